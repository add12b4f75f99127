"""YAML that cannot be meant is refused within a second; what we write is read back."""

from __future__ import annotations

import gc
import os
import re
import time

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.helpers import write_recipe
from trainfw import UserError, load_recipe, yaml_text
from trainfw.hardware import load_topology

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefghijklm", "bcdefghijklmn")
)
MAPS = "m0: &m0 {x: 1}\n" + "".join(f"m{i}: &m{i} {{a: *m{i - 1}, b: *m{i - 1}}}\n" for i in range(1, 40))
FILES = {
    "aliases that multiply": (BOMB, r":5: has more than 10,000 keys and values, what aliases repeat included$"),
    "mappings that multiply": (MAPS, r":11: has more than 10,000 keys and values, what"),
    "an alias in itself": ("a: 1\nb: &b [[*b]]\n", r":2: \*b contains itself"),
    "comments": ("# " + "x" * 50_000_000, ": is longer than 512 KiB"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(30_000)), r":\d+: has more than 10,000 keys and values$"),
    "many items": ("a: [" + "1," * 100_000, ":1: has more than 10,000"),
    "a long value": (f"a: 1\nname: {'x' * 70_000}\n", r":2: has a value of 70,000 characters; 65,536 at most"),
    "a long key": (f"? {'x' * 2000}\n: 1\n", r":1: a key of 2,000 characters"),
    "a long key below": (f"a:\n- ? {'x' * 2000}\n  : 1\n", r":[12]: (a: )?a key of 2,000 characters"),
    "depth": ("a: " + "[" * 10_000, ":1: is nested too deeply: more than 64 levels"),
    "depth of mappings": ("".join(f"{' ' * i}a:\n" for i in range(100)), r":\d\d: is nested too deeply"),
    "a key twice in a list": ("a:\n- {b: 1, b: 2}\n", r":[12]: ((a: )?the key 'b'|a\.0\.b:) is written twice"),
    "a long number": (f"a: {'9' * 5000}\n", r":1: (a: )?a number of 5,000 digits"),
    "a control character": ("a: 1\nb: \x07\n", ":2: not valid YAML: special characters"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["recipe", "base", "topology"])
def test_files_that_cannot_be_meant(name, kind, tmp_path):
    text, problem = FILES[name]
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    if kind == "base":
        (tmp_path / "mine.yaml").write_text("extends: bad.yaml\n")
    start = time.thread_time()
    with pytest.raises(UserError, match=f"bad.yaml'?{problem}") as error:
        load_topology(str(file)) if kind == "topology" else load_recipe(
            tmp_path / ("mine.yaml" if kind == "base" else "bad.yaml")
        )
    assert time.thread_time() - start < 5  # a moment; unbounded, there was no end in 25
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", [name for name in FILES if name != "comments"])
def test_overrides_that_cannot_be_meant(name):
    """A line's number says nothing there."""
    text, problem = FILES[name]
    start = time.thread_time()
    with pytest.raises(UserError, match=f"^overrides: data.source{re.sub(':[^:]+: ', ': (a: )?', problem, count=1)}"):
        load_recipe("quickstart", [f"data.source={text}"])
    assert time.thread_time() - start < 5  # a moment; unbounded, there was no end in 25


@pytest.mark.parametrize("path", ["fifo.yaml", "/dev/zero", "directory.yaml"])
def test_what_is_no_file_is_not_waited_for(path, tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "directory.yaml").mkdir()
    path = tmp_path / path
    for read in (load_recipe, lambda path: load_topology(f"{path}" if path.suffix else f"{path}.yaml")):
        with pytest.raises(UserError, match=re.escape(str(path))):
            read(path)
    base = tmp_path / "base.yaml"
    base.write_text(f"extends: {path}\n")
    with pytest.raises(UserError, match=r"base.yaml:1: extends"):
        load_recipe(base)


REFUSED = {
    "a scalar that a key replaces": (["train=5", "train.steps=7"], "overrides: train = 5: expected a section"),
    "a list for a section": (["data.tokenizer=[1]"], r"data.tokenizer = \[1\]: expected a section, `tokenizer: {key"),
    "a deep key": ["a" + ".a" * 30_000 + "=1", "is too long for a key"],
    "many levels": (["a" + ".a" * 100 + "=1"], "is too long for a key"),
    "a long name": (["name=" + "x" * 129], "name = 'xxx.*expected at most 128 characters"),
    "a long part of a path": (["data.cache_dir=/a/" + "é" * 128], "data.cache_dir = .*255 bytes a name"),
    "a long path": (["data.cache_dir=" + "/abc" * 1100], "data.cache_dir = .*4096 a path"),
    "a line break in a path": (['data.cache_dir="/a\\nb"'], r"data.cache_dir = '/a\\nb': holds the character U\+000A"),
    "one in a list": (['data.source=["a.txt", "a\\Lb"]'], r"data.source = 'a\\u2028b': holds the character U\+2028"),
    "bytes that are no UTF-8": (["data.source=\udcff.txt"], "data.source: not valid YAML: special characters"),
    "half a character": (['train.sample_prompt="\\ud800"'], "train.sample_prompt = .*: is not Unicode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_recipe_holds(name, tmp_path):
    overrides, problem = REFUSED[name]
    with pytest.raises(UserError, match=problem) as error:
        load_recipe(write_recipe(tmp_path), overrides if isinstance(overrides, list) else [overrides])
    assert len(str(error.value)) < 500


def test_a_base_with_a_value_for_a_section_is_not_passed_over(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: quickstart\ntrain: 5\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ntrain: {steps: 7}\n")
    with pytest.raises(UserError, match=r"base.yaml:2: train = 5: expected a section"):
        load_recipe(tmp_path / "mine.yaml")


def test_thousands_of_problems_are_counted(tmp_path):
    file = tmp_path / "many.yaml"
    file.write_text("extends: quickstart\ntrain:\n" + "".join(f"  steps{i}: 1\n" for i in range(4000)))
    gc.freeze()  # what thousands of other tests have left is not looked through meanwhile
    start = time.thread_time()
    with pytest.raises(UserError, match=r"(?s)many.yaml:3: train.steps0 = 1: unknown key.*\nand 3,980 more$"):
        load_recipe(file)
    took = time.thread_time() - start
    gc.unfreeze()
    assert took < 3


def test_a_chain_of_many_recipes_ends(tmp_path):
    for number in range(2000):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    with pytest.raises(UserError, match=r"32\.yaml: is extended by 32 recipes, one by the other"):
        load_recipe(tmp_path / "0.yaml")


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=8), st.text(max_size=20) | st.integers() | st.floats(allow_nan=False), max_size=4)
)
@example({"a": "\x85\u2028\u2029\ufeff\r\n\t\x00\x1b", "b": " x ", "no": "1e4", "c": "a\r\nb\x85c"})
def test_what_is_written_is_read_back(tree):
    text = yaml_text.dump(tree)
    assert yaml_text.load(text, "x") == tree
    assert not re.search(r"[^\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\U0010ffff]", text)
    if all(isinstance(value, str) for value in tree.values()):
        assert {str(key): str(value) for key, value in yaml.load(text, yaml.BaseLoader).items()} == tree
