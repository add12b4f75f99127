"""Partitioning of a lowered program: the module right after XLA's partitioner, on devices that may be simulated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainfw.hlo.buffers import Assignment, parse_assignment
from trainfw.hlo.module import Module
from trainfw.hlo.parse import parse_module
from trainfw.hlo.renumbering import module_of, renumbered
from trainfw.unfinished import scratch_directory

if TYPE_CHECKING:
    import jax


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
    """Buffers of `compiled` and their places; None where its compiler did not say."""


@dataclass(frozen=True)
class Exported:
    """A program as one device of many runs it, for a compiler that reads HLO."""

    module: Module
    text: str = field(repr=False)
    """The module as XLA prints it; large constants are left out."""
    proto: bytes = field(repr=False)
    """The serialized HloModuleProto, whole."""


def partition(lowered: jax.stages.Lowered, compiler_options: Mapping[str, str | bool] | None = None) -> Partitioned:
    """Compile a jax.stages.Lowered for its devices and read the module that the partitioner left.

    The final module would not do: by then the CPU's compiler has widened bf16 collectives to f32. A program for one
    device is never partitioned; its module is the one whose calls have been inlined, as partitioned ones are: names of
    operations are whole paths, and what is fused may cross what were functions.
    """
    with scratch_directory() as directory:
        compiled, text = _compile(lowered, Path(directory), compiler_options)
        kinds = ("buffer-assignment", "live-range")
        found = [sorted(Path(directory).glob(f"*after_optimizations-{kind}.txt")) for kind in kinds]
        assignment = parse_assignment(*(paths[-1].read_text() for paths in found)) if all(found) else None
        return Partitioned(parse_module(text.read_text()), compiled, assignment)


def export(lowered: jax.stages.Lowered, compiler_options: Mapping[str, str | bool] | None = None) -> Exported:
    """Compile as `partition` does, and take the module that the partitioner left as text and as bytes.

    Its instructions are numbered anew where the numbers do not fit 32 bits: see `trainfw.hlo.renumbering`.
    """
    with scratch_directory() as directory:
        options = {**(compiler_options or {}), "xla_dump_hlo_as_proto": True}
        _, text = _compile(lowered, Path(directory), options)
        proto = text.with_name(text.name.removesuffix(".txt") + ".hlo.pb")
        written = text.read_text()
        return Exported(parse_module(written), written, renumbered(module_of(proto.read_bytes())))


def _compile(
    lowered: jax.stages.Lowered, directory: Path, compiler_options: Mapping[str, str | bool] | None
) -> tuple[jax.stages.Compiled | None, Path]:
    """Return the jax.stages.Compiled, None where the compiler gave up after partitioning, and the partitioned text."""
    options: dict[str, Any] = {
        "xla_dump_to": str(directory),
        "xla_dump_hlo_pass_re": "spmd-partitioning|call-inliner",
        "xla_dump_hlo_as_text": True,
        # Machine code is written but never run: no time is spent on making it fast.
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    compiled, failure = None, None
    with without_compilation_cache():
        try:
            compiled = lowered.compile(compiler_options={**options, **(compiler_options or {})})
        except Exception as error:  # after partitioning, what the CPU lacks (a kernel of another device) is no matter
            failure = error
    texts = sorted(directory.glob("*.after_spmd-partitioning.*.txt"))
    texts = texts or sorted(directory.glob("*.after_call-inliner.*.txt"))[:1]
    texts = texts or sorted(directory.glob("*.before_optimizations.txt"))
    if not texts and failure is not None:
        raise failure
    return compiled, texts[-1]


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Keep JAX's persistent cache out of compiles, since what comes out of it was not compiled, hence dumps nothing.

    Compiles in several threads end this one after the other, so that there the caller keeps it off for all of them.
    """
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
