"""The memory of a process: computations in their caller's thread, what goes back and what stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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


USE = """
import ctypes, resource, sys, threading
from pathlib import Path
from trainfw import backends
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
backends.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def use(size, written, times, then):
    blocks = [libc.malloc(size) for _ in range(times)]
    for block in blocks:
        ctypes.memset(block, 1, written)
    found = then()
    for block in blocks:
        libc.free(block)
    return found
"""
INLINE = """
taken, kept = use(int(sys.argv[1]), 200_000_000, 1, resident), resident()
backends.release_freed_memory()
print(taken, kept, resident())
"""
IN_A_THREAD = """
def cleared():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    before, after = (use(30_000_000, 30_000_000, 7, cleared) for _ in range(2))
    print(after - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def measured(*code):
    done = subprocess.run([sys.executable, "-c", *code], capture_output=True, text=True, check=True)
    return map(int, done.stdout.split())


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="of glibc's malloc")
@pytest.mark.parametrize("size", [200_000_000, 3_000_000_000])  # of which 200 MB are written
def test_what_is_freed_is_kept_until_it_is_to_go(size):
    taken, kept, left = measured(USE + INLINE, str(size))
    assert kept > taken - 10_000_000
    assert left < taken - 190_000_000


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="of glibc's malloc")
def test_so_are_the_blocks_of_other_threads():
    (cleared,) = measured(USE + IN_A_THREAD)
    assert cleared < 1000  # pages, of 51,000
