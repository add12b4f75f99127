"""Scaling laws that are known, found again; and an isoFLOP sweep whose runs follow one."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from trainfw import RunError, UserError, load_recipe
from trainfw.sweeping import flop_budgets, isoflop
from trainfw.sweeping.flop_budgets import size_of
from trainfw.sweeping.result import RunResult
from trainfw.sweeping.scaling_law import Law, Point, fit_law, fit_parabola, fit_power_law, leave_one_out

TRUE = Law(1.7, 400.0, 410.0, 0.34, 0.28, 0.0)
QUICK = {
    "model.head_dim": 32,
    "model.num_heads": 8,
    "model.vocab_size": 1024,
    "train.global_batch_size": 4,
    "train.sample_prompt": None,
}


def points(noise=0.0):
    draw = np.random.default_rng(0)
    grid = [(n, c / 6 / n) for c in (1e11, 3e11, 1e12) for n in np.geomspace(2e4, 1e6, 6)]
    return [Point(n, d, TRUE.at(n, d) * np.exp(noise * draw.normal())) for n, d in grid]


def test_a_known_law_is_found_again():
    law = fit_law(points())
    assert law.determined
    assert law.residual < 1e-4
    budget, size = 1e12, law.best_parameters.at(1e12)
    near = [law.at(n, budget / 6 / n) for n in (0.9 * size, size, 1.1 * size)]
    assert min(near) == near[1]
    assert law.at(2e6, 1e7) == pytest.approx(TRUE.at(2e6, 1e7), rel=1e-3)
    noisy = fit_law(points(0.003))
    low, high = leave_one_out(points(0.003), noisy, 2e6, 1e7)
    assert low <= noisy.at(2e6, 1e7) <= high
    assert high / low - 1 > 1e-4


def test_parabolas_have_their_lowest_point_where_it_is():
    bowl = [Point(n, 1e9 / n, 2 + 0.1 * np.log(n / 3e5) ** 2) for n in (1e5, 2e5, 6e5, 1e6)]
    assert fit_parabola(bowl).best == pytest.approx(3e5)
    assert fit_parabola([*bowl[2:], Point(2e6, 500.0, bowl[-1].loss + 0.2)]).best is None
    with pytest.raises(RunError, match="three sizes"):
        fit_parabola(bowl[:2])
    with pytest.raises(RunError, match="6 runs at least"):
        fit_law(bowl)


def test_power_laws_are_lines_in_logarithms():
    found = fit_power_law([(1e10, 3e5), (1e12, 3e6)])
    assert (found.exponent, found.at(1e14)) == (pytest.approx(0.5), pytest.approx(3e7))


@pytest.fixture
def followed(monkeypatch):
    """Runs follow the law, and are never trained."""
    made = []

    def loss(run):
        n, d = size_of(run)
        return TRUE.at(n, d)

    monkeypatch.setattr(flop_budgets, "read_result", lambda run, _=None: RunResult(run, 9, loss(run), 1.0))
    monkeypatch.setattr(flop_budgets, "make_each", lambda runs, *_, **__: made.append(len(runs)) or [])
    return made


def test_a_larger_run_is_predicted_before_it_is_made(tmp_path, followed):
    recipe = load_recipe("quickstart", QUICK)
    found = isoflop(recipe, [2e11, 4e11, 8e11], widths=[32, 64, 96, 128, 192], out=tmp_path)
    assert followed[1] == 1
    assert abs(found.prediction.error(found.prediction.law)) < 2e-3
    assert found.prediction.flops == 3.2e12
    said = str(found)
    assert max(map(len, said.splitlines()[1:])) <= 80
    assert "best N by FLOPs C: " in said
    written = json.loads((tmp_path / "isoflop.json").read_text())
    assert written["prediction"]["measured"] == found.prediction.measured
    assert [row["steps"] for row in written["runs"]] == [result.run.recipe.train.steps for result in found.results]
    ET.parse(tmp_path / "isoflop.svg")


def test_sizes_spend_their_budget_and_keep_the_form(tmp_path, followed):
    recipe = load_recipe("quickstart", QUICK | {"optimizer.warmup_steps": 25})
    for result in isoflop(recipe, [2e11, 4e11, 8e11], widths=[64, 96, 128], out=tmp_path).results:
        n, d = size_of(result.run)
        model, train = result.run.recipe.model, result.run.recipe.train
        assert 6 * n * d == pytest.approx(result.run.values["flops"], rel=0.02)
        assert model.head_dim == 32
        assert model.num_heads % model.num_kv_heads == 0
        assert result.run.recipe.optimizer.warmup_steps == round(train.steps * 0.1)


@pytest.mark.parametrize(
    ("overrides", "arguments", "said"),
    [
        ({}, {"budgets": [1e11, 2e11]}, "expected 3 budgets"),
        ({}, {"predict": 1e11}, r"--predict 1e\+11: expected more FLOPs"),
        ({}, {"widths": [48, 64, 96]}, r"--widths 48: expected a multiple of model\.head_dim = 32"),
        ({}, {"widths": [64, 96]}, "2 of the widths 64, 96 have 16 steps or more"),
        ({}, {"budgets": [1e8, 2e11, 4e11]}, r"--isoflop 1e\+08: 0 of the widths"),
        ({"model.moe.num_experts": 4, "model.moe.experts_per_token": 2}, {}, "dense decoders alone"),
        ({"train.validation_batches": 0}, {}, "a sweep compares validation losses"),
    ],
)
def test_refused(tmp_path, overrides, arguments, said):
    recipe = load_recipe("quickstart", QUICK | overrides)
    with pytest.raises(UserError, match=said):
        isoflop(recipe, **{"budgets": [2e11, 4e11, 8e11], "out": tmp_path, **arguments})
