"""Logical dim names -> mesh axes -> shardings. Nothing resolves silently.

Parameters carry the names of their dims (`nnx.Param(value, axes=("embed", "mlp"))`). One table per layout says which
mesh axes shard which name. Along some of them an array stays split where it is used; along the others weights are
gathered first (`weights.py`).
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainfw.errors import UserError, did_you_mean
from trainfw.parallel.config import AXES, GATHERED_RULES, SPLIT_RULES, Sharded
from trainfw.parallel.layout import nearest_divisors


class Rules:
    """The rules table of one layout on one mesh.

    Args:
        overrides: dim name -> mesh axes, in place of those of `GATHERED_RULES` and `own`.
        fsdp_shards: see `ParallelConfig`.
        own: dim name -> mesh axes along which weights are kept split, of names that a family declares.
        splits_sequence: between layers each device along `tensor` has a part of the sequence; else all of it, as where
            a sequence is one token.
    """

    def __init__(
        self,
        mesh: Mesh,
        overrides: Mapping[str, Sequence[str]] | None = None,
        fsdp_shards: Sharded = "parameters",
        own: Mapping[str, Sequence[str]] | None = None,
        *,
        splits_sequence: bool = True,
    ):
        self.mesh, self.fsdp_shards, self.table = mesh, fsdp_shards, SPLIT_RULES | GATHERED_RULES
        self.splits_sequence = splits_sequence
        own = own or {}
        if known := sorted(own.keys() & self.table.keys()):
            raise UserError(f"{known[0]}: a family declares this dim name, which is trainfw's own")
        for name, axes in (*own.items(), *(overrides or {}).items()):
            if name in SPLIT_RULES:
                raise UserError(
                    f"{name} = {list(axes)}: this dim is always split over {' and '.join(SPLIT_RULES[name])}; "
                    f"rules can be given for {', '.join((*GATHERED_RULES, *own))}"
                )
            if name not in self.table and name not in own:
                raise UserError(f"{name}: unknown dim name{did_you_mean(name, (*GATHERED_RULES, *own))}")
            for axis in axes:
                if axis not in AXES:
                    raise UserError(f"{name} = {list(axes)}: unknown axis {axis!r}{did_you_mean(axis, AXES)}")
                if axes.count(axis) > 1:
                    raise UserError(f"{name} = {list(axes)}: names axis {axis!r} twice")
            self.table[name] = tuple(axes)

    def axes(self, name: str | None) -> tuple[str, ...]:
        """List the mesh axes of more than one device that split dims of this name."""
        return () if name is None else tuple(axis for axis in self.table[name] if self.mesh.shape[axis] > 1)

    def gathered(self, name: str | None) -> tuple[str, ...]:
        """List the mesh axes along which a dim of this name of a weight is gathered for use."""
        return () if name in SPLIT_RULES else self.axes(name)

    @property
    def gathers(self) -> bool:
        """Tell whether layers gather weights at all."""
        return self.fsdp_shards == "parameters" and any(map(self.gathered, self.table))

    def spec(
        self, array: str, shape: Sequence[int], names: Sequence[str | None], *, in_use: bool = False
    ) -> PartitionSpec:
        """Make the PartitionSpec of `array`, whose dims have these sizes and these names; as it is `in_use`, or kept.

        Raises UserError naming the array, the dim and the axis when a rule cannot apply.
        """
        if len(names) != len(shape):
            raise UserError(f"{array}: has {len(shape)} dims {tuple(shape)} but {len(names)} dim names {tuple(names)}")
        used: dict[str, str] = {}
        entries: list[tuple[str, ...] | None] = []
        for dim, (size, name) in enumerate(zip(shape, names, strict=True)):
            if name is not None and name not in self.table:
                raise UserError(f"{array}: dim {dim}: unknown dim name {name!r}{did_you_mean(name, self.table)}")
            axes = () if in_use and name not in SPLIT_RULES else self.axes(name)
            for axis in axes:
                if axis in used:
                    raise UserError(
                        f"{array}: dims {used[axis]!r} and {name!r} are both sharded over mesh axis {axis!r}; "
                        f"change parallel.rules.{used[axis] if used[axis] not in SPLIT_RULES else name}"
                    )
                used[axis] = str(name)
            parts = math.prod(self.mesh.shape[a] for a in axes)
            if size % parts:
                product = " * ".join(f"{a}({self.mesh.shape[a]})" for a in axes)
                raise UserError(
                    f"{array}: dim {dim} ({name!r}, size {size:,}) does not divide over mesh axes {product} = {parts:,}"
                    f"{nearest_divisors(size, parts)}"
                )
            entries.append(axes or None)
        return PartitionSpec(*entries)

    def sharding(self, array: str, shape: Sequence[int], names: Sequence[str | None]) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(array, shape, names))

    def weight_sharding(
        self, array: str, shape: Sequence[int], names: Sequence[str | None], of: Sharded
    ) -> NamedSharding:
        """Shard a weight (`of` parameters), its gradient or its optimizer state: by these names, and along
        what it is gathered over if `fsdp_shards` says so.
        """
        stages = get_args(Sharded)  # each shards what those before it do, and one thing more
        whole = stages.index(of) > stages.index(self.fsdp_shards)
        return NamedSharding(self.mesh, self.spec(array, shape, names, in_use=whole))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


_active: contextvars.ContextVar[Rules | None] = contextvars.ContextVar("trainfw_rules", default=None)


@contextlib.contextmanager
def use_rules(rules: Rules | None) -> Iterator[None]:
    """Let collectives and weights follow `rules` while tracing inside; outside they do nothing.

    What is differentiated must be so inside: the backward passes written here ask for the rules when they are traced.
    """
    token = _active.set(rules)
    try:
        yield
    finally:
        _active.reset(token)


def active_rules() -> Rules | None:
    """Return the rules in use."""
    return _active.get()


def by_layer(function: Callable[..., Any], *trees: Any) -> Any:
    """Let each device run `function` of trees of stacked matrices (layers, m, n) on whole matrices of its own layers.

    For what needs a matrix in one place. Layers are dealt out to as many devices as divide them, and computed alike by
    the others. Arrays of fewer dims go to every device. Nothing is left to the partitioner, which would permute
    shards in ways that are no ring.
    """
    rules = _active.get()
    if rules is None or rules.mesh.size == 1:
        return function(*trees)
    sizes, replicated = rules.mesh.shape, rules.replicated

    def spec(x: jax.Array) -> PartitionSpec:
        axes: list[str] = []
        for axis, size in sizes.items():
            if x.ndim > 2 and size > 1 and x.shape[0] % math.prod(sizes[a] for a in (*axes, axis)) == 0:
                axes.append(axis)
        return PartitionSpec(tuple(axes) or None) if axes else PartitionSpec()

    # Whole before they are dealt out, and again after: gathers and slices only.
    trees = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, replicated), trees)
    in_specs = jax.tree.map(spec, trees)
    out_specs = jax.tree.map(spec, jax.eval_shape(function, *trees))
    mapped = jax.shard_map(function, mesh=rules.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, replicated), mapped(*trees))
