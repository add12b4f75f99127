"""A convolutional variational autoencoder of images, of the shape of diffusers' AutoencoderKL."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw.models.autoencoder.config import AutoencoderConfig
from trainfw.models.autoencoder.layers import (
    TO_BLOCK,
    WHOLE,
    Attention,
    Conv,
    Downsample,
    GroupNorm,
    Residual,
    Upsample,
    draw_kernels,
)
from trainfw.models.common.layers import gather_weights
from trainfw.models.family import ModelOptions
from trainfw.models.layer_stack import checkpointed


class Block(nnx.Module):
    """Modules that run one after the other, by the names under which their weights are kept."""

    def __init__(self, modules: dict[str, nnx.Module]):
        self.order = tuple(modules)
        for name, module in modules.items():
            setattr(self, name, module)

    def parts(self) -> list[nnx.Module]:
        """List the modules of this block, and of the blocks in it, in the order in which they run."""
        inner = [getattr(self, name) for name in self.order]
        return [part for module in inner for part in (module.parts() if isinstance(module, Block) else [module])]


class Output(nnx.Module):
    """The end of encoder and decoder: a norm, SiLU and a convolution."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        self.norm, self.conv = GroupNorm(inputs, groups), Conv(3, inputs, outputs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return self.conv(self.norm(x_BHWC, silu=True))


class Autoencoder(nnx.Module):
    """Images to latents, each of a mean and a variance, and latents to images.

    All its state is `nnx.Param`, in f32, with the logical names of its dims as `axes`. Devices have images of their
    own; weights that are kept split are gathered module by module.
    """

    def __init__(self, config: AutoencoderConfig, options: ModelOptions | None = None, *, rngs: nnx.Rngs):
        self.config, self.options = config, options or ModelOptions()
        latent = config.latent_channels
        self.encoder, self.decoder = _encoder(config, rngs), _decoder(config, rngs)
        self.quant_conv = Conv(1, 2 * latent, 2 * latent, split=WHOLE) if config.quant_conv else None
        self.post_quant_conv = Conv(1, latent, latent, split=WHOLE) if config.post_quant_conv else None
        draw_kernels(self, rngs)

    def encode(self, x_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(mean_BHWC, logvar_BHWC) of the latents of images in [-1, 1], f32: `config.reduction` times smaller."""
        modules = [*self.encoder.parts(), *([] if self.quant_conv is None else [self.quant_conv])]
        mean_BHWC, logvar_BHWC = jnp.split(self._run(modules, x_BHWC), 2, axis=-1)
        return mean_BHWC, jnp.clip(logvar_BHWC, -30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution does

    def decode(self, z_BHWC: jax.Array) -> jax.Array:
        """x_BHWC, f32: the images of latents as `encode` has them."""
        return self._run(
            [*([] if self.post_quant_conv is None else [self.post_quant_conv]), *self.decoder.parts()], z_BHWC
        )

    def scaled(self, z_BHWC: jax.Array) -> jax.Array:
        """The latents as a diffusion model takes them."""
        return (z_BHWC - self.config.shift_factor) * self.config.scaling_factor

    def unscaled(self, z_BHWC: jax.Array) -> jax.Array:
        """The latents of what a diffusion model has made."""
        return z_BHWC / self.config.scaling_factor + self.config.shift_factor

    def _run(self, modules: list[nnx.Module], x_BHWC: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.options.compute_dtype)

        def one(
            x_BHWC: jax.Array, weights: nnx.State, _shared: None, _own: None, graphdef: nnx.GraphDef[nnx.Module]
        ) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, gather_weights(weights, dtype))(x_BHWC), None

        step = checkpointed(one, self.options.remat, scanned=False)
        x_BHWC = x_BHWC.astype(dtype)
        for module in modules:
            graphdef, weights = nnx.split(module)
            x_BHWC, _ = step(x_BHWC, weights, None, None, graphdef)
        return x_BHWC.astype(jnp.float32)


def _encoder(config: AutoencoderConfig, rngs: nnx.Rngs) -> Block:
    blocks, groups, width = config.block_channels, config.norm_groups, config.block_channels[0]
    modules: dict[str, nnx.Module] = {"conv_in": Conv(3, config.channels, width, split=TO_BLOCK)}
    for number, channels in enumerate(blocks):
        inner = _residuals(config.layers_per_block, width, channels, groups)
        if number < len(blocks) - 1:
            inner["downsample"] = Downsample(channels)
        modules[f"down_{number}"], width = Block(inner), channels
    modules |= {"mid": _middle(config, rngs), "out": Output(width, 2 * config.latent_channels, groups)}
    return Block(modules)


def _decoder(config: AutoencoderConfig, rngs: nnx.Rngs) -> Block:
    blocks, groups, width = config.block_channels[::-1], config.norm_groups, config.block_channels[-1]
    modules = {"conv_in": Conv(3, config.latent_channels, width, split=TO_BLOCK), "mid": _middle(config, rngs)}
    for number, channels in enumerate(blocks):
        inner = _residuals(config.layers_per_block + 1, width, channels, groups)
        if number < len(blocks) - 1:
            inner["upsample"] = Upsample(channels)
        modules[f"up_{number}"], width = Block(inner), channels
    return Block(modules | {"out": Output(width, config.channels, groups)})


def _residuals(layers: int, inputs: int, outputs: int, groups: int) -> dict[str, nnx.Module]:
    return {f"residual_{i}": Residual(outputs if i else inputs, outputs, groups) for i in range(layers)}


def _middle(config: AutoencoderConfig, rngs: nnx.Rngs) -> Block:
    width, groups = config.block_channels[-1], config.norm_groups
    attention = {"attention": Attention(width, groups, rngs)} if config.mid_attention else {}
    first, last = (Residual(width, width, groups) for _ in range(2))
    return Block({"residual_0": first, **attention, "residual_1": last})
