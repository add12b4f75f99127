"""An optimizer of your own in trainfw's loop: any Optax transformation.

    python recipes/own_optimizer.py [RECIPE] [KEY=VALUE]...

A recipe can name one too: `optimizer: {name: "optax:sgd", options: {momentum: 0.9}}`.
"""

import functools
import sys

from trainfw import backends

backends.prepare()  # the backend's environment comes before anything imports jax

import jax
import jax.numpy as jnp
import optax

import trainfw


def signs(learning_rate, *, momentum):
    """Signs of a running mean of gradients. `learning_rate` is the recipe's schedule: a rate by step."""
    return optax.chain(
        optax.trace(momentum),
        optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates)),
        optax.scale_by_learning_rate(learning_rate),
    )


if __name__ == "__main__":
    path, *overrides = sys.argv[1:] or ["quickstart", "name=own-optimizer", "optimizer.learning_rate=1e-4"]
    recipe = trainfw.load_recipe(path, overrides)
    # Gradients are clipped before (`optimizer.clip_norm`), and the state is sharded as the parameters are. Its options
    # are written into the run's recipe.yaml, and a run that goes on with others is refused.
    trainfw.train(recipe, optimizer=functools.partial(signs, momentum=0.9))
