from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from trainfw import backends
from trainfw.backends import Sdk, load_sdk
from trainfw.checking.jaxpr import place_of_failure, read_jaxpr, read_symbolic
from trainfw.checking.partitioned import memory_of, read_memory, read_partitioned, sum_collectives
from trainfw.checking.report import Finding, Report, merged
from trainfw.checking.stablehlo import read_stablehlo
from trainfw.errors import UserError
from trainfw.hardware import Topology, load_topology
from trainfw.hlo import Place, partition, user_place

Progress = Callable[[str], None]


def check(
    fn: Callable[..., Any],
    *abstract_args: Any,
    hardware: str | Topology = "trn2-ultraserver",
    count: int = 1,
    lnc: int | None = None,
    sdk: str | Sdk | None = None,
    mesh: Any | None = None,
) -> Report:
    """Read a JAX function for everything that Neuron is known to refuse, on whatever machine this is.

    Args:
        fn: what would be jitted on Neuron, jitted already or not.
        abstract_args: its arguments: arrays, or jax.ShapeDtypeStructs, with NamedShardings of `mesh` where they are
            split. Nothing is computed with them.
        hardware: a topology, or the name of one (`trainfw.hardware.topology_names()`), of which there are `count`.
        lnc: physical NeuronCores in a logical one; the hardware's default when left out.
        sdk: the Neuron SDK whose limits count; the newest when left out.
        mesh: a jax Mesh of the devices that the program is for, simulated ones say
            (`trainfw.backends.prepare(devices=64)` before jax starts). Device number n stands for core n of the
            hardware. Left out, it is the mesh of the arguments' shardings, or one core.

    Raises UserError for hardware that does not exist or is smaller than the mesh; what `fn` itself raises while it is
    traced, except for shapes that depend on values, which are a finding.
    """
    import jax

    topology = hardware if isinstance(hardware, Topology) else load_topology(hardware, count=count, lnc=lnc)
    release = sdk if isinstance(sdk, Sdk) else load_sdk(sdk)
    arguments = jax.tree.map(_abstract, abstract_args)
    if mesh is None:
        meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(arguments) if _is_split(leaf)}
        if len(meshes) > 1:
            raise UserError(f"the arguments are split over {len(meshes)} different meshes; expected one")
        mesh = next(iter(meshes), None)
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    if mesh is not None and jitted is not fn:  # a jitted function may say itself how its arguments are split
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        arguments = jax.tree.map(
            lambda leaf: (
                leaf
                if not hasattr(leaf, "shape") or _is_split(leaf)
                else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)
            ),
            arguments,
        )
    name = getattr(fn, "__name__", "function")
    return _check({name: (jitted, arguments)}, mesh, topology, release, lambda _: None)


def check_program(
    program: Any, *, topology: Topology, sdk: Sdk | None = None, progress: Progress | None = None
) -> Report:
    """Check the training and evaluation steps of a `trainfw.Program` built for devices that stand for `topology`.

    Args:
        progress: told what is being done.
    """
    steps = {
        "train_step": (program.train_step, (program.abstract_state, program.abstract_batch)),
        "eval_step": (program.eval_step, (program.abstract_state.params, program.abstract_batch)),
    }
    return _check(steps, program.mesh, topology, sdk or load_sdk(), progress or (lambda _: None))


def _check(
    functions: Mapping[str, tuple[Any, tuple[Any, ...]]],
    mesh: Any | None,
    topology: Topology,
    sdk: Sdk,
    progress: Progress,
) -> Report:
    """Check jitted functions with their arguments. Collectives are reported of the first, memory of the largest."""
    import jax

    neuron = topology.rules == "neuron"
    cores = _physical_cores(mesh, topology)
    findings: list[Finding] = list(_versions(sdk)) if neuron else []
    summary, memories = None, []
    for name, (function, arguments) in functions.items():
        progress(f"tracing {name}")
        found: list[Finding] = []
        try:
            traced = function.trace(*arguments)
        except (jax.errors.NonConcreteBooleanIndexError, jax.errors.ConcretizationTypeError) as error:
            if not neuron or isinstance(error, jax.errors.TracerBoolConversionError):
                raise
            findings.append(Finding("shape-dynamic", _first_line(error), _raised_at(error), program=name))
            continue
        if neuron and (symbolic := read_symbolic(traced.jaxpr)):
            findings += [replace(finding, program=name) for finding in symbolic]
            continue
        if neuron:
            found += read_jaxpr(traced.jaxpr, has_e4m3fn=_has_e4m3fn(topology))
            found += _lowered_findings(traced, {finding.rule for finding in found})
        progress(f"partitioning {name} for {len(cores)} core{'s' * (len(cores) > 1)}")
        try:
            partitioned = partition(traced.lower(), backends.current().compiler_options)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            partitioned = None  # what the CPU cannot lower at all; the rules above have been read
        if partitioned is not None and neuron:
            found += read_partitioned(partitioned.module, cores, mesh, topology, sdk)
        leaves = [leaf for leaf in jax.tree.leaves(arguments) if hasattr(leaf, "shape")]
        memories.append(memory_of(leaves, partitioned, topology))
        found += read_memory(memories[-1])
        if summary is None and partitioned is not None:
            summary = sum_collectives(partitioned.module, mesh)
        findings += [replace(finding, program=name) for finding in found]
    units = f"{topology.count} x {topology.name}" if topology.count > 1 else topology.name
    return Report(
        hardware=units,
        cores=topology.cores,
        sdk=sdk.version if neuron else None,
        findings=merged(findings),
        collectives=summary or (),
        memory=max(memories, key=lambda memory: memory.arguments + (memory.temporaries or 0), default=None),
    )


def _lowered_findings(traced: Any, found: set[str]) -> list[Finding]:
    """Findings in the StableHLO for Neuron, or, where JAX cannot make it, in that for CPU."""
    platform, failure = "neuron", []
    try:
        lowered = traced.lower(lowering_platforms=("neuron",))
    except (NotImplementedError, ValueError) as error:
        if not found & {"control-callback", "control-checkify"}:
            failure = [Finding("op-no-lowering", _first_line(error), place_of_failure(error))]
        platform = "cpu"
    if platform == "cpu":
        try:
            lowered = traced.lower(lowering_platforms=("cpu",))
        except (NotImplementedError, ValueError):
            return failure
    return [*failure, *read_stablehlo(lowered.compiler_ir("stablehlo"))]


def _physical_cores(mesh: Any | None, topology: Topology) -> list[int]:
    """The core of each partition: devices in order of process and number stand for cores in theirs."""
    import jax

    if mesh is None:
        return [0]
    everything = sorted({*jax.devices(), *mesh.devices.flat}, key=lambda d: (d.process_index, d.id))
    rank = {device: number for number, device in enumerate(everything)}
    cores = [rank[device] for device in mesh.devices.flat]
    if max(cores) >= topology.cores:
        raise UserError(
            f"the mesh has device {max(cores)}, but {topology.count} x {topology.name} has {topology.cores} cores "
            f"(0 to {topology.cores - 1})"
        )
    return cores


def _versions(sdk: Sdk) -> Iterable[Finding]:
    import jax

    def number(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version)[:3])

    low, high = sdk.jax
    if not number(low) <= number(jax.__version__) <= number(high):
        yield Finding("sdk-version", f"checked with JAX {jax.__version__}; SDK {sdk.version} supports {low} to {high}")
    low, high = sdk.python
    python = "{}.{}".format(*sys.version_info)
    if not number(low) <= number(python) <= number(high):
        yield Finding("sdk-version", f"checked with Python {python}; SDK {sdk.version} supports {low} to {high}")


def _has_e4m3fn(topology: Topology) -> bool:
    """Trainium3 only."""
    return any(kind.startswith("NC_v4") for kinds in topology.chip.device_kinds.values() for kind in kinds)


def _abstract(leaf: Any) -> Any:
    """An argument without its values. Python's own numbers stay: they are of weak type."""
    import jax

    if isinstance(leaf, jax.ShapeDtypeStruct) or not hasattr(leaf, "shape"):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
    return jax.ShapeDtypeStruct(leaf.shape, jax.typeof(leaf).dtype, sharding=sharding)


def _is_split(leaf: Any) -> bool:
    import jax

    return isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding)


def _raised_at(error: BaseException) -> Place | None:
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(Place(traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return user_place(reversed(frames))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
