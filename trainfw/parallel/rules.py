"""Logical dim names -> mesh axes -> shardings. Nothing resolves silently.

Parameters carry the names of their dims (`nnx.Param(value, axes=("embed", "mlp"))`); activations are named
where they are constrained. One table per layout says which mesh axes shard which name.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainfw.errors import UserError, did_you_mean
from trainfw.parallel.config import AXES, Sharded
from trainfw.parallel.layout import nearest_divisors

DEFAULT_RULES: dict[str, tuple[str, ...]] = {
    # Parameters.
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "norm": (),
    "router": (),
    "experts": ("expert",),
    "expert_embed": ("fsdp", "context"),
    # Activations.
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}


class Rules:
    """The rules table of one layout on one mesh.

    Args:
        overrides: dim name -> mesh axes, in place of the default.
        fsdp_shards: see `ParallelConfig`.
    """

    def __init__(
        self,
        mesh: Mesh,
        overrides: Mapping[str, Sequence[str]] | None = None,
        fsdp_shards: Sharded = "parameters",
    ):
        self.mesh = mesh
        self.fsdp_shards = fsdp_shards
        self.table = dict(DEFAULT_RULES)
        for name, axes in (overrides or {}).items():
            if name not in self.table:
                raise UserError(f"{name}: unknown dim name{did_you_mean(name, self.table)}")
            for axis in axes:
                if axis not in AXES:
                    raise UserError(f"{name} = {list(axes)}: unknown axis {axis!r}{did_you_mean(axis, AXES)}")
                if axes.count(axis) > 1:
                    raise UserError(f"{name} = {list(axes)}: names axis {axis!r} twice")
            self.table[name] = tuple(axes)

    def spec(
        self, array: str, shape: Sequence[int], names: Sequence[str | None], *, without: str | None = None
    ) -> PartitionSpec:
        """The PartitionSpec of `array`, whose dims have these sizes and these names.

        `without` names a mesh axis to leave out: the form a sharded weight takes where it is used.
        Raises UserError naming the array, the dim and the axis when a rule cannot apply.
        """
        if len(names) != len(shape):
            raise UserError(f"{array}: has {len(shape)} dims {tuple(shape)} but {len(names)} dim names {tuple(names)}")
        used: dict[str, str] = {}
        entries: list[tuple[str, ...] | None] = []
        for dim, (size, name) in enumerate(zip(shape, names, strict=True)):
            if name is not None and name not in self.table:
                raise UserError(f"{array}: dim {dim}: unknown dim name {name!r}{did_you_mean(name, self.table)}")
            axes = (
                tuple(a for a in self.table[name] if self.mesh.shape[a] > 1 and a != without)
                if name is not None
                else ()
            )
            for axis in axes:
                if axis in used:
                    raise UserError(
                        f"{array}: dims {used[axis]!r} and {name!r} are both sharded over mesh axis {axis!r}; "
                        f"change parallel.rules.{used[axis]} or parallel.rules.{name}"
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
        """How a weight is kept (`of` parameters), or its gradient, or its optimizer state: by these names, and along
        fsdp if `fsdp_shards` says so.
        """
        stages = get_args(Sharded)  # each shards what those before it do, and one thing more
        whole = stages.index(of) > stages.index(self.fsdp_shards)
        return NamedSharding(self.mesh, self.spec(array, shape, names, without="fsdp" if whole else None))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


_active: contextvars.ContextVar[Rules | None] = contextvars.ContextVar("trainfw_rules", default=None)


@contextlib.contextmanager
def use_rules(rules: Rules | None) -> Iterator[None]:
    """While tracing inside, `constrain` and `gather_weight` follow `rules`; outside they do nothing."""
    token = _active.set(rules)
    try:
        yield
    finally:
        _active.reset(token)


def active_rules() -> Rules | None:
    """The rules in use."""
    return _active.get()


def constrain(x: jax.Array, array: str, *names: str | None) -> jax.Array:
    """Shard activation `x` by the logical names of its dims, under the rules in use."""
    rules = _active.get()
    if rules is None or rules.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(rules.mesh, rules.spec(array, x.shape, names)))


def per_device(
    function: Callable[..., jax.Array],
    array: str,
    inputs: Sequence[tuple[jax.Array, Sequence[str | None]]],
    outputs: Sequence[str | None],
) -> jax.Array:
    """`function` of the inputs, run on each device with its own parts of them (kernels know nothing of meshes).

    Args:
        array: names the output in errors.
        inputs: each with the logical names of its dims; what the function computes must be local to these shards.
        outputs: the names of the dims of the result, which has the shape of the first input.
    """
    rules = _active.get()
    arrays = [x for x, _ in inputs]
    if rules is None or rules.mesh.size == 1:
        return function(*arrays)
    in_specs = tuple(rules.spec(array, x.shape, names) for x, names in inputs)
    out_specs = rules.spec(array, arrays[0].shape, outputs)
    mapped = jax.shard_map(function, mesh=rules.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(*arrays)


def local_size(size: int, name: str) -> int:
    """Of a dim of this logical name and global size, what one device holds, under the rules in use."""
    rules = _active.get()
    return size if rules is None else size // math.prod(rules.mesh.shape[axis] for axis in rules.table[name])


def gather_weight(x: jax.Array, array: str, *names: str | None, lookup: bool = False) -> jax.Array:
    """A weight where it is used: whole along `fsdp`, still split over `tensor`; its gradient is sharded as it is kept.

    Saying so keeps the partitioner from moving the (larger) activations instead, and from keeping gradients whole.
    `lookup` says that rows of it are looked up: its gradient is then summed before it is sharded, since a scatter
    into shards would have the partitioner replicate what is scattered where the batch spans more than one axis.
    """
    rules = _active.get()
    if rules is None or rules.mesh.size == 1:
        return x
    gathered = NamedSharding(rules.mesh, rules.spec(array, x.shape, names, without="fsdp"))
    kept = rules.weight_sharding(array, x.shape, names, "parameters")
    return _gather(x, kept, gathered, rules.weight_sharding(array, x.shape, names, "gradients"), lookup)


def by_layer(function: Callable[..., Any], *trees: Any) -> Any:
    """`function` of trees of stacked matrices (layers, m, n), run by each device on whole matrices of its own layers.

    For what needs a matrix in one place. Layers are dealt out to as many devices as divide them, and computed alike by
    the others. Arrays of fewer dims go to every device. Nothing is left to the partitioner, which would permute
    shards in ways that are no ring.
    """
    rules = _active.get()
    if rules is None or rules.mesh.size == 1:
        return function(*trees)
    sizes, replicated = rules.mesh.shape, rules.replicated

    def spec(x: Any) -> PartitionSpec:
        axes: list[str] = []
        for axis, size in sizes.items():
            if x.ndim > 2 and size > 1 and x.shape[0] % math.prod(sizes[a] for a in (*axes, axis)) == 0:
                axes.append(axis)
        return PartitionSpec(tuple(axes) or None) if axes else PartitionSpec()

    # Whole before they are dealt out, and again after: gathers and slices only.
    trees = jax.tree.map(lambda x: _constrain(x, replicated), trees)
    in_specs = jax.tree.map(spec, trees)
    out_specs = jax.tree.map(spec, jax.eval_shape(function, *trees))
    mapped = jax.shard_map(function, mesh=rules.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.tree.map(lambda x: _constrain(x, replicated), mapped(*trees))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(
    x: jax.Array, kept: NamedSharding, gathered: NamedSharding, of_grad: NamedSharding, lookup: bool
) -> jax.Array:
    # As it is kept first, or the partitioner gathers before the cast that made `x`, at twice the bytes.
    return _constrain(x, kept, gathered)


def _gather_forward(
    x: jax.Array, kept: NamedSharding, gathered: NamedSharding, of_grad: NamedSharding, lookup: bool
) -> tuple[jax.Array, None]:
    return _gather(x, kept, gathered, of_grad, lookup), None


def _gather_backward(
    kept: NamedSharding, gathered: NamedSharding, of_grad: NamedSharding, lookup: bool, _: None, grad: jax.Array
) -> tuple[jax.Array]:
    return (_constrain(grad, gathered, of_grad) if lookup else _constrain(grad, of_grad),)


_gather.defvjp(_gather_forward, _gather_backward)


def _constrain(x: jax.Array, *shardings: NamedSharding) -> jax.Array:
    for sharding in shardings:
        x = jax.lax.with_sharding_constraint(x, sharding)
    return x
