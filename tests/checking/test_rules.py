"""Rules as data: what they are keyed on, and that advice names nothing that is refused where it is given."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.checking.cases import HARDWARE, Case, Fields, reading
from trainfw.backends import load_sdk, sdk_versions
from trainfw.checking.programs import judge
from trainfw.checking.rules import CHIPS, KEYS, RULES, SEVERITIES, Rule, Target, When, within
from trainfw.hardware import load_topology

TARGETS = [
    Target(chip, lnc, version, load_sdk(version).packages["libneuronxla"])
    for chip in CHIPS
    for lnc in (1, 2)
    for version in sdk_versions()
]
SOURCES = ("aws-neuron-sdk ", "jax 0.10 ", "measured: ", "github.com/")
X, I32, KEY = "x f32[16,16]", "i i32[4]", 'key = jax.random.key(0, impl="rbg")'
ADVISED = {
    "jnp.where": ("jnp.where(x > 0, x, 0)", X),
    "lax.select": ("lax.select(x > 0, x, -x)", X),
    "lax.fori_loop": ("lax.fori_loop(0, 4, lambda _, x: x * 2, x)", X),
    "lax.scan": ("lax.scan(lambda x, _: (x * 2, None), x, None, length=4)[0]", X),
    "jnp.isfinite": ("jnp.isfinite(x).all()", X),
    "jnp.int32": ("x.astype(jnp.int32)", X),
    "jnp.float32": ("x.astype(jnp.float32)", "x bf16[16]"),
    "float8_e5m2": ("x.astype(jnp.float8_e5m2).astype(jnp.float32)", X),
    "float8_e4m3": ("x.astype(jnp.float8_e4m3).astype(jnp.float32)", X),
    "int32": ("i + 1", I32),
    "uint8": ("x & 15", "x u8[16]"),
    "bfloat16": ("x @ x", "x bf16[16,16]"),
    "jax.random.key": ('random.normal(random.key(0, impl="rbg"), (4,))', ""),
    "jax.config.update": None,  # of the program that follows it
    "jax.random.uniform": ("jnp.floor(8 * jax.random.uniform(key, (4,))).astype(jnp.int32)", KEY),
    "jnp.floor": ("jnp.floor(x).astype(jnp.int32)", X),
    "lax.rng_bit_generator": ("lax.rng_bit_generator(key, (16,))", "key u32[4]"),
    "jnp.max": ("jnp.where(x == jnp.max(x, axis=-1, keepdims=True), -jnp.inf, x)", X),
    "jnp.sum": ("jnp.sum(x[:, None] > x[None], axis=-1)", "x f32[16]"),
    "jnp.min": ("jnp.min(jnp.where(x == x.max(), jnp.arange(16), 16))", "x f32[16]"),
    "lax.reduce_window": ('lax.reduce_window(x, -jnp.inf, lax.max, (2, 1), (2, 1), "VALID")', X),
    "scatter-add": ('x.at[i].add(1.0, mode="clip")', f"x f32[16]; {I32}"),
    "jax.nn.one_hot": ("jax.nn.one_hot(i, 16) @ x", f"{X}; {I32}"),
    "jnp.clip": ("x[jnp.clip(i, 0, 15)]", f"{X}; {I32}"),
    "promise_in_bounds": ('x.at[i].get(mode="promise_in_bounds")', f"{X}; {I32}"),
    "jax.shard_map": None,  # of what is in it
    "lax.pad": ("lax.pad(x, 0.0, [(0, 0, 1), (0, 0, 1)])", X),
    "jnp.exp": ("jnp.exp(x * jnp.log(x))", X),
    "jnp.log": ("jnp.log(x)", X),
    "jnp.sqrt": ("jnp.sqrt(x)", X),
    "all_gather": None,  # tests/checking/cases/collectives.yaml
    "jax.numpy": None,
}
"""What advice names -> a program of it and its arguments."""
_NAMED = re.compile(
    r"\b(?:(?:jnp|lax|jax)(?:\.\w+)+|float8_\w+|bfloat16|u?int\d+|promise_in_bounds|scatter-add|all_gather)"
)
_OPERATIONS = re.compile(
    r"\b(?:top_?k|argmax|argmin|argsort|sort|cond|switch|while_loop|randint|unique|nonzero)\b", re.I
)


def names_in(advice: str) -> set[str]:
    return {name for name in _NAMED.findall(advice) if name not in ("jax.random",)}


@functools.cache
def errors(name: str) -> dict[tuple[str, str], list[str]]:
    """Rules that a program of what is named breaks, as errors, by chip and SDK."""
    program = ADVISED[name]
    if program is None:
        return {}
    text, arguments = program
    case = Case(Path(__file__), 2, text, Fields({"with": arguments}), "")
    read = reading(case)
    return {
        (chip, version): [f.rule for f in judge([read], load_topology(HARDWARE[chip]), load_sdk(version)).errors]
        for chip in CHIPS
        for version in sdk_versions()
    }


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_advice_is_not_refused_where_it_is_given(rule):
    found = names_in(rule.instead)
    assert found <= set(ADVISED), f"{rule.id}: no program tries {', '.join(found - set(ADVISED))}"
    for target in TARGETS:
        for name in found if rule.on(target) else ():
            assert not errors(name).get((target.chip or "", target.sdk)), f"{rule.id}: {name} on {target.chip}"


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_advice_names_no_operation_that_has_a_rule_of_its_own(rule):
    assert not _OPERATIONS.search(rule.instead)


def test_a_refused_operation_would_be_noticed():
    assert names_in('lax.top_k(x, 1)[1], x.at[i].add(y, mode="promise_in_bounds")') == {
        "lax.top_k",
        "promise_in_bounds",
    }
    assert _OPERATIONS.search("lax.top_k(x, 1)")
    ADVISED["lax.top_k"] = ("lax.top_k(x, 1)", X)
    assert errors("lax.top_k")["inf2", "2.31"] == ["topk"]
    assert errors("lax.top_k")["trn2", "2.31"] == []
    del ADVISED["lax.top_k"]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules_say_what_to_do(rule):
    assert rule.summary
    assert rule.instead
    assert all(part.startswith(SOURCES) for part in rule.source.split("; ")[:1]), rule.source
    assert set(rule.hides) <= set(RULES)
    assert all(len(line) <= 80 for line in rule.describe(80).split("\n") if " " in line.strip())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_is_nowhere_more_than_it_says(rule):
    """`check --rules` lists it as the most that it is; hardware that names no chip is held to that."""
    unknown = Target(None, 2, sdk_versions()[-1], "3.0")
    assert rule.on(unknown) is not None or not any(case.when.chips for case in rule.cases)
    for target in TARGETS:
        ruling = rule.on(target)
        assert ruling is None or SEVERITIES.index(ruling.severity) >= SEVERITIES.index(rule.severity)


def test_what_is_not_confirmed_for_an_sdk_says_so():
    """2.32's notes announced it for the next release; the pages of 2.33 that could be read do not say it."""
    for name in (
        "dtype-int64",
        "scatter-integer",
        "collective-integer-all-reduce",
        "collective-integer-reduce-scatter",
    ):
        ruling = RULES[name].on(Target("trn2", 2, "2.33", "3.0"))
        assert ruling is not None
        assert "not confirmed" in ruling.note, name
        before = RULES[name].on(Target("trn2", 2, "2.32", "3.0"))
        assert before is not None
        assert "not confirmed" not in before.note, name
    assert any("not confirmed" in note for note in load_sdk("2.33").notes)


def test_documents_that_disagree_on_large_outputs_are_both_named():
    for chip in CHIPS:
        ruling = RULES["buffer-size"].on(Target(chip, 2, "2.33", "3.0"))
        assert ruling is not None
        assert "SDK 2.28" in ruling.note
        assert "NCC_EVRF024" in ruling.note


def test_keys_are_those_that_decide():
    assert RULES["sort"].keyed_on == ["chip"]
    assert RULES["dtype-int64"].keyed_on == ["chip", "SDK"]
    assert RULES["gather-batched"].keyed_on == ["libneuronxla"]
    assert RULES["collective-group"].keyed_on == ["chip", "LNC"]
    assert RULES["control-cond"].keyed_on == []
    for rule in RULES.values():
        assert set(rule.keyed_on) <= set(KEYS)


def test_versions_within_bounds():
    assert within("2.33", ">= 2.33")
    assert not within("2.32", ">= 2.33")
    assert within("2.4", "< 2.33")
    assert within("3.0.5356.0", ">= 3")
    assert within("2.2.16408", "< 3")
    assert not within("3.0.1", "> 3")
    assert within("anything", None)


@pytest.mark.parametrize("when", [{"sdk": "2.33"}, {"sdk": "~= 2.33"}, {"libneuronxla": ">=3"}, {"chips": ["trn9"]}])
def test_conditions_that_cannot_be_meant(when):
    with pytest.raises(ValidationError):
        When.model_validate(when)


def test_a_case_names_what_it_holds_for():
    fields = {"id": "a", "summary": "b", "severity": "error", "source": "c", "instead": "d"}
    with pytest.raises(ValidationError, match="expected chips, lnc, sdk or libneuronxla"):
        Rule.model_validate({**fields, "cases": [{"when": {}, "severity": "note"}]})
    rule = Rule.model_validate({**fields, "cases": [{"when": {"lnc": 1}, "severity": "none"}]})
    assert rule.keyed_on == ["LNC"]
    assert rule.on(Target("trn2", 1, "2.33", "3.0")) is None
    assert rule.on(Target("trn2", 2, "2.33", "3.0")) is not None
