"""A plan: what a recipe will take on its hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

from trainfw.backends import for_topology, load_sdk
from trainfw.checking import hardware_of_function, refuse_arguments
from trainfw.errors import UserError
from trainfw.hardware import Topology, duration
from trainfw.parallel import Layout, Placement, place
from trainfw.planning.predict.closed_form import bubble_of
from trainfw.planning.predict.function_plan import FunctionPlan, plan_function
from trainfw.planning.predict.link_time import link_utilisation, transfer_lines, transfers_json
from trainfw.planning.predict.step_time import (
    Assumptions,
    StepTime,
    assumptions_of,
    fit_line,
    part_label,
    part_lines,
    step_time,
)
from trainfw.planning.predict.timeline import Timeline, timeline
from trainfw.planning.read_step.analysis import Analysis
from trainfw.planning.read_step.compile_cache import Compiled, compiled
from trainfw.planning.read_step.memory import MemoryTable
from trainfw.recipe import Recipe, RecipeLike, load_recipe_for, stage_to_plan
from trainfw.report import framed, plan_page
from trainfw.scopes import ATTENTION, LOSS

if TYPE_CHECKING:
    import jax

_REMAT = {
    "none": "none: the backward pass computes nothing again but gathers",
    "dots": "dots: the backward pass computes again what is neither a projection's result nor attention's",
    "full": "full: the backward pass computes every layer again",
    "stage": "stage: the backward pass computes every stage again",
}
"""Words for what the plan counts, by `train.remat`."""
_UNRECOGNISED = {
    ATTENTION: f"attention: not recognised: no matrix product is in a scope named {ATTENTION}; its scores, if the "
    "model has any, are counted as ordinary products and memory, whatever hardware.fused_attention is",
    LOSS: f"loss: not recognised: no operation is in a scope named {LOSS}; a loop over its parts, if it has one, may "
    "be taken for the loop over layers",
}
"""Words for what the plan could not tell from the rest, by the scope that was looked for."""


@dataclass(frozen=True, repr=False)
class Plan:
    """Predictions for one recipe on one topology."""

    recipe: Recipe
    topology: Topology
    layout: Layout
    placement: Placement
    analysis: Analysis
    memory: MemoryTable
    time: StepTime

    @property
    def bubble(self) -> float:
        """Share of a pipeline's iterations in which a stage computes on nothing; it is in the step's time already."""
        return bubble_of(self.recipe, self.layout)

    @property
    def timeline(self) -> Timeline:
        """The step in order."""
        return timeline(self.analysis, self.time, self.recipe.train.accumulation_steps)

    def part_label(self, part: str) -> str:
        """Name a part of the step (a key of `time.parts`) for people."""
        return part_label(part)

    @property
    def caveat(self) -> str:
        """Say what a reader must know of every figure."""
        measured = self.topology.chip.matmul_rates
        if measured is None:
            return "A prediction: nothing here was measured on this hardware."
        return f"A prediction, from rates of this hardware: {measured.source}."

    @property
    def unrecognised(self) -> list[str]:
        """Say which parts of the program were not found, and what they are counted as."""
        return [_UNRECOGNISED[scope] for scope in self.analysis.unrecognised]

    @property
    def fits(self) -> bool:
        """Tell whether a core has the memory, as far as its topology says."""
        return self.memory.headroom is None or self.memory.headroom >= 0

    @property
    def unit(self) -> str:
        """Name what a run's progress is counted in: `token` or `image`."""
        return self.recipe.counted[0]

    @property
    def units_per_step(self) -> int:
        return self.recipe.counted[1]

    @property
    def units_per_second(self) -> float:
        return self.units_per_step / self.time.seconds

    @property
    def run_in_words(self) -> str:
        """Say how much the whole run trains on: `2.1T tokens`."""
        return f"{_count(self.units_per_step * self.recipe.train.steps)} {self.unit}s"

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the cores could do at the compute dtype's dense peak."""
        return self.time.mfu

    @property
    def chip_hours(self) -> float:
        """Count the chip-hours of the whole run, steps alone."""
        return self.topology.chips * self.time.seconds * self.recipe.train.steps / 3600

    @property
    def dollars(self) -> float | None:
        price = self.recipe.hardware.dollars_per_chip_hour
        return None if price is None else price * self.chip_hours

    def to_json(self) -> dict[str, object]:
        """Plain data with stable keys; seconds, bytes, and per core where it says so."""
        return {
            "recipe": self.recipe.name,
            "hardware": {
                "topology": self.topology.name,
                "count": self.topology.count,
                "lnc": self.topology.lnc,
                "chips": self.topology.chips,
                "cores": self.topology.cores,
            },
            "layout": self.layout.sizes,
            "placement": {axis.axis: list(axis.parts) for axis in self.placement.axes},
            "step_time_seconds": self.time.seconds,
            "step_time_range_seconds": [self.time.low, self.time.high],
            "step_time_parts_seconds": dict(self.time.parts),
            "step_time_phases_seconds": {s.phase: s.seconds * s.times for s in self.timeline.phases},
            "pipeline_bubble": self.bubble,
            f"{self.unit}s_per_step": self.units_per_step,
            f"{self.unit}s_per_second": self.units_per_second,
            "mfu": self.mfu,
            "bound_by": self.time.bound_by,
            "remat": self.recipe.train.remat,
            "memory_bytes_per_core": self.memory.to_json(),
            "memory_capacity_bytes_per_core": self.topology.hbm_size,
            "fits": self.fits,
            "collectives": transfers_json(self.time.longest, phases=True),
            "chip_hours": self.chip_hours,
            "dollars": self.dollars,
            "unrecognised": self.unrecognised,
            "assumptions": list(self.time.assumptions),
        }

    def __repr__(self) -> str:
        fits = "fits" if self.fits else "does not fit"
        return (
            f"<Plan: {self.recipe.name} on {self.topology.in_words}, {self.layout}: "
            f"{duration(self.time.seconds)} a step, MFU {self.mfu:.1%}, {fits}>"
        )

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def _repr_html_(self) -> str:
        return framed(plan_page(self, whatif(self)))


@overload
def plan(
    fn: RecipeLike,
    *,
    hardware: str | None = None,
    count: int | None = None,
    lnc: int | None = None,
    progress: Callable[[str], None] = ...,
    simulate: int | None = None,
    fresh: bool = False,
) -> Plan: ...


@overload
def plan(
    fn: Callable[..., object],
    *abstract_args: object,
    hardware: str | Topology | None = None,
    count: int | None = None,
    lnc: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> FunctionPlan: ...


def plan(
    fn: RecipeLike | Callable[..., object],
    *abstract_args: object,
    hardware: str | Topology | None = None,
    count: int | None = None,
    lnc: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[str], None] = lambda _: None,
    simulate: int | None = None,
    fresh: bool = False,
) -> Plan | FunctionPlan:
    """Plan the training step of a recipe, or one run of any JAX function, on hardware that need not be here.

    A recipe's step comes from the cache of compiled steps, or is compiled on simulated devices, which are started where
    jax has not. A function is compiled on the devices of its mesh.

    Args:
        fn: a recipe: what `load_recipe` takes, or returns (of stages whose steps differ, the largest; another is
            `recipe.in_stages()[0].alone`); or a function, jitted already or not.
        abstract_args: the function's arguments, as `trainfw.check` takes them.
        hardware: a topology, or the name of one (`trainfw.hardware.topology_names()`), of which there are `count`.
            Left out, the recipe's own; of a function, trn2-ultraserver.
        lnc: physical NeuronCores in a logical one; the hardware's default when left out.
        mesh: a jax Mesh of the devices that the function is for (see `trainfw.check`).
        progress, simulate, fresh: of a recipe, as `compiled` takes them.

    Raises UserError where the recipe names no topology, its layout does not fit it, or it is too large to simulate; and
    for a function as `plan_function` does.
    """
    if callable(fn):
        if simulate is not None or fresh:
            raise UserError(
                "simulate, fresh: go with a recipe; a function is compiled anew, on the devices of its mesh"
            )
        return plan_function(fn, abstract_args, mesh, hardware_of_function(hardware, count, lnc))
    refuse_arguments(abstract_args, mesh)
    if isinstance(hardware, Topology):
        raise UserError("hardware: expected the name of a topology, with a recipe; such as hardware='trn2.48xlarge'")
    recipe = stage_to_plan(load_recipe_for(fn, hardware, count, lnc))
    return planned(recipe, compiled(recipe, progress, simulate=simulate, fresh=fresh))


def planned(recipe: Recipe, step: Compiled) -> Plan:
    """The plan of `recipe`, whose step `step` is, at the layout of its analysis."""
    topology = recipe.hardware.load()
    assert topology is not None  # or it would not have been compiled
    with recipe.blamed("parallel"):
        placement = place(topology, step.analysis.layout, recipe.parallel.traffic)
    return Plan(
        recipe=recipe,
        topology=topology,
        layout=step.analysis.layout,
        placement=placement,
        analysis=step.analysis,
        memory=step.memory.on(topology, load_sdk(recipe.hardware.sdk)),
        time=step_time(step.analysis, placement, recipe),
    )


def whatif(plan: Plan) -> list[tuple[str, float]]:
    """Changes and by how many seconds each, alone, would shorten the predicted step; the best first.

    Told by the same model of time, not compiled: what a change does to memory is for another plan to say.
    """
    recipe, analysis = plan.recipe, plan.analysis

    def saved(analysis: Analysis, assumptions: Assumptions) -> float:
        return plan.time.seconds - step_time(analysis, plan.placement, recipe, assumptions).seconds

    unmask = " and data.mask_documents=false" if recipe.data.mask_documents else ""
    base = assumptions_of(recipe)
    kernel = f"attention by a fused kernel{unmask} (plan it: hardware.fused_attention=true; on Neuron it is nkilib's)"
    hidden = f"all collectives of FSDP and data beside matrix products, where {base.overlap:.0%} is assumed"
    changes = [(hidden, analysis, replace(base, overlap=1.0))]
    if not recipe.reads_images:
        changes.append((kernel, analysis, replace(base, attention="fused")))
    elif for_topology(plan.topology).fuses_all_attention:
        kernel = "attention by a fused kernel (plan it: hardware.fused_attention=true)"
        changes.append((kernel, analysis, replace(base, attention="fused")))
    if (parts := recipe.train.accumulation_steps) > 1:
        halved = [(t, "fsdp" in t.axes and t.phase != "update") for t in analysis.transfers]
        transfers = (replace(t, times=max(1, t.times // 2)) if half else t for t, half in halved)
        text = (
            f"microbatches twice as large (train.accumulation_steps={parts // 2}), which gather weights half as often"
        )
        changes.append((text, replace(analysis, transfers=tuple(transfers)), base))
    found = [(text, saved(changed, assumed)) for text, changed, assumed in changes]
    return sorted((pair for pair in found if pair[1] > 0.005 * plan.time.seconds), key=lambda pair: -pair[1])


def _lines(plan: Plan) -> Iterator[str]:
    topology, time = plan.topology, plan.time
    chips = f"{topology.chips:,} chip{'s' * (topology.chips > 1)}"
    cores = f"{topology.cores:,} core{'s' * (topology.cores > 1)}"
    yield f"{plan.recipe.name} on {topology.in_words}: {chips}, {cores}, {plan.layout}"
    yield plan.caveat
    yield from plan.unrecognised
    if (headroom := plan.memory.headroom) is not None:
        yield fit_line(headroom)
    yield ""
    yield f"step time   {duration(time.seconds)}  {time.ends}"
    yield f"{plan.unit}s/s    {plan.units_per_second:,.0f}  ({plan.units_per_second / topology.chips:,.0f} a chip)"
    yield f"MFU         {plan.mfu:.1%}"
    yield f"bound by    {time.bound_by}"
    yield f"remat       {_REMAT[plan.recipe.train.remat]}"
    if plan.layout.pipeline > 1:
        yield f"bubble      {plan.bubble:.1%} of a stage's iterations (in the step time)"
    cost, steps = "" if plan.dollars is None else f", ${plan.dollars:,.0f}", plan.recipe.train.steps
    hours = f"{plan.chip_hours:,.0f}" if plan.chip_hours >= 100 else f"{plan.chip_hours:.3g}"
    yield f"the run     {steps:,} steps, {plan.run_in_words}: {hours} chip-hours{cost}"
    yield ""
    yield "where a step goes"
    yield from part_lines(time)
    forward, backward, update = (duration(phase.seconds) for phase in plan.timeline.phases)
    each = plan.timeline.microbatches
    passes = f"forward {forward}, backward {backward}"
    yield f"  in order: {passes if each == 1 else f'{each} x ({passes})'}, then the update {update}"
    yield ""
    yield "memory of a core"
    yield from (f"  {line}" for line in plan.memory.lines())
    yield ""
    yield from transfer_lines(time.longest, phases=True)
    if busy := link_utilisation(plan.analysis.transfers, plan.placement, time.seconds):
        yield "  links busy: " + ", ".join(f"{dim} {share:.0%}" for dim, share in busy.items())
    if changes := whatif(plan):
        yield ""
        yield "what would help most (predicted, each alone)"
        yield from (f"  -{seconds / time.seconds:.0%}  {text}" for text, seconds in changes[:3])
    yield ""
    yield "assumed"
    yield from (f"  {text}" for text in time.assumptions)


def _count(number: int) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= scale:
            return f"{number / scale:,.1f}{unit}"
    return f"{number:,}"
