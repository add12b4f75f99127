"""Published times of decoding, predicted: python benchmarks/decode_accuracy.py [--fit] [--save]

Every row of benchmarks/published/ is predicted by formula (trainfw/planning/predict/serving.py) and printed beside what
was published; README.md there gives the sources, and the rule by which rows are kept out of the fit. `--fit` finds the
three figures of NeuronCore-v2 (`serving` in trainfw/hardware/chips/) anew on the rows that are not kept out: the least
squares of the relative errors of their times per token. Times to the first token are fitted by nothing; so that a
reader sees what such a formula could reach, one with a free factor for each of its parts is fitted to all of them too.

The published programs are Transformers NeuronX's, not trainfw's: prompts of a batch are read at once and whole, and a
token reads the whole cache that was compiled. Nothing here ran on Neuron hardware, or on Graviton.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import Check, Table, add_arguments, at_least, at_most, finish, say, table
from trainfw.hardware import Topology, load_topology
from trainfw.models import ModelConfig
from trainfw.parallel import place_mesh
from trainfw.planning import FunctionTime, Kept, Quantities, decoder_quantities, function_time

PUBLISHED = Path(__file__).parent / "published"
PRESETS = {
    "Llama-2-7b": "llama2-7b",
    "Llama-2-13b": "llama2-13b",
    "CodeLlama-13b-hf": "llama2-13b",  # its shapes but for 16 rows of the embedding
    "Llama-2-70b": "llama2-70b",
    "Llama-3-8B": "llama3.1-8b",  # the shapes of Llama 3
    "Llama-3-70B": "llama3.1-70b",
    "Mistral-7B-Instruct-v0.2": "mistral-7b",
    "Qwen3-32B": "qwen3-32b",
}
WEIGHTS = {"bf16": "bfloat16", "int8": "int8", "q4_0": "q4_0", "q8_0": "q8_0"}
FIGURES = ("weights_efficiency", "memory_efficiency", "layer_time")
KEPT_OUT = 3
"""Every third row is kept out of the fit."""
APART = 1.1
"""Ratio of two published times from which on a pair is counted by itself, for it is no near tie."""


@dataclass(frozen=True)
class Row:
    """A published measurement."""

    model: str
    instance: str
    tensor: int
    rows: int
    sequence_length: int
    prompt: int
    output: int
    weights: str
    ttft: float | None
    """Seconds, the median, as is `tpot`."""
    tpot: float
    tokens_per_second: float | None = None
    kept_out: bool = False

    @property
    def name(self) -> str:
        lengths = f"{self.prompt:,} + {self.output:,} of {self.sequence_length:,}"
        return f"{self.model} {self.weights}, {self.instance}, {self.rows} x {lengths}"

    @property
    def config(self) -> ModelConfig:
        # The preset of Mistral 7B is v0.1's, which slides; v0.2 sees everything (sliding_window: null in its config).
        every = {"layer_pattern": ("global",), "sliding_window": None} if "Mistral" in self.model else {}
        return ModelConfig.model_validate({"preset": PRESETS[self.model], **every})

    @property
    def kept(self) -> Kept:
        tables = "bfloat16" if self.weights == "int8" else ""
        cpu = self.instance[0] in "cr"  # Graviton: products of a CPU's float32 peak
        return Kept(tensor=self.tensor, weights=WEIGHTS[self.weights], tables=tables, products="f32" if cpu else "bf16")

    def decode(self) -> Quantities:
        return decoder_quantities(self.config, self.kept, rows=self.rows, tokens=1, attended=self.sequence_length)

    def prefill(self) -> Quantities:
        """Whole prompts at once: they attend to nothing but themselves."""
        return decoder_quantities(self.config, self.kept, rows=self.rows, tokens=self.prompt, attended=0)

    def times(self, topology: Topology) -> tuple[FunctionTime, FunctionTime]:
        """Times of the prompts, and of a token."""
        placement = place_mesh(topology, ("tensor",), np.arange(self.tensor))
        return function_time(self.prefill(), placement), function_time(self.decode(), placement)


def published(file: str) -> list[Row]:
    """Rows of a table, in the order of the rule."""
    with (PUBLISHED / file).open(newline="") as text:
        found = list(csv.DictReader(text))
    rows = [
        Row(
            **{key: row[key] for key in ("model", "instance", "weights")},
            **{key: int(row[key]) for key in ("tensor", "rows", "sequence_length", "prompt", "output")},
            ttft=float(row["ttft_p50_ms"]) / 1e3,
            tpot=float(row["tpot_p50_ms"]) / 1e3,
            tokens_per_second=float(row["tokens_per_second"]),
        )
        for row in found
    ]
    rows.sort(key=lambda r: (r.instance, r.model, r.weights, r.rows, r.sequence_length, r.prompt))
    return [Row(**vars(row) | {"kept_out": i % KEPT_OUT == KEPT_OUT - 1}) for i, row in enumerate(rows)]


def hardware(row: Row, figures: tuple[float, ...] | None) -> Topology:
    """The topology of a row, perhaps with other figures than its chip's file has."""
    if figures is None:
        return load_topology(row.instance)
    weights, memory, layer = figures
    values = (f"{weights:.4f}", f"{memory:.4f}", f"{layer * 1e6:.2f} us")
    parameters = {f"chip.serving.{name}": value for name, value in zip(FIGURES, values, strict=True)}
    return load_topology(row.instance, parameters=parameters)


def fitted(rows: list[Row], *, one_share: bool = False) -> tuple[float, float, float]:
    """The figures with the least squares of relative errors of times per token, which are linear in them.

    one_share: all of memory is read at one share of its bandwidth.
    """
    shares = []
    for row in rows:
        parts = row.times(hardware(row, (1.0, 1.0, 1e-6)))[1].parts
        weights, memory = parts["weights"], parts["cache"] + parts["activations"]
        columns = [weights + memory] if one_share else [weights, memory]
        shares.append([x / row.tpot for x in (*columns, parts["layers"] / 1e-6, row.tpot - parts["collectives"])])
    *known, wanted = np.array(shares).T
    *inverse, layer = np.linalg.lstsq(np.stack(known, 1), wanted, rcond=None)[0]
    return 1 / inverse[0], 1 / inverse[-1], layer


def graviton() -> list[tuple[Row, dict[str, str]]]:
    """Rows of Graviton, each with the rest that is published of it."""
    with (PUBLISHED / "graviton_llama_cpp.csv").open(newline="") as text:
        found = list(csv.DictReader(text))
    rows = []
    for row in found:
        fits = row["instance"] == row["hardware"]  # the rule: c7g.16xlarge
        time = 1 / float(row["tokens_per_second"])
        of_one = {"tensor": 1, "rows": 1, "sequence_length": 256, "prompt": 128, "output": 128}
        made = Row(row["model"], row["hardware"], **of_one, weights=row["weights"], ttft=None, tpot=time)  # type: ignore[arg-type]
        rows.append((Row(**vars(made) | {"kept_out": not fits}), row))
    return rows


TRAINIUM2 = Row("Qwen3-32B", "trn2.48xlarge", 4, 2, 4096, 2048, 2048, "bf16", None, 32.1e-3, kept_out=True)


def pairs(rows: list[Row], predicted: dict[Row, float]) -> list[tuple[Row, Row, bool]]:
    """Pairs of layouts of one model, at least one of them kept out, and whether the faster one is named."""
    found = []
    for a, b in itertools.combinations(rows, 2):
        same = (PRESETS[a.model], a.weights) == (PRESETS[b.model], b.weights)
        if same and (a.instance, a.rows) != (b.instance, b.rows) and (a.kept_out or b.kept_out):
            found.append((a, b, (predicted[a] < predicted[b]) == (a.tpot < b.tpot)))
    return found


def floor(rows: list[Row]) -> float:
    """Mean relative error of times to first token where each part of the time has a free factor, fitted to all rows."""
    times = [row.times(hardware(row, None))[0].parts for row in rows]
    names = sorted({name for parts in times for name in parts})
    known = np.array([[p.get(name, 0.0) / row.ttft for name in names] for p, row in zip(times, rows, strict=True)])  # type: ignore[operator]
    factors, _ = nnls(known, np.ones(len(rows)))
    return float(np.abs(known @ factors - 1).mean())


def mean(errors: list[float]) -> float:
    return sum(map(abs, errors)) / len(errors)


def neuron_tables(rows: list[Row], figures: tuple[float, ...] | None) -> tuple[list[Table], list[Check]]:
    shown, per_token, first, decode = [], [], [], {}
    for row in rows:
        kind = "kept out" if row.kept_out else "fitted"
        prompt, token = row.times(hardware(row, figures))
        assert row.ttft is not None
        assert row.tokens_per_second is not None
        decode[row] = token.seconds
        errors = token.seconds / row.tpot - 1, prompt.seconds / row.ttft - 1
        rate = row.rows * row.output / (prompt.seconds + row.output * token.seconds)
        per_token.append((errors[0], row.kept_out))
        first.append((errors[1], row.kept_out))
        shown.append([
            row.name, kind, row.tpot * 1e3, token.seconds * 1e3, f"{errors[0]:+.1%}",
            token.bound_by, row.ttft * 1e3, prompt.seconds * 1e3, f"{errors[1]:+.1%}", row.tokens_per_second, rate,
        ])  # fmt: skip
    columns = [
        *("row", "", "per token, ms", "predicted", "error", "bound by", "to first token, ms", "predicted", "error"),
        *("tokens/s", "predicted"),
    ]
    named = pairs(rows, decode)
    wrong = [[f"{a.name} and {b.name}", a.tpot * 1e3, b.tpot * 1e3] for a, b, right in named if not right]
    apart = [right for a, b, right in named if abs(math.log(a.tpot / b.tpot)) > math.log(APART)]
    tables = [table("Transformers NeuronX on Inf2 and Trn1", columns, shown)]
    tables.append(table("Pairs whose faster layout is not named, ms per token", ["pair", "first", "second"], wrong))
    summary = []
    for what, found in (("per token", per_token), ("to first token", first)):
        for label, out in (("fitted" if what == "per token" else "others", False), ("kept out", True)):
            errors = [error for error, kept in found if kept == out]
            summary.append([what, label, len(errors), mean(errors) * 100, max(map(abs, errors)) * 100])
    text = "time to first token where each part of it has a free factor, fitted to all rows"
    summary.append([text, "all", len(rows), floor(rows) * 100, None])
    tables.append(table("Errors, %", ["time", "rows", "count", "mean", "worst"], summary))
    known = [["all", len(named), sum(right for *_, right in named)], ["over 10% apart", len(apart), sum(apart)]]
    tables.append(table("Pairs", ["pairs", "count", "faster layout named"], known))
    out, out_first = ([error for error, kept in found if kept] for found in (per_token, first))
    right = sum(right for *_, right in named) / len(named)
    checks = [
        at_most("time per token, rows kept out, mean error, %", mean(out) * 100, 8),
        at_most("time per token, rows kept out, worst error, %", max(map(abs, out)) * 100, 20),
        at_most("time to first token, rows kept out, mean error, %", mean(out_first) * 100, 15),
        at_least(f"of {len(named)} pairs, the faster layout is named, %", right * 100, 90),
    ]
    return tables, checks


def others_table() -> Table:
    """Rows of other hardware, predicted with the figures of its chip's file."""
    shown = []
    for row, more in [*graviton(), (TRAINIUM2, {})]:
        token = row.times(hardware(row, None))[1]
        rates = [row.rows / row.tpot, row.rows / token.seconds] if not more else [1 / row.tpot, 1 / token.seconds]
        on = f"{more['instance']}, {more['cores']} cores" if more else row.instance
        error = f"{token.seconds / row.tpot - 1:+.1%}"
        said = [more.get("gguf", row.weights), more.get("software", "optimum-neuron, vLLM")]
        shown.append([row.model, on, row.instance, *said, "kept out" if row.kept_out else "fitted", *rates, error])
    columns = [
        "model",
        "published on",
        "planned on",
        "weights",
        "software",
        "",
        "tokens/s",
        "predicted",
        "error in time",
    ]
    return table("llama.cpp on Graviton, and one row of Trainium2", columns, shown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="find the figures of the chips' files anew, and use them")
    add_arguments(parser)
    arguments = parser.parse_args()
    rows = published("neuron_decoding.csv")
    figures = None
    if arguments.fit:
        figures = fitted([row for row in rows if not row.kept_out])
        arms = fitted([row for row, _ in graviton() if not row.kept_out], one_share=True)
        for name, found in (("inferentia2, trainium1", figures), ("graviton3", arms)):
            shares = f"weights_efficiency {found[0]:.3f}, memory_efficiency {found[1]:.3f}"
            say(f"{name}: {shares}, layer_time {found[2] * 1e6:.0f} us")
    tables, checks = neuron_tables(rows, figures)
    return finish("decode_accuracy", [*tables, others_table()], checks, arguments, page=True)


if __name__ == "__main__":
    raise SystemExit(main())
