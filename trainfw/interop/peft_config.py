"""Reader of adapter_config.json: the adapter that PEFT would make by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainfw.config import INT32, SMALLEST
from trainfw.errors import UserError, short
from trainfw.interop.expressions import MAX_TEXT, Expression, Steps, Text
from trainfw.json_text import read_json

CONFIG = "adapter_config.json"
_READ = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("target_modules", "exclude_modules", "init_lora_weights"),
)
_WITHOUT_EFFECT = (
    # Keys about an adapter's origin, and about training it from its start.
    *("base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode", "peft_version"),
    *("runtime_config", "eva_config"),
    # Keys that count only beside others, which are refused: megatron_config, use_qalora.
    *("megatron_core", "qalora_group_size"),
)
_KEEP_THE_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that do not change the base; others (pissa, olora, corda, lora_ga, loftq) take the first
A B out of it."""


@dataclass(frozen=True)
class PeftConfig:
    """A LoRA adapter as PEFT describes it; both `use_dora` and `use_rslora` mean DoRA scaled as rsLoRA."""

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    _steps: Steps
    _targeted: Callable[[str], bool]
    _excluded: Callable[[str], bool]
    _ranks: list[tuple[Expression, int]]
    _alphas: list[tuple[Expression, float]]

    @property
    def kind(self) -> Literal["lora", "rslora", "dora"]:
        return "dora" if self.use_dora else "rslora" if self.use_rslora else "lora"

    def targets(self, module: str) -> bool:
        """Tell whether PEFT puts an adapter on a module of this name."""
        return len(module) <= MAX_TEXT and self._targeted(module) and not self._excluded(module)

    def size(self, module: str) -> tuple[int, float]:
        """Return rank and alpha of a module's adapter: as in PEFT, those of the first pattern that matches its name,
        whole or after a dot."""
        text = Text(module, self._steps)
        starts = sum(1 << place + 1 for place, letter in enumerate(module) if letter == ".") | 1
        rank = next((rank for pattern, rank in self._ranks if pattern.matches(text, starts)), self.rank)
        alpha = next((alpha for pattern, alpha in self._alphas if pattern.matches(text, starts)), self.alpha)
        # Our DoRA scales by alpha / r.
        return rank, alpha * rank**0.5 if self.use_dora and self.use_rslora else alpha


def read_peft_config(file: Path) -> PeftConfig:
    """Read adapter_config.json. Raises UserError where it is no LoRA, rsLoRA or DoRA, or has senseless values."""
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type = {short(config.get('peft_type'))}: expected LORA")
    for key, value in config.items():
        # A value that is null, false or empty turns something off, whatever it is.
        if value and key not in _READ and key not in _WITHOUT_EFFECT and (key, value) != ("bias", "none"):
            raise UserError(f"{file}: {short(key)[1:-1]} = {short(value)} is not supported")
    initial = config.get("init_lora_weights")
    if not isinstance(initial, bool | str | None) or str(initial).lower() not in _KEEP_THE_BASE:
        raise UserError(
            f"{file}: init_lora_weights = {short(initial)}: not one that leaves the base's weights as they are "
            f"({', '.join(_KEEP_THE_BASE)}): A and B belong to a changed base, which the file does not hold; "
            "PEFT's save_pretrained(DIR, path_initial_model_for_weight_conversion=START) makes them those of the base"
        )
    steps = Steps(str(file))

    def flag(key: str) -> bool:
        if not isinstance(value := config.get(key), bool | None):
            raise UserError(f"{file}: {key} = {short(value)}: expected true or false")
        return bool(value)

    def patterns(key: str, check: Callable[[str, Any], Any]) -> list[tuple[Expression, Any]]:
        if not isinstance(values := config.get(key), dict | None):
            raise UserError(f"{file}: {key} = {short(values)}: expected an object")
        values = {p: check(f"{file}: {key}.{short(p)[1:-1]}", value) for p, value in (values or {}).items()}
        return [(Expression(pattern, f"{file}: {key}", steps), value) for pattern, value in values.items()]

    return PeftConfig(
        rank=_checked_rank(f"{file}: r", config.get("r")),
        alpha=_checked_alpha(f"{file}: lora_alpha", config.get("lora_alpha")),
        dropout=_checked_dropout(f"{file}: lora_dropout", config.get("lora_dropout")),
        use_rslora=flag("use_rslora"),
        use_dora=flag("use_dora"),
        _steps=steps,
        _targeted=_named(file, "target_modules", config.get("target_modules"), steps),
        _excluded=_named(file, "exclude_modules", config.get("exclude_modules") or [], steps),
        _ranks=patterns("rank_pattern", _checked_rank),
        _alphas=patterns("alpha_pattern", _checked_alpha),
    )


def _named(file: Path, key: str, names: object, steps: Steps) -> Callable[[str], bool]:
    """Return a test of modules' names: `key` lists ends of names, or is a regular expression."""
    if names == "all-linear":
        return lambda module: module.rpartition(".")[2] not in ("embed_tokens", "lm_head")
    if isinstance(names, str):
        expression = Expression(names, f"{file}: {key}", steps)
        return lambda module: expression.matches(Text(module, steps))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: {key} = {short(names)}: expected a list of names")
    ends = tuple(f".{name}" for name in names)
    return lambda module: f".{module}".endswith(ends)


def _checked_rank(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= INT32:
        raise UserError(f"{key} = {short(value)}: expected a whole number above 0, below 2**31")
    return value


def _checked_alpha(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not SMALLEST <= value < 1e9:
        raise UserError(f"{key} = {short(value)}: expected a number above 0, below 1e9")
    return float(value)


def _checked_dropout(key: str, value: object) -> float:
    value = 0.0 if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not (value == 0 or SMALLEST <= value < 1):
        raise UserError(f"{key} = {short(value)}: expected a number from 0 to less than 1")
    return float(value)
