"""Parameters and the layers that own them: linear maps, the embedding, norms and the gated feed-forward."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trainfw.models.common.matmul import Frozen, dense, frozen_product, matmul
from trainfw.models.decoder.config import Activation
from trainfw.parallel import SPLIT_RULES, all_reduce, axis_index, axis_size, gather_weight, scatter_sequence
from trainfw.quantization import Quantized

M = TypeVar("M", bound=nnx.Module)

PRODUCT = "what a linear map returns"
"""Name for policies of `jax.checkpoint`: in the compute dtype and with the adapter's part added, where the products
inside may have wider results, and two."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, axes: tuple[str, ...], **metadata: bool) -> nnx.Param:
    """A parameter drawn from N(0, std²), in f32, whose dims carry the logical names `axes`.

    `wide=True` among the metadata: it is used in f32 as well.
    """
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes, **metadata)


def gather_weights(params: nnx.State, dtype: jnp.dtype, num_kv_heads: int | None = None) -> nnx.State:
    """The weights of a module as it uses them: in `dtype` but for wide ones, whole but for what stays split.

    Frozen ones are widened no sooner than in their product. Those of a stack may be one layer's, without the layers
    dim. `num_kv_heads` is that of `gather_weight`.
    """

    def gathered(weight: nnx.Variable) -> nnx.Variable:
        value, axes, wide = weight.get_value(), weight.axes, weight.get_metadata().get("wide", False)
        first = jax.tree.leaves(value)[0]
        kept = wide or (isinstance(weight, Frozen) and first.dtype.itemsize <= jnp.dtype(dtype).itemsize)
        return weight.replace(
            gather_weight(value, axes[-first.ndim :], None if kept else dtype, num_kv_heads=num_kv_heads)
        )

    return nnx.from_flat_state([(path, gathered(weight)) for path, weight in nnx.to_flat_state(params)])


def gathered(module: M, dtype: Any) -> M:
    """The module with its weights as `gather_weights` makes them."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, gather_weights(state, jnp.dtype(dtype)))


def gathered_array(weight: nnx.Variable, dtype: jnp.dtype) -> jax.Array:
    """Return a weight by itself as `gather_weights` makes it."""
    ((_, whole),) = nnx.to_flat_state(gather_weights(nnx.State({"weight": weight}), dtype))
    return whole.get_value()


_matmul_fp8 = functools.partial(matmul, fp8=True)
FewRows: TypeAlias = Callable[..., jax.Array]
"""Product of x (..., in) and a weight in the form that serving gives it: (x, array) or (x, codes, scales) -> f32."""


def of_few_rows(product: FewRows, x: jax.Array, weight: jax.Array | Quantized) -> jax.Array:
    """Return `product` of x and a weight as it is kept, f32."""
    if isinstance(weight, Quantized):
        return product(x, weight.codes, weight.scales.reshape(-1))
    return product(x, weight)


def adapted_product(
    linear: Linear | Any,
    product: Callable[..., jax.Array],
    x: jax.Array,
    *others: Any,
    fp8: bool = False,
    few_rows: FewRows | None = None,
) -> jax.Array:
    """`product(x, kernel, *others)` with the kernel of `linear`, whatever it is kept as, and through its adapter.

    `fp8`: the product with the kernel, but not those of the adapter, is of 8 bits; `few_rows`: it is that one.
    """
    kernel, own = linear.kernel.get_value(), _matmul_fp8 if fp8 else product
    if few_rows is not None:
        y = of_few_rows(few_rows, x, kernel).astype(x.dtype)
    elif isinstance(linear.kernel, Frozen):
        y = frozen_product(own, x, kernel, *others)
    else:
        y = own(x, kernel.astype(x.dtype), *others)
    return y if linear.adapter is None else linear.adapter(product, x, y, kernel, *others)


@jax.custom_vjp
def add_bias(y: jax.Array, bias_F: jax.Array) -> jax.Array:
    """y + bias, in the dtype of y; the bias's gradient is summed over all rows in f32."""
    return y + bias_F.astype(y.dtype)


def _bias_backward(bias_F: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    total_F = jnp.sum(dy, axis=tuple(range(dy.ndim - 1)), dtype=jnp.float32)
    return dy, total_F.astype(bias_F.dtype)


add_bias.defvjp(lambda y, bias_F: (add_bias(y, bias_F), bias_F), _bias_backward)


class Linear(nnx.Module):
    """y = x @ kernel (+ bias). The kernel is a matrix (in, out), cast to the dtype of x where it is used.

    Where its rows are split over `tensor`, y is a part of the sum, and so is the bias that it holds.
    """

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
        self.partial = SPLIT_RULES.get(axes[0]) == ("tensor",)
        bias_axis = "norm" if self.partial else axes[1]
        self.bias = nnx.Param(jnp.zeros(shape[1], jnp.float32), axes=(bias_axis,)) if bias else None
        self.adapter: Any = nnx.data(None)
        self.fp8 = False
        """True where the product is of 8 bits."""
        self.few_rows: FewRows | None = None
        """Product for serving, in place of `matmul`, of a kernel in the form that it takes."""
        self.joined: tuple[int, ...] = ()
        """Widths of the maps whose kernels this one holds (`together`), its own first; empty: its own alone."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.biased(adapted_product(self, matmul, x, fp8=self.fp8, few_rows=self.few_rows))

    def biased(self, y: jax.Array) -> jax.Array:
        """Return what `__call__` does of the product."""
        if self.bias is not None:
            bias = self.bias[...]
            y = add_bias(y, bias / axis_size("tensor") if self.partial and axis_size("tensor") > 1 else bias)
        return checkpoint_name(y, PRODUCT)


def together(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """Apply linear maps of the same inputs; where the first one's kernel holds those of all, by one product."""
    first = linears[0]
    if not first.joined:
        return [linear(x) for linear in linears]
    y = adapted_product(first, matmul, x, few_rows=first.few_rows)
    parts = jnp.split(y, list(itertools.accumulate(first.joined[:-1])), axis=-1)
    return [linear.biased(part) for linear, part in zip(linears, parts, strict=True)]


class Embedding(nnx.Module):
    """The token table, f32[V, D]; with tied embeddings the output head too."""

    def __init__(self, vocab_size: int, hidden_size: int, *, std: float, rngs: nnx.Rngs):
        self.table = normal(rngs, (vocab_size, hidden_size), std, ("vocab", "embed"))
        self.adapter: Any = nnx.data(None)

    def __call__(self, tokens_BS: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """x_BSD, its sequence split over `tensor`.

        A token outside the vocabulary reads the nearest row: check data where it is made.
        """
        x_BSD = lookup(self.table, tokens_BS)
        if self.adapter is not None:
            x_BSD = self.adapter(tokens_BS, x_BSD)
        return scatter_sequence(x_BSD.astype(dtype))


def lookup(table: nnx.Variable, tokens_BS: jax.Array) -> jax.Array:
    """Rows of a table (V, n) whose rows are split over `tensor`: f32, zeros for those that are another device's."""
    # Looked up in f32, so that the gradients of a frequent token add up in f32.
    table_Vn = gather_weight(table.get_value(), table.axes)
    count = table_Vn.shape[0]
    # Every device looks up the tokens that are among its rows of the table.
    rows_BS = tokens_BS - axis_index("tensor") * count
    # Of each array, where the table is kept as several.
    taken = jax.tree.map(lambda part: jnp.take(part, rows_BS, axis=0, mode="clip"), table_Vn)
    x_BSn = dense(taken, jnp.float32)
    if axis_size("tensor") == 1:
        return x_BSn
    return jnp.where(((rows_BS >= 0) & (rows_BS < count))[..., None], x_BSn, 0.0)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dim, in f32, back to the dtype of x. Zhang & Sennrich, arXiv:1910.07467.

    Args:
        zero_centered: the scale is kept as its offset from 1.
        axis: names the last dim where it is split over `tensor`: the mean is then that of all its parts.
        multiplier: of what is returned.
    """

    def __init__(
        self, size: int, *, eps: float, zero_centered: bool = False, axis: str = "norm", multiplier: float = 1.0
    ):
        self.eps, self.zero_centered, self.split = eps, zero_centered, axis != "norm"
        self.multiplier = multiplier
        scale = jnp.full(size, 0.0 if self.zero_centered else 1.0, jnp.float32)
        self.scale = nnx.Param(scale, axes=(axis,), wide=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        if self.split:
            square = all_reduce(square, "tensor") / axis_size("tensor")
        wide = wide * jax.lax.rsqrt(square + self.eps)
        wide = wide * (self.scale[...] + float(self.zero_centered))
        return (wide if self.multiplier == 1 else wide * self.multiplier).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gate_with(activation: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) * up, in f32, back to their dtype; the backward pass keeps the two, in that dtype.

    Rounded after every operation, bfloat16 would cost a CPU a pass for every rounding.
    """
    wide = gate.astype(jnp.float32)
    wide = jax.nn.silu(wide) if activation == "silu" else jax.nn.gelu(wide, approximate=True)
    return (wide * up.astype(jnp.float32)).astype(gate.dtype)


def _gate_backward(
    activation: Activation, kept: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, transpose = jax.vjp(functools.partial(gate_with.fun, activation), *kept)
    return transpose(cotangent)


gate_with.defvjp(lambda activation, *kept: (gate_with(activation, *kept), kept), _gate_backward)


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)). Shazeer, arXiv:2002.05202.

    Its width is split over `tensor`: each device returns a part of the sum.
    """

    TOGETHER: ClassVar = ("gate", "up")
    """Linear maps of the same inputs."""

    def __init__(self, hidden_size: int, width: int, *, activation: Activation, std: float, rngs: nnx.Rngs):
        size = (hidden_size, width)
        self.activation = activation
        self.gate = Linear(size, ("embed", "mlp"), std=std, rngs=rngs)
        self.up = Linear(size, ("embed", "mlp"), std=std, rngs=rngs)
        self.down = Linear(size[::-1], ("mlp", "embed"), std=std, rngs=rngs)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return self.down(gate_with(self.activation, *together(x_BSD, self.gate, self.up)))
