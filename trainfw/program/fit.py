"""Fit of a recipe to a set of devices: its layout and mesh, or why there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from trainfw import backends
from trainfw.models import dims_of, family_of, flops_per_token
from trainfw.parallel import Layout, Placement, Rules, make_mesh, place, stage_order, use_rules
from trainfw.recipe import Recipe, layout_problems


@dataclass(frozen=True)
class Fit:
    """A recipe's place on a set of devices."""

    layout: Layout
    placement: Placement | None
    """Places of the axes on `hardware.topology`; None without one, with devices in their own order."""
    mesh: Mesh
    rules: Rules
    microbatch_rows: int
    """Rows on a device of one of the pipeline's microbatches."""
    layer_order: tuple[int, ...]
    """The layer at each place of the stacked parameters."""
    own_kernels: bool
    """The devices' own kernels are used: they stand for no other hardware."""
    device_kind: str | None
    """The topology's kind of device; None for devices as they are found."""

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """While tracing inside, a device computes by these rules, as the hardware that it is or stands for."""
        with use_rules(self.rules), backends.own_kernels(self.own_kernels), backends.standing_for(self.device_kind):
            yield


def fit(recipe: Recipe, devices: Sequence[jax.Device], stands_in: bool | None) -> Fit:
    """Return a recipe's place on `devices`; `stands_in` as in `build_program`. Raises UserError where it has none."""
    topology, backend = recipe.hardware.load(), backends.current()
    device_kind = None if topology is None else topology.device_kinds[0]
    if topology is not None and topology.cores != len(devices):
        raise recipe.error(
            "hardware.topology",
            f"{topology.count} of it is {topology.cores} devices, but this is {len(devices)}; simulate them with "
            f"--devices {topology.cores} (trainfw.simulate), or set hardware.topology=null to run on what there is",
        )
    with recipe.blamed("parallel"):
        layout = Layout.resolve(recipe.parallel, len(devices), simulate=topology is None)
    check_layout(recipe, layout, device_kind)
    with recipe.blamed("parallel"):
        placement = None if topology is None else place(topology, layout, recipe.parallel.traffic)
    if placement is not None and not placement.hosts_read_shares:
        raise recipe.error(
            "parallel.traffic",
            f"{layout} is placed so that a host's rows are not one share of the batch; say what each axis moves "
            "(`trainfw check` prints it), so that axes are placed by it, or let fsdp or data span whole instances",
        )
    mesh = make_mesh(layout, devices, placement)
    with recipe.blamed("parallel.rules"):
        rules = Rules(mesh, recipe.parallel.rules, recipe.parallel.fsdp_shards, dims_of(recipe.model))
    microbatches = recipe.parallel.pipeline_microbatches
    rows = recipe.train.global_batch_size // (layout.batch_shards * recipe.train.accumulation_steps)
    if stands_in is None:
        stands_in = backend.simulated or (topology is not None and not topology.is_cpu)
    return Fit(
        layout=layout,
        placement=placement,
        mesh=mesh,
        rules=rules,
        microbatch_rows=rows * layout.pipeline // microbatches if microbatches is not None else 1,
        layer_order=stage_order(recipe.model.num_layers, layout.pipeline, recipe.parallel.interleave),
        own_kernels=not backend.on_host or not stands_in,
        device_kind=device_kind,
    )


def check_layout(recipe: Recipe, layout: Layout, device_kind: str | None) -> None:
    """Raise UserError where the model or the batch do not divide, or the backend cannot compute the model."""
    with recipe.blamed("model"):
        problem = next(layout_problems(recipe, layout), None)
        flops_per_token(recipe.model, recipe.sequence_length)  # refused here, where it is no number
    if problem is not None:
        raise recipe.error(problem.key, problem.text)
    with backends.standing_for(device_kind):
        for field, why in family_of(recipe.model).backend_problems(recipe.model, backends.current()):
            raise recipe.error(f"model.{field}", why)
