from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import jax
import pytest

import trainfw
from trainfw import UserError, backends
from trainfw.backends import compiled, select
from trainfw.hardware import HardwareConfig


@pytest.fixture
def as_neuron():
    backends.prepare(as_backend="neuron")
    yield
    backends.prepare()


def test_simulated_devices_are_there():
    assert backends.current().name == "cpu"
    assert str(backends.current()) == "cpu"
    assert jax.device_count() == 8


def test_another_number_after_jax_has_started_is_refused():
    before = dict(os.environ)
    with pytest.raises(UserError, match="already running with 8"):
        backends.prepare(4)
    assert dict(os.environ) == before


def test_devices_are_simulated_by_the_public_name():
    code = "import trainfw; trainfw.simulate(devices=3); import jax; assert jax.device_count() == 3"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(UserError, match="already running with 8"):
        trainfw.simulate(devices=4)


def test_what_runs_a_program_refuses_devices_that_are_there_for_a_plan(monkeypatch):
    backends.refuse_lent()
    monkeypatch.setattr(select, "_lent", True)
    with pytest.raises(UserError, match=r"8 simulated devices, for a plan.*trainfw\.simulate\(devices=8\)"):
        trainfw.train("quickstart")
    trainfw.simulate(devices=8)
    backends.refuse_lent()


def test_a_contract_ends():
    with backends.contract("neuron"):
        assert backends.current().has_sdk
    assert backends.current() is select.CPU


def test_the_users_own_flags_are_kept():
    code = (
        "import os; os.environ['XLA_FLAGS'] = '--xla_cpu_enable_fast_math=false';"
        "from trainfw import backends; backends.prepare(3); import jax; assert jax.device_count() == 3;"
        "assert '--xla_cpu_enable_fast_math=false' in os.environ['XLA_FLAGS']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("as_neuron")
def test_neurons_contract_on_the_cpu():
    backend = backends.current()
    assert (backend.name, backend.platform, backend.restricts_groups) == ("neuron", "cpu", True)
    assert backend.host_init
    assert backend.host_generate
    assert str(backend) == "neuron (simulated on the CPU)"
    assert backend.compiler_options == select.CPU.compiler_options


def test_xla_knows_the_options():
    options = select.CPU.compiler_options | select.CPU.init_options
    assert jax.jit(lambda: 3, compiler_options=options)() == 3


def test_the_next_prepare_ends_a_simulation():
    backends.prepare(as_backend="neuron")
    backends.prepare()
    assert backends.current() is select.CPU


@pytest.mark.usefixtures("as_neuron")
def test_a_simulation_is_for_the_cpu_only(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match=r"as_backend = 'neuron': is for the CPU, but jax is already running on 'gpu'"):
        backends.current()


def test_only_known_backends_are_simulated():
    with pytest.raises(UserError, match=r"as_backend = 'neurom': .*did you mean 'neuron'"):
        backends.prepare(as_backend="neurom")


def test_a_real_neuron_platform_is_taken_and_an_unknown_one_refused_by_name(monkeypatch):
    dropped = []
    monkeypatch.setattr(compiled, "keep_nothing", lambda: dropped.append("jax's cache"))
    monkeypatch.setattr(jax, "default_backend", lambda: "neuron")
    assert backends.current() is select.NEURON
    assert dropped
    assert not backends.current().simulated
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(UserError, match="platform 'tpu': trainfw has no backend for it; it has cpu, gpu, neuron"):
        backends.current()


def test_the_host_device_is_of_the_cpu():
    assert backends.host_device().platform == "cpu"


SLURM = {"SLURM_NODEID": "2", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "trn[001-004]"}


@pytest.mark.parametrize(
    ("environ", "asked"),
    [
        (SLURM, True),
        ({**SLURM, "NEURON_GLOBAL_TOPOID": "1", "NEURON_GLOBAL_TOPOID0_HOST": "trn003"}, False),
        ({**SLURM, "TRAINFW_PROCESS_INDEX": "1"}, False),
    ],
    ids=["the launcher's order", "placed", "chosen"],
)
def test_on_ultraservers_places_number_the_processes(environ, asked, monkeypatch):
    """Before the environment is set, which has the number."""
    met, applied = [], []

    def number(wiring, place):
        met.append(wiring.process_index)
        return replace(wiring, process_index=3, order="places")

    monkeypatch.setattr(select.plugin, "on_neuron", lambda environ: True)
    monkeypatch.setattr(select, "number_by_place", number)
    monkeypatch.setattr(select, "_tell_jax", lambda: None)
    monkeypatch.setattr(select.environment, "apply", lambda hardware, wiring, **_: applied.append(wiring))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    wiring = select.prepare(hardware=HardwareConfig(topology="trn2-ultraserver"))
    assert applied == [wiring]
    assert met == ([2] if asked else [])
    assert wiring.process_index == (3 if asked else 1)


@pytest.mark.parametrize(
    ("variable", "value", "meant"),
    [("JAX_PLATFORMS", "cudo", "; did you mean 'cuda'?"), ("JAX_PLATFORM_NAME", "abacus", "")],
)
def test_a_platform_that_is_not_there_is_said_with_those_that_are(variable, value, meant, monkeypatch):
    code = (
        "from trainfw import UserError, backends\n"
        "try: backends.prepare()\n"
        "except UserError as error: print(error)\n"
        "import jax; jax.config.update('jax_platforms', ''); jax.config.update('jax_platform_name', '')\n"
        "print(jax.device_count())"
    )
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv(variable, value)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = f"{variable} = {value!r}: jax has no such platform here{meant}; it has cpu; without the variable it takes"
    first, second = ran.stdout.splitlines()
    assert first.startswith(said)
    assert second == "8"  # as XLA_FLAGS has it here
