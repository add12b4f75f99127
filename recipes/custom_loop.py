"""A training loop of your own: trainfw's pieces, your code around them.

    python recipes/custom_loop.py [RECIPE] [KEY=VALUE]...

The program, the data and the model are the ones `trainfw train` uses; this loop adds a metric of its own
(the model's accuracy at guessing the next token) and stops early.
"""

import sys

from trainfw import backends

# The backend's environment comes before anything imports jax. `prepare(8)` would simulate eight CPU devices.
backends.prepare()
backends.keep_freed_memory()  # of one step for the next, as `trainfw train` does

import jax
import jax.numpy as jnp

import trainfw
from trainfw.data import prepare, train_iterator
from trainfw.training import agree


def main(path: str = "quickstart", *overrides: str) -> None:
    # A recipe is typed and frozen: `recipe.train.steps` is an int, and a typo here is an error with its line.
    recipe = trainfw.load_recipe(path, overrides)

    # Tokenise once (later runs read the cache), then iterate over packed rows: dicts of (B, S) NumPy arrays.
    data = prepare(recipe.data)
    batches = train_iterator(data.train, recipe.data, global_batch_size=recipe.train.global_batch_size)

    # The program is everything jitted: how to make the state, one step, one evaluation, and all shardings.
    program = trainfw.build_program(recipe)
    # Of several processes: that all of them train the same program on the same data, which no loss would tell.
    agree(program, data)
    train_step = program.compile_train_step()  # with the backend's options, which `program.train_step` is without
    state = program.init()

    @jax.jit
    def accuracy(params, batch):
        logits_BSV = program.model(params)(
            batch["tokens"], segment_ids_BS=batch["segment_ids"], positions_BS=batch["positions"]
        )
        right_BS = (jnp.argmax(logits_BSV, axis=-1) == batch["targets"]) * batch["loss_mask"]
        return right_BS.sum() / batch["loss_mask"].sum()

    for step in range(1, recipe.train.steps + 1):
        batch = program.shard_batch(next(batches))
        state, metrics = train_step(state, batch)  # the old state is donated: do not use it again
        if step % recipe.train.log_every == 0:
            right = float(accuracy(state.params, batch))
            print(f"step {step}: loss {metrics['loss'].value():.3f}, right {right:.1%}")
            if right > 0.9:
                break

    # The model is an ordinary Flax module; its parameters are a nested dict of arrays.
    prompt = [data.tokenizer.bos_id, *data.tokenizer.encode("import ")]
    tokens = trainfw.generate(program.model(state.params), prompt, max_tokens=16, eos_id=data.tokenizer.eos_id)
    print("import " + data.tokenizer.decode(list(tokens)))
    batches.close()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except trainfw.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
