"""Huge pages for malloc: where they are asked for, and that the command starts itself again with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainfw import backends

VARIABLE = "GLIBC_TUNABLES"


@pytest.fixture
def glibc(monkeypatch):
    """Says which C library there is."""

    def choose(version: str | None) -> None:
        monkeypatch.setattr(os, "confstr", lambda name: version)

    choose("glibc 2.36")
    return choose


def setting(tmp_path: Path, text: str) -> Path:
    (tmp_path / "enabled").write_text(text)
    return tmp_path / "enabled"


def test_they_are_asked_for_where_the_system_leaves_it_to_the_program(tmp_path, glibc):
    asked = setting(tmp_path, "always [madvise] never\n")
    assert backends.huge_page_variables({}, asked) == {VARIABLE: "glibc.malloc.hugetlb=1"}
    kept = backends.huge_page_variables({VARIABLE: "glibc.malloc.tcache_count=0"}, asked)
    assert kept == {VARIABLE: "glibc.malloc.tcache_count=0:glibc.malloc.hugetlb=1"}
    assert backends.huge_page_variables(kept, asked) == {}, "it would start itself again for ever"


@pytest.mark.parametrize("environ", [{VARIABLE: "glibc.malloc.hugetlb=0"}, {"JAX_PLATFORMS": "neuron"}])
def test_the_user_and_neuron_are_left_alone(tmp_path, glibc, environ):
    assert backends.huge_page_variables(environ, setting(tmp_path, "always [madvise] never\n")) == {}


@pytest.mark.parametrize("text", ["[always] madvise never\n", "always madvise [never]\n"])
def test_a_system_that_decides_for_all_is_left_alone(tmp_path, glibc, text):
    assert backends.huge_page_variables({}, setting(tmp_path, text)) == {}


def test_a_system_without_them_is_left_alone(tmp_path, glibc):
    assert backends.huge_page_variables({}, tmp_path / "none") == {}


@pytest.mark.parametrize("version", ["glibc 2.34", "musl", None])
def test_other_c_libraries_are_left_alone(tmp_path, glibc, version):
    glibc(version)
    assert backends.huge_page_variables({}, setting(tmp_path, "always [madvise] never\n")) == {}


PROGRAM = """
import os, sys
from pathlib import Path
from trainfw.backends import memory
memory.huge_page_variables.__defaults__ = (Path(sys.argv[1]),)
os.confstr = lambda name: "glibc 2.36"
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[2:], flush=True)
memory.restart_with_huge_pages()
print("went on")
"""


def test_the_program_starts_once_more_as_the_same_process(tmp_path):
    asked = setting(tmp_path, "always [madvise] never\n")
    environ = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-c", PROGRAM, str(asked), "two words"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    first, again, last = done.stdout.splitlines()
    pid = first.split()[0]
    assert first == f"{pid} None two words"
    assert again == f"{pid} glibc.malloc.hugetlb=1 two words"
    assert last == "went on"
