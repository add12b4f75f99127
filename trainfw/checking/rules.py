from __future__ import annotations

import functools
from importlib import resources
from typing import Any, Literal

import yaml

from trainfw.config import Config

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_SDK = "aws-neuron-sdk 2.32.0"


class Rule(Config):
    """Something that Neuron does not take, does otherwise, or does not document."""

    id: str
    summary: str
    severity: Severity
    source: str
    instead: str
    """What to do about it."""
    hides: list[str] = []
    """Rules that do not count where this one is broken: they would speak of how JAX builds the same operation."""


def _load(name: str) -> Any:
    return yaml.safe_load(resources.files(__package__).joinpath(name).read_text())


def _source(source: str) -> str:
    if source.startswith("jax "):
        return source
    return f"aws-neuron-sdk {source}" if source.startswith("release notes") else f"{_SDK} {source}"


RULES: dict[str, Rule] = {
    name: Rule.model_validate({"id": name, **fields, "source": _source(fields["source"])})
    for name, fields in _load("rules.yaml").items()
}


@functools.cache
def known_operators() -> frozenset[str]:
    """StableHLO operators that documents list, or that have a rule of their own."""
    operators = _load("operators.yaml")
    return frozenset(name for group, names in operators.items() if group != "custom_calls" for name in names)


@functools.cache
def known_custom_calls() -> frozenset[str]:
    return frozenset(name for names in _load("operators.yaml")["custom_calls"].values() for name in names)
