"""Modules of an adapter beside those that PEFT finds; and expressions with which Python's `re` never ends."""

import contextlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from trainfw import confined
from trainfw.confined import Helper
from trainfw.errors import UserError
from trainfw.interop import peft_config
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
    sizes = ours.sizes(names)
    for name in names:
        found = check_target_module_exists(theirs, name)
        assert (name in sizes) is (found is True or isinstance(found, re.Match)), name
        assert sizes.get(name, (11, 7.0)) == (ranks.get(get_pattern_key(ranks, name), 11) if name in sizes else 11, 7.0)


NAME = "model.layers.11.self_attn." + "a" * 450 + "!"
REFUSED = {
    "a{4294967296}": "is not a regular expression: the repetition number is too large",
    "(?<=a*)": "is not a regular expression: look-behind requires fixed-width pattern",
    "(" * 900 + ")" * 900: "is not a regular expression: nested too deeply",
    "(": "is not a regular expression: missing )",
    "(((a?){400}){400}){400}": "simplify its regular expressions, or list the names",
    "(a|a)*": "simplify its regular expressions, or list the names",
    "(.*.*)*x": "simplify its regular expressions, or list the names",
}


@pytest.mark.parametrize("pattern", REFUSED)
@pytest.mark.parametrize("key", ["target_modules", "rank_pattern"])
def test_what_is_no_expression_or_takes_python_for_ever_is_refused(tmp_path, monkeypatch, key, pattern):
    monkeypatch.setattr(confined, "BURST_SECONDS", 1)
    monkeypatch.setattr(peft_config, "helper", helper := Helper())
    fields = {"r": 11, "lora_alpha": 7, "target_modules": "all-linear", "init_lora_weights": True}
    fields[key] = pattern if key == "target_modules" else {pattern: 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    config = read_peft_config(tmp_path / "adapter_config.json")
    with contextlib.closing(helper), pytest.raises(UserError) as error:
        config.sizes([NAME, NAME[26:]])
    assert f"adapter_config.json: {key}: " in str(error.value)
    assert REFUSED[pattern] in str(error.value)
