from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3), glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees for the next one, rather than hand it back to the system.

    The CPU's computations take their buffers from malloc, which asks the system for large ones each time, and has it
    clear every page: a first step of benchmarks/startup.py was a quarter longer so, and the later ones a twelfth. The
    peak is the same, and less is given back after it. Other C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**30)  # what is larger goes back all the same
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
