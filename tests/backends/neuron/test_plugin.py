from __future__ import annotations

import pytest

from trainfw import UserError
from trainfw.backends.neuron import plugin
from trainfw.backends.neuron.plugin import detect_plugin

# As in the wheels on PyPI.
WRONG = "WRONG PACKAGE. Please install the package from Neuron Repository - pip.repos.neuron.amazonaws.com\n"


def install(site, name: str, version: str, description: str = "") -> None:
    directory = site / f"{name.replace('-', '_')}-{version}.dist-info"
    directory.mkdir()
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n{description}")


@pytest.fixture
def placeholders(tmp_path):
    install(tmp_path, "jax-neuronx", "0.0.0", WRONG)
    install(tmp_path, "libneuronxla", "1.0", WRONG)
    install(tmp_path, "neuronx-cc", "1.0.post1", WRONG)
    return tmp_path


@pytest.fixture
def installed(tmp_path):
    install(tmp_path, "jax-neuronx", "0.10.0.1.0.11459+2b3c")
    install(tmp_path, "libneuronxla", "3.0.5356.0+e2a7e2f2")
    install(tmp_path, "neuronx-cc", "2.27.5334.0+abc")
    return tmp_path


def devices(directory, count: int):
    dev = directory / "dev"
    dev.mkdir()
    for i in range(count):
        (dev / f"neuron{i}").touch()
    return dev


def test_nothing_installed(tmp_path):
    found = detect_plugin([str(tmp_path)])
    assert (found.state, found.versions, found.placeholders) == ("missing", {}, ())
    assert plugin.INSTALL in str(found)


def test_pypis_placeholders_are_told_from_the_plugin(placeholders):
    found = detect_plugin([str(placeholders)])
    assert found.state == "placeholder"
    assert found.placeholders == ("jax-neuronx 0.0.0", "libneuronxla 1.0", "neuronx-cc 1.0.post1")
    assert "placeholders without the plugin" in str(found)
    assert "--extra-index-url=https://pip.repos.neuron.amazonaws.com" in str(found)


def test_a_real_install(installed):
    found = detect_plugin([str(installed)])
    assert found.state == "installed"
    assert found.versions["libneuronxla"] == "3.0.5356.0+e2a7e2f2"
    assert str(found).startswith("jax-neuronx 0.10.0.1.0.11459")


def test_one_placeholder_among_real_packages_is_named(tmp_path):
    install(tmp_path, "libneuronxla", "3.0.5356.0")
    install(tmp_path, "jax-neuronx", "0.0.0", WRONG)
    found = detect_plugin([str(tmp_path)])
    assert (found.state, found.placeholders) == ("installed", ("jax-neuronx 0.0.0",))
    assert "jax-neuronx 0.0.0" in str(found)


def test_neuron_needs_the_plugin_and_devices(installed):
    path = [str(installed)]
    dev = devices(installed, 2)
    assert plugin.on_neuron({}, path=path, dev=dev)
    assert not plugin.on_neuron({}, path=path, dev=installed)
    assert not plugin.on_neuron({"JAX_PLATFORMS": "cpu"}, path=path, dev=dev)
    assert plugin.on_neuron({"JAX_PLATFORMS": "neuron,cpu"}, path=path, dev=installed)


def test_devices_without_the_plugin_are_not_enough(placeholders):
    assert not plugin.on_neuron({}, path=[str(placeholders)], dev=devices(placeholders, 2))


def test_asking_for_neuron_with_placeholders_says_what_to_install(placeholders):
    with pytest.raises(UserError, match=r"JAX_PLATFORMS = neuron: .*placeholders.*pip install"):
        plugin.on_neuron({"JAX_PLATFORMS": "neuron"}, path=[str(placeholders)], dev=placeholders)
