from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
"""Parameters of mallopt(3), from glibc's malloc.h."""
_THRESHOLDS = (700, 10, 10)
"""CPython's own, up to 3.13."""


def compute_inline() -> None:
    """Have the computations of one CPU device run in the thread that asks for them. For where jax has not started yet.

    What that thread frees can be kept whole (`keep_freed_memory`), of which threads of jax's own hand large blocks back
    to the system: a step of an adapter in benchmarks/adapters.py has 640 MB of buffers to clear then, and takes a tenth
    longer. What the host would do meanwhile it does on the same cores.
    """
    import jax  # not before the environment for it is set

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees for the next one, rather than hand it back to the system.

    The CPU's computations take their buffers from malloc, which asks the system for large ones each time, and has it
    clear every page of them for every step. The peak is no higher, and less is given back after it. Other C libraries
    are left as they are.
    """
    compute_inline()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)  # nothing in a mapping of its own, however large: those go back at once
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
        mallopt(_M_TOP_PAD, 2**27)  # nor the heaps of other threads, which are of 64 MB, when they are empty


def share_freed_memory() -> None:
    """Have all threads take memory from one arena of glibc's. For before JAX starts several devices in this process.

    These compute in threads of JAX's own, whose own arenas hold blocks of up to 64 MB, and a step's buffers are one
    larger block: a tenth of a step's processor time went into memory that was cleared anew (benchmarks/scaling.py).
    (XLA can lay them in blocks that fit, `xla_multiheap_size_constraint_per_heap`, but then no step can be kept on
    disk: "Multiple temp buffer allocations found", jaxlib 0.10.2.)
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def start_is_kept() -> Iterator[None]:
    """Have Python look for cycles only among objects that are made inside, and as often as by default.

    A start leaves half a million objects that stay. Looking through them takes half a second, so that Python does it
    rarely, and what saves leave behind in cycles would lie there for a thousand of them.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.collect()  # of nothing: by how much it finds Python judges when to do so again
    gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def release_freed_memory() -> None:
    """Hand back to the system what has been freed by now, where glibc can.

    Compiling and reading weights take memory of which much is free afterwards, and which steps have no use for: of an
    adapter's 30 layers, 600 and 120 MB (benchmarks/adapters.py).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_memory() -> int:
    """Count the bytes that may still be taken, on this machine or in this container; 0 where nothing says."""
    found = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        group = Path("/sys/fs/cgroup")
        limit, taken = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken -= sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))  # which give way
        found = min(found, max(limit - taken, 0))
    return found
