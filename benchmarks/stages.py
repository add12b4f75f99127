"""Does the order of data matter: python benchmarks/stages.py [--seeds 3] [--save]

recipes/stages.yaml to the end of its second stage (code, then code and ever more prose), beside runs of the same rows
in one stage: as many of each source, mixed evenly from the beginning to the end, with the same steps, learning rates
and tokenizer. Both are validated on the second stage's target: its sources, by the weights that it ends with. The order
of rows and the first weights differ by seed. Exits 1 where the stages do not win on their target by twice the standard
error of the seeds' differences.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import add_arguments, at_least, finish, positive, say, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=3)
    add_arguments(parser)
    arguments = parser.parse_args()
    from trainfw import backends, load_recipe

    backends.prepare()
    whole = load_recipe("stages")
    first, second = whole.in_stages()[:2]
    stages = whole.model_dump()["stages"][:2]
    stages[1]["until"] = None
    totals = dict.fromkeys(second.weights, 0.0)
    for stage in (first, second):
        for number, name in enumerate(stage.weights):
            totals[name] += float(stage.shares.total(number, stage.rows))
    target = {name: end / sum(end for _, end in second.weights.values()) for name, (_, end) in second.weights.items()}
    common = [f"train.steps={second.end}", "train.sample_prompt=null", "train.validate_every=0", "checkpoint.every=0"]
    weights = [f"data.mixture.{name}.weight={total:g}" for name, total in totals.items()]
    kinds = {
        "two stages": [f"stages={json.dumps(stages)}"],
        "one": ["stages=[]", *weights],
    }
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for seed in range(arguments.seeds):
        for kind, settings in kinds.items():
            recipe = load_recipe("stages", [*common, *settings, f"data.seed={seed}", f"train.seed={seed}"])
            found[kind].append(run(recipe) | {"seed": seed})
            last = found[kind][-1]
            say(f"seed {seed}, {kind}: {', '.join(f'{name} {value:.4f}' for name, value in last.items())}")
    for runs in found.values():
        for one in runs:
            one["target"] = sum(share * one[name] for name, share in target.items())
    gains = [b["target"] - a["target"] for a, b in zip(found["two stages"], found["one"])]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    named = " + ".join(f"{share:.2f} {name}" for name, share in target.items())
    columns = ["seed", "stages", *(f"held-out {name}, nats" for name in target), f"target: {named}", "seconds"]
    rows = [
        [one["seed"], kind, *(one[name] for name in target), one["target"], one["seconds"]]
        for seed in range(arguments.seeds)
        for kind, one in ((kind, runs[seed]) for kind, runs in found.items())
    ]
    mixed = " and ".join(f"{total:.0f} rows of {name}" for name, total in totals.items())
    said = f"{second.end} steps of {second.recipe.tokens_per_step:,} tokens, {mixed}"
    gain = statistics.mean(gains)
    checks = [at_least("gain on the target by two stages, nats, in standard errors", gain / error, 2.0)]
    summary = table("Gain by two stages, over the seeds", ["mean, nats", "standard error"], [[gain, error]])
    return finish("stages", [table(f"Held-out loss after {said}", columns, rows), summary], checks, arguments)


def run(recipe: Any) -> dict[str, float]:
    """Train once; the held-out loss of each source, and the seconds it took."""
    from trainfw import train
    from trainfw.training import Reporter

    class Quiet(Reporter):
        def note(self, text: str) -> None: ...

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="trainfw-stages-") as place:
        result = train(recipe, run_dir=Path(place) / "run", reporter=Quiet())
    assert result.validation is not None
    losses = {name: part.loss for name, part in result.validation.parts.items()}
    return losses | {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    sys.exit(main())
