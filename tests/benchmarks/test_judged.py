"""What benchmarks make of measurements; these are made up."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import checkpoint, data, machine, scaling, startup, tokenise
from benchmarks.reporting import finish

BENCHMARKS = Path(startup.__file__).parent
NOWHERE = argparse.Namespace(json=None, save=False)


def exit_code(judged) -> int:
    return finish("made-up", *judged, NOWHERE)


@pytest.mark.parametrize(
    ("cold", "warm", "loss", "code"), [(15, 9, 2.0, 0), (15.1, 9, 2.0, 1), (15, 9.1, 2.0, 1), (1, 1, 2.5, 1)]
)
def test_startup(cold, warm, loss, code, capsys):
    phases = dict.fromkeys(startup.PHASES, 0.5)
    made_up = {
        "cold": [phases | {"total": cold, "loss": 2.0}] * 2,
        "warm": [phases | {"total": warm, "loss": 2.0}, phases | {"total": warm, "loss": loss}],
    }
    assert exit_code(startup.judge(made_up)) == code
    assert "| first step |  0.5 |  0.5 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("placed", "opening", "pack", "code"),
    [(40.0, 0.5, 0.2, 0), (39.0, 0.5, 0.2, 1), (40, 1.5, 0.2, 1), (40, 0.5, 0.6, 1)],
)
def test_data(placed, opening, pack, code):
    rates = {"rows": 8, "length": 256, "read": 50.0, "placed": placed, "steps": 2.0, "fed": 1.9}
    start = {"documents": 1000, "open": opening, "first batch": 0.01, "pack": pack}
    assert exit_code(data.judge(rates, start)) == code


@pytest.mark.parametrize(("saving", "code"), [(15.0, 0), (15.6, 1)])
def test_checkpoint(saving, code, capsys):
    one = {
        "bytes": 3_000_000_000,
        "steps": 10,
        "every": 100,
        "blocks": {False: [10.0, 10.0, 11.0], True: [saving] * 3},
        "alone": {"restore": [1.0, 1.5, 4.0]},
    }
    assert exit_code(checkpoint.judge({"made-up": one})) == code
    assert "| restore   |" in capsys.readouterr().out


@pytest.mark.parametrize(("last", "code"), [(2.3, 0), (2.31, 1)])
def test_scaling(last, code):
    def one(devices, processor):
        return {
            "tokens": 100 * devices,
            "parameters": 9,
            "wall": 1.0,
            "processor": processor,
            "system": 0.1,
            "compile": 3.0,
        }

    weak = {
        "fsdp": {1: one(1, 1.0), 2: one(2, last)},
        "data": {1: one(1, 1.0), 2: one(2, 9.0)},  # is reported
    }
    assert exit_code(scaling.judge(weak, {4: one(1, 1.0)})) == code


def test_machine():
    rates = [[[float(m + n + k)] * 7 for n in range(7)] for m in range(7) for k in [0]]
    chip = {
        "matmul_rates": {"rates": {"float32": rates}},
        "elementwise_rates": {"sizes": [2**20], "rates": [2e9]},
        "hbm_bandwidth": {"value": "12.50 GB/s"},
    }
    assert exit_code((machine.tables({"chip": chip}, 1e9, [["all-reduce", 2, 2**20, 1e9]]), [])) == 0


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("startup", ["--repeats", "0"]),
        ("data", ["--documents", "none"]),
        ("checkpoint", ["--model", "other"]),
        ("scaling", ["--steps", "-1"]),
        ("machine", ["--what"]),
    ],
)
def test_bad_arguments_are_exit_code_2(script, arguments):
    ran = subprocess.run([sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "usage:" in ran.stderr


@pytest.mark.parametrize(
    ("cpu", "memory", "same", "running", "code"),
    [(6.0, 2.4, True, 0, 0), (7.0, 2.4, True, 0, 1), (6.0, 2.6, True, 0, 1), (6, 2.4, False, 0, 1), (6, 2, True, 1, 1)],
)
def test_tokenise(cpu, memory, same, running, code):
    speed = {
        name: {"cpu": used, "seconds": used / 2, "tokens": 1000} for name, used in (("trainfw", cpu), ("datasets", 10))
    }
    held = [{"bytes": size, "memory": most, "seconds": 1.0} for size, most in ((10**8, 2.0), (10**9, memory))]
    kills = {"killed": 10, "same": same, "running": running, "whole": 3.0, "last": 1.0}
    assert exit_code(tokenise.judge(10**8, speed, held, kills)) == code


def test_text_of_the_tokenising_benchmark(tmp_path):
    size = tokenise.write_text(tmp_path / "text.jsonl", 1)
    assert 10**6 <= size < 2 * 10**6
    assert tokenise.held(os.getpid()) > 10**6
