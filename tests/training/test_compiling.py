"""The step is compiled while the run makes ready what it needs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading

import jax
import pytest

from tests.helpers import losses, tiny_recipe
from trainfw import UserError, build_program, train
from trainfw.program import Program
from trainfw.recipe.run_config import WatchdogConfig
from trainfw.training import loop
from trainfw.training.compiling import Compiling
from trainfw.training.phases import Phases
from trainfw.training.reporter import Reporter


@pytest.fixture
def program(tmp_path):
    return build_program(tiny_recipe(tmp_path, "train.validation_batches=1"), jax.devices()[:1])


def compiling(program: Program, trains: bool = True) -> Compiling:
    return Compiling(program, Reporter(), Phases(WatchdogConfig()), trains=trains)


def test_data_is_read_meanwhile(tmp_path, monkeypatch):
    read = threading.Event()
    compile_step, prepare = Program.compile_train_step, loop.read_data

    def compile_later(program):
        assert read.wait(60)
        return compile_step(program)

    def prepare_first(*arguments, **options):
        data = prepare(*arguments, **options)
        read.set()
        return data

    monkeypatch.setattr(Program, "compile_train_step", compile_later)
    monkeypatch.setattr(loop, "read_data", prepare_first)
    recipe = tiny_recipe(tmp_path, "train.steps=1")
    train(recipe, devices=jax.devices()[:1], run_dir=tmp_path / "run")
    assert list(losses(tmp_path / "run")) == [1]


def test_a_mistake_in_the_data_shows_before_the_step_is_compiled(tmp_path, monkeypatch):
    seen = threading.Event()
    monkeypatch.setattr(Program, "compile_train_step", lambda _: seen.wait(60))
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "text" / "0.txt").write_bytes(b"\xff")  # there, but no text
    try:
        with pytest.raises(UserError, match="expected UTF-8"):
            train(recipe, devices=jax.devices()[:1], run_dir=tmp_path / "run")
        assert any(thread.name.startswith("compiling") for thread in threading.enumerate())
    finally:
        seen.set()


def test_what_compiling_raises_is_raised_where_it_is_waited_for(program, monkeypatch):
    def fail(_):
        raise MemoryError("the compiler's")

    monkeypatch.setattr(Program, "compile_train_step", fail)
    with compiling(program) as functions, pytest.raises(MemoryError, match="the compiler's"):
        functions.train_step()


def test_what_the_run_does_not_call_is_not_compiled(program, tmp_path, monkeypatch):
    compiled = []
    silent = dataclasses.replace(program, recipe=tiny_recipe(tmp_path, "train.validation_batches=0"))
    monkeypatch.setattr(Program, "compile_train_step", lambda _: compiled.append("train") or "train")
    with compiling(silent, trains=False) as functions:
        functions.wait()
        assert functions.eval_step() is None
        assert not compiled
        assert functions.train_step() == "train"  # of a run that goes on from an earlier checkpoint than thought
    with compiling(program) as functions:
        functions.wait()
        assert functions.eval_step() is functions.eval_step()
    assert compiled == ["train", "train"]


LEAVE = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from trainfw.cli import command
ThreadPoolExecutor(1, thread_name_prefix="compiling").submit(threading.Event().wait)
sys.argv = ["trainfw", "train", "nowhere.yaml"]
command()
"""


def test_the_command_does_not_wait_for_what_nobody_will_run():
    done = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr
