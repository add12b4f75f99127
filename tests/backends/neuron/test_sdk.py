from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from trainfw import UserError
from trainfw.backends import installed_sdk, load_sdk, sdk_problems, sdk_versions


def test_versions_are_ordered_as_numbers_and_the_newest_is_the_default():
    assert sdk_versions() == ["2.29", "2.30", "2.31", "2.32", "2.33"]
    assert load_sdk().version == "2.33"


def test_communicators_as_the_release_notes_have_them():
    assert [load_sdk(version).communicators for version in sdk_versions()] == [12, 12, 12, 16, 16]


def test_an_unknown_release_is_refused():
    with pytest.raises(UserError, match=r"sdk = '2.23': .*one of: 2.29, 2.30, 2.31, 2.32, 2.33"):
        load_sdk("2.23")


def test_yaml_reads_a_release_as_a_number():
    assert load_sdk(2.3).version == "2.30"
    with pytest.raises(UserError, match=r"sdk = '2.4'"):
        load_sdk(2.4)


def test_installed_packages_name_their_release():
    found = installed_sdk(
        {"libneuronxla": "3.0.3854.0+a1", "jax-neuronx": "0.10.0.1.0.10466", "neuronx-cc": "2.26.6360"}
    )
    assert found is not None
    assert found.version == "2.31"
    assert installed_sdk({"libneuronxla": "3.0.3854", "neuronx-cc": "2.27.5334.0"}) is None
    assert installed_sdk({}) is None


def test_versions_outside_a_releases_range_are_named():
    sdk = load_sdk("2.32")
    assert sdk_problems(sdk, "0.10.0", "3.13.5") == []
    assert sdk_problems(sdk, "0.10.2", "3.14.0") == [
        "jax 0.10.2 is outside 0.7.0 to 0.10.0, which Neuron SDK 2.32 supports",
        "python 3.14.0 is outside 3.11 to 3.13, which Neuron SDK 2.32 supports",
    ]


def test_the_extra_takes_the_newest_jax_that_the_newest_release_supports():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["neuron"] == [f"jax=={load_sdk().jax[1]}"]
