"""Parameters and the layers that own them: linear maps, the embedding, norms and the gated feed-forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw.models.config import Activation, ModelConfig
from trainfw.parallel import all_reduce, axis_index, axis_size, gather_weight, reduce_scatter


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, axes: tuple[str, ...], **metadata: bool) -> nnx.Param:
    """A parameter drawn from N(0, std²), in f32, whose dims carry the logical names `axes`.

    `wide=True` among the metadata: it is used in f32 as well.
    """
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes, **metadata)


def gather_weights(params: nnx.State, dtype: jnp.dtype, config: ModelConfig) -> nnx.State:
    """The weights of a module as it uses them: in `dtype` but for wide ones, whole but for what stays split.

    Those of a stack may be one layer's, without the layers dim.
    """

    def gathered(weight: nnx.Variable) -> nnx.Variable:
        value, axes, wide = weight.get_value(), weight.axes, weight.get_metadata().get("wide", False)
        ndim = jax.tree.leaves(value)[0].ndim
        return weight.replace(
            gather_weight(value, axes[-ndim:], None if wide else dtype, num_kv_heads=config.num_kv_heads)
        )

    return nnx.from_flat_state([(path, gathered(weight)) for path, weight in nnx.to_flat_state(params)])


class Linear(nnx.Module):
    """y = x @ kernel (+ bias). The kernel is a matrix (in, out), cast to the dtype of x where it is used."""

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str, str],
        *,
        std: float,
        bias: bool = False,
        wide: bool = False,
        rngs: nnx.Rngs,
    ):
        self.kernel = normal(rngs, shape, std, axes, wide=wide)
        self.bias = nnx.Param(jnp.zeros(shape[1], jnp.float32), axes=axes[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.matmul(x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embedding(nnx.Module):
    """The token table, f32[V, D]; with tied embeddings the output head too."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.table = normal(rngs, (config.vocab_size, config.hidden_size), config.init_std, ("vocab", "embed"))

    def __call__(self, tokens_BS: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """x_BSD, its sequence split over `tensor`.

        A token outside the vocabulary reads the nearest row: check data where it is made.
        """
        # Looked up in f32, so that the gradients of a frequent token add up in f32.
        table_VD = gather_weight(self.table.get_value(), self.table.axes)
        if axis_size("tensor") == 1:
            return jnp.take(table_VD, tokens_BS, axis=0, mode="clip").astype(dtype)
        # Every device looks up the tokens that are among its rows of the table.
        rows_BS = tokens_BS - axis_index("tensor") * table_VD.shape[0]
        mine_BS = (rows_BS >= 0) & (rows_BS < table_VD.shape[0])
        x_BSD = jnp.where(mine_BS[..., None], jnp.take(table_VD, rows_BS, axis=0, mode="clip"), 0.0)
        return reduce_scatter(x_BSD.astype(dtype), "tensor", 1)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dim, in f32, back to the dtype of x. Zhang & Sennrich, arXiv:1910.07467.

    `axis` names the last dim where it is split over `tensor`: the mean is then that of all its parts.
    """

    def __init__(self, size: int, config: ModelConfig, axis: str = "norm"):
        self.eps, self.zero_centered, self.split = config.norm_eps, config.zero_centered_norm, axis != "norm"
        scale = jnp.full(size, 0.0 if self.zero_centered else 1.0, jnp.float32)
        self.scale = nnx.Param(scale, axes=(axis,), wide=True)

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
    """down(activation(gate(x)) * up(x)). Shazeer, arXiv:2002.05202.

    Its width is split over `tensor`: each device returns a part of the sum.
    """

    def __init__(self, config: ModelConfig, *, width: int | None = None, rngs: nnx.Rngs):
        size, std = (config.hidden_size, width or config.intermediate_size), config.init_std
        self.activation = config.activation
        self.gate = Linear(size, ("embed", "mlp"), std=std, rngs=rngs)
        self.up = Linear(size, ("embed", "mlp"), std=std, rngs=rngs)
        self.down = Linear(size[::-1], ("mlp", "embed"), std=std, rngs=rngs)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return self.down(activate(self.activation, self.gate(x_BSD)) * self.up(x_BSD))
