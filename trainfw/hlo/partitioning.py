"""From a lowered program to the module right after XLA's partitioner, on devices that may be simulated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfw.hlo.buffers import Assignment, parse_assignment
from trainfw.hlo.module import Module
from trainfw.hlo.parse import parse_module
from trainfw.unfinished import scratch_directory


@dataclass(frozen=True)
class Partitioned:
    """A program as one device of many runs it."""

    module: Module
    """Right after partitioning: nothing fused yet, and collectives in the dtypes that the program asked for."""
    compiled: Any | None
    """The jax.stages.Compiled, for `memory_analysis` and `cost_analysis`; their figures are the CPU compiler's.

    None where that compiler gave up after partitioning.
    """
    assignment: Assignment | None = None
    """What `compiled` keeps where; None where its compiler did not say."""


def partition(lowered: Any, compiler_options: Mapping[str, Any] | None = None) -> Partitioned:
    """Compile a jax.stages.Lowered for its devices and read the module that the partitioner left.

    The final module would not do: by then the CPU's compiler has widened bf16 collectives to f32. A program for one
    device is never partitioned; its module is the one whose calls have been inlined, as partitioned ones are: names of
    operations are whole paths, and what is fused may cross what were functions.
    """
    with scratch_directory() as directory, _without_compilation_cache():
        options = {
            "xla_dump_to": directory,
            "xla_dump_hlo_pass_re": "spmd-partitioning|call-inliner",
            "xla_dump_hlo_as_text": True,
            # Machine code is written but never run: no time is spent on making it fast.
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
        }
        compiled, failure = None, None
        try:
            compiled = lowered.compile(compiler_options={**options, **(compiler_options or {})})
        except Exception as error:  # after partitioning, what the CPU lacks (a kernel of another device) is no matter
            failure = error
        texts = sorted(Path(directory).glob("*.after_spmd-partitioning.*.txt"))
        texts = texts or sorted(Path(directory).glob("*.after_call-inliner.*.txt"))[:1]
        texts = texts or sorted(Path(directory).glob("*.before_optimizations.txt"))
        if not texts and failure is not None:
            raise failure
        return Partitioned(parse_module(texts[-1].read_text()), compiled, _assignment(Path(directory)))


def _assignment(directory: Path) -> Assignment | None:
    kinds = ("*after_optimizations-buffer-assignment.txt", "*after_optimizations-live-range.txt")
    found = [sorted(directory.glob(kind)) for kind in kinds]
    if not all(found):
        return None
    return parse_assignment(*(paths[-1].read_text() for paths in found))


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """What comes out of JAX's persistent cache was not compiled, hence dumps nothing."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or it goes by the answer of the first time it asked
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
