from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainfw.config import INT32, Config, PositiveInt, invalid


class OptimizerConfig(Config):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    """`muon` updates the layers' matrices; embeddings, head, norms and biases get AdamW."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """The peak, reached after warmup."""
    adam_learning_rate: float | None = Field(default=None, gt=0)
    """With `muon`: the peak for what AdamW updates. Left out, `learning_rate`."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """After warmup: stay, decay over the rest of the run, or (`wsd`) stay and decay over `decay_steps` at the end."""
    warmup_steps: int = Field(default=0, ge=0, le=INT32)
    """Steps of linear warmup; the first of them takes peak / (warmup_steps + 1)."""
    decay_steps: PositiveInt | None = None
    """With `wsd`: the length of the final decay. Left out, a tenth of the run."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """The learning rate at the end, as a fraction of the peak."""
    b1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment (Muon: of the momentum); Adafactor has none."""
    b2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment (Lion: of the momentum); Adafactor's rises with the step."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator of AdamW's update."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, per unit of learning rate."""
    weight_decay_exclude: list[str] = Field(default_factory=lambda: ["*.scale", "*.bias"])
    """Patterns of parameter names (`layers.mlp.up.kernel`) that do not decay."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Scale gradients down to this global norm; null: never."""

    @model_validator(mode="after")
    def _combinations(self) -> OptimizerConfig:
        if self.decay_steps is not None and self.schedule != "wsd":
            invalid("decay_steps", f"decay_steps belongs to schedule wsd, not {self.schedule}")
        if self.adam_learning_rate is not None and self.name != "muon":
            invalid("adam_learning_rate", f"adam_learning_rate belongs to muon, not {self.name}")
        return self
