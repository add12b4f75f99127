"""Modules of adapters: LoRA, rsLoRA and DoRA, and a bank of several of which each row takes one."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trainfw.models import PRODUCT, active_inputs, dense, frozen_product, lookup, wide_einsum
from trainfw.parallel import all_reduce, axis_index, gather_weight
from trainfw.quantization import Quantized

Product = Callable[..., jax.Array]
"""Function of x, a kernel and what else a linear map hands on."""
Kernel = jax.Array | Quantized


class LoRA(nnx.Module):
    """A low-rank update: y + s (x A) B; with a magnitude m, by columns, (m / |W + s A B|) (y + s (x A) B).

    A and B are stacked like the kernel, over layers and experts. Their dims have the kernel's names, and the rank none,
    so that they are split and gathered like the kernel. Where the kernel's inputs are split, x A is a partial sum like
    y, and so is its product with B.
    """

    def __init__(
        self, a: nnx.Param, b: nnx.Param, magnitude: nnx.Param | None, *, scale: float, dropout: float, name: str
    ):
        self.lora_a, self.lora_b, self.magnitude = a, b, nnx.data(magnitude)
        self.scale, self.dropout, self.salt = scale, dropout, zlib.crc32(name.encode())

    def __call__(self, product: Product, x: jax.Array, y: jax.Array, kernel: Kernel, *others: object) -> jax.Array:
        dropped = self._dropout(x)
        a, b = (part[...].astype(x.dtype) for part in (self.lora_a, self.lora_b))
        narrow = checkpoint_name(product(dropped, a, *others) * self.scale, PRODUCT)
        update = product(narrow, b, *others)
        if self.magnitude is None:
            return y + update
        factor = self._factor(kernel).astype(y.dtype)
        if dropped is x:
            return factor * (y + update)
        # The direction is trained on the inputs that are left, as in PEFT.
        return y + (factor - 1) * frozen_product(product, dropped, kernel, *others) + factor * update

    def _dropout(self, x: jax.Array) -> jax.Array:
        part = axis_index("tensor") if self._splits_inputs else jnp.int32(0)
        if not self.dropout or (key := active_inputs().draws(self.salt, part)) is None:
            return x
        mask = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
        return jnp.where(mask, x / (1.0 - self.dropout), jnp.zeros((), x.dtype))

    @property
    def _splits_inputs(self) -> bool:
        return self.lora_a.axes[-2] in ("heads", "mlp")  # split over `tensor` in a product

    def _factor(self, kernel: Kernel) -> jax.Array:
        """Return m / |W + s A B| of each column, f32; only m has a gradient (arXiv:2402.09353, section 4.3)."""
        assert self.magnitude is not None
        wide = jax.lax.stop_gradient(dense(kernel, jnp.float32) + self.delta())
        square = jnp.sum(jnp.square(wide), axis=-2)
        if self._splits_inputs:
            square = all_reduce(square, "tensor")
        return self.magnitude[...].astype(jnp.float32) / jnp.sqrt(square)

    def delta(self) -> jax.Array:
        """Return s A B, f32 (..., in, out)."""
        a, b = (part[...].astype(jnp.float32) for part in (self.lora_a, self.lora_b))
        return self.scale * jnp.matmul(a, b)

    def merged(self, kernel: jax.Array) -> jax.Array:
        """Return a kernel with the adapter added, in the dtype of `kernel`: alone it computes the same."""
        wide = kernel.astype(jnp.float32) + self.delta()
        if self.magnitude is not None:
            wide = wide * self._factor(kernel)[..., None, :]
        return wide.astype(kernel.dtype)


class EmbeddingLoRA(nnx.Module):
    """A low-rank update of an embedding: x + s A[tokens] B for a table's rows x; A (V, r), B (r, D)."""

    def __init__(self, a: nnx.Param, b: nnx.Param, *, scale: float):
        self.lora_a, self.lora_b, self.scale = a, b, scale

    def __call__(self, tokens_BS: jax.Array, x_BSD: jax.Array) -> jax.Array:
        b_rD = gather_weight(self.lora_b.get_value(), self.lora_b.axes)
        return x_BSD + jnp.matmul(lookup(self.lora_a, tokens_BS) * self.scale, b_rD).astype(x_BSD.dtype)

    def merged(self, table: jax.Array) -> jax.Array:
        """Return the table with the adapter added, in its dtype: alone it gives the same rows."""
        update = self.scale * jnp.matmul(self.lora_a[...], self.lora_b[...])
        return (table.astype(jnp.float32) + update).astype(table.dtype)


class Bank(nnx.Module):
    """N adapters of one linear map, for generation; each row of x (B, ..., in) takes one (`AdapterInputs.rows_B`).

    A row's result depends on its own adapter alone.

    Args:
        a, b: (in, N, r) and (N, r, out), those of lower rank padded with zeros; b includes the scales.
        factor: (N, out), multiplies y and the update; 1 except for DoRA.
    """

    def __init__(self, a: nnx.Variable, b: nnx.Variable, factor: nnx.Variable | None):
        self.a, self.b, self.factor = a, b, nnx.data(factor)

    def __call__(self, product: Product, x: jax.Array, y: jax.Array, kernel: Kernel, *others: object) -> jax.Array:
        rows_B = active_inputs().rows_B
        assert rows_B is not None, "a bank of adapters is asked without rows"
        a, b = (part[...].astype(x.dtype) for part in (self.a, self.b))
        x_BSi, count = x.reshape(x.shape[0], -1, x.shape[-1]), b.shape[0]
        if x_BSi.shape[0] > 1 and count <= 2 * x_BSi.shape[0]:
            # All adapters of all rows, as products of matrices: to pick out each row's own takes longer than that.
            of_all = wide_einsum("bsi,inr->bsnr", x_BSi, a)
            own_BN = (jnp.arange(count) == jnp.clip(rows_B, 0, count - 1)[:, None])[:, None, :, None]
            update = wide_einsum("bsnr,nro->bso", jnp.where(own_BN, of_all, 0).astype(x.dtype), b)
        else:
            narrow = wide_einsum("bsi,ibr->bsr", x_BSi, _of_rows(a, rows_B, 1))
            update = wide_einsum("bsr,bro->bso", narrow.astype(x.dtype), _of_rows(b, rows_B, 0))
        y = y + update.astype(y.dtype).reshape(y.shape)
        if self.factor is None:
            return y
        factor = _of_rows(self.factor[...], rows_B, 0).astype(y.dtype)
        return y * factor.reshape(factor.shape[0], *(1,) * (y.ndim - 2), -1)


def _of_rows(x: jax.Array, rows_B: jax.Array, axis: int) -> jax.Array:
    if rows_B.shape[0] == 1:  # no gather, which XLA's CPU backend does number by number
        return jax.lax.dynamic_slice_in_dim(x, rows_B[0], 1, axis)
    return jnp.take(x, rows_B, axis=axis, mode="clip")
