"""A plan of any function: its time, memory and collectives on hardware that is not there, without a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainfw.backends import load_sdk
from trainfw.checking import Memory
from trainfw.errors import UserError, did_you_mean
from trainfw.hardware import Topology, duration
from trainfw.hlo import Module, collectives_of
from trainfw.parallel import Layout, place_mesh
from trainfw.planning.predict.link_time import link_utilisation, transfer_lines, transfers_json
from trainfw.planning.predict.step_time import (
    Assumptions,
    WorkTime,
    assumptions_of,
    attention_words,
    fit_line,
    part_lines,
    share_of_fused,
    work_time,
)
from trainfw.planning.read_step.analysis import Matmul, read
from trainfw.planning.read_step.memory import corrected_temporaries
from trainfw.recipe import Recipe
from trainfw.report import amount

if TYPE_CHECKING:
    import jax

    from trainfw.program import Program

DRAWING_STEPS = 20
"""Runs of `denoise` that an image takes where nobody says how many: as many steps as samplers take by default."""

_WAITED = "every collective is waited for; at the fast end, all that matrix products can hide is hidden behind them"


@dataclass(frozen=True, repr=False)
class FunctionPlan:
    """Predictions for one run of a function on the cores of its mesh."""

    name: str
    topology: Topology
    mesh: Mapping[str, int]
    """Axis -> size; empty for one core."""
    matmuls: tuple[Matmul, ...]
    """Matrix products of one core."""
    memory: Memory
    time: WorkTime
    links: Mapping[str, float]
    """Physical dim -> share of the time in which its links carry data."""
    rows: int | None = None
    """Rows of a recipe's batch that a run computes, of all cores together; None of any other function."""
    steps: int | None = None
    """Runs that an image takes to be drawn, where a run takes noise out of images."""

    @property
    def flops(self) -> float:
        """FLOPs of one core's matrix products, as many as the program computes."""
        return sum(matmul.flops for matmul in self.matmuls)

    @property
    def bytes_per_core(self) -> int:
        return self.memory.arguments + self.memory.overhead + (self.memory.temporaries or 0)

    @property
    def fits(self) -> bool:
        """Tell whether a core has the memory, as far as its topology says."""
        return self.memory.capacity is None or self.bytes_per_core <= self.memory.capacity

    @property
    def rows_per_second(self) -> float | None:
        return None if self.rows is None else self.rows / self.time.seconds

    @property
    def images_per_second(self) -> float | None:
        """Images drawn a second by all cores, in `steps` runs one after the other and nothing else."""
        return None if self.rows is None or self.steps is None else self.rows / (self.steps * self.time.seconds)

    def to_json(self) -> dict[str, object]:
        """Plain data with stable keys; seconds and bytes, of one core."""
        of_recipe = {"rows": self.rows, "rows_per_second": self.rows_per_second}
        drawn = {"steps": self.steps, "images_per_second": self.images_per_second}
        return {
            "function": self.name,
            "hardware": {"topology": self.topology.name, "count": self.topology.count, "lnc": self.topology.lnc},
            "mesh": dict(self.mesh),
            "seconds": self.time.seconds,
            "range_seconds": [self.time.low, self.time.high],
            "parts_seconds": dict(self.time.parts),
            "bound_by": self.time.bound_by,
            "flops": self.flops,
            "memory_bytes": {
                "arguments": self.memory.arguments,
                "temporaries": self.memory.temporaries,
                "runtime": self.memory.overhead,
            },
            "memory_capacity_bytes": self.memory.capacity,
            "fits": self.fits,
            "collectives": transfers_json(self.time.longest),
            "assumptions": list(self.time.assumptions),
            **(of_recipe if self.rows is not None else {}),
            **(drawn if self.steps is not None else {}),
        }

    def __repr__(self) -> str:
        return f"<FunctionPlan: {self.name} on {self.topology.in_words}, {duration(self.time.seconds)}>"

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan_program_function(program: Program, name: str, topology: Topology, steps: int = DRAWING_STEPS) -> FunctionPlan:
    """Plan one run of a function of a recipe's program, and with it drawing in `steps` runs where it is `denoise`.

    Attention is as `hardware.fused_attention` says. Raises UserError as `plan_function` does, and for a function that
    the program does not have.
    """
    if name not in program.functions:
        known = f"the recipe's program has {', '.join(program.functions)}"
        raise UserError(f"function {name!r}: {known}{did_you_mean(name, program.functions)}")
    function, recipe = program.functions[name], program.recipe
    made = plan_function(function.jitted, function.arguments, program.mesh, topology, recipe)
    made = replace(made, rows=recipe.train.global_batch_size * recipe.group)
    return replace(made, steps=steps) if name == "denoise" else made


def plan_function(
    fn: Callable[..., object],
    arguments: tuple[object, ...],
    mesh: jax.sharding.Mesh | None,
    topology: Topology,
    recipe: Recipe | None = None,
) -> FunctionPlan:
    """Plan one run of a function, of the arguments and the mesh that `trainfw.check` takes; or of a part of `recipe`.

    Raises UserError as `check` does, and for a program that holds what no time is known for.
    """
    from trainfw.checking import memory_of, read_function  # with jax

    reading = read_function(fn, arguments, mesh, topology)
    assert reading.partitioned is not None
    assert reading.arguments is not None
    module = reading.partitioned.module
    if reading.mesh is None and module.num_partitions > 1:
        raise UserError(f"{reading.name}: nothing names the axes of its {module.num_partitions} devices: pass mesh=")
    notes = _notes(reading.name, module)
    # The layout is of no account: nothing below reads it. Which phase of a training step something is of, neither.
    analysis = read(module, reading.mesh, Layout())
    streamed = [replace(piece, kind="model") if piece.kind == "update" else piece for piece in analysis.streamed]
    analysis = replace(analysis, streamed=tuple(streamed))
    sizes = {} if reading.mesh is None else dict(reading.mesh.shape)
    placement = place_mesh(topology, tuple(sizes), reading.cores(topology).reshape(tuple(sizes.values())))
    if any(collective.axes(reading.mesh) is None for collective in collectives_of(module)):
        notes.append("collectives among parts of an axis are timed as among all of it")
    written = "attention is as the function writes it: its scores go through memory"
    assumed, of_fused = Assumptions(overlap=0.0), (1.0, 1.0)
    if recipe is not None:
        assumed = replace(assumptions_of(recipe), overlap=0.0)
        written, of_fused = attention_words(recipe, topology, assumed), share_of_fused(recipe)
    said = [written] * any(matmul.attention for matmul in analysis.matmuls)
    time = work_time(analysis, placement, assumed, [*said, _WAITED], of_fused, beside=lambda transfer: True)
    memory = memory_of(reading.arguments, reading.partitioned, topology, load_sdk())
    return FunctionPlan(
        name=reading.name,
        topology=topology,
        mesh=sizes,
        matmuls=analysis.matmuls,
        memory=replace(memory, temporaries=corrected_temporaries(reading.partitioned)),
        time=replace(time, assumptions=(*time.assumptions, *notes)),
        links=link_utilisation(analysis.transfers, placement, time.seconds) if time.seconds else {},
    )


def _notes(name: str, module: Module) -> list[str]:
    """Words on what the time of a program leaves open. Raises UserError where it would not be known at all."""
    opcodes: Counter[str] = Counter()
    for computation in module.times:
        for instruction in module.computations[computation].instructions.values():
            opcodes[instruction.opcode] += 1
            where = f"{name}, at {instruction.place}" if instruction.place else name
            if instruction.opcode == "while" and module.trip_count(computation, instruction) is None:
                raise UserError(
                    f"{where}: a loop runs as often as its values say, so its time is not known before; give it a "
                    "fixed number of turns (jax.lax.scan, or fori_loop between constants)"
                )
    notes = ["other operations than matrix products and collectives take the time of their memory alone"]
    if opcodes["convolution"]:
        notes.append("convolutions take the time of matrix products of as many FLOPs, at the rate of their shape")
    if opcodes["conditional"]:
        notes.append("of each conditional, all branches count")
    if opcodes["custom-call"]:
        notes.append(f"{opcodes['custom-call']} custom calls count by the memory that they read and write")
    return notes


def _lines(plan: FunctionPlan) -> Iterator[str]:
    topology, time, memory = plan.topology, plan.time, plan.memory
    mesh = " * ".join(f"{axis}({size})" for axis, size in plan.mesh.items()) or "one core"
    yield f"{plan.name} on {topology.in_words}: {mesh}"
    yield "A prediction: the function has not run."
    if memory.capacity is not None:
        yield fit_line(memory.capacity - plan.bytes_per_core)
    yield ""
    yield f"time      {duration(time.seconds)}  {time.ends}"
    yield f"FLOPs     {plan.flops:.3g} a core"
    yield f"bound by  {time.bound_by}"
    yield from part_lines(time)
    yield ""
    held = {"arguments": memory.arguments, "temporaries and results": memory.temporaries, "runtime": memory.overhead}
    yield "memory of a core"
    for label, size in held.items():
        yield f"  {label:25}" + ("  not known" if size is None else f"  {amount(size, 'B')}")
    if plan.rows is not None:
        yield ""
        yield f"{plan.rows:,} rows a run of all cores: {plan.rows_per_second:,.4g} a second"
    if plan.steps is not None:
        drawn = f"{plan.images_per_second:,.4g} images/s, drawn in {plan.steps:,} runs each"
        yield f"{drawn} (samplers take one a step, heun two)"
        yield "  without what is before and after: the text encoder, the autoencoder, the host"
    if time.transfers:
        yield ""
        yield from transfer_lines(time.longest)
    if busy := {dim: share for dim, share in plan.links.items() if share}:
        yield "  links busy: " + ", ".join(f"{dim} {share:.0%}" for dim, share in busy.items())
    yield ""
    yield "assumed"
    yield from (f"  {text}" for text in time.assumptions)
