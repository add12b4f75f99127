from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from trainfw import backends
from trainfw.backends import Sdk, for_topology, load_sdk
from trainfw.checking.arguments import hardware_of_function, refuse_arguments, topology_to_check
from trainfw.checking.instructions import read_instructions
from trainfw.checking.jaxpr import meshes_in, place_of_failure, read_jaxpr, read_symbolic, targets_in
from trainfw.checking.partitioned import (
    is_partitioned,
    memory_of,
    read_arguments,
    read_memory,
    read_partitioned,
    sum_collectives,
)
from trainfw.checking.report import Finding, Report, merged, on_target
from trainfw.checking.rules import Target
from trainfw.checking.stablehlo import read_stablehlo
from trainfw.errors import UserError, first_line
from trainfw.hardware import Topology
from trainfw.hlo import Partitioned, Place, partition, user_place, without_compilation_cache
from trainfw.parallel import physical_order
from trainfw.recipe import Recipe, RecipeLike, load_recipe_for, stage_to_plan

if TYPE_CHECKING:
    from trainfw.program import Program, Server

Progress = Callable[[str], None]
_SIMULATE = "Devices can be simulated: trainfw.simulate(devices=64), before jax starts"
_CONVERSIONS = ("The problem arose with the `", "occurred in the item() method", "occurred in the tolist() method")
"""Words of JAX's about Python numbers made of arrays; else it names the function whose result would have the shape."""
_SHAPES = (
    "Shapes must be 1D sequences of concrete values",
    "Slice entries must be static integers",
    "Array slice indices must have static start/stop/step",
)

_FATAL = {"TopK", "SliceToDynamic"}
"""Custom calls that XLA takes for its own, of operands and results of its own, and dies of others (jaxlib 0.10.2)."""


def check(
    fn: Callable[..., object] | RecipeLike,
    *abstract_args: object,
    hardware: str | Topology | None = None,
    count: int | None = None,
    lnc: int | None = None,
    sdk: str | Sdk | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Report:
    """Read a JAX function, or the steps of a recipe, for everything that Neuron is known to refuse, on any machine.

    A recipe's steps are built on simulated devices, which are started where jax has not.

    Args:
        fn: what would be jitted on Neuron, jitted already or not; or a recipe: what `load_recipe` takes, or returns.
        abstract_args: its arguments: arrays, or jax.ShapeDtypeStructs, with NamedShardings of `mesh` where they are
            split. Nothing is computed with them.
        hardware: a topology, or the name of one (`trainfw.hardware.topology_names()`), of which there are `count`.
            Left out, the recipe's own; of a function, trn2-ultraserver.
        lnc: physical NeuronCores in a logical one; the hardware's default when left out.
        sdk: the Neuron SDK whose limits count; the newest when left out.
        mesh: a jax Mesh of the devices that the program is for, simulated ones say
            (`trainfw.simulate(devices=64)` before jax starts). Device number n stands for core n of the
            hardware. Left out, it is the mesh of the arguments' shardings, the one that `fn` names, or one core.

    Raises UserError for hardware that does not exist or is smaller than the mesh, and for a function that cannot be
    traced or lowered for any device (values that Python would need, meshes of different devices); whatever else `fn`
    raises. Shapes that depend on values are a finding.
    """
    if isinstance(fn, Recipe | str | os.PathLike | Mapping):
        refuse_arguments(abstract_args, mesh)
        return _check_recipe(fn, hardware, count, lnc, sdk)
    release = sdk if isinstance(sdk, Sdk) else load_sdk(sdk)
    topology = hardware_of_function(hardware, count, lnc)
    return _check([_called(fn, abstract_args, mesh)], topology, release, lambda _: None)


def read_function(
    fn: Callable[..., object], abstract_args: tuple[object, ...], mesh: jax.sharding.Mesh | None, topology: Topology
) -> Reading:
    """Read a function for its collectives and memory alone. Raises UserError as `check` does, and where XLA fails."""
    called = _called(fn, abstract_args, mesh)
    _check_size(called.mesh, topology)
    with without_compilation_cache(), ThreadPoolExecutor() as pool:
        reading = begin(pool, called, neuron=False)()
    if reading.partitioned is None:
        raise UserError(f"{called.name} cannot be compiled here: {reading.findings[-1].message}")
    return reading


def _check_recipe(
    given: RecipeLike, hardware: str | Topology | None, count: int | None, lnc: int | None, sdk: str | Sdk | None
) -> Report:
    if isinstance(hardware, Topology) or isinstance(sdk, Sdk):
        raise UserError("hardware, sdk: expected names, with a recipe; such as hardware='trn2.48xlarge'")
    recipe = stage_to_plan(load_recipe_for(given, hardware, count, lnc, sdk))
    topology = topology_to_check(recipe)
    from trainfw.program import build_program

    backends.lend(topology.cores)
    devices = jax.devices()[: topology.cores]
    if len(devices) < topology.cores or not backends.is_host(devices[0]):
        raise UserError(
            f"a check of {recipe.name} takes {topology.cores} simulated devices, and jax has started with "
            f"{jax.device_count()} of {devices[0].platform}: call trainfw.simulate(devices={topology.cores}) first, "
            "before anything uses jax"
        )
    with backends.contract(topology.rules):
        program = build_program(recipe, devices)
        return check_program(program, topology=topology, sdk=load_sdk(recipe.hardware.sdk))


@dataclass(frozen=True)
class Called:
    """A jitted function, and what it is to be traced for."""

    name: str
    jitted: Any
    arguments: tuple[object, ...]
    mesh: jax.sharding.Mesh | None
    unrolled: bool = False
    """Loops stand for layers that are unrolled where it runs."""


def _called(fn: Callable[..., object], abstract_args: tuple[object, ...], mesh: jax.sharding.Mesh | None) -> Called:
    if not callable(fn):
        raise UserError(f"fn = {fn!r:.60}: expected a function, or a recipe, such as 'quickstart'")
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise UserError(f"mesh = {mesh}: expected a jax.sharding.Mesh of devices. {_SIMULATE}")
    arguments = jax.tree.map(lambda leaf: _abstract(leaf, mesh), abstract_args)
    if mesh is None:
        meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(arguments) if _is_split(leaf)}
        if len(meshes) > 1:
            raise UserError(f"the arguments are split over {len(meshes)} different meshes; expected one")
        mesh = next(iter(meshes), None)
        if isinstance(mesh, jax.sharding.AbstractMesh):
            raise UserError(f"the arguments are split over a mesh without devices, {mesh}: pass mesh=. {_SIMULATE}")
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    if mesh is not None and jitted is not fn:  # a jitted function may say itself how its arguments are split
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        for_all = functools.partial(jax.ShapeDtypeStruct, sharding=replicated)
        arguments = jax.tree.map(
            lambda a: for_all(a.shape, a.dtype) if hasattr(a, "shape") and not _is_split(a) else a, arguments
        )
    return Called(getattr(fn, "__name__", "function"), jitted, arguments, mesh)


@dataclass(frozen=True)
class Reading:
    """Facts read of one function, from which it can be judged for any hardware and SDK."""

    name: str
    findings: tuple[Finding, ...]
    """Findings in the program, of rules that count on some target."""
    arguments: tuple[Any, ...] | None
    """The arrays among them, in the order in which the compiled function takes them; None for one without shapes."""
    partitioned: Partitioned | None = None
    devices: tuple[Any, ...] = ()
    mesh: Any | None = None
    """A mesh of these, after whose axes groups can be named."""
    unrolled: bool = False

    def cores(self, topology: Topology) -> np.ndarray:
        """The physical core of each partition. Raises UserError where the hardware has fewer."""
        return np.asarray(_physical_cores(self.devices, topology))


def check_program(
    program: Program | Server, *, topology: Topology, sdk: Sdk | None = None, progress: Progress | None = None
) -> Report:
    """Check the functions of a program or a server built for devices that stand for `topology`."""
    from trainfw.program import Server

    unrolled = isinstance(program, Server)  # as `load_engine` has it, whatever is quicker to check
    called = [Called(one.name, one.jitted, one.arguments, program.mesh, unrolled) for one in program.functions.values()]
    return _check(called, topology, sdk or load_sdk(), progress or (lambda _: None))


def _check(called: Sequence[Called], topology: Topology, sdk: Sdk, progress: Progress) -> Report:
    """Check functions on one mesh. Collectives are reported of the first, memory of the largest."""
    _check_size(called[0].mesh, topology)
    neuron = for_topology(topology).has_sdk
    # XLA compiles one function while the next is traced, and beside it.
    with without_compilation_cache(), ThreadPoolExecutor() as pool:
        begun = [begin(pool, one, progress, neuron=neuron) for one in called]
        return judge([finish() for finish in begun], topology, sdk)


def judge(readings: Iterable[Reading], topology: Topology, sdk: Sdk) -> Report:
    """Say what of these functions counts on this hardware, with this SDK."""
    neuron = for_topology(topology).has_sdk
    findings: list[Finding] = list(_versions(sdk)) if neuron else []
    sums, memories = [], []
    for reading in readings:
        found = list(reading.findings)
        if reading.partitioned is not None:
            physical = _physical_cores(reading.devices, topology)
            if neuron:
                module = reading.partitioned.module
                found += read_partitioned(module, physical, reading.mesh, topology, sdk)
                found += read_instructions(module, topology, unrolled=reading.unrolled)
            sums.append(sum_collectives(reading.partitioned.module, reading.mesh))
        if reading.arguments is not None:
            memory = memory_of(reading.arguments, reading.partitioned, topology, sdk)
            found += read_memory(memory)
            if neuron:
                found += read_arguments(reading.arguments)
            memories.append(memory)
        findings += [replace(finding, program=reading.name) for finding in found]
    return Report(
        hardware=topology.in_words,
        cores=topology.cores,
        sdk=sdk.version if neuron else None,
        findings=merged(on_target(findings, Target.of(topology, sdk))),
        collectives=next(iter(sums), ()),
        memory=max(memories, key=lambda memory: memory.arguments + (memory.temporaries or 0), default=None),
    )


def begin(
    pool: Executor, called: Called, progress: Progress = lambda _: None, *, neuron: bool = True
) -> Callable[[], Reading]:
    """Read a function, as far as it can be read, and have it partitioned in `pool`; the rest when called.

    `neuron`: for Neuron's rules, and not for memory and collectives alone.
    """
    name, mesh = called.name, called.mesh
    found: list[Finding] = []
    progress(f"tracing {name}")
    with contextlib.ExitStack() as context:
        try:
            traced = _trace(called, context)
        except Exception as error:
            if neuron and _is_about_shapes(error):
                finding = Finding("shape-dynamic", first_line(error), _raised_at(error))
                return lambda: Reading(name, (finding,), None)
            raise
        if neuron and (symbolic := read_symbolic(traced.jaxpr)):
            return lambda: Reading(name, tuple(symbolic), None)
        cores = f" for {mesh.size} core{'s' * (mesh.size > 1)}" if mesh is not None else ""
        progress(f"partitioning {name}{cores}")
        lowered, why = _lower(traced, name)
        begun = pool.submit(_partition, lowered) if lowered is not None else None
        if neuron:
            found += read_jaxpr(traced.jaxpr)
            found += _lowered_findings(traced, name, {finding.rule for finding in found})

    def finish() -> Reading:
        leaves = [leaf for leaf in jax.tree.leaves(called.arguments) if hasattr(leaf, "shape")]
        taken = [jax.ShapeDtypeStruct(info.shape, info.dtype) for info in jax.tree.leaves(traced.args_info)]
        if [(leaf.shape, leaf.dtype) for leaf in leaves] != [(leaf.shape, leaf.dtype) for leaf in taken]:
            leaves = taken
        partitioned, problem = begun.result() if begun is not None else (None, why)
        if partitioned is None:
            return Reading(name, (*found, Finding("not-partitioned", problem)), tuple(leaves))
        step = partitioned.compiled
        shardings = jax.tree.leaves((step.input_shardings, step.output_shardings)) if step is not None else []
        meshes = [s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)]
        concrete = [m for m in (mesh, *meshes_in(traced.jaxpr), *meshes) if isinstance(m, jax.sharding.Mesh)]
        devices = _devices(partitioned, concrete)
        named = next((m for m in concrete if list(m.devices.flat) == devices), None)
        return Reading(name, tuple(found), tuple(leaves), partitioned, tuple(devices), named, called.unrolled)

    return finish


def _trace(called: Called, context: contextlib.ExitStack) -> jax.stages.Traced:
    """Trace, in the context of the mesh (left to `context` to leave) where the function names none with devices."""

    def trace() -> jax.stages.Traced:
        try:
            traced = called.jitted.trace(*called.arguments)
        except (
            jax.errors.ConcretizationTypeError,
            jax.errors.TracerIntegerConversionError,
            jax.errors.TracerArrayConversionError,
        ) as error:
            if _is_about_shapes(error):
                raise
            needs = f"{called.name} needs a value that is known only when it runs, at {_raised_at(error)}"
            raise UserError(f"{needs}: {first_line(error)}") from error
        traced = getattr(traced, "traced", traced)  # what flax.nnx.jit wraps
        if not isinstance(traced, jax.stages.Traced):
            raise UserError(f"{called.jitted}: expected a function, or what jax.jit or flax.nnx.jit returns")
        return traced

    traced = trace()
    abstract = [isinstance(mesh, jax.sharding.AbstractMesh) for mesh in meshes_in(traced.jaxpr)]
    if not (abstract and all(abstract) and jax.sharding.get_mesh().empty):
        return traced
    if called.mesh is None:
        raise UserError(f"{called.name} names a mesh without devices (AbstractMesh): pass mesh=. {_SIMULATE}")
    context.enter_context(jax.set_mesh(called.mesh))
    return trace()


def _is_about_shapes(error: Exception) -> bool:
    """Tell whether a program failed to trace because a shape depends on values, rather than on other use of one."""
    if isinstance(error, jax.errors.NonConcreteBooleanIndexError):
        return True
    text = str(error)
    if type(error) is jax.errors.ConcretizationTypeError:  # of the function that would make the array, or of a number
        return not any(conversion in text for conversion in _CONVERSIONS)
    return "Tracer" in text and any(said in text for said in _SHAPES)


def _lowered_findings(traced: jax.stages.Traced, name: str, found: set[str]) -> list[Finding]:
    """List findings in the StableHLO for Neuron, or, where JAX cannot make it, in that for CPU."""
    failure = []
    try:
        lowered = traced.lower(lowering_platforms=("neuron",))
    except (NotImplementedError, ValueError) as error:
        if not found & {"control-callback", "control-checkify"}:
            place, origin = place_of_failure(error)
            failure = [Finding("op-no-lowering", first_line(error), place, origin=origin)]
        try:
            lowered = traced.lower(lowering_platforms=("cpu",))
        except (NotImplementedError, ValueError) as other:
            _raise_what_is_wrong_anywhere(name, error, other)
            return failure
    return [*failure, *read_stablehlo(lowered.compiler_ir("stablehlo"))]


def _lower(traced: jax.stages.Traced, name: str) -> tuple[jax.stages.Lowered | None, str]:
    """Lower the program for a CPU, or say why JAX cannot."""
    if fatal := _FATAL & targets_in(traced.jaxpr):
        return None, f"XLA ends the process at a custom call of this name: {', '.join(sorted(fatal))}"
    try:
        return traced.lower(), ""
    except (NotImplementedError, ValueError) as error:
        try:
            traced.lower(lowering_platforms=("neuron",))
        except (NotImplementedError, ValueError) as other:
            _raise_what_is_wrong_anywhere(name, error, other)
        return None, first_line(error)


def _partition(lowered: jax.stages.Lowered) -> tuple[Partitioned | None, str]:
    try:
        partitioned = partition(lowered, backends.current().compiler_options)
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return None, first_line(error)
    if partitioned.compiled is None and not is_partitioned(partitioned.module):
        return None, "XLA gave up before it had partitioned the program"
    return partitioned, ""


def _raise_what_is_wrong_anywhere(name: str, error: Exception, other: Exception) -> None:
    """Raise a failure that is the same for two platforms: then it is of the program, not of what one of them lacks."""
    if isinstance(error, ValueError) and type(error) is type(other) and str(error) == str(other):
        raise UserError(f"{name} cannot be lowered for any device: {first_line(error)}") from error


def _devices(partitioned: Partitioned, meshes: Iterable[jax.sharding.Mesh]) -> list[jax.Device]:
    count = partitioned.module.num_partitions
    if partitioned.compiled is not None:
        devices = list(partitioned.compiled.runtime_executable().local_devices())
        if len(devices) == count:
            return devices
    for mesh in meshes:
        if mesh.size == count:
            return list(mesh.devices.flat)
    if count == 1:
        return jax.devices()[:1]
    raise UserError(f"the program is for {count} devices, and nothing says which: pass mesh=, a jax Mesh of them")


def _check_size(mesh: jax.sharding.Mesh | None, topology: Topology) -> None:
    """Raise UserError where the hardware is smaller than the mesh."""
    if mesh is not None:
        _physical_cores(mesh.devices.flat, topology)


def _physical_cores(devices: Iterable[jax.Device], topology: Topology) -> list[int]:
    """Return the core of each of these: devices in order of process and number stand for cores in theirs."""
    devices = list(devices)
    rank = {device: number for number, device in enumerate(physical_order([*{*jax.devices(), *devices}]))}
    cores = [rank[device] for device in devices]
    if max(cores) >= topology.cores:
        have = f"{topology.count} x {topology.name} has {topology.cores} cores (0 to {topology.cores - 1})"
        raise UserError(f"the mesh has device {max(cores)}, but {have}")
    return cores


def _versions(sdk: Sdk) -> Iterable[Finding]:
    python = "{}.{}".format(*sys.version_info)
    for rule, name, version, bounds in (
        ("sdk-version", "JAX", jax.__version__, sdk.jax),
        ("sdk-python", "Python", python, sdk.python),
    ):
        if not backends.supports(bounds, version):
            message = f"checked with {name} {version}; SDK {sdk.version} supports {bounds[0]} to {bounds[1]}"
            yield Finding(rule, message)


def _abstract(leaf: object, mesh: jax.sharding.Mesh | None) -> object:
    """Drop an argument's values, over `mesh` where its own has no devices. Python's own numbers stay: they are
    of weak type."""
    if not hasattr(leaf, "shape"):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
    if sharding is not None and isinstance(sharding.mesh, jax.sharding.AbstractMesh) and mesh is not None:
        sharding = jax.sharding.NamedSharding(mesh, sharding.spec)
    elif isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, jax.typeof(leaf).dtype, sharding=sharding)


def _is_split(leaf: object) -> bool:
    return isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding)


def _raised_at(error: BaseException) -> Place | None:
    frames = list(traceback.walk_tb(error.__traceback__))
    return user_place(Place(frame.f_code.co_filename, line) for frame, line in reversed(frames))
