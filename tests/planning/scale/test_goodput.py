"""Checkpoints, restarts and spares: against published values, and against simulations that know no formula."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.helpers import tiny_recipe
from trainfw.hardware import load_topology
from trainfw.parallel import Layout
from trainfw.planning.predict.closed_form import state_bytes
from trainfw.planning.scale.goodput import (
    assumed,
    checkpoint_goodput,
    daly_interval,
    down_exactly,
    goodput_of,
    young_interval,
)

MINUTE, HOUR = 60.0, 3600.0


# Daly 2006, figures 3 to 5: R = delta + 5 min = 10 min.
@pytest.mark.parametrize(("mtbf", "minutes"), [(24 * HOUR, "117"), (6 * HOUR, "57"), (15 * MINUTE, "9.1")])
def test_daly_as_published(mtbf, minutes):
    found = daly_interval(5 * MINUTE, mtbf) / MINUTE
    assert f"{found:.0f}" == minutes or f"{found:.1f}" == minutes
    assert young_interval(5 * MINUTE, mtbf) == pytest.approx((2 * 5 * MINUTE * mtbf) ** 0.5)


def simulated(work, copy, mtbf, restart, write, seed, until=4e7):
    """Useful share of the time, event by event: nothing is computed but who is first."""
    rng = np.random.default_rng(seed)
    failures = itertools.accumulate(iter(lambda: rng.exponential(mtbf), None))
    failure = next(failures)
    now, saved = 0.0, 0.0
    while now < until:
        # From a checkpoint: work, stop to copy, go on while it is written; a save waits for the write before it.
        done, written_at = saved, []
        while True:
            stop = now + work
            if written_at:
                stop = max(stop, written_at[-1][0])
            if stop + copy > failure:
                break
            now, done = stop + copy, done + work
            written_at.append((now + write, done))
        saved = max([saved, *(amount for at, amount in written_at if at <= failure)])
        now = failure
        failure = next(failures)
        while now + restart > failure:
            now, failure = failure, next(failures)
        now += restart
    return saved / now


@pytest.mark.parametrize(
    ("work", "copy", "mtbf", "restart", "write"),
    [
        (57 * MINUTE, 5 * MINUTE, 6 * HOUR, 10 * MINUTE, 0.0),
        (20 * MINUTE, 1 * MINUTE, 2 * HOUR, 15 * MINUTE, 10 * MINUTE),
        (5 * MINUTE, 10.0, 30 * MINUTE, 20 * MINUTE, 1 * MINUTE),
        (1 * MINUTE, 10.0, 1 * HOUR, 5 * MINUTE, 4 * MINUTE),  # saves wait for the write
    ],
)
def test_goodput_as_simulated(work, copy, mtbf, restart, write):
    found = np.mean([simulated(work, copy, mtbf, restart, write, seed) for seed in range(4)])
    assert checkpoint_goodput(work, copy, mtbf, restart, write) == pytest.approx(found, rel=0.01)


def test_no_interval_is_much_better_than_the_optimum():
    for copy, mtbf in [(1.0, 1000 * HOUR), (30.0, HOUR), (5 * MINUTE, 15 * MINUTE)]:
        best = max(checkpoint_goodput(work, copy, mtbf, 600.0) for work in np.geomspace(copy, 3 * mtbf, 2000))
        ours = checkpoint_goodput(daly_interval(copy, mtbf), copy, mtbf, 600.0)
        assert best * 0.999 < ours <= best * (1 + 1e-5)
    assert daly_interval(100.0, 50.0) == 50.0


def test_what_never_gets_anywhere():
    assert checkpoint_goodput(1e9, 1.0, 60.0, 600.0) == 0.0


def test_availability_as_simulated():
    """Units that fail at random and are repaired in times that are anything but exponential."""
    rng = np.random.default_rng(0)
    rate, repair, until = 1 / HOUR, 2.5 * HOUR, 40_000 * HOUR
    start = np.sort(rng.uniform(0, until, rng.poisson(rate * until)))
    length = np.where(rng.random(len(start)) < 0.8, 0.5 * repair, 3 * repair)  # of mean `repair`
    times = rng.uniform(10 * repair, until, 20_000)
    down = np.searchsorted(start, times) - np.searchsorted(np.sort(start + length), times)
    for spares in (0, 1, 3, 6):
        available = sum(down_exactly(rate * repair, k) for k in range(spares + 1))
        assert available == pytest.approx(np.mean(down <= spares), abs=0.015)
    assert sum(down_exactly(500.0, k) for k in range(901)) == pytest.approx(1.0)


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(
        tmp_path,
        "hardware={topology: trn2-ultraserver, count: 4}",
        "parallel={data: 4, fsdp: 64, tensor: 4}",
        "train.global_batch_size=256",
        "model={preset: llama3.1-8b}",
        "train.steps=100000",
        "checkpoint.every=1000",
    )


def test_a_job(recipe):
    topology, layout = recipe.hardware.load(), Layout(data=4, fsdp=64, tensor=4)
    found = goodput_of(recipe, topology, layout, 2.0)
    assert found.instances == 16
    assert found.mtbf_seconds == pytest.approx(2048 * 54 * 24 / 419 / 16 * HOUR, rel=1e-3)
    assert found.state_bytes == pytest.approx(12 * 8.03e9, rel=1e-3)  # weights and two moments, f32
    # A replica's 64 chips copy, its 4 instances write, all 16 read four times as much.
    assert found.copy_seconds == pytest.approx(found.state_bytes / 64 / 16e9, rel=1e-2)
    assert found.write_seconds == pytest.approx(found.state_bytes / (4 * 12.5e9))
    assert found.read_seconds == pytest.approx(found.write_seconds)
    assert found.restart_seconds == pytest.approx(100 + 600 + found.read_seconds)
    assert found.suggested_checkpoint_every == round(found.daly_interval_seconds / 2.0)
    assert 0.99 < found.goodput_at_checkpoint_every < found.goodput_at_suggested < 1
    assert found.units_down == pytest.approx(16 * 4 / 6334)
    none = np.exp(-found.units_down)
    assert found.first_spare == pytest.approx(none * (1 + found.units_down) / none - 1)
    assert found.best.spares == 0  # one of four does not pay
    assert len(found.spares) == 4


def test_state_is_that_of_the_program(tmp_path):
    import jax

    from trainfw.program import build_program

    for optimizer in ("adamw", "lion"):
        recipe = tiny_recipe(tmp_path, "parallel={data: 2, fsdp: 2, tensor: 2}", f"optimizer.name={optimizer}")
        state = build_program(recipe).abstract_state
        arrays = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim]
        assert sum(state_bytes(recipe, Layout()).values()) == sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)


def test_at_scale_the_file_system_and_spares_count(recipe):
    topology = load_topology("trn2-ultraserver", count=2048)
    found = goodput_of(recipe, topology, Layout(data=2048, fsdp=64, tensor=4), 2.0)
    assert found.read_seconds == pytest.approx(found.state_bytes * 2048 / 1e12)
    assert found.best.spares > found.units_down > 3
    assert found.spares[0].availability < 0.01 < 0.95 < found.best.availability
    assert found.best.goodput == found.best.availability * found.goodput_at_suggested
    assert found.best.goodput_per_rented_chip == max(option.goodput_per_rented_chip for option in found.spares)


def test_figures_are_the_recipes_to_replace(recipe):
    figures = {"reliability.instance_mtbf": "1,000 h", "storage.total": "10 TB/s", "reliability.repair": "1 h"}
    topology = load_topology("trn2-ultraserver", count=4, parameters=figures)
    found = goodput_of(recipe, topology, Layout(data=4, fsdp=64, tensor=4), 2.0)
    assert found.mtbf_seconds == 1000 * HOUR / 16
    assert found.units_down == pytest.approx(16 / 1000)
    said = list(assumed(topology))
    assert "mean time between failures of an instance: 1,000 h (the recipe) [reliability.instance_mtbf]" in said
    assert any("419 unexpected" in text for text in assumed(load_topology("h100-8")))


def test_only_at_the_end(recipe):
    recipe = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"every": 0})})
    found = goodput_of(recipe, recipe.hardware.load(), Layout(data=4, fsdp=64, tensor=4), 20.0)
    assert found.goodput_at_checkpoint_every < 0.5 < found.goodput_at_suggested


@pytest.mark.parametrize("count", [4, 2048, 2**20])
def test_hardware_that_fails_all_the_time(recipe, count):
    topology = load_topology("trn2-ultraserver", count=count, parameters={"reliability.instance_mtbf": "1 s"})
    found = goodput_of(recipe, topology, Layout(data=count, fsdp=64, tensor=4), 2.0)
    assert found.units_down == count * 4 * 4 * HOUR
    assert found.best.goodput == 0
    assert found.first_spare == found.units_down
    assert len(found.spares) == 4


def test_spares_are_those_of_the_formula(recipe):
    topology = load_topology("trn2-ultraserver", count=64, parameters={"reliability.instance_mtbf": "20 h"})
    found = goodput_of(recipe, topology, Layout(data=64, fsdp=64, tensor=4), 2.0)
    assert found.units_down == pytest.approx(51.2)
    expected = np.cumsum([down_exactly(found.units_down, option.spares) for option in found.spares])
    assert [option.availability for option in found.spares] == pytest.approx(expected, rel=1e-9)
    assert found.best.spares > found.units_down
