"""Layers of convolutional models of images: height and width before channels, weights gathered by who runs them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trainfw.models.common.layers import PRODUCT, Linear

EPSILON = 1e-6
"""Added to the variance in norms, as diffusers' autoencoders do."""
FROM_BLOCK, TO_BLOCK, WHOLE = ("embed", "channels"), ("channels", "embed"), ("channels", "channels")
"""Names of a kernel's dims of channels; `ImageAutoencoder.dims` declares those that are not the decoders'."""
Pads = tuple[tuple[int, int], tuple[int, int]]


class Conv(nnx.Module):
    """A convolution of a square window (height, width, in, out) and a bias. `draw_kernels` draws it.

    Args:
        split: names of the kernel's dims of channels: `embed` is one of a block's, which divides over devices. Images
            and latents have too few.
    """

    def __init__(
        self,
        window: int,
        inputs: int,
        outputs: int,
        *,
        split: tuple[str, str] = FROM_BLOCK,
        stride: int = 1,
        pads: Pads | None = None,
    ):
        half = window // 2
        self.stride, self.pads = stride, pads or ((half, half), (half, half))
        self.kernel = nnx.Param(jnp.zeros((window, window, inputs, outputs)), axes=("window", "window", *split))
        self.bias = nnx.Param(jnp.zeros(outputs), axes=("norm",))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y_BHWC = jax.lax.conv_general_dilated(
            x_BHWC,
            self.kernel[...].astype(x_BHWC.dtype),
            (self.stride, self.stride),
            self.pads,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return checkpoint_name(y_BHWC + self.bias[...].astype(y_BHWC.dtype), PRODUCT)


def draw_kernels(model: nnx.Module, rngs: nnx.Rngs) -> None:
    """Draw the kernels of convolutions and linear maps evenly, as PyTorch does; the variance of what they make is a
    third of that of what they take. All in one draw: every one by itself takes XLA a fifth of a second to compile.
    """
    kernels = [part.kernel for _, part in nnx.iter_modules(model) if isinstance(part, (Conv, Linear))]
    shapes = [tuple(kernel.shape) for kernel in kernels]
    sizes = [math.prod(shape) for shape in shapes]
    drawn = jax.random.uniform(rngs.params(), (sum(sizes),), jnp.float32, -1.0, 1.0)
    for kernel, shape, values in zip(kernels, shapes, jax.lax.split(drawn, sizes), strict=True):
        kernel.set_value(values.reshape(shape) / math.sqrt(math.prod(shape[:-1])))


class GroupNorm(nnx.Module):
    """(x - mean) / std * scale + bias, of groups of channels in all places of an image; in f32. arXiv:1803.08494."""

    def __init__(self, channels: int, groups: int):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones(channels), axes=("norm",), wide=True)
        self.bias = nnx.Param(jnp.zeros(channels), axes=("norm",), wide=True)

    def __call__(self, x_BHWC: jax.Array, *, silu: bool = False) -> jax.Array:
        """Return it in the dtype of x; with `silu`, what SiLU makes of it."""
        wide_BHWC = x_BHWC.astype(jnp.float32)
        centred_BHWC = wide_BHWC - self._mean(wide_BHWC)
        inverse_B11C = jax.lax.rsqrt(self._mean(centred_BHWC * centred_BHWC) + EPSILON)
        y_BHWC = centred_BHWC * (inverse_B11C * self.scale[...]) + self.bias[...]
        return (jax.nn.silu(y_BHWC) if silu else y_BHWC).astype(x_BHWC.dtype)

    def _mean(self, x_BHWC: jax.Array) -> jax.Array:
        """Return the mean of each channel's group, [B, 1, 1, C]."""
        B, _, _, C = x_BHWC.shape
        # Places first: channels stay the last dim of what is large.
        of_groups_BGc = jnp.mean(x_BHWC, axis=(1, 2)).reshape(B, self.groups, -1)
        means_BGc = jnp.broadcast_to(jnp.mean(of_groups_BGc, axis=-1, keepdims=True), of_groups_BGc.shape)
        return means_BGc.reshape(B, 1, 1, C)


class Residual(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x by a map of each place where the number of channels changes."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        self.norm1, self.conv1 = GroupNorm(inputs, groups), Conv(3, inputs, outputs)
        self.norm2, self.conv2 = GroupNorm(outputs, groups), Conv(3, outputs, outputs)
        self.shortcut = Conv(1, inputs, outputs) if inputs != outputs else None

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y_BHWC = self.conv1(self.norm1(x_BHWC, silu=True))
        y_BHWC = self.conv2(self.norm2(y_BHWC, silu=True))
        return y_BHWC + (x_BHWC if self.shortcut is None else self.shortcut(x_BHWC))


class Downsample(nnx.Module):
    """Half the height and width, by a convolution that sees one place more below and to the right."""

    def __init__(self, channels: int):
        self.conv = Conv(3, channels, channels, stride=2, pads=((0, 1), (0, 1)))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return self.conv(x_BHWC)


class Upsample(nnx.Module):
    """Twice the height and width: every place four times, and a convolution."""

    def __init__(self, channels: int):
        self.conv = Conv(3, channels, channels)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        four_BHhWwC = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (B, H, 2, W, 2, C))
        return self.conv(four_BHhWwC.reshape(B, 2 * H, 2 * W, C))


class Attention(nnx.Module):
    """x + attention of one head between all places of an image."""

    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs):
        size = (channels, channels)
        self.norm = GroupNorm(channels, groups)
        self.query, self.key, self.value = (Linear(size, FROM_BLOCK, std=1.0, bias=True, rngs=rngs) for _ in range(3))
        self.output = Linear(size, FROM_BLOCK, std=1.0, bias=True, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h_BSC = self.norm(x_BHWC).reshape(x_BHWC.shape[0], -1, x_BHWC.shape[-1])
        q_BSC, k_BTC, v_BTC = self.query(h_BSC), self.key(h_BSC), self.value(h_BSC)
        scores_BST = jnp.einsum("bsc,btc->bst", q_BSC, k_BTC, preferred_element_type=jnp.float32)
        weights_BST = jax.nn.softmax(scores_BST / math.sqrt(x_BHWC.shape[-1]), axis=-1).astype(v_BTC.dtype)
        o_BSC = self.output(jnp.einsum("bst,btc->bsc", weights_BST, v_BTC))
        return x_BHWC + o_BSC.reshape(x_BHWC.shape)
