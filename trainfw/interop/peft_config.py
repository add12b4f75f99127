"""Reader of adapter_config.json: the adapter that PEFT would make by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from trainfw.config import INT32, SMALLEST
from trainfw.confined import LimitError, Problem, helper
from trainfw.errors import UserError, expect, short
from trainfw.json_text import read_json

_Value = TypeVar("_Value")

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

    file: Path
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    @property
    def kind(self) -> Literal["lora", "rslora", "dora"]:
        return "dora" if self.use_dora else "rslora" if self.use_rslora else "lora"

    def sizes(self, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
        """Return rank and alpha of the adapter of each module of these names on which PEFT puts one.

        They are those of the first pattern that matches its name, whole or after a dot. Raises UserError for what is no
        regular expression, or takes too long to match.
        """
        names = list(modules)
        targeted = self._named("target_modules", self.target_modules, names)
        excluded = set(self._named("exclude_modules", self.exclude_modules, list(targeted)))
        names = [name for name in targeted if name not in excluded]
        ranks = self._matches("rank_pattern", self.rank_pattern, names)
        alphas = self._matches("alpha_pattern", self.alpha_pattern, names)
        found = {}
        for name in names:
            rank, alpha = ranks.get(name, self.rank), alphas.get(name, self.alpha)
            # Our DoRA scales by alpha / r.
            found[name] = rank, alpha * rank**0.5 if self.use_dora and self.use_rslora else alpha
        return found

    def _named(self, key: str, named: str | list[str], modules: list[str]) -> Collection[str]:
        """Return the modules that `key` names: it lists ends of names, or is a regular expression."""
        if named == "all-linear":
            return [name for name in modules if name.rpartition(".")[2] not in ("embed_tokens", "lm_head")]
        if isinstance(named, str):
            return self._matches(key, {named: True}, modules, "{}")
        ends = tuple(f".{end}" for end in named)
        return [name for name in modules if f".{name}".endswith(ends)]

    def _matches(
        self, key: str, values: Mapping[str, _Value], modules: Collection[str], form: str = r"(.*\.)?({})$"
    ) -> dict[str, _Value]:
        """Return, by each module that an expression matches, the value of the first one; PEFT puts it in this form."""
        if not values:
            return {}
        try:
            found = helper.call("interop.peft_config:first_matches", None, form, list(values), list(modules))
        except Problem as problem:
            raise UserError(f"{self.file}: {key}: {problem}") from None
        except LimitError as error:
            advice = "simplify its regular expressions, or list the names"
            raise UserError(f"{self.file}: {key}: the search for them {error}; {advice}") from None
        each = list(values.values())
        return {name: each[place] for name, place in found.items()}


def first_matches(_: None, form: str, patterns: list[str], texts: list[str]) -> dict[str, int]:
    """Return the place of the first expression that matches each text, in the helper: expressions may take forever.

    Raises Problem for what is no regular expression.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(form.format(pattern)))
        except (re.error, OverflowError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise Problem(f"{short(pattern)} is not a regular expression: {why}") from None
    found = {text: next((i for i, each in enumerate(compiled) if each.fullmatch(text)), None) for text in texts}
    return {text: place for text, place in found.items() if place is not None}


def read_peft_config(file: Path) -> PeftConfig:
    """Read adapter_config.json. Raises UserError where it is no LoRA, rsLoRA or DoRA, or has senseless values."""
    return peft_config(read_json(file), file)


def peft_config(config: Mapping[str, object], file: Path) -> PeftConfig:
    """Return what PEFT would make by the keys of `file`. Raises UserError as `read_peft_config`."""
    kind = config.get("peft_type")
    expect(f"{file}: peft_type", kind, kind == "LORA", "LORA")
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

    def flag(key: str) -> bool:
        value = config.get(key)
        expect(f"{file}: {key}", value, isinstance(value, bool | None), "true or false")
        return bool(value)

    def names(key: str, value: object) -> str | list[str]:
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return value
        raise UserError(f"{file}: {key} = {short(value)}: expected a list of names")

    def patterns(key: str, check: Callable[[str, object], _Value]) -> dict[str, _Value]:
        if not isinstance(values := config.get(key), dict | None):
            raise UserError(f"{file}: {key} = {short(values)}: expected an object")
        return {p: check(f"{file}: {key}.{short(p)[1:-1]}", value) for p, value in (values or {}).items()}

    return PeftConfig(
        file=file,
        rank=_checked_rank(f"{file}: r", config.get("r")),
        alpha=_checked_alpha(f"{file}: lora_alpha", config.get("lora_alpha")),
        dropout=_checked_dropout(f"{file}: lora_dropout", config.get("lora_dropout")),
        use_rslora=flag("use_rslora"),
        use_dora=flag("use_dora"),
        target_modules=names("target_modules", config.get("target_modules")),
        exclude_modules=names("exclude_modules", config.get("exclude_modules") or []),
        rank_pattern=patterns("rank_pattern", _checked_rank),
        alpha_pattern=patterns("alpha_pattern", _checked_alpha),
    )


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
