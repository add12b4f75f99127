"""The memory of a process: huge pages for malloc, computations in their caller's thread, what goes back and stays."""

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


COMPUTE = """
import sys
from trainfw import backends
if "inline" in sys.argv:
    backends.compute_inline()
import jax, jax.numpy as jnp
x = jnp.eye(512)
work = jax.jit(lambda x: jax.lax.fori_loop(0, 50, lambda i, y: jnp.tanh(y @ x), x))
jax.block_until_ready(work(x))
print(work(x).is_ready())
"""


@pytest.mark.parametrize("how", ["inline", "apart"])
def test_a_computation_is_done_when_its_caller_goes_on(how):
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE, how],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(how == "inline")


RELEASE = """
import ctypes, sys
from pathlib import Path
from trainfw import backends
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
backends.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
block = libc.malloc(200_000_000)
ctypes.memset(block, 1, 200_000_000)
taken = resident()
libc.free(block)
kept = resident()
backends.release_freed_memory()
print(taken, kept, resident())
"""


@pytest.mark.skipif(not (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="of glibc's malloc")
def test_what_is_freed_is_kept_until_it_is_to_go():
    done = subprocess.run([sys.executable, "-c", RELEASE], capture_output=True, text=True, check=True)
    taken, kept, left = map(int, done.stdout.split())
    assert kept > taken - 10_000_000
    assert left < taken - 190_000_000
