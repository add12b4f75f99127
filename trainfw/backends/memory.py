from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from trainfw.backends.neuron import plugin
from trainfw.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3), glibc's malloc.h."""


def compute_inline() -> None:
    """Have the computations of one CPU device run in the thread that asks for them. For where jax has not started yet.

    What that thread frees can be kept (`keep_freed_memory`), which threads of jax's own hand back to the system: a step
    of an adapter in benchmarks/adapters.py has 640 MB of buffers to clear then, and takes a tenth longer. What the host
    would do meanwhile it does on the same cores.
    """
    import jax  # not before the environment for it is set

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees for the next one, rather than hand it back to the system.

    The CPU's computations take their buffers from malloc, which asks the system for large ones each time, and has it
    clear every page: a first step of benchmarks/startup.py was a quarter longer so, and the later ones a twelfth. The
    peak is the same, and less is given back after it. Other C libraries are left as they are.
    """
    compute_inline()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**30)  # what is larger goes back all the same
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def release_freed_memory() -> None:
    """Hand back to the system what has been freed by now, where glibc can.

    Compiling takes memory of which half is free afterwards, and which steps have no use for: of an adapter's 30 layers,
    600 MB (benchmarks/adapters.py).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


_TUNABLES, _HUGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_page_variables(environ: Mapping[str, str], setting: Path = _SETTING) -> dict[str, str]:
    """The environment variables with which a process of glibc's has malloc ask for huge pages; none where they are of
    no use: the system gives them to all or to nobody, glibc is older than 2.35, `environ` has its say, or the devices
    are Neuron's, on whose hosts nothing has been measured.
    """
    tunables = environ.get(_TUNABLES, "")
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        able = name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
        able = able and _HUGE not in tunables and "[madvise]" in setting.read_text()
        able = able and not plugin.on_neuron(environ)
    except (OSError, ValueError, AttributeError, UserError):  # what is wrong with `environ` is not for here to say
        return {}
    if not able:
        return {}
    return {_TUNABLES: ":".join(filter(None, [tunables, f"{_HUGE}=1"]))}


def restart_with_huge_pages() -> None:
    """Start this program again, as the same process, where `huge_page_variables` has something to change.

    For the first line of a program that computes on the CPU: glibc reads its settings only when a process starts. The
    buffers of large matrix products come from malloc and go back to the system after each, to be cleared page by page:
    with pages of 2 MiB rather than 4 KiB a step of benchmarks/peers.py takes a tenth less.
    """
    variables = huge_page_variables(os.environ)
    if variables:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **variables})
