"""How well do small runs predict the loss of a larger one? `trainfw sweep --isoflop` on the quickstart's text.

    python benchmarks/isoflop.py --save

Sizes of a small decoder at each of three budgets of FLOPs, the laws fitted to their losses, and the run of 4 times the
largest budget that they predict before it is made. The learning rate is the same everywhere, by muP. Stopped, the same
command goes on with the same `--out`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import reporting

import trainfw
from trainfw.sweeping import IsoFlop, isoflop

BUDGETS = (1e11, 2e11, 4e11)
RECIPE = {
    "model.vocab_size": 1024,
    "model.num_heads": 16,
    "model.num_kv_heads": 8,
    "model.head_dim": 16,
    "model.mup": True,
    "data.tokenizer.vocab_size": 1024,
    "data.sequence_length": 128,
    "train.global_batch_size": 8,
    "train.validation_batches": 32,
    "train.log_every": 50,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 2.0**-7,
    "checkpoint.every": 1000,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/isoflop"), help="where the runs are kept")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, metavar="C")
    parser.add_argument("--predict", type=float, help="default: 4 times the largest budget")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 48, 64, 80])
    reporting.add_arguments(parser)
    arguments = parser.parse_args()
    found = isoflop(
        trainfw.load_recipe("quickstart", RECIPE),
        arguments.budgets,
        predict=arguments.predict,
        widths=arguments.widths,
        out=arguments.out,
        progress=reporting.say,
    )
    reporting.say(str(found))
    if arguments.save:
        (reporting.RESULTS / "isoflop.svg").write_text(found.to_svg())
    predicted = found.prediction
    checks = [
        reporting.at_most(f"{name}: error of the prediction, percent", 100 * abs(error), 3)
        for name, error in (
            ("law of N and D", predicted.error(predicted.law)),
            ("line through the lowest losses", predicted.error(predicted.line)),
        )
        if error is not None
    ]
    return reporting.finish("isoflop", tables_of(found), checks, arguments, ["scipy"])


def tables_of(found: IsoFlop) -> list[reporting.Table]:
    data = found.to_json()
    keys = ("flops", "width", "layers", "parameters", "tokens", "steps", "validation_loss")
    rows = [[f"{row['flops']:.3g}", *(rounded(row[key]) for key in keys[1:])] for row in data["runs"]]
    runs = reporting.table(
        "runs; N is FLOPs a token over 6", ["FLOPs", "width", "layers", "N", "D", "steps", "loss"], rows
    )
    law, predicted = data["law"], data["prediction"]
    fitted = reporting.table(
        "the law that was fitted: E + A / N^alpha + B / D^beta",
        ["E", "A", "alpha", "B", "beta", "off at these runs, rms"],
        [[*(rounded(law[key]) for key in ("E", "A", "alpha", "B", "beta")), f"{law['rms_error']:.2%}"]],
    )
    spread = f"{predicted['law_least']:.4f} to {predicted['law_most']:.4f}"
    rows = [["law of N and D", rounded(predicted["law"]), f"{predicted['law_error']:+.2%}", spread]]
    if predicted["line"] is not None:
        rows.append(
            ["line through the lowest losses", rounded(predicted["line"]), f"{predicted['line_error']:+.2%}", ""]
        )
    rows.append(["measured", rounded(predicted["measured"]), "", ""])
    title = f"predicted for {predicted['flops']:.3g} FLOPs, width {predicted['width']}, before that run was made"
    return [runs, fitted, reporting.table(title, ["by", "loss", "error", "without one run each"], rows)]


def rounded(value: float) -> float | int:
    return value if isinstance(value, int) else round(value) if value >= 1000 else float(f"{value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
