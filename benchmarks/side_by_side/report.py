"""Numbers -> table, checks, Markdown. Nothing is measured here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from side_by_side.driver import Record

BF16 = "-bf16"
PYTORCH = ("transformers", "transformers-compile", "litgpt")
MAXTEXT = ("maxtext", "maxtext-tuned")
"""As it comes, whose times are checked, and tuned, which the table tells."""
TIMES_MAXTEXT, OF_PYTORCH, LOSSES_WITHIN = 2.0, 0.9, 1e-3


@dataclass(frozen=True)
class Check:
    text: str
    state: Literal["ok", "MISSED", "not asked for", "CANNOT BE MADE"]

    @property
    def missed(self) -> bool:
        return self.state in ("MISSED", "CANNOT BE MADE")

    def __str__(self) -> str:
        return f"{self.state}: {self.text}"


@dataclass(frozen=True)
class Results:
    tokens_per_step: int
    records: Mapping[str, Record]
    """By name (`maxtext`, or `maxtext-bf16`) of those that ran."""
    problems: Mapping[str, str]
    """By name, why it did not run."""
    products: Mapping[tuple[str, str], float]
    """(backend, `` or `-bf16`) -> seconds of a step's products by themselves."""

    def median(self, name: str) -> float:
        return statistics.median(self.records[name].seconds)

    def tokens_per_second(self, name: str) -> float:
        return self.tokens_per_step / self.median(name)

    @property
    def dtypes(self) -> list[str]:
        names = [*self.records, *self.problems]
        plain = [BF16 if name.endswith(BF16) else "" for name in names]
        return [suffix for suffix in ("", BF16) if suffix in plain]


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated between the two nearest."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"


def cells_of(results: Results) -> list[list[str]]:
    """The table: its head, and a row for each."""
    head = ["", "s/step", "p10–p90", "tokens/s", "trainfw is", "first step, s", "peak RSS, GB", "parameters"]
    rows = [head]
    for name, record in results.records.items():
        own = f"trainfw{BF16 if name.endswith(BF16) else ''}"
        times = "" if own not in results.records else f"{results.median(name) / results.median(own):.2f}x"
        memory = gigabytes(record.memory)
        if record.children_memory:
            memory += f" + {gigabytes(record.children_memory)}"
        spread = f"{percentile(record.seconds, 10):.2f}–{percentile(record.seconds, 90):.2f}"
        cells = [name, f"{results.median(name):.2f}", spread, f"{results.tokens_per_second(name):,.0f}", times]
        cells += [f"{record.first_step:.1f}", memory, f"{record.parameters:,}" if record.parameters else "?"]
        rows.append(cells)
    for name in results.problems:
        rows.append([name, "did not run", *[""] * (len(head) - 2)])
    return rows


def problem_lines(results: Results) -> list[str]:
    return [f"{name} did not run: {problem}" for name, problem in results.problems.items()]


def table(results: Results) -> list[str]:
    rows = cells_of(results)
    widths = [max(map(len, column)) for column in zip(*rows)]
    drawn = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
    rule = ["-" * w if not i else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [*(f"| {' | '.join(row)} |" for row in (drawn[0], rule, *drawn[1:])), *problem_lines(results)]


def product_lines(results: Results) -> list[str]:
    lines = []
    for (backend, suffix), seconds in results.products.items():
        dtype = "bfloat16" if suffix else "float32"
        line = f"products alone ({backend}, {dtype}): {seconds:.2f} s a step"
        names = (f"trainfw{suffix}",) if backend == "jax" else tuple(f"{name}{suffix}" for name in PYTORCH)
        taken = [f"{n} takes {results.median(n) / seconds:.2f} times that" for n in names if n in results.records]
        if backend == "torch" and f"trainfw{suffix}" in results.records:
            taken.append(f"trainfw{suffix} takes {results.median(f'trainfw{suffix}') / seconds:.2f} times that")
        lines.append("; ".join([line, *taken]))
    return lines


def idle_line(results: Results) -> list[str]:
    """Whether those that waited left the machine to the one at work."""
    shares = {name: r.idle_cpu / r.idle_wall for name, r in results.records.items() if r.idle_wall}
    if not shares:
        return []
    name = max(shares, key=lambda name: shares[name])
    return [f"while others had their turns, none took more than {shares[name]:.1%} of a core ({name})"]


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)  # `max` overlooks NaNs


def loss_lines(results: Results) -> list[str]:
    """The curves of those that start from the same weights and read the same batches."""
    lines = []
    for suffix in results.dtypes:
        names = [n for n in (f"trainfw{suffix}", f"transformers{suffix}") if n in results.records]
        if len(names) < 2:
            continue
        curves = [[float(loss) for loss in results.records[n].losses if loss is not None] for n in names]
        count = min(map(len, curves))
        lines.append(f"losses of {count} steps from the same weights, on the same batches:")
        width = max(map(len, names))
        lines += [f"  {n:{width}}  {' '.join(f'{x:.4f}' for x in c[:count])}" for n, c in zip(names, curves)]
        lines.append(f"  largest relative difference: {largest_difference(*curves):.1e}")
    return lines


def checks(results: Results, asked: Sequence[str]) -> list[Check]:
    """What is to hold; `asked` are the names that were to run."""
    made: list[Check] = []
    for suffix in results.dtypes:
        own = f"trainfw{suffix}"
        made.append(_check_faster(results, asked, own, MAXTEXT[:1], suffix, TIMES_MAXTEXT, "MaxText"))
        made.append(_check_faster(results, asked, own, PYTORCH, suffix, OF_PYTORCH, "the fastest PyTorch form"))
    made.append(_check_bf16(results, asked))
    made += [_check_memory(results, asked, suffix) for suffix in results.dtypes]
    made.append(_check_losses(results, asked))
    return made


def _unmade(text: str, needed: Sequence[Sequence[str]], results: Results, asked: Sequence[str]) -> Check | None:
    """A check that lacks one of its sides: of each of `needed`, all that were asked for must have run."""
    for group in needed:
        failed = [name for name in group if name in results.problems]
        if failed:
            return Check(f"{text} ({', '.join(failed)} did not run)", "CANNOT BE MADE")
        if not set(group) & set(asked):
            return Check(text, "not asked for")
    return None


def _check_faster(
    results: Results,
    asked: Sequence[str],
    own: str,
    group: Sequence[str],
    suffix: str,
    least: float,
    title: str,
) -> Check:
    peers = [f"{name}{suffix}" for name in group]
    text = f"{own}: tokens/s at least {least:g} times {title}'s{', bfloat16' if suffix else ''}"
    if unmade := _unmade(text, ([own], peers), results, asked):
        return unmade
    fastest = max((name for name in peers if name in results.records), key=results.tokens_per_second)
    times = results.tokens_per_second(own) / results.tokens_per_second(fastest)
    return Check(f"{text}: {times:.2f} ({fastest})", "ok" if times >= least else "MISSED")


def _check_bf16(results: Results, asked: Sequence[str]) -> Check:
    text = "trainfw: bfloat16 no slower than float32"
    if unmade := _unmade(text, (["trainfw"], [f"trainfw{BF16}"]), results, asked):
        return unmade
    half, single = results.median(f"trainfw{BF16}"), results.median("trainfw")
    return Check(f"{text}: {half:.2f} s a step, {single:.2f} s", "ok" if half <= single else "MISSED")


def _check_memory(results: Results, asked: Sequence[str], suffix: str) -> Check:
    own = f"trainfw{suffix}"
    peers = [f"{name}{suffix}" for name in (*MAXTEXT, *PYTORCH)]
    text = f"{own}: peak RSS at most the smallest peer's"
    if unmade := _unmade(text, ([own], peers), results, asked):
        return unmade
    # Of peers, without their children: what is held against us.
    smallest = min((name for name in peers if name in results.records), key=lambda n: results.records[n].memory)
    ours = results.records[own].memory + results.records[own].children_memory
    theirs = results.records[smallest].memory
    held = f"{gigabytes(ours)} GB, {gigabytes(theirs)} GB ({smallest})"
    return Check(f"{text}: {held}", "ok" if ours <= theirs else "MISSED")


def _check_losses(results: Results, asked: Sequence[str]) -> Check:
    text = f"trainfw and transformers: losses agree within {LOSSES_WITHIN:g}, relative"
    if unmade := _unmade(text, (["trainfw"], ["transformers"]), results, asked):
        return unmade
    ours, theirs = (
        [float(loss) for loss in results.records[name].losses if loss is not None]
        for name in ("trainfw", "transformers")
    )
    if not ours or not theirs:
        return Check(f"{text}: none were told", "MISSED")
    most = largest_difference(ours, theirs)
    return Check(f"{text}: {most:.1e}", "ok" if most <= LOSSES_WITHIN else "MISSED")  # NaN is missed


def as_json(results: Results, made: Sequence[Check], about: Mapping[str, Any]) -> dict[str, Any]:
    """A result as `reporting.py` describes one, and all numbers beside."""
    peers: dict[str, Any] = {}
    versions: dict[str, str] = {}
    for name, record in results.records.items():
        peers[name] = {
            "seconds_per_step": results.median(name),
            "p10": percentile(record.seconds, 10),
            "p90": percentile(record.seconds, 90),
            "tokens_per_second": results.tokens_per_second(name),
            **vars(record),
        }
        for package, version in record.versions.items():  # MaxText brings a jax of its own
            key = package if versions.get(package, version) == version else f"{package} ({name})"
            versions[key] = version
    head, *rows = cells_of(results)
    lines = [*problem_lines(results), *product_lines(results), *idle_line(results), *loss_lines(results)]
    return {
        **about,
        "benchmark": "peers",
        "versions": versions,
        "tables": [
            {"title": about["work"], "columns": head, "rows": rows},
            {"title": "Beside the table", "columns": [""], "rows": [[line] for line in lines]},
        ],
        "checks": [
            {"name": check.text, "value": check.state, "limit": "ok", "ok": not check.missed}
            for check in made
            if check.state != "not asked for"
        ],
        "tokens_per_step": results.tokens_per_step,
        "peers": peers,
        "did_not_run": dict(results.problems),
        "products": [
            {"backend": backend, "dtype": "bfloat16" if suffix else "float32", "seconds_per_step": seconds}
            for (backend, suffix), seconds in results.products.items()
        ],
    }
