"""Comparison of what a run's processes must have in common, before the first step; the run ends with what differs.

Nothing in a step would tell: processes that read other data, or learn at another rate, train on together.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from trainfw import backends
from trainfw.data import Prepared
from trainfw.errors import PeerError, RunError, UserError
from trainfw.program import Program
from trainfw.recipe import Recipe, leaves
from trainfw.training.resuming import effect_of

T = TypeVar("T")

_WHY = {
    "code": "all processes of a run run the same code",
    "environment": "all processes of a run have the same environment",
    "recipe": "all processes of a run take the same recipe",
    "command": "all processes of a run are started by the same command",
    "program": "all processes of a run make the same program",
    "base": "all processes of a run start from the same weights",
    "data": "all processes of a run read the same data",
    "start": "all processes of a run begin at the same step",
}
"""Reasons why it must be the same, by section of what is compared."""

_OF_ITS_OWN = ("data.cache_dir", "data.prefetch")
"""Keys of which each host may have a value of its own."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libneuronxla", "neuronx-cc")
_FLAGS = ("XLA_FLAGS", "NEURON_CC_FLAGS")
_DUMPS = ("--xla_dump", "--dump", "--cache_dir")
"""Flags that change no number, and may name a place on a host."""
_VARIABLES = (
    "NEURON_RT_STOCHASTIC_ROUNDING_EN",
    "NEURON_RT_STOCHASTIC_ROUNDING_SEED",
    "NVIDIA_TF32_OVERRIDE",
    "XLA_DOWNCAST_BF16",
    "XLA_USE_BF16",
)
_OPTIONS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)
_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (UserError, PeerError, RunError)}
"""Errors that are of the same kind in the processes that hear of them; of others a process dies."""
_ALONE_SECONDS = 300.0
"""Seconds that the first process may be alone in deciding something."""
_HEARD_SECONDS = 10.0
"""Seconds that the first process, which keeps what all have said, stays for the others to hear why the run ends."""


def agree(program: Program, data: Prepared | None = None, *, timeout: float = 3600.0) -> None:
    """Compare, of several processes, what their steps compute: for a loop of your own; `train` does so itself.

    Every process calls this. `timeout` is in seconds. Raises UserError, in every process, naming the first thing in
    which one is not like process 0 (code, environment, recipe, program or data); PeerError where one does not call.
    """
    with agreeing("program", timeout) as facts:
        facts |= recipe_facts(program.recipe) | program_facts(program)
        facts |= {} if data is None else {"data": data.facts()}


@contextlib.contextmanager
def agreeing(name: str, timeout: float = _ALONE_SECONDS) -> Iterator[dict[str, Any]]:
    """Work of every process, after which all go on or none does: what they put into this dict must be the same.

    Its keys are those of `_WHY`. Raises UserError, in all, where it is not; where the work failed in one, its error
    there, and in the others one that names it. PeerError where one is not done `timeout` seconds after this one.
    """
    facts: dict[str, Any] = {}
    with _telling(name):
        yield facts
    if jax.process_count() == 1:
        return
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
    if len(set(_meet(name, digest, timeout))) > 1:
        said = _meet(f"{name}/facts", facts, _ALONE_SECONDS)
        _leave(name)
        raise UserError(difference(said))


def first_says(name: str, decide: Callable[[], T]) -> T:
    """Return what the first process decides, in all of them: they see the same files, but not at the same moment.

    Raises in all of them where it fails.
    """
    with _telling(name):
        answer = decide() if jax.process_index() == 0 else None
    return _meet(name, answer, _ALONE_SECONDS)[0]


def difference(said: Sequence[Mapping[str, Any]]) -> str:
    """The first thing in which a process says otherwise than process 0, in words; empty where there is none."""
    first = dict(leaves(dict(said[0])))
    for index, facts in enumerate(said):
        other = dict(leaves(dict(facts)))
        for path in [*first, *other]:
            if path in first and path in other and json.dumps(first[path]) == json.dumps(other[path]):
                continue
            section, _, key = path.partition(".")
            here, there = (f"{key} = {one[path]!r:.200}" if path in one else f"no {key}" for one in (other, first))
            there = there.removeprefix(f"{key} = ")
            return f"process {index} of {len(said)} has {here}, process 0 has {there}: {_WHY[section]}"
    return ""


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """Code, environment and recipe, but keys that lead to something that is compared itself (data, weights)."""
    given = {
        # One form of numbers: a default may be written as an integer where a file's is read as a float.
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in leaves(recipe.model_dump())
        if key not in _OF_ITS_OWN and effect_of(key) != "compared"
    }
    code = {"digest of trainfw's code": _source_digest()}
    for package in ("trainfw", *_PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            code[package] = importlib.metadata.version(package)
    environment = {
        f"{name} {flag.partition('=')[0]}": flag.partition("=")[2]
        for name in _FLAGS
        for flag in sorted(os.environ.get(name, "").split())
        if not flag.startswith(_DUMPS)
    }
    environment |= {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    environment |= {name: str(getattr(jax.config, name, None)) for name in _OPTIONS}
    return {"code": code, "environment": environment, "recipe": given}


def program_facts(program: Program) -> dict[str, Any]:
    devices = program.mesh.devices.flat
    order = " ".join(f"{device.process_index}:{device.id}" for device in devices)
    return {
        "program": {
            "layout": str(program.layout),
            "platform": backends.current().platform,
            "devices of kind": jax.local_devices()[0].device_kind,
            "devices": program.mesh.size,
            "order of devices": hashlib.blake2b(order.encode(), digest_size=8).hexdigest(),
            "parameters": program.num_parameters,
        }
    }


@functools.cache
def _source_digest() -> str:
    """Return a digest of trainfw's own files, wherever they lie."""
    root = Path(__file__).parents[1]
    whole = hashlib.blake2b(digest_size=8)
    for file in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".yaml")):
        whole.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return whole.hexdigest()


@contextlib.contextmanager
def _telling(name: str) -> Iterator[None]:
    """Tells the processes that will `_meet` by this name of an error, for which they would wait."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1:
            kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "")
            said = (kind, str(error)) if kind else (PeerError.__name__, f"{type(error).__name__}: {error}")
            with contextlib.suppress(PeerError):
                backends.exchange(f"agree/{name}", [*said, None], _to_be_heard())
            _leave(name)
        raise


def _meet(name: str, value: Any, timeout: float) -> list[Any]:
    """Every process's `value`, by index. Raises what `_telling` was told."""
    said = backends.exchange(f"agree/{name}", [None, None, value], timeout)
    for index, (kind, problem, _) in enumerate(said):
        if kind is not None:
            _leave(name)
            raise _KINDS[kind](f"process {index} of {len(said)}: {problem}")
    return [value for _, _, value in said]


def _leave(name: str) -> None:
    """Before a process ends that knows why: the first one's end would take from the others what they have not read."""
    with contextlib.suppress(PeerError):
        backends.exchange(f"agree/{name}/heard", None, _to_be_heard())
    backends.end_together()


def _to_be_heard() -> float:
    return _HEARD_SECONDS if jax.process_index() == 0 else 0.0
