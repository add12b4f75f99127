"""The disk of `benchmarks/lost_writes.py`, and a few of its cases."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.lost.replay import Change, Disk, marks_before, read_journal
from benchmarks.lost_writes import compile_library
from tests.helpers import COMPILED_QUICKLY

LOST_WRITES = Path(__file__).parents[2] / "benchmarks" / "lost_writes.py"
compiled = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def changes(*steps: tuple) -> list[Change]:
    """(kind, path, data or other path)"""
    return [
        Change(kind, 0, f"/r/{path}", f"/r/{rest[0]}" if rest and kind == "r" else "", rest[0] if kind == "w" else b"")
        for kind, path, *rest in steps
    ]


def trees(made: list[Change]) -> set[tuple]:
    """What the disk may hold, by many seeds."""
    return {tuple(Disk("/r", made, random.Random(seed)).files()) for seed in range(200)}


def test_a_rename_may_outlive_what_was_written():
    made = changes(("c", "new"), ("w", "new", b"1234"), ("r", "new", "old"))
    assert {(("old", b""),), (("old", b"1234"),), (("old", bytes(4)),), (("new", b""),), ()} <= trees(made)


def test_what_was_fsynced_is_there_under_the_name_that_it_had():
    made = changes(("c", "new"), ("w", "new", b"1234"), ("s", "new"), ("r", "new", "old"))
    assert trees(made) == {(("new", b"1234"),), (("old", b"1234"),)}
    assert trees([*made, *changes(("m", "d"), ("s", "d"))]) == {(("d", None), ("old", b"1234"))}


def test_a_file_that_was_emptied_may_be_empty_or_as_it_was():
    made = changes(("c", "f"), ("w", "f", b"1234"), ("s", "f"), ("t", "f"), ("w", "f", b"56"))
    assert (("f", b"1234"),) in trees(made)
    assert (("f", b""),) in trees(made)
    assert not {files for files in trees(made) if files[0][1] not in (b"1234", b"", b"5", b"56", b"\0\0", b"56")}


PROGRAM = """
import os, shutil, sys
os.chdir(sys.argv[1])
os.makedirs("a/b")
with open("a/b/f", "w") as file:
    file.write("one"); file.flush(); os.fsync(file.fileno())
    file.write("two")
descriptor = os.open("g", os.O_RDWR | os.O_CREAT)
os.pwrite(descriptor, b"xyz", 5); os.writev(descriptor, [b"12", b"3"]); os.ftruncate(descriptor, 7)
try: os.open("/lost-mark/half", os.O_RDONLY)
except OSError: pass
shutil.copyfile("g", "h"); os.link("h", "i"); os.rename("a/b", "c"); os.unlink("h")
with open("c/f", "a") as file: file.write("three")
"""


@compiled
def test_the_journal_makes_the_same_tree(tmp_path):
    compile_library(tmp_path / "journal.so")
    root, journal = tmp_path / "root", tmp_path / "journal"
    root.mkdir()
    environ = {"LD_PRELOAD": str(tmp_path / "journal.so"), "LOST_JOURNAL": str(journal), "LOST_ROOT": str(root)}
    subprocess.run([sys.executable, "-c", PROGRAM, str(root)], check=True, env=os.environ | environ)
    made = read_journal(journal)
    files = {name: content for name, content in Disk(str(root), made).files() if content is not None}
    assert files == {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert files["c/f"] == b"onetwothree"
    assert marks_before(made, len(made)) == ["half"]
    assert sum(change.kind == "s" for change in made) == 1


@compiled
def test_writes_fail_when_they_are_told_to(tmp_path):
    compile_library(tmp_path / "journal.so")
    environ = {"LD_PRELOAD": str(tmp_path / "journal.so"), "LOST_JOURNAL": "/dev/null", "LOST_ROOT": str(tmp_path)}
    program = f"import os; d = os.open({str(tmp_path / 'f')!r}, os.O_CREAT | os.O_WRONLY); os.write(d, b'x' * 10)"
    seen = set()
    for seed in range(12):
        fail = environ | {"LOST_FAIL": f"{seed} 1 2 1000"}
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | fail)
        seen.add(ran.stderr.strip().rpartition("\n")[2] or (tmp_path / "f").stat().st_size)
    assert seen == {"OSError: [Errno 28] No space left on device", "OSError: [Errno 5] Input/output error", 5}


@pytest.mark.long
@compiled
def test_a_few_moments_of_losing_power(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", COMPILED_QUICKLY)  # without these tests' own devices
    command = [sys.executable, str(LOST_WRITES), "--cases", "8", "--seed", "23"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "\n8 of 8 right, in " in ran.stdout
