"""The search for a layout: an analytic pass over all that are legal, and the compiler over the best few.

Searched are data, fsdp and tensor over all of the recipe's cores, with pipeline over units of the hardware, context for
long sequences and expert for mixtures, what fsdp shards, how many microbatches a step is split into, what the backward
pass computes again, and whether layers are scanned; each axis is placed where it is fastest. The batch, the data and
the hardware stay. Formulas (`estimate`) say which candidates are worth compiling; what is ranked in the end, and
reported, are plans. Unrolled programs take long to compile: where there is time, the best by formula that compute
little again, and the unrolled form of the best.
"""

from __future__ import annotations

import math
import operator
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainfw.errors import UserError
from trainfw.planning.predict.plan import Plan, plan
from trainfw.planning.search.candidates import (
    COMPILED,
    MARGIN,
    Candidate,
    Survey,
    objective_key,
    pareto,
    same_but_stack,
    scanned,
    settings,
)
from trainfw.recipe import Recipe, find_recipe, load_recipe
from trainfw.unfinished import write_text

LIMIT = 200.0
"""Seconds after which no further candidate is compiled."""

_UNROLLED = 1 / 6
"""Seconds that an unrolled layer takes to compile per second of the scanned program (Llama 3.1 8B on 256 cores: 0.16;
SmolLM2 135M on 8: 0.17), by which unrolled ones are tried only where there is time for them."""

_MOST_UNROLLED = 3
"""Programs that `_unrolled` asks for, at most."""

ROOM = 0.95
"""Share of a core's memory that a winner may be planned to take: plans of memory are good to about 5%."""


@dataclass(frozen=True, repr=False)
class Found:
    """Result of a search."""

    survey: Survey
    own: Plan | None
    """The recipe as it is; None where it cannot be planned."""
    plans: tuple[tuple[Candidate, Plan], ...]
    """Compiled, the recipe itself among them, the best by the objective first; whether they fit or not."""
    refused: Counter[str]
    """Reason -> how many could not be built after all."""
    skipped: int
    """Candidates not compiled, since they were estimated to need no less than one that did not fit."""
    out_of_time: int
    """Candidates that were to be compiled when the time was over."""

    @property
    def fitting(self) -> list[tuple[Candidate, Plan]]:
        """List the candidates that fit with memory to spare."""
        return [(candidate, made) for candidate, made in self.plans if _fits(made, ROOM)]

    @property
    def winner(self) -> tuple[Candidate, Plan] | None:
        """The best that fits with memory to spare."""
        return next(iter(self.fitting), None)

    @property
    def unchanged(self) -> bool:
        """Tell whether the winner is the recipe as it is."""
        return self.winner is not None and self.winner[1] is self.own

    @property
    def pareto(self) -> list[tuple[Candidate, Plan]]:
        """List those of `fitting` that no other beats in both speed and memory, the fastest first."""
        return pareto(self.fitting, lambda pair: (pair[1].time.seconds, pair[1].memory.total))

    def to_json(self) -> dict[str, object]:
        """Plain data with stable keys."""
        return {
            "objective": self.survey.objective,
            "candidates": self.survey.legal,
            "dropped_layouts": dict(self.survey.dropped),
            "estimated_not_to_fit": self.survey.too_large,
            "winner": self.winner[1].to_json() if self.winner else None,
            "recipe": self.own.to_json() if self.own else None,
            "compiled": [
                {
                    "settings": settings(candidate.recipe),
                    "step_time_seconds": made.time.seconds,
                    "memory_bytes_per_core": made.memory.total,
                    "fits": _fits(made),
                    "fits_with_room": _fits(made, ROOM),
                    "estimated_step_time_seconds": candidate.estimate.seconds,
                    "estimated_memory_bytes_per_core": candidate.estimate.memory,
                }
                for candidate, made in self.plans
            ],
            "pareto": [settings(candidate.recipe) for candidate, _ in self.pareto],
        }

    def __repr__(self) -> str:
        best = "none fits" if self.winner is None else repr(self.winner[1])
        return f"<Found: {len(self.plans)} layouts planned, {best}>"

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def search_layouts(
    survey: Survey,
    progress: Callable[[str], None] = lambda _: None,
    *,
    most: int = COMPILED,
    limit: float = LIMIT,
    simulate: int | None = None,
) -> Found:
    """Plan the best of `survey`, from the cache or on simulated devices (see `Survey.simulated_cores`).

    Args:
        progress: told what is being done.
        most: candidates to compile, beside the recipe itself; where none of them fits, more until one does.
        limit: seconds after which no further one is begun. (The recipe itself always is.)
        simulate: as for `compiled`.
    """
    started = time.monotonic()
    plans: list[tuple[Candidate, Plan]] = []
    refused: Counter[str] = Counter()
    took: dict[bool, float] = {}
    skipped = late = 0
    chosen = survey.chosen(most)
    total = (survey.own is not None) + len(chosen) + _MOST_UNROLLED

    def compiled(candidate: Candidate, wait: float = 0.0) -> Plan | None:
        begun = time.monotonic()
        number = len(plans) + refused.total() + 1
        takes = f"; takes some {wait:.0f} s" if wait >= 1 else ""
        formula = f"about {candidate.estimate.seconds:.3g} s a step by formula"
        progress(f"compiling {number} of about {max(total, number)}: {candidate} ({formula}{takes})")
        try:
            made = plan(candidate.recipe, simulate=simulate)
        except UserError as error:
            refused[str(error)] += 1
            return None
        scan = candidate.recipe.train.scan_layers
        took[scan] = max(took.get(scan, 0.0), time.monotonic() - begun)
        plans.append((candidate, made))
        progress(
            f"  {made.time.seconds:.3g} s a step, {made.memory.total / 2**30:.1f} GiB a core{_unfit(made, ' ({})')}"
        )
        return made

    same = operator.attrgetter("remat", "scan_layers")

    def hopeless(candidate: Candidate) -> bool:
        return any(
            not _fits(made, ROOM)
            and same(other.recipe.train) == same(candidate.recipe.train)
            and other.estimate.memory <= candidate.estimate.memory
            for other, made in plans
        )

    own = compiled(survey.own) if survey.own is not None else None
    rest = [candidate for candidate in scanned(survey.candidates) if candidate not in chosen]
    for number, candidate in enumerate([*chosen, *rest]):
        if number >= len(chosen) and any(_fits(made, ROOM) for _, made in plans if made is not own):
            break
        if survey.own is not None and candidate.recipe == survey.own.recipe:
            continue
        if time.monotonic() - started + took.get(True, 0.0) > limit:
            late = max(0, len(chosen) - number)
            break
        if hopeless(candidate):
            skipped += 1
            continue
        compiled(candidate, took.get(True, 0.0))

    for candidate in _unrolled(survey, plans):
        wait = took.get(False, took.get(True, 0.0) * survey.recipe.model.num_layers * _UNROLLED)
        if hopeless(candidate):
            skipped += 1
        elif time.monotonic() - started + wait > limit:
            late += 1
        else:
            compiled(candidate, wait)
    return Found(survey, own, tuple(_ranked(survey, plans)), refused, skipped, late)


def _unrolled(survey: Survey, plans: Sequence[tuple[Candidate, Plan]]) -> list[Candidate]:
    """The unrolled programs to compile, the best by formula first, of those not among `plans`.

    The best of each policy that keeps what a scan would have to stack, and the other form of the best of `plans`.
    """
    program = [candidate for candidate in survey.candidates if not candidate.recipe.train.scan_layers]
    wanted = []
    capacity = math.inf if survey.topology.hbm_size is None else survey.topology.hbm_size * ROOM
    for remat in ("none", "dots"):
        wanted += [c for c in program if c.recipe.train.remat == remat and c.estimate.memory <= capacity][:1]
    best = next((candidate for candidate, made in _ranked(survey, plans) if _fits(made, ROOM)), None)
    if best is not None:
        wanted += [c for c in program if same_but_stack(c, best)]
    return [c for c in program if c in wanted and all(c.recipe != other.recipe for other, _ in plans)]


def _ranked(survey: Survey, plans: Sequence[tuple[Candidate, Plan]]) -> list[tuple[Candidate, Plan]]:
    return sorted(plans, key=lambda pair: objective_key(survey.objective, pair[1].time.seconds, pair[1].memory.total))


def _fits(made: Plan, room: float = 1.0) -> bool:
    capacity = made.memory.capacity
    return capacity is None or made.memory.total <= room * capacity


def _unfit(made: Plan, form: str) -> str:
    """Why it cannot win, in this form; nothing where it can."""
    if _fits(made, ROOM):
        return ""
    return form.format(f"fits, with less than {1 - ROOM:.0%} to spare" if _fits(made) else "does not fit")


def _lines(found: Found) -> Iterator[str]:
    survey = found.survey
    cores = f"{survey.topology.in_words}: {survey.topology.cores:,} cores"
    yield f"{survey.recipe.name} on {cores}, global batch and data as the recipe says"
    yield (
        f"{survey.legal:,} legal candidates (layout, sharding, microbatches, remat, stack), "
        f"estimated in {survey.seconds:.1f} s by formula; {len(found.plans)} compiled"
    )
    for reason, times in survey.dropped.most_common():
        yield f"  {times:5,} layouts dropped: {reason}"
    if survey.too_large:
        yield f"  {survey.too_large:5,} candidates dropped: estimated to need more than {MARGIN:.2f} x a core's memory"
    if found.skipped:
        yield f"  {found.skipped:5,} not compiled: estimated to need no less than one that does not fit"
    for reason, times in found.refused.items():
        yield f"  {times:5,} refused when built: {reason}"
    if found.out_of_time:
        yield f"  {found.out_of_time:5,} not compiled for lack of time"
    if survey.own is None:
        yield f"  the recipe as it is cannot be planned: {survey.own_problem}"
    if survey.recipe.parallel.rules:
        yield "  parallel.rules is set: estimates take the default rules"
    yield "A prediction: nothing here was measured on this hardware. (est.: by formula, before compiling)"
    yield ""
    yield f"    {'step':>8}  {'est.':>8}  {'GiB/core':>8}  {'est.':>6}  what it changes"
    front, own = found.pareto, settings(survey.own.recipe if survey.own else survey.recipe)
    rest = [pair for pair in found.plans if all(pair[1] is not made for _, made in front)]
    for title, pairs in (("the Pareto set of step time and memory", front), ("compiled too", rest)):
        if pairs:
            yield title
        for candidate, made in pairs:
            mark = "*" if found.winner is not None and made is found.winner[1] else " "
            size = f"{made.memory.total / 2**30:8.2f}  {candidate.estimate.memory / 2**30:6.1f}"
            speed = f"{made.time.seconds:8.4g}  {candidate.estimate.seconds:8.4g}"
            changed = [f"{k}={str(v).lower()}" for k, v in settings(candidate.recipe).items() if v != own[k]]
            what = " ".join(changed) or "nothing: the recipe as it is"
            yield f"  {mark} {speed}  {size}  {what}{_unfit(made, '  ({})')}"
    yield ""
    if found.winner is None:
        yield f"nothing that was compiled fits in memory with {1 - ROOM:.0%} to spare: no winner"
        return
    candidate, made = found.winner
    yield f"* best by {survey.objective}: {candidate}{' (the recipe as it is)' * found.unchanged}"
    if survey.objective == "cost":
        price = "" if made.dollars is None else f", ${made.dollars:,.0f}"
        yield f"  the run: {made.chip_hours:,.0f} chip-hours{price} (hardware stays, so cost follows step time)"
    if found.own is not None and found.own is not made:
        seconds, saved = found.own.time.seconds, found.own.memory.total - made.memory.total
        time_saved = f"{abs(1 - made.time.seconds / seconds):.1%} {'less' if made.time.seconds < seconds else 'more'}"
        memory_saved = f"{abs(saved) / 2**30:.2f} GiB {'less' if saved > 0 else 'more'}"
        said = _unfit(found.own, "; the recipe as it is {}")
        yield f"  {time_saved} time a step than the recipe as it is ({seconds:.4g} s), {memory_saved} a core{said}"


def default_out(recipe: Recipe) -> Path:
    """Return the path at which the winner is written when none is given."""
    return Path(f"{recipe.name}-planned.yaml")


def check_out(file: Path, source: str | os.PathLike[str], *, named: bool) -> None:
    """Raises UserError where the winner, which extends `source`, cannot go to `file`: before the search, not after it.

    Where the user has not `named` it, it must not be there yet.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--out {file}: expected a file in a directory that exists")
    if file.exists() and file.samefile(find_recipe(source)):
        raise UserError(f"--out {file}: is the recipe itself, which the one to write extends; name another file")
    if file.exists() and not named:
        raise UserError(f"{file}: already there; name it with --out {file} to replace it, or name another")


def write_winner(found: Found, source: str | os.PathLike[str], file: Path) -> bool:
    """Write the winner to `file`, as a recipe that extends `source` (a path, or the name of a bundled recipe).

    Returns whether it was written: not where it is the recipe as it is.

    What overrides said is in it too. Where an extension cannot say it (it merges sections, and removes nothing), the
    recipe is written in full. Raises UserError where nothing fits, and where the file cannot be written.
    """
    if found.winner is None:
        raise UserError("nothing that was compiled fits in memory with some to spare: no recipe is written")
    if found.unchanged:
        return False
    candidate, made = found.winner
    recipe = candidate.recipe.model_copy(update={"name": f"{found.survey.recipe.name}-planned"})
    here, base = file.resolve().parent, find_recipe(source).resolve()
    extends = str(base.relative_to(here) if base.is_relative_to(here) else base)
    tree: dict[str, Any] = {"extends": extends, "name": recipe.name}
    before, chosen = load_recipe(source).model_dump(), settings(recipe)
    for section, values in recipe.model_dump().items():
        if not isinstance(values, dict):
            continue
        all_of_it = section == "model" and values["preset"] != before["model"]["preset"]
        said = {
            key: value
            for key, value in values.items()
            if all_of_it or value != before[section][key] or f"{section}.{key}" in chosen
        }
        if said:
            tree[section] = said
    head = (
        f"# Best by {found.survey.objective} of {len(found.plans)} layouts and programs that were compiled, out of "
        f"{found.survey.legal:,} that are legal: trainfw plan --search\n# Predicted: {made.time.seconds:.3g} s a step, "
        f"{made.memory.total / 2**30:.2f} GiB a core. Nothing was measured on this hardware.\n"
    )
    try:
        write_text(file, head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    try:
        same = load_recipe(file) == recipe
    except UserError:
        same = False
    if not same:
        write_text(file, head + recipe.to_yaml())
    return True
