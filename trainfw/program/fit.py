"""How a recipe fits a set of devices: its layout and mesh, or why there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from trainfw import backends
from trainfw.models import dispatch_problem, routing_problem
from trainfw.parallel import (
    Layout,
    Placement,
    Rules,
    context_problem,
    layers_problem,
    make_mesh,
    nearest_divisors,
    place,
    stage_order,
    use_rules,
)
from trainfw.recipe import Recipe


@dataclass(frozen=True)
class Fit:
    """A recipe's place on a set of devices."""

    layout: Layout
    placement: Placement | None
    """Where the axes lie on `hardware.topology`; None without one, with devices in their own order."""
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
    layout = _layout(recipe, len(devices))
    _check_model(recipe, layout, device_kind)
    _check_sequence_and_layers(recipe, layout)
    if problem := layout.batch_problem(recipe.train.global_batch_size, recipe.train.accumulation_steps):
        raise recipe.error("train.global_batch_size", problem)
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
        rules = Rules(mesh, recipe.parallel.rules, recipe.parallel.fsdp_shards)
    if stands_in is None:
        stands_in = backend.simulated or (topology is not None and not topology.is_cpu)
    return Fit(
        layout=layout,
        placement=placement,
        mesh=mesh,
        rules=rules,
        microbatch_rows=_microbatch_rows(recipe, layout),
        layer_order=stage_order(recipe.model.num_layers, layout.pipeline, recipe.parallel.interleave),
        own_kernels=not backend.on_host or not stands_in,
        device_kind=device_kind,
    )


def _layout(recipe: Recipe, num_devices: int) -> Layout:
    hardware = recipe.hardware
    topology = hardware.load()
    if topology is not None:
        expected = topology.cores
        if expected != num_devices:
            raise recipe.error(
                "hardware.topology",
                f"{hardware.count} of it is {expected} devices, but this is {num_devices}; "
                f"simulate them with --devices {expected}, or set hardware.topology=null to run on what there is",
            )
    with recipe.blamed("parallel"):
        return Layout.resolve(recipe.parallel, num_devices, simulate=topology is None)


def _check_model(recipe: Recipe, layout: Layout, device_kind: str | None) -> None:
    """Raise UserError where experts, heads or vocabulary do not divide, or the backend cannot route."""
    model, tensor = recipe.model, layout.tensor
    if layout.expert > 1 and model.moe is None:
        raise recipe.error("parallel.expert", "spreads experts, and the model has none (model.moe); use fsdp")
    if model.moe is not None and model.moe.num_experts % layout.expert:
        raise recipe.error(
            "model.moe.num_experts",
            f"does not divide over parallel.expert = {layout.expert}"
            f"{nearest_divisors(model.moe.num_experts, layout.expert)}",
        )
    if problem := dispatch_problem(model, backends.current()):
        raise recipe.error("model.moe.dispatch", problem)
    with backends.standing_for(device_kind):
        if problem := routing_problem(model, backends.current()):
            raise recipe.error("model.moe.experts_per_token", problem)
    if model.num_heads % tensor:
        raise recipe.error(
            "model.num_heads",
            f"does not divide over parallel.tensor = {tensor}{nearest_divisors(model.num_heads, tensor)}",
        )
    if max(model.num_kv_heads, tensor) % min(model.num_kv_heads, tensor):
        raise recipe.error(
            "model.num_kv_heads",
            f"must divide parallel.tensor = {tensor} or be a multiple of it; values of parallel.tensor that do: "
            + ", ".join(
                str(n)
                for n in range(1, model.num_heads + 1)
                if model.num_heads % n == 0 and max(model.num_kv_heads, n) % min(model.num_kv_heads, n) == 0
            ),
        )
    if model.vocab_size % tensor:
        raise recipe.error(
            "model.vocab_size",
            f"does not divide over parallel.tensor = {tensor}; {-(-model.vocab_size // tensor) * tensor:,} does, with "
            "rows that no token uses",
        )


def _check_sequence_and_layers(recipe: Recipe, layout: Layout) -> None:
    if problem := context_problem(recipe.data.sequence_length, layout.context, layout.tensor):
        raise recipe.error("data.sequence_length", problem)
    model, chunks = recipe.model, recipe.parallel.interleave
    if problem := layers_problem(model.num_layers, layout.pipeline, chunks, len(model.layer_pattern)):
        raise recipe.error("model.num_layers", problem)


def _microbatch_rows(recipe: Recipe, layout: Layout) -> int:
    microbatches, stages = recipe.parallel.pipeline_microbatches, layout.pipeline
    rows = recipe.train.global_batch_size // (layout.batch_shards * recipe.train.accumulation_steps)
    if microbatches is None:
        return 1
    if microbatches % stages or rows % (microbatches // stages):
        legal = [stages * n for n in range(1, rows + 1) if rows % n == 0]
        raise recipe.error(
            "parallel.pipeline_microbatches",
            f"expected a multiple of parallel.pipeline = {stages} that divides the rows of {stages} stages, "
            f"{rows * stages:,}: {', '.join(map(str, legal))}",
        )
    return rows * stages // microbatches
