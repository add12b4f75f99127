"""trainfw: the program of a recipe, stepped as its training loop does."""

from __future__ import annotations

import itertools
import json
from importlib.metadata import version
from pathlib import Path

from turns import Turns, read_work

TURNS, WORK = Turns(), read_work()


def main() -> None:
    from trainfw import backends

    backends.prepare()

    import jax
    import numpy as np

    from trainfw import load_recipe
    from trainfw.program import build_program

    TURNS.say("imported", versions={name: version(name) for name in ("trainfw", "jax", "flax", "optax")})
    recipe = {
        "name": "peers",
        "model": {"from": WORK["weights"]},
        "data": {"sequence_length": WORK["length"], "mask_documents": False},
        "train": {"global_batch_size": WORK["rows"], "compute_dtype": WORK["dtype"], **WORK["train"]},
        "optimizer": {"name": "adamw", "schedule": "constant", **WORK["optimizer"]},
    }
    file = Path(WORK["directory"]) / "recipe.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    backends.keep_freed_memory()  # as `train` does
    program = build_program(load_recipe(file), jax.devices()[:1])
    step, state = program.compile_train_step(), program.init()
    TURNS.say("built", parameters=program.num_parameters)
    rows = np.load(WORK["batches"])["rows"]
    whole = {"segment_ids": np.ones, "loss_mask": np.ones}
    for batch in itertools.cycle(rows):
        tokens, targets = batch[:, :-1], batch[:, 1:]
        arrays = {"tokens": tokens, "targets": targets}
        arrays |= {"positions": np.broadcast_to(np.arange(WORK["length"]), tokens.shape)}
        arrays |= {name: make(tokens.shape) for name, make in whole.items()}
        placed = program.shard_batch({n: a.astype(program.abstract_batch[n].dtype) for n, a in arrays.items()})
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, placed)
        jax.block_until_ready(state)
        TURNS.done(metrics["loss"].value())


main()
