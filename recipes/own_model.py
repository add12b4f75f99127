"""A model of your own, of Flax NNX modules, in trainfw's loop.

python recipes/own_model.py [RECIPE] [KEY=VALUE]...
"""

import sys

from trainfw import backends

backends.prepare()  # the backend's environment comes before anything imports jax

import jax.numpy as jnp
from flax import nnx

import trainfw
from trainfw.models import MLP, Embedding, Family, LanguageModel, Limit, Linear, RMSNorm, TokenFamilyConfig, init_stack


class Shift(nnx.Module):
    """A layer that sees a token and the one before it in its document. Parameters name their dims: `embed`, `mlp`."""

    def __init__(self, size, rngs):
        self.norm, self.mlp_norm = RMSNorm(size, eps=1e-5), RMSNorm(size, eps=1e-5)
        self.mix = Linear((2 * size, size), ("mlp", "embed"), std=0.05, rngs=rngs)
        self.mlp = MLP(size, 4 * size, activation="silu", std=0.05, rngs=rngs)

    def __call__(self, x_BSD, places):
        h_BSD = self.norm(x_BSD)
        before_BSD = jnp.where((places.positions_BS > 0)[..., None], jnp.roll(h_BSD, 1, axis=1), 0)
        x_BSD = x_BSD + self.mix(jnp.concatenate([h_BSD, before_BSD], axis=-1))
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


class Shifts(Family):
    """Kind of model, as trainfw asks for one: its config, how it is made, what divides over devices, its FLOPs."""

    config = TokenFamilyConfig

    def build(self, config, options, rngs):
        model, size = LanguageModel(config, options), config.hidden_size  # which scans, recomputes and shards layers
        model.embedding = Embedding(config.vocab_size, size, std=0.05, rngs=rngs)
        model.layers = init_stack(lambda rngs: Shift(size, rngs), config.num_layers, rngs)
        model.final_norm, model.head = RMSNorm(size, eps=1e-5), None  # the head is the embedding's table
        return model

    def limits(self, config):
        yield Limit("hidden_size", config.hidden_size, "embed")

    def flops_per_token(self, config, sequence_length):
        return 6.0 * config.hidden_size * (14 * config.num_layers * config.hidden_size + config.vocab_size)


if __name__ == "__main__":
    path, *overrides = sys.argv[1:] or ["quickstart", "name=own-model"]
    recipe = trainfw.load_recipe(path, overrides)
    shape = {"hidden_size": 64, "num_layers": 4, "vocab_size": recipe.model.vocab_size}
    trainfw.train(trainfw.load_recipe(recipe, {"model": {"family": "own_model:Shifts", **shape}}))
