"""A short form of `benchmarks/fuzz.py`: every kind's reader meets changed files, in watched processes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.fuzzing import gguf_tree, mutations, readers, watching
from tests.helpers import COMPILED_QUICKLY

FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


@pytest.mark.long
def test_a_few_inputs_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", COMPILED_QUICKLY)  # without these tests' own devices
    command = [sys.executable, str(FUZZ), "--inputs", "40", "--seed", "23", "--out", str(tmp_path / "found")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count(": 40 inputs in") == 8
    assert ran.stdout.endswith("\n0 findings\n")


@pytest.mark.parametrize("form", sorted(mutations.FORMS))
def test_changes_are_the_same_for_the_same_seed(form):
    data = {
        "json": b'{"a": [1, "b", null], "c": {"d": 1.5}}',
        "lines": b'{"step": 1}\n{"step": 2}\n',
        "yaml": b"name: x\ntrain: {steps: 5}\n",
        "tokenizer": b'{"normalizer": null, "model": {"vocab": {"a": 0}}}',
        "adapter": b'{"r": 4, "target_modules": ["q_proj"]}',
        "overrides": b"train.steps=5\nname=x",
        "jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}",
        "bytes": bytes(range(256)),
        "safetensors": (2).to_bytes(8, "little") + b"{}" + bytes(8),
        "gguf": gguf_tree.write([3, None, None], [["k", 4, 7]], [["t", [2, 2], 0, 0]], bytes(16)),
    }[form]
    change = mutations.FORMS[form]
    found = [change(data, random.Random(seed)) for seed in range(30)]
    assert found == [change(data, random.Random(seed)) for seed in range(30)]
    assert len({*found, data}) > 10


def test_a_gguf_file_is_written_as_it_was_read():
    values = [["a", 8, "text"], ["b", 9, [8, ["x", "y"]]], ["c", 6, 0.5], ["d", 7, True], ["e", 10, 2**63]]
    data = gguf_tree.write([3, None, None], values, [["t", [2, 3], 0, 0]], bytes(24))
    assert gguf_tree.read(data)[1] == values
    assert gguf_tree.write(*gguf_tree.read(data)) == data


def test_what_is_dumped_may_hold_a_key_twice_and_no_number_at_all():
    tree = mutations.Pairs([["a", 1], ["a", mutations.Raw("1e400")], ["b", [None, 10**400]]])
    assert mutations.dump(tree) == f'{{"a": 1, "a": 1e400, "b": [null, {10**400}]}}'
    assert mutations.parse(b'{"a": 1, "a": 2}') == [["a", 1], ["a", 2]]


def bad_reader(directory: Path, _: Path) -> None:
    """Does what the content of its file asks for, by number."""
    what = json.loads((directory / "number").read_text())
    if directory.name != "case" or what == 0:
        return
    actions = {
        1: lambda: {}["missing"],
        2: lambda: time.sleep(600),
        3: lambda: bytearray(2**34),
        4: lambda: __import__("os").abort(),
        5: lambda: (_ for _ in ()).throw(watching.UserError("\x1b[31mred")),
        6: lambda: (_ for _ in ()).throw(watching.UserError("x" * 3000)),
        7: lambda: (_ for _ in ()).throw(watching.UserError("said why")),
        8: lambda: (_ for _ in ()).throw(readers.Wrong("3 are 4")),
    }
    actions[what]()


@pytest.mark.filterwarnings("ignore:os.fork")  # the child runs a few lines of Python
def test_whatever_goes_wrong_is_found_and_the_next_case_runs(tmp_path, monkeypatch):
    (tmp_path / "corpus" / "bad").mkdir(parents=True)
    (tmp_path / "corpus" / "bad" / "number").write_text("0")
    monkeypatch.setitem(watching.READERS, "bad", readers.Kind(bad_reader, {"number": "number"}))
    numbers = iter(range(10**9))

    def make(corpus, kind, seed, number, target):
        target.mkdir(exist_ok=True)
        (target / "number").write_text(str(number))
        return f"case {next(numbers)}"

    monkeypatch.setattr(watching.cases, "make", make)
    monkeypatch.setattr(watching, "IDLE_SECONDS", 1.0)
    watched = watching.Watched(tmp_path / "corpus", "bad", 0, tmp_path / "work")
    found = {finding.number: finding.place for finding in watched.run(0, 9, time.monotonic() + 60)}
    assert watched.done == 9
    assert watched.refused == 2  # a control character does not reach the terminal
    assert sorted(found) == [1, 2, 3, 4, 6, 8]
    assert "KeyError" in found[1]
    assert "a wait without end" in found[2]
    assert "MemoryError" in found[3]
    assert "SIGABRT" in found[4]
    assert "thousands of characters" in found[6]
    assert found[8] == "wrong: N are N"
