"""Shapes of decoders: the fields that tell Llama, Qwen, Mistral, Gemma and OLMoE apart, and presets of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from trainfw.config import Config, Dim, PositiveInt, invalid
from trainfw.models.family import TokenFamilyConfig, preset_fields

Activation = Literal["silu", "gelu_tanh"]
LayerKind = Literal["global", "sliding"]
Dispatch = Literal["capacity", "dropless"]


class RopeScaling(Config):
    """Stretch of the rotary frequencies past the length the model was first trained on."""

    kind: Literal["llama3", "linear"]
    """`linear` divides every frequency by `factor`; `llama3` only the low ones, with a smooth transition."""
    factor: PositiveFloat
    """Factor by which the context becomes longer."""
    low_freq_factor: PositiveFloat | None = None
    """llama3: frequencies that turn fewer times than this within the original length are divided by `factor`."""
    high_freq_factor: PositiveFloat | None = None
    """llama3: frequencies that turn more times than this within the original length are kept."""
    original_max_position: PositiveInt | None = None
    """llama3: the original length, in tokens."""

    @model_validator(mode="after")
    def _fields_suit_the_kind(self) -> RopeScaling:
        for name in ("low_freq_factor", "high_freq_factor", "original_max_position"):
            given = getattr(self, name) is not None
            if given != (self.kind == "llama3"):
                invalid(name, f"{name} {'does not apply to' if given else 'is required by'} kind: {self.kind}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low and high and low >= high:
            invalid("low_freq_factor", f"low_freq_factor = {low:g} must be less than high_freq_factor = {high:g}")
        return self


class MoEConfig(Config):
    """A mixture of experts in place of every feed-forward layer: each token goes to a few of many small ones."""

    num_experts: Dim
    """E: routed experts in every layer."""
    experts_per_token: Dim
    """k: experts that every token goes to."""
    normalize_weights: bool = True
    """Divide the weights of a token's k experts by their sum (Mixtral, Qwen3-MoE); otherwise they are the softmax's
    own (OLMoE)."""
    shared_intermediate_size: Dim | None = None
    """Width of the experts that every token goes to (DeepSeek-style), all of them together. Null is none."""
    # The one form that every backend takes, and whose cost does not depend on what the router does. What it drops is
    # in the metrics.
    dispatch: Dispatch = "capacity"
    """`capacity`: an expert has a fixed number of slots, and what finds none is dropped (its token keeps what its other
    experts add); all-to-all over the expert axis. `dropless`: nothing is dropped; needs a backend with grouped
    products (not Neuron), and gathers the expert axis's tokens. Text is generated without drops in either case."""
    capacity_factor: PositiveFloat = 1.25
    """capacity: slots of an expert, as a multiple of what it needs where all experts are chosen equally often."""
    balance_loss: NonNegativeFloat = 0.01
    """Coefficient of the load-balance loss, in every layer; the loss is 1 where all experts are chosen equally."""
    z_loss: NonNegativeFloat = 0.001
    """Coefficient of the router's z-loss (logsumexp of its logits, squared), in every layer."""

    @model_validator(mode="after")
    def _choices_are_enough(self) -> MoEConfig:
        if (k := self.experts_per_token) > self.num_experts:
            invalid("experts_per_token", f"experts_per_token = {k} is more than num_experts = {self.num_experts}")
        return self


class ModelConfig(TokenFamilyConfig):
    """A decoder-only transformer. `preset` gives the values of a published model; other fields override them."""

    preset: str | None = None
    """Start from a named model, for example `llama3.2-1b`."""
    from_: str | None = Field(default=None, alias="from")
    """Start from these weights: a Hugging Face directory (config.json and safetensors), a GGUF file, a run directory,
    or `package:NAME` for the model inside an installed Python package. It also gives every field that is not written
    here, and the tokenizer."""
    intermediate_size: Dim
    """F: width of the gated feed-forward layer; with `moe`, of one expert."""
    num_heads: Dim
    """H: query heads."""
    num_kv_heads: Dim
    """K: key and value heads, each shared by H / K query heads."""
    head_dim: Dim
    """h: size of a head. Left out, it is hidden_size / num_heads."""
    tie_embeddings: bool = False
    """Use the embedding table as the output head too."""
    activation: Activation = "silu"
    """The feed-forward gate: `silu` (Llama, Qwen, Mistral) or `gelu_tanh` (Gemma)."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_local_theta: PositiveFloat | None = None
    """Base of the rotary frequencies in sliding layers, which are then not scaled (Gemma 3)."""
    rope_scaling: RopeScaling | None = None
    """Stretch the rotary frequencies for longer contexts."""
    max_position: PositiveInt = 8192
    """Longest context the weights were trained for, in tokens. Informational: nothing is allocated by it."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen 2)."""
    qk_norm: bool | Literal["all_heads"] = False
    """RMSNorm on each query and key head (Qwen 3, Gemma 3); `all_heads`: on all heads together (OLMoE)."""
    sliding_window: PositiveInt | None = None
    """Number of tokens that a token sees in sliding layers, itself included."""
    # Not strict, so that YAML's list is taken as a tuple: a config is hashed as part of what is compiled.
    layer_pattern: Annotated[tuple[LayerKind, ...], Field(strict=False, min_length=1)] = ("global",)
    """Kinds of attention, repeated over the layers from the first."""
    attention_softcap: PositiveFloat | None = None
    """Squash attention scores into (-cap, cap) with tanh (Gemma 2)."""
    final_softcap: PositiveFloat | None = None
    """Squash logits into (-cap, cap) with tanh (Gemma 2)."""
    query_scale: PositiveFloat | None = None
    """Multiplies attention scores. Null is head_dim ** -0.5."""
    zero_centered_norm: bool = False
    """Store norm scales as their offset from 1 (Gemma)."""
    post_norms: bool = False
    """Normalise the output of attention and feed-forward as well as their input (Gemma 2 and 3)."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(hidden_size) (Gemma)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of freshly initialised weights."""
    moe: MoEConfig | None = None
    """A mixture of experts in place of every feed-forward layer."""
    mup: bool = False
    """Scale with the width by muP (arXiv:2203.03466, table 8), so that a learning rate found at `mup_base_width` holds
    at other widths: of the layers' matrices AdamW's learning rate is multiplied by base / hidden_size and the variance
    at the start too, and so are the logits. At the base width nothing changes. Needs optimizer.name: adamw."""
    mup_base_width: Dim = 64
    """The hidden_size at which `mup` changes nothing."""
    mup_base_head_dim: Dim | None = None
    """The head_dim at that width, where wider models have larger heads: attention scores are then divided by head_dim,
    not by its root. Null: head_dim, for models that have more heads instead."""

    @model_validator(mode="before")
    @classmethod
    def _merge_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        preset = data.get("preset")
        if isinstance(preset, str):
            hub = preset.rpartition("/")[2].lower()
            plain = re.sub(r"(-(instruct|it|chat|base|hf|v[\d.]+))+$", "", hub)
            fields: dict[str, Any] = preset_fields(__package__, preset, plain)
            parts = [source["moe"] for source in (fields, data) if isinstance(source.get("moe"), dict)]
            data = fields | data
            if len(parts) == 2:  # of `moe` one by one, since it says how to run as well
                data["moe"] = parts[0] | parts[1]
        hidden, heads = data.get("hidden_size"), data.get("num_heads")
        if "head_dim" not in data and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            if hidden % heads:
                invalid("head_dim", f"hidden_size = {hidden} does not divide by num_heads = {heads}: give head_dim")
            data = data | {"head_dim": hidden // heads}
        return data

    @model_validator(mode="after")
    def _shapes_agree(self) -> ModelConfig:
        if self.num_heads % (kv := self.num_kv_heads):
            invalid("num_kv_heads", f"num_heads = {self.num_heads} does not divide by num_kv_heads = {kv}")
        if self.head_dim % 2:
            invalid("head_dim", f"head_dim = {self.head_dim} is odd, but rotary embeddings turn pairs")
        slides = "sliding" in self.layer_kinds
        if slides and self.sliding_window is None:
            invalid("sliding_window", "layer_pattern has sliding layers: give sliding_window")
        if not slides and self.rope_local_theta is not None:
            invalid("rope_local_theta", "rope_local_theta applies to sliding layers, and layer_pattern has none")
        return self

    @model_validator(mode="after")
    def _mup_is_known(self) -> ModelConfig:
        if not self.mup:
            for name in ("mup_base_width", "mup_base_head_dim"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    invalid(name, f"{name} applies with mup: true alone")
        elif self.moe is not None:
            invalid("mup", "muP's rule for routers and experts is not implemented: set mup to false, or moe to null")
        elif self.scale_embeddings:
            invalid("mup", "muP keeps embeddings as they are at every width: set mup or scale_embeddings to false")
        return self

    @property
    def mup_ratio(self) -> float:
        """The base width over the width; 1 without muP."""
        return self.mup_base_width / self.hidden_size if self.mup else 1.0

    @property
    def hidden_std(self) -> float:
        """Standard deviation of the layers' matrices at the start."""
        return self.init_std * math.sqrt(self.mup_ratio)

    @property
    def attention_scale(self) -> float:
        """Factor on attention scores."""
        base = self.mup_base_head_dim or self.head_dim
        scale = self.query_scale or base**-0.5
        return scale if base == self.head_dim else scale * base / self.head_dim

    @property
    def update_scales(self) -> Mapping[str, float] | None:
        return {"layers.*.kernel": self.mup_ratio} if self.mup else None

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        period = len(self.layer_pattern)
        return tuple(self.layer_pattern[i % period] for i in range(self.num_layers))

    @property
    def layer_period(self) -> int:
        return len(self.layer_pattern)

    @property
    def longest_context(self) -> int | None:
        return self.max_position

    @property
    def depends_on_cut(self) -> str:
        """Say why numbers depend on how a batch is cut: an expert takes so many tokens at a time (`capacity`)."""
        if self.moe is None or self.moe.dispatch != "capacity":
            return ""
        return "model.moe.dispatch is capacity, which drops tokens by the part of the batch that they are in"
