"""Cache of what a plan has read of compiled steps, so that the same step is compiled once.

Nothing of it depends on the hardware's figures. An entry of the cache is what was read of the program that was
compiled; recipes that differ in what that program does not show, such as how many replicas there are, share it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainfw import backends
from trainfw.paths import cache_dir
from trainfw.pieces import is_own
from trainfw.planning.read_step.analysis import (
    Analysis,
    Simulation,
    compile_step,
    lengthened,
    read,
    simulated_program,
    simulation,
)
from trainfw.planning.read_step.memory import MemoryTable, memory_table, state_arrays
from trainfw.recipe import Recipe
from trainfw.unfinished import writing

ENTRIES = 500
"""Number of entries that the cache keeps, those used last."""


@dataclass(frozen=True)
class Compiled:
    analysis: Analysis
    memory: MemoryTable
    """Without what the runtime of a core takes (see `MemoryTable.on`)."""


@dataclass(frozen=True)
class _Entry:
    key: str
    step: Compiled


def compiled(
    recipe: Recipe,
    progress: Callable[[str], None] = lambda _: None,
    *,
    most: int = backends.MAX_SIMULATED,
    simulate: int | None = None,
    fresh: bool = False,
) -> Compiled:
    """The training step of `recipe` on its topology, at full size: from the cache, or compiled.

    Args:
        progress: told what is being done.
        most: devices to compile for at most, as far as shortening `data` and `fsdp` goes.
        simulate: so many devices are started where it must be compiled, before which this process has no need of jax.
            Left out, as many as it takes, where jax has not started; else the ones that this process has.
        fresh: compile it anew, whatever the cache has; so is what is of somebody's own code, always.

    Raises UserError as `simulation` does, and where the state does not divide among all cores.
    """
    found = simulation(recipe, most)
    stands_in = simulate is not None or not backends.started() or backends.current().on_host
    backend = backends.simulated(found.rules) if stands_in else backends.current()
    key = _key(found, backend)
    file = cache_dir() / "plans" / f"{key}.json"
    own = any(map(is_own, (recipe.model.family, recipe.objective.name)))  # code that the key does not know
    step = None if fresh or own else _load(file, key)
    if step is not None:
        progress("compiled before (in the cache; fresh=True, --no-cache, compiles it anew)")
    else:
        backends.lend(simulate or found.cores)
        with backends.contract(found.rules) if stands_in else contextlib.nullcontext():
            step = _compile(found, recipe, progress)
        if not own and (problem := _save(file, _Entry(key, step))):
            progress(f"not kept for the next time: {problem}")
    with recipe.blamed("parallel"):
        memory = step.memory.lengthened(found.simulated, found.layout)
    return Compiled(lengthened(step.analysis, found.simulated, found.layout), memory)


def _compile(found: Simulation, recipe: Recipe, progress: Callable[[str], None]) -> Compiled:
    program = simulated_program(found)
    with recipe.blamed("parallel"):
        for array in state_arrays(program):  # said before anything is compiled
            array.bytes_on(found.layout)
    partitioned = compile_step(program, progress)
    analysis = read(partitioned.module, program.mesh, found.simulated)
    return Compiled(analysis, memory_table(program, partitioned))


def _key(found: Simulation, backend: backends.Backend) -> str:
    """A hash of all that the compiled step depends on."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    parts = {
        "recipe": found.recipe.model_dump(mode="json", exclude={"name"}),
        "layout": found.simulated.sizes,
        "stands_in": found.stands_in,
        "backend": repr(replace(backend, init_options={})),  # of the first state
        "flags": flags,
        # As JAX_ENABLE_X64; the platform is the backend's.
        "jax": {k: v for k, v in os.environ.items() if k.startswith("JAX_") and k != "JAX_PLATFORMS"},
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "python": sys.version_info[:2],
        "machine": platform.machine(),
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code() -> str:
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        text = file.read_bytes()
        digest.update(f"{file.relative_to(package)} {len(text)} ".encode() + text)
    return digest.hexdigest()


@functools.cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(_Entry)


def _load(file: Path, key: str) -> Compiled | None:
    """None where there is no such entry, or it is not what it should be."""
    try:
        entry: _Entry = _adapter().validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None
    if entry.key != key:
        return None
    with contextlib.suppress(OSError):  # a cache may be for reading only
        os.utime(file)  # used last
    return entry.step


def _save(file: Path, entry: _Entry) -> str:
    """Why it could not be; empty where it was."""
    try:
        with writing(file) as partial:
            partial.write_bytes(_adapter().dump_json(entry))
    except OSError as error:
        return str(error)
    with contextlib.suppress(OSError):  # another process may tidy up too
        entries = sorted(file.parent.glob("*.json"), key=lambda path: -path.stat().st_mtime)
        for old in entries[ENTRIES:]:
            old.unlink()
    return ""
