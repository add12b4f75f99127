from __future__ import annotations

import functools
import operator
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import field_validator, model_validator

from trainfw.backends import Sdk
from trainfw.config import Config, invalid
from trainfw.hardware import Topology

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
Chip = Literal["inf2", "trn1", "trn2", "trn3"]
CHIPS: tuple[Chip, ...] = ("inf2", "trn1", "trn2", "trn3")
Key = Literal["chip", "LNC", "SDK", "libneuronxla"]
KEYS: tuple[Key, ...] = ("chip", "LNC", "SDK", "libneuronxla")

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}
_BOUND = re.compile(r"(<=|>=|==|<|>) (\d+(?:\.\d+)*)")


@dataclass(frozen=True)
class Target:
    """The machine that a program is for, as far as rules are keyed on it."""

    chip: str | None
    """None: hardware of one's own that does not say which of Neuron's chips it has; no exception counts there."""
    lnc: int
    sdk: str
    libneuronxla: str
    """The plugin that this SDK has for the newest JAX."""

    @classmethod
    def of(cls, topology: Topology, sdk: Sdk) -> Target:
        return cls(topology.chip.neuron_family, topology.lnc, sdk.version, sdk.packages.get("libneuronxla", "0"))


class When(Config):
    """Conditions that hold together; what is left out holds everywhere."""

    chips: list[Chip] = []
    lnc: int | None = None
    sdk: str | None = None
    """Bound of the SDK's version, such as `>= 2.33`."""
    libneuronxla: str | None = None

    @field_validator("sdk", "libneuronxla")
    @classmethod
    def _is_a_bound(cls, value: str | None) -> str | None:
        if value is not None and not _BOUND.fullmatch(value):
            invalid("", f"{value!r}: expected a comparison and a version, such as '>= 2.33'")
        return value

    def holds(self, target: Target) -> bool:
        return (
            (not self.chips or target.chip in self.chips)
            and self.lnc in (None, target.lnc)
            and within(target.sdk, self.sdk)
            and within(target.libneuronxla, self.libneuronxla)
        )

    @property
    def keys(self) -> dict[Key, object]:
        """Conditions by what they are on."""
        asked: list[object] = [" ".join(self.chips), self.lnc, self.sdk, self.libneuronxla]
        return {key: value for key, value in zip(KEYS, asked, strict=True) if value}

    def __str__(self) -> str:
        return ", ".join(f"{value}" if key == "chip" else f"{key} {value}" for key, value in self.keys.items())


class Case(Config):
    """An exception to a rule: where it holds, and what of the rule is otherwise there."""

    when: When
    severity: Severity | Literal["none"] | None = None
    """`none`: the rule does not count there. Left out: as elsewhere."""
    note: str | None = None


@dataclass(frozen=True)
class Ruling:
    """A rule as it counts on one target."""

    severity: Severity
    note: str


class Rule(Config):
    """Rule on something that Neuron does not take, does otherwise, or does not document."""

    id: str
    summary: str
    severity: Severity
    """Severity where no case holds: the most that it is anywhere."""
    source: str
    instead: str
    """Advice on what to do about it."""
    note: str = ""
    """Note on disagreements of documents and measurements, and on what is not confirmed."""
    cases: list[Case] = []
    """Cases, of which the first that holds counts."""
    keys: list[Key] = []
    """Further facts that decide it: whether it is broken at all, which code or another profile knows."""
    hides: list[str] = []
    """Rules that do not count where this one is broken: they would speak of how JAX builds the same operation."""

    @model_validator(mode="after")
    def _cases_differ(self) -> Rule:
        for number, case in enumerate(self.cases):
            if not case.when.keys:
                invalid(f"cases.{number}.when", "expected chips, lnc, sdk or libneuronxla")
        return self

    def on(self, target: Target) -> Ruling | None:
        """Rule on a target; None where the rule does not count."""
        case = next((case for case in self.cases if case.when.holds(target)), None)
        if case is None:
            return Ruling(self.severity, self.note)
        severity = case.severity or self.severity
        if severity == "none":
            return None
        return Ruling(severity, self.note if case.note is None else case.note)

    @property
    def keyed_on(self) -> list[Key]:
        """List the facts that decide it, in the order of `KEYS`: none for what is the same everywhere."""
        asked = {key for case in self.cases for key in case.when.keys} | set(self.keys)
        return [key for key in KEYS if key in asked]

    def to_json(self) -> dict[str, object]:
        return self.model_dump(exclude={"hides", "keys"}) | {"keyed_on": self.keyed_on}

    def describe(self, width: int = 80) -> str:
        """Wrap text into lines of at most `width` columns, longer words aside."""
        texts = [self.summary, f"keyed on {', '.join(self.keyed_on)}" if self.keyed_on else ""]
        for case in self.cases:
            note = f" ({case.note})" if case.note else ""
            said = "does not count" if case.severity == "none" else case.severity or self.severity
            texts.append(f"  {said} on {case.when}{note}")
        texts += [f"note: {self.note}" if self.note else "", f"source: {self.source}"]
        lines = [f"{self.severity:7}  {self.id}"]
        for text in texts:
            first = " " * (9 + len(text) - len(text.lstrip()))
            wrapper = textwrap.TextWrapper(width, first, first, break_long_words=False, break_on_hyphens=False)
            lines += wrapper.wrap(text.lstrip())
        return "\n".join(lines)


def within(version: str, bound: str | None) -> bool:
    """Tell whether a version (`2.33`, `3.0.5356.0`) keeps a bound (`>= 2.33`), by as many numbers as the bound has."""
    found = _BOUND.fullmatch(bound or "")
    if found is None:
        return True
    wanted = [int(part) for part in found[2].split(".")]
    have = [int(part) for part in re.findall(r"\d+", version)][: len(wanted)]
    return _COMPARISONS[found[1]](have, wanted)


def _load(name: str) -> Any:
    return yaml.safe_load(resources.files(__package__).joinpath(name).read_text())


RULES = {name: Rule.model_validate({"id": name, **fields}) for name, fields in _load("rules.yaml").items()}


@functools.cache
def known_operators() -> frozenset[str]:
    """List the StableHLO operators that documents list, or that have a rule of their own."""
    operators = _load("operators.yaml")
    return frozenset(name for group, names in operators.items() if group != "custom_calls" for name in names)


@functools.cache
def custom_calls(group: str) -> frozenset[str]:
    """List the targets of custom calls in a group of operators.yaml: `recognised`, `microscaling`, `partitioning`."""
    return frozenset(_load("operators.yaml")["custom_calls"][group])
