from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from trainfw.config import INT32, Config, PositiveInt, invalid
from trainfw.errors import did_you_mean
from trainfw.names import VALUES
from trainfw.optim.registry import OPTIMIZERS
from trainfw.pieces import is_own

_OURS = ("b1", "b2", "epsilon", "weight_decay", "weight_decay_exclude")
"""Keys that an optimizer of somebody's own does not read: its own are `options`."""


class OptimizerConfig(Config):
    """The optimizer and its learning-rate schedule."""

    name: str = Field(
        default="adamw", json_schema_extra={"anyOf": [{"enum": [*OPTIMIZERS]}, {"pattern": r"^[\w.]+:[\w.<>]+$"}]}
    )
    """`adamw`, `lion`, `adafactor` or `muon`, which updates the layers' matrices; embeddings, head, norms and biases
    get AdamW. Or your own, `package.module:Name`: a function of the learning rate and of `options` that returns an
    Optax transformation, such as `optax:sgd`; see `trainfw.optim.OwnOptimizer`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of your own optimizer, beside the learning rate."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """The peak, reached after warmup."""
    adam_learning_rate: float | None = Field(default=None, gt=0)
    """Peak of `muon` for what AdamW updates. Left out, `learning_rate`."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """After warmup: stay, decay over the rest of the run, or (`wsd`) stay and decay over `decay_steps` at the end."""
    warmup_steps: int = Field(default=0, ge=0, le=INT32)
    """Steps of linear warmup; the first of them takes peak / (warmup_steps + 1)."""
    decay_steps: PositiveInt | None = None
    """Length of the final decay of `wsd`, in steps. Left out, a tenth of the run."""
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
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of what learns, such as 0.9999; null: none. The average is what is
    validated, sampled, exported and loaded."""

    @model_validator(mode="after")
    def _combinations(self) -> OptimizerConfig:
        if self.decay_steps is not None and self.schedule != "wsd":
            invalid("decay_steps", f"decay_steps belongs to schedule wsd, not {self.schedule}")
        own = is_own(self.name)
        if not own and self.name not in OPTIMIZERS:
            known = VALUES.get(self.name.lower())
            meant = f"; did you mean {known!r}?" if known in OPTIMIZERS else did_you_mean(self.name, OPTIMIZERS)
            ours = f"expected one of {', '.join(OPTIMIZERS)}{meant}"
            invalid("name", f"{self.name!r}: {ours} (or your own, package.module:Name)")
        if self.options and not own:
            invalid("options", f"options are for an optimizer of your own, but name is {self.name!r}")
        for field in _OURS if own else ():
            if getattr(self, field) != type(self).model_fields[field].get_default(call_default_factory=True):
                invalid(field, f"{field} is not read by an optimizer of your own, {self.name}: put it into options")
        for owner, optimizer in OPTIMIZERS.items():
            for field in optimizer.traits.fields:
                if getattr(self, field) is not None and self.name != owner:
                    invalid(field, f"{field} belongs to {owner}, not {self.name}")
        return self

    @model_serializer(mode="wrap")
    def _what_is_read(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unread = _OURS if is_own(self.name) else ()
        return {key: value for key, value in dump(self).items() if key not in unread}
