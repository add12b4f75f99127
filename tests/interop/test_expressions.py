"""Expressions beside Python's `re`, and beside PEFT's looking up of modules; and those with which `re` never ends."""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from trainfw.errors import UserError
from trainfw.interop.expressions import Expression, Steps, Text
from trainfw.interop.peft_config import read_peft_config

ATOMS = re.split(
    " ", r"a b 1 _ \. . [ab] [^a] [^.] [\W_] [a-c\d] \d \w \s \b \B ^ $ \Z (?<=a) (?<!b) (?<=^a) (?!) [^\d]*"
)
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?", "{2,}"]
EXPRESSIONS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.tuples(st.sampled_from(["({}|{})", "(?:{}|{})", "(?={})(?!{})", "{}|{}"]), inner, inner).map(
            lambda drawn: drawn[0].format(*drawn[1:])
        ),
        st.tuples(inner, st.sampled_from(REPEATS)).map(lambda drawn: f"(?:{drawn[0]}){drawn[1]}"),
    ),
    max_leaves=8,
)
NAMES = st.text("ab1_.", max_size=7)


@settings(max_examples=400, deadline=None)
@given(EXPRESSIONS, st.lists(NAMES | st.text("a\n", max_size=4), min_size=4, max_size=4))
def test_a_match_is_what_python_matches(pattern, texts):
    expression = Expression(pattern, "here", Steps("here"))
    for text in texts:
        assert expression.matches(Text(text, Steps("here"))) is (re.fullmatch(pattern, text) is not None), text


@settings(max_examples=200, deadline=None)
@given(
    target=EXPRESSIONS | st.lists(st.sampled_from(["q_proj", "a", "a.b", "1.a"]), min_size=1),
    exclude=st.none() | EXPRESSIONS | st.lists(NAMES),
    ranks=st.dictionaries(EXPRESSIONS | st.sampled_from(["a", "a.b", "^a", "b$"]), st.integers(1, 9), max_size=3),
    names=st.lists(NAMES, min_size=4, max_size=4),
)
def test_modules_are_those_of_peft(tmp_path_factory, target, exclude, ranks, names):
    fields = {"r": 11, "lora_alpha": 7, "target_modules": target, "exclude_modules": exclude, "rank_pattern": ranks}
    file = tmp_path_factory.getbasetemp() / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "init_lora_weights": True, **fields}))
    ours, theirs = read_peft_config(file), LoraConfig(**fields)
    for name in names:
        found = check_target_module_exists(theirs, name)
        assert ours.targets(name) is (found is True or isinstance(found, re.Match)), name
        assert ours.size(name) == (ranks.get(get_pattern_key(ranks, name), 11), 7.0), name


EMPTY = "(?:" + "|" * 3_880 + ")"
for _ in range(4):
    EMPTY = f"(?:{EMPTY}){{40}}"
NAME = "model.layers.11.self_attn." + "a" * 450 + "!"
REFUSED = {
    r"(.)\1": "references to groups are not supported",
    "(?i)a": "flags are not supported",
    "(?i:a)": "flags are not supported",
    "(a)?(?(1)b|c)": "conditions are not supported",
    "a*+": "possessive repeats are not supported",
    "(?>a)": "atomic groups are not supported",
    "a{4294967296}": "is not a regular expression: the repetition number is too large",
    "(?<=a*)": "is not a regular expression: look-behind requires fixed-width pattern",
    "(" * 900 + ")" * 900: "is not a regular expression: nested too deeply",
    "(": "is not a regular expression: missing )",
    "a" * 9_999: "has 9,999 characters; expected 4,000 at most",
    "(((a?){400}){400}){400}": "here: its regular expressions take too long to match",
    "(?=.*(?=.*(?=.*(?=.*x))))": "here: its regular expressions take too long to match",
    EMPTY: "here: its regular expressions take too long to match",
    # They take Python for ever, and have an answer.
    **dict.fromkeys(["(a+)+", "(a|a)*", "(.*.*)*x", "(a|aa)+$", "((a*)*)*", "(.*)*" * 50 + "x", "(a?){450}a{450}"], ""),
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_takes_python_for_ever_takes_a_moment(pattern):
    start, steps = time.thread_time(), Steps("here")
    try:
        for _ in range(20):
            assert not Expression(pattern, "here", steps).matches(Text(NAME, steps))
        said = ""
    except UserError as error:
        said = str(error)
    assert REFUSED[pattern] in said
    assert bool(said) is bool(REFUSED[pattern])
    assert time.thread_time() - start < 5
