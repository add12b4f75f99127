"""One family of diffusion transformers; `DiTConfig` makes it DiT, PixArt or SD3."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainfw.errors import UserError
from trainfw.models.common.adapter_inputs import AdapterInputs, use_inputs
from trainfw.models.common.layers import Linear, gather_weights, gathered, gathered_array, normal
from trainfw.models.denoising import Condition
from trainfw.models.dit.config import DiTConfig
from trainfw.models.dit.family import TIME_FEATURES
from trainfw.models.dit.joint import JointLayer, Streams
from trainfw.models.dit.layers import (
    Conditions,
    DiTLayer,
    Modulation,
    Turns,
    glorot,
    linear,
    modulated,
    parts_of,
    table,
)
from trainfw.models.family import ModelOptions
from trainfw.models.layer_stack import StackedModel, checkpointed, init_stack
from trainfw.parallel import all_gather, all_reduce, axis_index, axis_size

FINAL_EPS = 1e-6
"""Added to the variance in the final norm, in every published model."""
_LONGEST_PERIOD = 10_000.0


class TwoMaps(nnx.Module):
    """output(activation(input(x))), with biases: of times (silu), of captions (gelu), of their vectors (silu).

    Its width is split over `tensor` where `split` says so, and its devices add up what each makes of its part.
    """

    def __init__(self, size: int, hidden_size: int, std: float, rngs: nnx.Rngs, *, split: bool = False):
        self.split, inner = split, "mlp" if split else "hidden"
        self.input = linear((size, hidden_size), ("features", "mlp" if split else "embed"), rngs, std)
        self.output = linear((hidden_size, hidden_size), (inner, "embed"), rngs, std)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.input(x)
        y = jax.nn.gelu(y, approximate=True) if self.split else jax.nn.silu(y)
        return all_reduce(self.output(y), "tensor") if self.split else self.output(y)


class Final(nnx.Module):
    """A modulated norm and the map to patches, both zero at first.

    The modulation is a layer's: made of the condition, or a table added to it.
    """

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        D, out = config.hidden_size, config.patch_size**2 * config.out_channels
        cross, self.scale_first = config.conditioning == "cross", config.conditioning == "joint"  # as published
        self.modulation = None if cross else linear((D, 2 * D), ("embed", "hidden"), rngs, 0.0)
        self.table = table(2, D, rngs) if cross else None
        self.output = linear((D, out), ("embed", "patch"), rngs, 0.0)

    def __call__(self, x_BSD: jax.Array, condition_BD: jax.Array) -> jax.Array:
        if self.modulation is not None:
            parts = parts_of(self.modulation(jax.nn.silu(condition_BD).astype(x_BSD.dtype)), 2)
            shift, scale = parts[::-1] if self.scale_first else parts
        else:
            assert self.table is not None
            shift, scale = (row + condition_BD[:, None] for row in jnp.split(self.table[...], 2))
        return self.output(modulated(x_BSD, shift, scale, FINAL_EPS)).astype(jnp.float32)


class DiT(StackedModel):
    """Noised images to predictions, of the shape that the config says: a `DenoisingModel`.

    All its state is `nnx.Param`, in f32, with the logical names of its dims as `axes`.
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig, options: ModelOptions | None = None, *, rngs: nnx.Rngs):
        super().__init__(config, options or ModelOptions())
        D, std = config.hidden_size, config.init_std
        size = (config.patch_size**2 * config.channels, D)
        self.patch = Linear(size, ("patch", "embed"), std=glorot(size), bias=True, rngs=rngs)
        self.time = TwoMaps(TIME_FEATURES, D, std, rngs)
        classes = config.num_classes
        self.classes = None if classes is None else normal(rngs, (classes + 1, D), std, ("classes", "embed"))
        cross, joint = config.conditioning == "cross", config.conditioning == "joint"
        self.caption = _caption(config, rngs)
        self.pooled = TwoMaps(config.pooled_size or 0, D, std, rngs) if joint else None
        self.modulation = linear((D, 6 * D), ("embed", "mlp"), rngs, std) if cross else None
        layer = JointLayer if joint else DiTLayer
        self.layers = init_stack(lambda rngs: layer(config, rngs), len(config.layer_kinds), rngs)
        self.last = JointLayer(config, rngs, last=True) if joint else None
        """The layer after those that are stacked, which is of another shape."""
        if self.options.matmul_dtype == "fp8":
            _in_8_bits(self.layers, self.last)
        self.final = Final(config, rngs)

    def patches(self, x_BHWC: jax.Array) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        p = self.config.patch_size
        x = x_BHWC.reshape(B, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5)
        return own_part(x.reshape(B, -1, p * p * C))

    def unpatched(self, x_BSO: jax.Array) -> jax.Array:
        x_BSO = all_gather(all_gather(x_BSO, "tensor", 1), "context", 1)
        p, grid = self.config.patch_size, self.config.grid
        x = x_BSO.reshape(-1, grid, grid, p, p, x_BSO.shape[-1] // p**2).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(x.shape[0], grid * p, grid * p, -1)

    def forward(
        self, x_BHWC: jax.Array, time_B: jax.Array, condition: Condition, *, adapters: AdapterInputs | None = None
    ) -> jax.Array:
        with use_inputs(adapters):
            return self._forward(x_BHWC, time_B, condition, adapters)

    def _forward(
        self, x_BHWC: jax.Array, time_B: jax.Array, condition: Condition, adapters: AdapterInputs | None
    ) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.compute_dtype)
        x_BSD = gathered(self.patch, dtype)(self.patches(x_BHWC).astype(dtype))
        if config.positions == "sincos":
            x_BSD = (x_BSD.astype(jnp.float32) + own_part(positions(config)[None])).astype(dtype)
        condition_BD = self.condition(time_B, condition)
        side = self._side(condition_BD, condition, dtype)
        turns = self._turns() if config.positions == "rotary" else None
        streams: Any = x_BSD
        if self.last is not None:
            streams, side = (x_BSD, side.caption_BTD), replace(side, caption_BTD=None)
        streams, _ = self.stack.run(streams, side, lambda side: replace(side, turns=turns), adapters=adapters)
        x_BSD = streams if self.last is None else self._ended(self.last, streams, replace(side, turns=turns))
        return gathered(self.final, dtype)(x_BSD, condition_BD)

    def _ended(self, last: JointLayer, streams: Streams, conditions: Conditions) -> jax.Array:
        graphdef, weights = nnx.split(last)
        dtype = jnp.dtype(self.compute_dtype)

        def step(streams: Streams, weights: nnx.State, conditions: Conditions, own: None, kind: None) -> jax.Array:
            return nnx.merge(graphdef, gather_weights(weights, dtype))(streams, conditions)[0]

        run = checkpointed(step, self.options.remat, scanned=False)
        x_BSD: jax.Array = run(streams, weights, conditions, None, None)
        return x_BSD

    def condition(self, time_B: jax.Array, condition: Condition) -> jax.Array:
        """Return the sum of what is made of the time and of the class, f32[B, D]."""
        # DiT's frequencies as diffusers has them end a step sooner.
        last = 1 if self.config.conditioning in ("none", "class") else 0
        condition_BD = gathered(self.time, jnp.float32)(time_features(time_B, last))
        if self.classes is not None:
            assert self.config.num_classes is not None
            label_B = _needed(condition.label_B, "label", self.config)
            if condition.keep_B is not None:
                label_B = jnp.where(condition.keep_B > 0.5, label_B, self.config.num_classes)
            # Looked up in f32, so that the gradients of a frequent class add up in f32.
            whole = gathered_array(self.classes, jnp.dtype(jnp.float32))
            condition_BD = condition_BD + jnp.take(whole, label_B, axis=0, mode="clip")
        if self.pooled is not None:
            condition_BD = condition_BD + gathered(self.pooled, jnp.float32)(pooled_caption(condition, self.config))
        return condition_BD

    def _side(self, condition_BD: jax.Array, condition: Condition, dtype: jnp.dtype) -> Conditions:
        """Return what layers share of each row: their modulation, or what it is made of; caption; its mask."""
        active_BD = jax.nn.silu(condition_BD)
        if self.caption is None:
            return Conditions(active_BD)
        if self.modulation is not None:
            active_BD = all_gather(gathered(self.modulation, jnp.float32)(active_BD), "tensor", 1)
        caption_BTF, mask_BT = kept_caption(condition, self.config)
        return Conditions(active_BD, gathered(self.caption, dtype)(caption_BTF.astype(dtype)), mask_BT)

    def _turns(self) -> Turns:
        angles_NP = rotary_angles(self.config)
        mine = own_part(angles_NP[None], ("context",))
        return jax.lax.optimization_barrier((jnp.cos(mine), jnp.sin(mine)))


def _in_8_bits(*layers: nnx.Module | None) -> None:
    """Let maps of tokens multiply in 8 bits, and no modulation: of one row for an image, it scales all patches."""
    for stack in layers:
        for _, part in () if stack is None else nnx.iter_modules(stack):
            if isinstance(part, Linear):
                part.fp8 = True
        for _, part in () if stack is None else nnx.iter_modules(stack):
            if isinstance(part, Modulation):
                part.map.fp8 = False


def _caption(config: DiTConfig, rngs: nnx.Rngs) -> TwoMaps | Linear | None:
    """Make the map of a caption's features to the hidden size, where the model has captions."""
    if config.caption_size is None:
        return None
    size = (config.caption_size, config.hidden_size)
    if config.conditioning == "joint":
        return linear(size, ("features", "embed"), rngs, config.init_std)
    return TwoMaps(*size, config.init_std, rngs, split=True)


def own_part(x_BNO: jax.Array, axes: tuple[str, ...] = ("context", "tensor")) -> jax.Array:
    """Take this device's part of a sequence that every device has whole: over the first axis, then within it."""
    count, place = axis_size(axes), jnp.int32(0)
    for axis in axes:
        place = place * axis_size(axis) + axis_index(axis)
    size = x_BNO.shape[1] // count
    return x_BNO if count == 1 else jax.lax.dynamic_slice_in_dim(x_BNO, place * size, size, 1)


def _needed(array: jax.Array | None, name: str, config: DiTConfig) -> jax.Array:
    if array is None:
        raise UserError(f"condition: a model with conditioning: {config.conditioning} needs the {name} of every image")
    return array


def kept_caption(condition: Condition, config: DiTConfig) -> tuple[jax.Array, jax.Array | None]:
    """Return the captions' features and mask, all zeros and all kept where the condition is left out."""
    caption_BTF, mask_BT = _needed(condition.caption_BTF, "caption", config), condition.caption_mask_BT
    if condition.keep_B is None:
        return caption_BTF, mask_BT
    keep_B1 = condition.keep_B[:, None] > 0.5
    mask_BT = None if mask_BT is None else jnp.where(keep_B1, mask_BT, 1.0)
    return jnp.where(keep_B1[..., None], caption_BTF, 0.0), mask_BT


def pooled_caption(condition: Condition, config: DiTConfig) -> jax.Array:
    """Return the one vector of each caption, f32[B, P]: the mean of its tokens where none is given; zero left out."""
    pooled_BP = condition.pooled_BP
    if pooled_BP is None:
        if config.pooled_size != config.caption_size:
            problem = f"pooled_size = {config.pooled_size} is not caption_size = {config.caption_size}"
            raise UserError(f"condition: {problem}: give the pooled vector of every caption")
        caption_BTF = _needed(condition.caption_BTF, "caption", config).astype(jnp.float32)
        mask_BT = condition.caption_mask_BT
        mask_BT = jnp.ones(caption_BTF.shape[:2], jnp.float32) if mask_BT is None else mask_BT
        count_B1 = jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1.0)
        pooled_BP = jnp.sum(caption_BTF * mask_BT[..., None], axis=1) / count_B1
    keep_B = condition.keep_B
    return pooled_BP if keep_B is None else jnp.where(keep_B[:, None] > 0.5, pooled_BP, 0.0)


def time_features(time_B: jax.Array, last: int) -> jax.Array:
    """Cosines, then sines, of times at frequencies from 1 to 1/10,000, f32[B, TIME_FEATURES].

    Args:
        last: 1 where the last frequency is 1/10,000, 0 where the one after it would be.
    """
    half = TIME_FEATURES // 2
    exponents = np.float32(-math.log(_LONGEST_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half - last)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = time_B.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_rows(config: DiTConfig, places: np.ndarray) -> np.ndarray:
    """Return the sines, then cosines, of places in a row or column of the largest grid, f32[n, D / 2]."""
    grid, quarter = config.grid, config.hidden_size // 4
    steps = places * (grid / (config.largest_grid or grid)) / config.position_scale
    angles = np.outer(steps, _LONGEST_PERIOD ** -(np.arange(quarter) / quarter))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def positions(config: DiTConfig) -> jax.Array:
    """Sin-cos positions of all patches, f32[N, D]: half of the numbers say the column, the others the row."""
    grid = config.grid
    one = jnp.asarray(position_rows(config, np.arange(grid) + ((config.largest_grid or grid) - grid) // 2))
    shape = (grid, grid, one.shape[1])
    both = jnp.broadcast_to(one[None], shape), jnp.broadcast_to(one[:, None], shape)
    return jnp.concatenate(both, axis=-1).reshape(grid * grid, -1)


def rotary_angles(config: DiTConfig) -> jax.Array:
    """Angles by which pairs of a head's numbers turn, f32[N, h / 2]: half of them by the row, half by the column."""
    grid, quarter = config.grid, config.head_dim // 4
    one = np.outer(np.arange(grid), _LONGEST_PERIOD ** -(np.arange(quarter) / quarter)).astype(np.float32)
    shape = (grid, grid, quarter)
    both = jnp.broadcast_to(one[:, None], shape), jnp.broadcast_to(one[None], shape)
    return jnp.concatenate(both, axis=-1).reshape(grid * grid, -1)
