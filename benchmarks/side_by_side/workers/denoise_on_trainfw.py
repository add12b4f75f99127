"""trainfw's diffusion transformer, from the work's weights: steps of training, or pictures drawn by its `denoise`."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from turns import Turns, read_work, versions

TURNS, WORK = Turns(), read_work()
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: WORK["threads"]])


def main() -> None:
    from trainfw import backends

    backends.prepare()

    import jax
    import numpy as np

    from trainfw import load_recipe
    from trainfw.interop import open_transformer
    from trainfw.program import build_program
    from trainfw.weights import named

    TURNS.say("imported", versions=versions("trainfw", "jax", "flax", "optax"))
    backends.keep_freed_memory()  # as `train` does
    program = build_program(load_recipe(recipe_file()), jax.devices()[:1])
    source = open_transformer(WORK["weights"])
    abstract = program.abstract_state.params
    read = [source.read(name, like) for name, like in named(abstract)]
    params = jax.tree.unflatten(jax.tree.structure(abstract), read)
    arrays = np.load(WORK["batches"])
    if WORK["task"] == "draw":
        draw(program, params, {name: arrays[name][0] for name in arrays.files})
    else:
        train(program, params, [{name: arrays[name][i] for name in arrays.files} for i in range(len(arrays["time"]))])


def train(program: Any, params: Any, batches: list[Any]) -> None:
    import dataclasses

    import jax

    state = dataclasses.replace(program.init(), params=params)
    del params
    step = program.compile_train_step()
    TURNS.say("built", parameters=program.num_parameters)
    for batch in itertools.cycle(batches):
        # With the work's noise, times and conditions in the place of the objective's own.
        placed = {name: jax.device_put(batch[name], like.sharding) for name, like in program.abstract_batch.items()}
        state, metrics = step(state, placed)
        jax.block_until_ready(state)
        TURNS.done(metrics["loss"].value(), more=time.process_time())


def draw(program: Any, params: Any, batch: Any) -> None:
    import jax
    import numpy as np

    from trainfw import sampling

    function = program.functions["denoise"]
    denoise, inputs = function.compile(), dict(function.arguments[2])
    arrays = batch | {"guidance": np.float32(WORK["guidance"])}
    given = {n: jax.device_put(arrays[n], like.sharding) for n, like in inputs.items() if n not in ("image", "time")}
    TURNS.say("built", parameters=program.num_parameters)

    def predict(image: Any, time_B: Any) -> Any:
        moved = {"image": image, "time": jax.device_put(time_B, inputs["time"].sharding)}
        return denoise(params, {}, given | moved)

    noise = jax.device_put(arrays["noise"], inputs["image"].sharding)
    schedule = program.objective.schedule
    for number in itertools.count():
        pictures = np.asarray(sampling.draw(predict, noise, schedule=schedule, steps=WORK["denoising_steps"]))
        if not number:
            np.save(WORK["pictures"], pictures)
        TURNS.done(None, more=time.process_time())


def recipe_file() -> Path:
    recipe = {
        "name": "diffusion",
        "model": WORK["model"],
        "data": {"format": "images", "source": "digits"},  # of which none is read
        "objective": {"name": "flow_matching", "drop_condition": 0.1},
        "train": {"global_batch_size": WORK["rows"], **WORK["train"]},
        "optimizer": {"name": "adamw", "schedule": "constant", "weight_decay_exclude": [], **WORK["optimizer"]},
    }
    file = Path(WORK["recipe"])
    file.write_text(json.dumps(recipe))  # JSON is YAML
    return file


main()
