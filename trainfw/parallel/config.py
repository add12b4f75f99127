from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, model_validator

from trainfw.config import INT32, Config, PositiveInt, invalid
from trainfw.errors import did_you_mean

AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")
"""Mesh axes, from least to most communication (so from the slowest links to the fastest)."""

Sharded: TypeAlias = Literal["optimizer", "gradients", "parameters"]

SPLIT_RULES: dict[str, tuple[str, ...]] = {
    "layers": ("pipeline",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    # Of activations.
    "batch": ("pipeline", "data", "fsdp", "expert"),
    "sequence": ("context",),
}
"""Dims that stay split in use: what each device computes with its part, the model's collectives put together."""

GATHERED_RULES: dict[str, tuple[str, ...]] = {
    # Every device that has its own tokens has its own share of the weights, but for those of its own experts.
    "embed": ("fsdp", "expert", "context"),
    "expert_embed": ("fsdp", "context"),
    "norm": (),
    "router": (),
}
"""Dims of weights that are split only while they are kept. `parallel.rules` may replace these."""


class ParallelConfig(Config):
    """The layout: how many devices each mesh axis spans. One axis may be -1: the devices that are left."""

    pipeline: int = 1
    """Stages of layers, through which microbatches pass. All stages share the embedding, the head and the loss, each
    for its own rows of the batch."""
    pipeline_microbatches: PositiveInt | None = None
    """Number of microbatches into which the pipeline splits the rows of one accumulation step, a multiple of its
    stages: the more, the less time stages idle. Null is as many as there are rows."""
    interleave: PositiveInt = 1
    """Chunks of layers that each stage holds. Microbatches go round the stages this many times, and the part of the
    time that stages idle falls accordingly, for as many times the traffic between them."""
    data: int = 1
    """Replicas of the parameters; each takes a part of the batch."""
    fsdp: int = -1
    """Devices over which the batch is split, and with it parameters, gradients and optimizer state (`fsdp_shards`)."""
    fsdp_shards: Sharded = "parameters"
    """Arrays that are split along `fsdp`: the stages of ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054, section 5).

    `parameters` (ZeRO-3): all three; weights are gathered for every use, in every microbatch.
    `gradients` (ZeRO-2): gradients, scattered in every microbatch, and optimizer state. Parameters are whole on every
    device, but for `tensor`; each device updates its share of them, and the shares are gathered once a step.
    `optimizer` (ZeRO-1): optimizer state alone. As `gradients`, but gradients are summed whole in every microbatch."""
    prefetch: bool = True
    """Gather the next layer's weights while a layer computes, where there is something to gather, train.remat is full
    or stage, and layers are unrolled or all of one kind: the links work while the tensor engine does, and two layers'
    weights are there at a time."""
    expert: int = 1
    """Devices over which the experts of a mixture are spread. Each takes a part of the batch, too, and tokens go to
    the devices that have their experts (`model.moe.dispatch` says how)."""
    context: int = 1
    """Devices over which the sequence is split, in zig-zag: each has an early and a late part of it."""
    context_attention: Literal["ring", "gathered"] = "ring"
    """Exchange of keys and values between devices: these travel round a `ring` of devices, met by each with its
    own queries (Liu et al., arXiv:2310.01889), or are `gathered` first: more memory, one exchange."""
    tensor: int = 1
    """Devices over which heads, feed-forward columns and the vocabulary are split."""
    rules: dict[str, list[str]] = Field(default_factory=dict)
    """Replace entries of the rules table: a logical dim name -> the mesh axes that shard it."""
    traffic: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Bytes that a core's collectives produce in a step over each axis, by which devices are placed on
    hardware.topology (`trainfw check` prints them). Axes left out take those of an 8B model."""

    @model_validator(mode="after")
    def _sizes_make_sense(self) -> ParallelConfig:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size == 0 or size < -1 or size > INT32:
                invalid(axis, f"{axis} = {size}: expected a positive size, or -1 to fill")
        filled = [axis for axis, size in sizes.items() if size == -1]
        if len(filled) > 1:
            invalid(filled[1], f"only one axis may be -1, but {' and '.join(filled)} are")
        if self.interleave > 1 and self.pipeline == 1:
            invalid("interleave", f"interleave = {self.interleave}: needs a pipeline of more than one stage")
        if self.pipeline_microbatches is not None and self.pipeline == 1:
            invalid("pipeline_microbatches", "pipeline_microbatches applies to a pipeline of more than one stage")
        for axis in self.traffic:
            if axis not in AXES:
                invalid("traffic", f"unknown axis {axis!r}{did_you_mean(axis, AXES)}")
        return self
