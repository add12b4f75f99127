"""Does a learning rate that is found at width 64 hold at 512? With muP, and without.

    python benchmarks/mup.py --save

Sweeps of the learning rate (`trainfw sweep`), on the text of Python's standard library, of a model of two layers at
widths from 64 to 512 (without muP at these two alone), its heads 32 wide. At the base width, 64, muP changes nothing,
so that its runs serve both. The best rate of each width is the one of lowest validation loss after the last step; a
step of the grid is a factor of 2. Stopped, the same command goes on with the same `--out`.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import reporting

import trainfw
from trainfw.report import loss_chart, svg_of_chart

WIDTHS = (64, 128, 256, 512)
RATES = tuple(2.0**power for power in range(-11, -5))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mup"), help="where the runs are kept")
    parser.add_argument("--steps", type=reporting.positive, default=150)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    reporting.add_arguments(parser)
    arguments = parser.parse_args()
    found = {
        (width, mup): sweep(arguments, width, mup or width == arguments.widths[0])
        for mup in (True, False)
        for width in widths_of(arguments, mup)
    }
    tables = [rates_table(found, mup, arguments) for mup in (True, False)]
    drift = {mup: drift_of(found, mup, arguments.widths) for mup in (True, False)}
    last = arguments.widths[-1]
    checks = [
        reporting.at_most(f"muP: grid steps from the best rate at {arguments.widths[0]} to {last}'s", drift[True], 1),
        reporting.at_least(
            f"without: grid steps from the best rate at {arguments.widths[0]} to {last}'s", drift[False], 2
        ),
        reporting.at_most(
            f"muP: loss that the best rate of {arguments.widths[0]} costs at {last}",
            regret(found, True, arguments),
            0.05,
        ),
    ]
    if arguments.save:
        for mup in (True, False):
            file = reporting.RESULTS / f"mup-{'with' if mup else 'without'}.svg"
            file.write_text(drawing(found, mup, widths_of(arguments, mup)))
    return reporting.finish("mup", tables, checks, arguments)


def widths_of(arguments: argparse.Namespace, mup: bool) -> list[int]:
    """All widths with muP; without it the first and the last, which show the drift."""
    widths = sorted(arguments.widths)
    return widths if mup else [widths[0], widths[-1]]


def recipe_of(arguments: argparse.Namespace, width: int, mup: bool) -> trainfw.Recipe:
    heads = width // 32
    model = {
        "preset": "tiny",
        "vocab_size": 1024,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_layers": 2,
    }
    model |= {"num_heads": heads, "num_kv_heads": heads, "head_dim": 32, "tie_embeddings": False, "mup": mup}
    train = {"steps": arguments.steps, "global_batch_size": 4, "validation_batches": 64, "scan_layers": False}
    return trainfw.load_recipe(
        {
            "name": f"mup-{width}",
            "model": model,
            "data": {
                "source": "python-stdlib",
                "tokenizer": {"name": "bpe", "vocab_size": 1024},
                "sequence_length": 64,
                "validation_fraction": 0.04,
            },
            "train": train,
            "optimizer": {"name": "adamw", "warmup_steps": 5},
        }
    )


def sweep(arguments: argparse.Namespace, width: int, mup: bool) -> dict[float, float]:
    """Validation losses by learning rate; of a run that diverged, infinity."""
    name = f"width={width},mup={str(mup).lower()}"
    reporting.say(name)
    recipe = recipe_of(arguments, width, mup)
    rates = {"optimizer.learning_rate": list(RATES)}
    made = trainfw.sweep(recipe, rates, out=arguments.out / name, progress=reporting.say)
    losses = {float(result.run.values["optimizer.learning_rate"]): result.loss for result in made.results}
    return {rate: math.inf if loss is None else loss for rate, loss in losses.items()}


def best_of(losses: dict[float, float]) -> float:
    return min(losses, key=losses.__getitem__)


def drift_of(found, mup: bool, widths) -> float:
    """Steps of the grid between the best rates of the first width and of the last."""
    first, last = (best_of(found[width, mup]) for width in (widths[0], widths[-1]))
    return round(abs(math.log2(first / last)))


def regret(found, mup: bool, arguments) -> float:
    losses = found[arguments.widths[-1], mup]
    return losses[best_of(found[arguments.widths[0], mup])] - min(losses.values())


def rates_table(found, mup: bool, arguments) -> reporting.Table:
    rows = []
    for width in widths_of(arguments, mup):
        losses = found[width, mup]
        best = f"2^{math.log2(best_of(losses)):.0f}"
        rows.append(
            [width, *(round(losses[rate], 3) if losses[rate] < math.inf else "diverged" for rate in RATES), best]
        )
    title = f"validation loss after {arguments.steps} steps by learning rate, {'with' if mup else 'without'} muP"
    return reporting.table(title, ["width", *(f"2^{math.log2(rate):.0f}" for rate in RATES), "best"], rows)


def drawing(found, mup: bool, widths) -> str:
    lines = {
        f"width {width}": [(rate, loss) for rate, loss in found[width, mup].items() if loss < math.inf]
        for width in widths
    }
    title = f"validation loss by learning rate, {'with' if mup else 'without'} muP"
    return svg_of_chart(loss_chart(title, lines, column=lambda rate: f"2^{math.log2(rate):.0f}"))


if __name__ == "__main__":
    sys.exit(main())
