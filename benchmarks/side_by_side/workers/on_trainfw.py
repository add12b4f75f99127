"""trainfw: the program of a recipe, stepped as its training loop does.

The recipe is made of the work's own keys, or is the file that `recipe` names, with `overrides`; the batches may then be
larger than `peers.py`'s.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from turns import Turns, read_work, versions

TURNS, WORK = Turns(), read_work()


def main() -> None:
    from trainfw import backends

    backends.prepare()

    import jax
    import numpy as np

    from trainfw import load_recipe
    from trainfw.program import build_program

    TURNS.say("imported", versions=versions("trainfw", "jax", "flax", "optax"))
    backends.keep_freed_memory()  # as `train` does
    program = build_program(load_recipe(recipe_file(), WORK.get("overrides", ())), jax.devices()[:1])
    state, step = program.init(), program.compile_train_step()  # in the order of `train`
    TURNS.say("built", parameters=program.num_parameters)
    told = {"model_flops": program.flops_per_step, "device": jax.devices()[0].device_kind}
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
        memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")  # None on a CPU
        TURNS.done(metrics["loss"].value(), more={**told, "device_memory": memory})


def recipe_file() -> Path:
    if "recipe" in WORK:
        return Path(WORK["recipe"])
    recipe = {
        "name": "peers",
        "model": {"from": WORK["weights"]},
        "data": {"sequence_length": WORK["length"], "mask_documents": False},
        "train": {"global_batch_size": WORK["rows"], "compute_dtype": WORK["dtype"], **WORK["train"]},
        "optimizer": {"name": "adamw", "schedule": "constant", **WORK["optimizer"]},
    }
    file = Path(WORK["directory"]) / "recipe.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    return file


main()
