"""IsoFLOP sweeps: sizes of a model at each of several budgets, laws fitted to their losses, and a prediction tried."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainfw.errors import RunError, UserError
from trainfw.models import flops_per_token
from trainfw.recipe import COMMAND_LINE, Recipe, RecipeLike, load_recipe
from trainfw.report import loss_chart, svg_of_chart
from trainfw.sweeping.grid import SweepRun, check_runs
from trainfw.sweeping.result import RunResult, read_result
from trainfw.sweeping.runner import Say, make_each
from trainfw.sweeping.scaling_law import (
    Law,
    Parabola,
    Point,
    PowerLaw,
    fit_law,
    fit_parabola,
    fit_power_law,
    leave_one_out,
)
from trainfw.tables import table
from trainfw.unfinished import write_text

RESULT, DRAWING = "isoflop.json", "isoflop.svg"
FEWEST_BUDGETS = 3
_FEWEST_STEPS = 16
"""Steps of a run at least: fewer are all warmup, and far from their budget."""
_WIDTHS = (0.25, 0.375, 0.5, 0.75, 1.0, 1.5)
"""Widths that are tried, over the recipe's."""
_FARTHER = 4.0
"""Budget of the prediction over the largest of the others, where none is given."""


def width_overrides(recipe: Recipe, width: int) -> dict[str, object]:
    """Return the keys of a recipe's model at another width.

    Heads stay as large as they are, and there are more of them; kv heads, the feed-forward and the depth grow with the
    width. Raises UserError for models of another form, and for widths that heads do not divide.
    """
    model: Any = recipe.model
    if not hasattr(model, "num_kv_heads") or getattr(model, "moe", None) is not None:
        raise recipe.error("model.family", "sizes are known of dense decoders alone")
    if model.from_ is not None:
        raise recipe.error(
            "model.from", "weights have one size: a scaling law is of models that are trained from a seed"
        )
    heads, rest = divmod(width, model.head_dim)
    if rest or not heads:
        raise UserError(f"--widths {width}: expected a multiple of model.head_dim = {model.head_dim}")
    wanted = heads * model.num_kv_heads / model.num_heads
    kv_heads = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= max(1.0, wanted))
    return {
        "model.hidden_size": width,
        "model.num_heads": heads,
        "model.num_kv_heads": kv_heads,
        "model.intermediate_size": max(8, 8 * round(model.intermediate_size * width / model.hidden_size / 8)),
        "model.num_layers": max(1, round(model.num_layers * width / model.hidden_size)),
    }


def default_widths(recipe: Recipe) -> list[int]:
    """List the widths that are tried: parts of the recipe's own, as whole numbers of heads."""
    model: Any = recipe.model
    size = getattr(model, "head_dim", 1)
    return sorted({max(1, round(share * model.hidden_size / size)) * size for share in _WIDTHS})


def sized_run(recipe: Recipe, flops: float, width: int, out: Path) -> SweepRun | None:
    """Make the run of a width that spends a budget; None where that is too few steps.

    Warmup and decay are the same shares of the run as in the recipe.
    """
    model = width_overrides(recipe, width)
    sized = load_recipe(recipe, model, written=COMMAND_LINE)
    steps = round(flops / (flops_per_token(sized.model, sized.sequence_length) * sized.tokens_per_step))
    if steps < _FEWEST_STEPS:
        return None
    share, optimizer = steps / recipe.train.steps, recipe.optimizer
    changed: dict[str, object] = {
        "train.steps": steps,
        "train.sample_prompt": None,
        "train.validate_every": 0,
        "evaluation": None,
        "optimizer.warmup_steps": round(optimizer.warmup_steps * share),
    }
    if optimizer.decay_steps is not None:
        changed["optimizer.decay_steps"] = max(1, round(optimizer.decay_steps * share))
    made = load_recipe(sized, changed, written=COMMAND_LINE)
    name = f"flops={flops:.3g},width={width}"
    return SweepRun(name, {"flops": flops, "width": width}, made, out / name)


def point_of(result: RunResult) -> Point:
    """Return what a finished run cost, by the count of FLOPs that its MFU is told by, and its loss."""
    recipe = result.run.recipe
    assert result.loss is not None
    each = flops_per_token(recipe.model, recipe.sequence_length)
    return Point(each / 6, float(recipe.train.steps * recipe.tokens_per_step), result.loss)


@dataclass(frozen=True)
class Prediction:
    """Loss of a run that was not made when it was predicted."""

    run: SweepRun
    flops: float
    best_parameters: float
    """N that is best for this budget."""
    law: float
    """Loss by the law of N and D (approach 3)."""
    spread: tuple[float, float]
    """Least and largest such loss, of laws fitted without one of the runs each."""
    line: float | None
    """Loss by a line through the lowest losses of the budgets (approach 2), both in logarithms; None where fewer than
    two are known."""
    measured: float | None = None

    def error(self, predicted: float | None) -> float | None:
        """Return how far a prediction was off, over what was measured."""
        return None if self.measured is None or predicted is None else predicted / self.measured - 1


@dataclass(frozen=True)
class IsoFlop:
    """Runs of several sizes at several budgets, the laws fitted to them, and the prediction."""

    directory: Path
    results: Sequence[RunResult]
    parabolas: Mapping[float, Parabola]
    """Parabolas by budget."""
    best: PowerLaw
    """The best N by budget: a line through the parabolas' lowest points where there are two, else the law's."""
    law: Law
    prediction: Prediction
    failed: Sequence[RunResult] = ()
    """Runs that nothing was fitted to."""

    def of_budget(self, flops: float) -> list[RunResult]:
        return [result for result in self.results if result.run.values["flops"] == flops]

    def to_json(self) -> dict[str, object]:
        """Plain data with stable keys.

        `runs`: `flops`, `width`, `layers`, `parameters` (N), `tokens`, `steps`, `validation_loss`; `budgets`: `flops`,
        `best_parameters` (null where no minimum lies between the sizes), `best_loss`; `law`: `E`, `A`, `B`, `alpha`,
        `beta`, `rms_error`, `determined`; `prediction`: `flops`, `width`, `parameters`, `tokens`, `law`, `law_least`,
        `law_most`, `line`, `measured`, `law_error`, `line_error` (predicted over measured, less 1); `failed`: runs that
        nothing was fitted to, as in `Sweep.to_json`.
        """
        predicted, point = self.prediction, size_of(self.prediction.run)
        return {
            "runs": [_row(result) for result in self.results],
            "budgets": [
                {
                    "flops": flops,
                    "best_parameters": parabola.best,
                    "best_loss": None if parabola.best is None else parabola.at(parabola.best),
                }
                for flops, parabola in self.parabolas.items()
            ],
            "best_parameters": {"factor": self.best.factor, "exponent": self.best.exponent},
            "law": {
                "E": self.law.entropy,
                "A": self.law.a,
                "B": self.law.b,
                "alpha": self.law.alpha,
                "beta": self.law.beta,
                "rms_error": self.law.residual,
                "determined": self.law.determined,
            },
            "prediction": {
                "flops": predicted.flops,
                "width": predicted.run.values["width"],
                "parameters": point[0],
                "tokens": point[1],
                "law": predicted.law,
                "law_least": predicted.spread[0],
                "law_most": predicted.spread[1],
                "line": predicted.line,
                "measured": predicted.measured,
                "law_error": predicted.error(predicted.law),
                "line_error": predicted.error(predicted.line),
            },
            "failed": [result.to_json() for result in self.failed],
        }

    def save(self) -> None:
        """Write isoflop.json and isoflop.svg into the sweep's directory."""
        write_text(self.directory / RESULT, json.dumps(self.to_json(), indent=2) + "\n")
        write_text(self.directory / DRAWING, self.to_svg())

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.directory}: {len(self.parabolas)} budgets, {len(self.results)} runs; N is FLOPs a token over 6"
        rows: list[Sequence[str] | str] = [("FLOPs", "width", "layers", "N", "tokens D", "steps", "val loss", "")]
        for flops in self.parabolas:
            among = self.of_budget(flops)
            lowest = min(among, key=lambda result: result.loss or math.inf)
            for result in among:
                recipe, (size, tokens) = result.run.recipe, size_of(result.run)
                numbers = (f"{flops:.3g}", f"{result.run.values['width']}", f"{recipe.model.num_layers}", _short(size))
                rest = (_short(tokens), f"{recipe.train.steps:,}", f"{result.loss:.4f}")
                rows.append((*numbers, *rest, "best" if result is lowest else ""))
        yield from table(rows, ">>>>>>><")
        for result in self.failed:
            yield f"left out: {result.run.name} {result.where}"
        yield ""
        for flops, parabola in self.parabolas.items():
            best = parabola.best
            found = "no lowest point between these sizes"
            if best is not None:
                found = f"lowest at N = {_short(best)}, loss {parabola.at(best):.4f}"
            yield f"parabola of {flops:.3g} FLOPs: {found}"
        by = "by a line through these" if len(lowest_of(self.parabolas)) > 1 else "by the law"
        yield f"best N by FLOPs C: {self.best.factor:.3g} * C^{self.best.exponent:.3f}, {by}"
        yield f"law: {self.law}"
        yield f"  off by {self.law.residual:.2%} (root mean square) at the runs that it was fitted to"
        if not self.law.determined:
            yield "  an exponent is at the limit of the fit: these runs do not determine it"
        yield ""
        predicted = self.prediction
        size, tokens = size_of(predicted.run)
        where = f"width {predicted.run.values['width']}, N = {_short(size)}, D = {_short(tokens)}"
        yield f"{predicted.flops:.3g} FLOPs, {where}, predicted before it was run:"
        rows = [("", "val loss", "error")]
        for name, loss in (("law", predicted.law), ("line through the lowest losses", predicted.line)):
            if loss is not None:
                error = predicted.error(loss)
                rows.append((f"predicted by the {name}", f"{loss:.4f}", "-" if error is None else f"{error:+.2%}"))
        rows.append(("measured", "-" if predicted.measured is None else f"{predicted.measured:.4f}", ""))
        yield from table(rows, "<>>")
        low, high = predicted.spread
        yield f"laws that are fitted without one of the runs predict {low:.4f} to {high:.4f}"

    def to_svg(self) -> str:
        """Draw losses by N, a line for each budget with its parabola, and the prediction beside what was measured."""
        lines = {
            f"{flops:.3g}": [(p.parameters, p.loss) for p in map(point_of, self.of_budget(flops))]
            for flops in self.parabolas
        }
        fits = {}
        for flops, parabola in self.parabolas.items():
            low, high = parabola.range
            places = [low * (high / low) ** (i / 24) for i in range(25)]
            fits[f"{flops:.3g}"] = [(x, parabola.at(x)) for x in places]
        size, _ = size_of(self.prediction.run)
        lines[f"{self.prediction.flops:.3g}, predicted"] = [(size, self.prediction.law)]
        if self.prediction.measured is not None:
            lines[f"{self.prediction.flops:.3g}, measured"] = [(size, self.prediction.measured)]
        return svg_of_chart(
            loss_chart("validation loss by N, for budgets of FLOPs", lines, column=_short, fits=fits, points=True)
        )


def size_of(run: SweepRun) -> tuple[float, float]:
    """Return N and D of a run."""
    each = flops_per_token(run.recipe.model, run.recipe.sequence_length)
    return each / 6, float(run.recipe.train.steps * run.recipe.tokens_per_step)


def isoflop(
    recipe: RecipeLike,
    budgets: Sequence[float],
    *,
    predict: float | None = None,
    widths: Sequence[int] | None = None,
    out: str | Path | None = None,
    devices: int | None = None,
    progress: Say = lambda text: None,
) -> IsoFlop:
    """Train sizes of a recipe's model at each budget, fit scaling laws, predict a larger budget's loss, and make that
    run.

    Args:
        budgets: FLOPs of training, three or more.
        predict: the larger budget; by default 4 times the largest.
        widths: by default from a quarter of the recipe's to one and a half, where a budget has 16 steps at least.
        out: by default `runs/NAME-isoflop`.

    Raises UserError before anything starts; RunError where too few runs have a loss; Interrupted as `sweep`.
    """
    loaded = load_recipe(recipe)
    place = Path("runs") / f"{loaded.name}-isoflop" if out is None else Path(out)
    farthest = _FARTHER * max(budgets, default=0.0) if predict is None else predict
    runs = plan_runs(loaded, budgets, farthest, widths or default_widths(loaded), place)
    problems: dict[str, str] = {}
    for _ in make_each(runs, problems, progress, devices=devices):
        pass
    results = [read_result(run, problems.get(run.name)) for run in runs]
    finished = [result for result in results if result.finished]
    points = [point_of(result) for result in finished]
    parabolas = {}
    for flops in sorted(budgets):
        among = [point for point, result in zip(points, finished) if result.run.values["flops"] == flops]
        try:
            parabolas[flops] = fit_parabola(among)
        except RunError as error:
            said = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
            raise RunError(f"{flops:.3g} FLOPs: {error}{f' ({said})' if said else ''}") from None
    progress("fitting the law")
    law = fit_law(points)
    lowest = [(flops, n) for flops, n, _ in lowest_of(parabolas)]
    best = fit_power_law(lowest) if len(lowest) > 1 else law.best_parameters
    prediction = _predict(loaded, farthest, widths, place, parabolas, best, points, law)
    failed = [result for result in results if not result.finished]
    found = IsoFlop(place, finished, parabolas, best, law, prediction, failed)
    found.save()
    progress(f"predicted for {farthest:.3g} FLOPs: loss {prediction.law:.4f}; now that run is made")
    for result in make_each([prediction.run], problems, progress, devices=devices):
        if result.loss is None:
            raise RunError(f"{prediction.run.name} {result.where}")
    found = replace(found, prediction=replace(prediction, measured=read_result(prediction.run).loss))
    found.save()
    return found


def plan_runs(
    recipe: Recipe, budgets: Sequence[float], farthest: float, widths: Sequence[int], out: Path
) -> list[SweepRun]:
    """List the runs of all budgets and widths. Raises UserError where these make no law. Writes nothing."""
    if len(set(budgets)) < max(FEWEST_BUDGETS, len(budgets)):
        raise UserError(f"--isoflop: expected {FEWEST_BUDGETS} budgets of FLOPs or more, such as 3e11,6e11,1.2e12")
    if farthest <= max(budgets):
        raise UserError(f"--predict {farthest:.3g}: expected more FLOPs than the largest budget, {max(budgets):.3g}")
    runs: list[SweepRun] = []
    for flops in sorted(budgets):
        made = [run for width in sorted(set(widths)) if (run := sized_run(recipe, flops, width, out)) is not None]
        if len(made) < 3:
            raise UserError(
                f"--isoflop {flops:.3g}: {len(made)} of the widths {', '.join(map(str, sorted(set(widths))))} have "
                f"{_FEWEST_STEPS} steps or more; a parabola needs three: give more FLOPs, fewer tokens a step "
                "(train.global_batch_size), or smaller --widths"
            )
        runs += made
    check_runs(runs)
    return runs


def lowest_of(parabolas: Mapping[float, Parabola]) -> list[tuple[float, float, float]]:
    """List the lowest points of parabolas, as (FLOPs, N, loss), where they have one between their sizes."""
    found = [(parabola, parabola.best) for parabola in parabolas.values()]
    return [(parabola.flops, best, parabola.at(best)) for parabola, best in found if best is not None]


def _predict(
    recipe: Recipe,
    flops: float,
    widths: Sequence[int] | None,
    out: Path,
    parabolas: Mapping[float, Parabola],
    best: PowerLaw,
    points: Sequence[Point],
    law: Law,
) -> Prediction:
    """Predict the loss of the width whose N is nearest to the best of a budget."""
    size, wanted = getattr(recipe.model, "head_dim", 1), best.at(flops)
    known = sorted({*(widths or default_widths(recipe))})
    larger = range(known[-1] + size, 4 * known[-1] + 1, size)
    made = [run for width in (*known, *larger) if (run := sized_run(recipe, flops, width, out)) is not None]
    run = min(made, key=lambda run: abs(math.log(size_of(run)[0] / wanted)))
    n, d = size_of(run)
    lowest = [(flops, loss) for flops, _, loss in lowest_of(parabolas)]
    line = fit_power_law(lowest).at(6 * n * d) if len(lowest) > 1 else None
    return Prediction(run, flops, wanted, law.at(n, d), leave_one_out(points, law, n, d), line)


def _row(result: RunResult) -> dict[str, object]:
    recipe, (size, tokens) = result.run.recipe, size_of(result.run)
    return {
        "flops": result.run.values["flops"],
        "width": result.run.values["width"],
        "layers": recipe.model.num_layers,
        "parameters": size,
        "tokens": tokens,
        "steps": recipe.train.steps,
        "validation_loss": result.loss,
    }


def _short(count: float) -> str:
    """Write `1.23M`."""
    for suffix, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{suffix}" if count < 1000 * scale else f"{count / scale:,.0f}{suffix}"
    return f"{count:.3g}"
