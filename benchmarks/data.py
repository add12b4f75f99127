"""Whether the input keeps up: python benchmarks/data.py [--documents N] [--json FILE] [--save]

On the quickstart: the rows that `train_iterator` hands out and `shard_batch` places, the device being idle, beside
those that its training step consumes, measured in the same run; and what a step takes longer when it is fed than with
one batch again and again. Then a second start, in a process of its own, from the cache of a million documents:
`prepare`, `train_iterator` and the first batch, without imports. Packing as many examples into rows, which each start
does anew, is timed beside it.

Exits 1 where the input is less than 20 times as fast as the device, or a start takes over 1 s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import Check, Table, add_arguments, at_least, at_most, finish, say, table

LEAST_TIMES, MOST_SECONDS = 20.0, 1.0
LENGTH = 512
STEPS, BATCHES = 12, 400
REOPEN = """
import json, sys, time
from trainfw.data import DataConfig, prepare, train_iterator
config = DataConfig(**json.loads(sys.argv[1]))
start = time.perf_counter()
data = prepare(config)
opened = time.perf_counter()
batches = train_iterator(data.train, config, global_batch_size=8)
next(batches)
done = time.perf_counter()
print(json.dumps([data.train.num_documents + data.validation.num_documents, opened - start, done - opened]))
"""


def rate(function: Callable[[], Any], times: int) -> float:
    """Calls a second, after a few."""
    import jax

    for _ in range(3):
        jax.block_until_ready(function())
    start = time.perf_counter()
    for _ in range(times):
        last = function()
    jax.block_until_ready(last)
    return times / (time.perf_counter() - start)


def measure_rates() -> dict[str, Any]:
    """Batches a second of the quickstart's input, and steps a second of its program."""
    from trainfw import backends, build_program, load_recipe

    backends.prepare()
    import jax

    from trainfw.data import prepare, train_iterator

    recipe = load_recipe("quickstart")
    program = build_program(recipe, jax.devices()[:1])
    data = prepare(recipe.data)
    rows = recipe.train.global_batch_size
    batches = train_iterator(data.train, recipe.data, global_batch_size=rows)
    found: dict[str, Any] = {"rows": rows, "length": recipe.data.sequence_length}
    found["read"] = rate(lambda: next(batches), BATCHES)
    found["placed"] = rate(lambda: program.shard_batch(next(batches)), BATCHES)
    step, state, batch = program.compile_train_step(), program.init(), program.shard_batch(next(batches))

    def run(fed: bool) -> Any:
        nonlocal state
        state, metrics = step(state, program.shard_batch(next(batches)) if fed else batch)
        return metrics

    turns = [(rate(lambda: run(False), STEPS), rate(lambda: run(True), STEPS)) for _ in range(3)]
    found["steps"], found["fed"] = (statistics.median(column) for column in zip(*turns, strict=True))
    batches.close()
    return found


def reopen(documents: int) -> dict[str, Any]:
    """Seconds of a second start."""
    say(f"writing and tokenising {documents:,} documents, which is not timed")
    with tempfile.TemporaryDirectory(prefix="trainfw-data-") as place:
        path = Path(place) / "documents.jsonl"
        with path.open("w") as file:
            file.writelines(
                json.dumps({"text": f"document {n}: {n * n} is {n} squared"}) + "\n" for n in range(documents)
            )
        config = json.dumps({"source": str(path), "cache_dir": f"{place}/cache", "sequence_length": LENGTH})
        command = [sys.executable, "-c", REOPEN, config]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        for _ in range(2):  # of which the first builds
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        count, opening, first = json.loads(done.stdout)
    assert count == documents
    return {"documents": documents, "open": opening, "first batch": first, "pack": pack_examples(documents)}


def pack_examples(count: int) -> float:
    """Seconds to open so many examples, packed into rows; lengths like those of short answers."""
    import numpy as np

    from trainfw.data import ExampleRows, TokenStore

    lengths = np.random.default_rng(0).integers(2, LENGTH, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.zeros(1, np.uint16)  # which packing does not look at
    store = TokenStore(tokens, offsets, 0, "", learnt=np.zeros(1, bool))
    start = time.perf_counter()
    ExampleRows(store, LENGTH)
    return time.perf_counter() - start


def judge(rates: dict[str, Any], start: dict[str, Any]) -> tuple[list[Table], list[Check]]:
    names = {
        "read": "train_iterator, device idle",
        "placed": "train_iterator and shard_batch, device idle",
        "steps": "the training step, one batch again and again",
        "fed": "the training step, fed",
    }
    rows, length = rates["rows"], rates["length"]
    speeds = [[name, rates[key], rates[key] * rows, rates[key] * rows * length] for key, name in names.items()]
    seconds = start["open"] + start["first batch"]
    tables = [
        table(
            f"The quickstart's input and its device: {rows} rows of {length}",
            ["", "batches/s", "rows/s", "tokens/s"],
            speeds,
        ),
        table(
            "A start from the cache",
            ["what", "documents", "seconds"],
            [
                ["prepare", start["documents"], start["open"]],
                ["train_iterator and the first batch", start["documents"], start["first batch"]],
                ["packing examples into rows", start["documents"], start["pack"]],
            ],
        ),
    ]
    return tables, [
        at_least("times as fast as the device", rates["placed"] / rates["steps"], LEAST_TIMES),
        at_most("seconds of a start from the cache, text", seconds, MOST_SECONDS),
        at_most("seconds of a start from the cache, examples", seconds + start["pack"], MOST_SECONDS),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.documents < 1000:
        parser.error("--documents: expected 1,000 or more")
    return finish("data", *judge(measure_rates(), reopen(arguments.documents)), arguments)


if __name__ == "__main__":
    raise SystemExit(main())
