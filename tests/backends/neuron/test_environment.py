from __future__ import annotations

import logging
import os
from unittest import mock

import jax
import pytest

from trainfw.backends import Wiring, compiler_flags, environment_warnings, load_sdk, neuron_environment
from trainfw.backends.compiled import keep_nothing
from trainfw.backends.neuron import environment
from trainfw.errors import UserError
from trainfw.hardware import HardwareConfig

TRIVIAL = "NEURON_RUN_TRIVIAL_COMPUTATION_ON_CPU"


def variables(topology: str | None, environ: dict[str, str]) -> dict[str, environment.Variable]:
    with mock.patch.dict(os.environ, environ, clear=True):
        found = neuron_environment(HardwareConfig(topology=topology), Wiring(), layout={}, scan_layers=True)
    return {variable.name: variable for variable in found}


def flags_of(hardware: HardwareConfig, environ: dict[str, str]) -> list[str]:
    with mock.patch.dict(os.environ, environ, clear=True):
        return compiler_flags(hardware)


@pytest.mark.parametrize(
    ("environ", "one"),
    [
        ({"NEURON_RT_VISIBLE_CORES": "0"}, True),
        ({"NEURON_RT_VISIBLE_CORES": "3-3"}, True),
        ({"NEURON_RT_NUM_CORES": "1"}, True),
        ({"NEURON_RT_NUM_CORES": "1", "NEURON_RT_VISIBLE_CORES": "0-3"}, False),  # which wins
        ({"NEURON_RT_VISIBLE_CORES": "0-1"}, False),
        ({"NEURON_RT_NUM_CORES": "0"}, False),  # all
        ({}, False),
    ],
)
def test_on_one_core_nothing_is_left_to_the_host(environ, one):
    assert (TRIVIAL in variables(None, environ)) != one
    variable = variables(None, environ | {TRIVIAL: "1"})[TRIVIAL]
    assert variable.removed == one
    assert variable.already_set != one
    said = [text for text in environment_warnings(environ | {TRIVIAL: "1"}, load_sdk(), None) if TRIVIAL in text]
    assert bool(said) == one
    assert TRIVIAL not in variables(None, environ | {TRIVIAL: "0"}) or not one


def test_applied_it_is_unset_with_a_word(monkeypatch, caplog):
    monkeypatch.setattr(os, "environ", {TRIVIAL: "1", "NEURON_RT_VISIBLE_CORES": "0", "PATH": "/usr/bin"})
    with caplog.at_level(logging.WARNING, "trainfw"):
        environment.apply(HardwareConfig(), Wiring(), layout={}, scan_layers=True)
    assert TRIVIAL not in os.environ
    assert "65 to 2,700 times slower" in caplog.text


def test_a_cache_of_jaxs_that_a_program_asked_for_is_dropped_with_a_word():
    before = {name: jax.config.values[name] for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    try:
        jax.config.update("jax_compilation_cache_dir", "/shared/jax")
        with pytest.warns(UserWarning, match="/shared/jax: is not used"):
            keep_nothing()
        assert jax.config.values["jax_compilation_cache_dir"] is None
        assert not jax.config.values["jax_enable_compilation_cache"]
        keep_nothing()  # and nothing more is said
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.parametrize(
    ("own", "flags"),
    [
        (None, ["--target=trn2", "--lnc=2", "--model-type=transformer", "-O1", "-O2"]),
        ("", ["--target=trn2", "--lnc=2"]),
        ("--model-type=transformer", ["--target=trn2", "--lnc=2", "--model-type=transformer"]),
        ("--target trn2 --lnc 2", ["--target", "trn2", "--lnc", "2"]),
        ("--target=trn3 --logical-nc-config=2", ["--target=trn3", "--logical-nc-config=2"]),
    ],
)
def test_a_compiler_is_told_the_machine_that_the_users_flags_do_not_name(own, flags):
    environ = {} if own is None else {"NEURON_CC_FLAGS": own}
    hardware = HardwareConfig(topology="trn2.3xlarge", compiler_flags=["-O2"])
    assert flags_of(hardware, environ) == flags


@pytest.mark.parametrize("topology", [None, "trn2.3xlarge"])
def test_flags_that_no_shell_reads_are_named(topology):
    hardware = HardwareConfig(topology=topology)
    with pytest.raises(UserError, match=r"NEURON_CC_FLAGS = --target 'trn2: No closing quotation; expected options"):
        flags_of(hardware, {"NEURON_CC_FLAGS": "--target 'trn2"})
    with pytest.raises(UserError, match="NEURON_CC_FLAGS = --target 'trn2: No closing quotation"):
        variables(topology, {"NEURON_CC_FLAGS": "--target 'trn2"})
    hardware = HardwareConfig(topology=topology, compiler_flags=["--target='trn2"])
    with pytest.raises(UserError, match=r"hardware\.compiler_flags = --target='trn2: No closing quotation"):
        flags_of(hardware, {})
