"""Parameters and the layers that own them: linear maps, the embedding, norms and the gated feed-forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw.models.config import Activation, ModelConfig
from trainfw.models.products import wide_einsum
from trainfw.parallel import all_reduce, axis_size, constrain, gather_weight


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, axes: tuple[str, ...]) -> nnx.Param:
    """A parameter drawn from N(0, std²), in f32, whose dims carry the logical names `axes`."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """y = x @ kernel (+ bias). The kernel is a matrix (in, out) in f32, cast to the dtype of x where it is used.

    `name` is the path of the layer's parameters, for errors.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        axes: tuple[str, str],
        *,
        std: float,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.name, self.axes = name, axes
        self.kernel = normal(rngs, shape, std, axes)
        self.bias = nnx.Param(jnp.zeros(shape[1], jnp.float32), axes=axes[1:]) if bias else None

    def __call__(self, x: jax.Array, *, wide: bool = False) -> jax.Array:
        """y in the dtype of x; in f32 where it is to be `wide`."""
        # Cast before gathering, so that what crosses the links has the smaller dtype.
        kernel = gather_weight(self.kernel[...].astype(x.dtype), f"{self.name}.kernel", *self.axes)
        y = wide_einsum("...d,df->...f", x, kernel) if wide else jnp.matmul(x, kernel)
        if self.bias is not None:
            y = y + gather_weight(self.bias[...].astype(y.dtype), f"{self.name}.bias", self.axes[1])
        return y


class Embedding(nnx.Module):
    """The token table, f32[V, D]; with tied embeddings the output head too."""

    axes = ("vocab", "embed")

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.table = normal(rngs, (config.vocab_size, config.hidden_size), config.init_std, self.axes)

    def __call__(self, tokens_BS: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """x_BSD. A token outside the vocabulary reads the nearest row: check data where it is made."""
        # Looked up in f32, so that the gradients of a frequent token add up in f32.
        table_VD = gather_weight(self.table[...], "embedding.table", *self.axes, lookup=True)
        return jnp.take(table_VD, tokens_BS, axis=0, mode="clip").astype(dtype)

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """The table as the output head: logits_BSV in f32."""
        table_VD = gather_weight(self.table[...].astype(x_BSD.dtype), "embedding.table", *self.axes)
        return wide_einsum("bsd,vd->bsv", x_BSD, table_VD)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dim, in f32, back to the dtype of x. Zhang & Sennrich, arXiv:1910.07467.

    `axis` names the last dim where it is split over `tensor`: the mean is then that of all its parts.
    """

    def __init__(self, size: int, config: ModelConfig, axis: str = "norm"):
        self.eps, self.zero_centered, self.split = config.norm_eps, config.zero_centered_norm, axis != "norm"
        self.scale = nnx.Param(jnp.full(size, 0.0 if self.zero_centered else 1.0, jnp.float32), axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        if self.split:
            square = all_reduce(square, "tensor") / axis_size("tensor")
        wide = wide * jax.lax.rsqrt(square + self.eps)
        return (wide * (self.scale[...] + float(self.zero_centered))).astype(x.dtype)


def activate(activation: Activation, x: jax.Array) -> jax.Array:
    """The gate's activation function."""
    return jax.nn.silu(x) if activation == "silu" else jax.nn.gelu(x, approximate=True)


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)). Shazeer, arXiv:2002.05202."""

    def __init__(self, config: ModelConfig, *, width: int | None = None, path: str = "layers.mlp", rngs: nnx.Rngs):
        size, std = (config.hidden_size, width or config.intermediate_size), config.init_std
        self.activation = config.activation
        self.gate = Linear(f"{path}.gate", size, ("embed", "mlp"), std=std, rngs=rngs)
        self.up = Linear(f"{path}.up", size, ("embed", "mlp"), std=std, rngs=rngs)
        self.down = Linear(f"{path}.down", size[::-1], ("mlp", "embed"), std=std, rngs=rngs)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        gate_BSF = activate(self.activation, self.gate(x_BSD))
        hidden_BSF = constrain(gate_BSF * self.up(x_BSD), "feed-forward", "batch", "sequence", "act_mlp")
        return self.down(hidden_BSF)
