"""A stack of like layers whose parameters are stored as one array each, with a leading layers dim.

Scanned or unrolled is a choice of program, never of storage: the same checkpoint serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw.errors import UserError, did_you_mean
from trainfw.parallel import GATHERED, active_rules

Remat = Literal["none", "full", "dots"]
M = TypeVar("M", bound=nnx.Module)

REDUCED = "reduced over tensor"
"""Name of what attention and feed-forward add to the residual stream."""

_policies = jax.checkpoint_policies
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": _policies.save_anything_except_these_names(GATHERED),
    "full": None,  # saves a layer's input only
    # And what its projections return, so that no product with weights is done again.
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(REDUCED)
    ),
}


def init_stack(make: Callable[[nnx.Rngs], M], num_layers: int, rngs: nnx.Rngs) -> M:
    """`num_layers` layers made with keys of their own, as one module whose parameters are stacked."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), num_layers)
    stacked = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(params=key))))(keys)
    for _, param in nnx.to_flat_state(stacked):
        param.set_metadata(axes=("layers", *param.axes))
    return nnx.merge(graphdef, stacked)


def check_remat(remat: str) -> None:
    """Raises UserError for a policy that does not exist."""
    if remat not in REMAT_POLICIES:
        raise UserError(f"remat: unknown policy {remat!r}{did_you_mean(remat, REMAT_POLICIES)}")


def checkpointed(step: Callable[..., Any], remat: Remat, *, scanned: bool) -> Callable[..., Any]:
    """`step`, recomputed in the backward pass as `remat` says; weights are gathered again whatever it says."""
    rules = active_rules()
    if remat == "none" and (rules is None or rules.mesh.size == 1):
        return step
    # Outside a loop XLA would merge the recomputation with the original and save nothing: hence prevent_cse.
    return jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=not scanned, static_argnums=(2,))


def run_stack(
    step: Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    stacked: Any,
    kinds: tuple[Any, ...],
    period: int,
    *,
    scan: bool,
    remat: Remat,
) -> tuple[jax.Array, Any]:
    """Apply `step(x, slice, kind) -> (x, out)` for every layer, in order; returns the last x and the stacked outs.

    Args:
        stacked: a pytree of arrays with a leading layers dim; `slice` is one layer of it.
        kinds: static, one for each layer, repeating with `period`.
        scan: compile one period of layers and loop over it; layers that do not fill a period are unrolled after.
    """

    def unrolled(x: jax.Array, stacked: Any, kinds: tuple[Any, ...], scanned: bool) -> tuple[jax.Array, Any]:
        layer = checkpointed(step, remat, scanned=scanned)
        outs = []
        for slice_, kind in zip(_unstack(stacked, len(kinds)), kinds, strict=True):
            x, out = layer(x, slice_, kind)
            outs.append(out)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)

    groups = len(kinds) // period if scan else 0
    if groups < 2:
        return unrolled(x, stacked, kinds, scanned=False)
    if period == 1:
        # Slices of the stack go straight into the checkpoint: the backward pass then reads the stack itself, where it
        # would keep a copy of what is made of them.
        layer = checkpointed(step, remat, scanned=True)
        return jax.lax.scan(lambda x, slice_: layer(x, slice_, kinds[0]), x, stacked)
    looped, rest = _cut(stacked, groups * period)
    looped = jax.tree.map(lambda a: a.reshape(groups, period, *a.shape[1:]), looped)
    x, outs = jax.lax.scan(lambda x, group: unrolled(x, group, kinds[:period], scanned=True), x, looped)
    outs = jax.tree.map(lambda a: a.reshape(groups * period, *a.shape[2:]), outs)
    if groups * period < len(kinds):
        x, rest_outs = unrolled(x, rest, kinds[groups * period :], scanned=False)
        outs = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), outs, rest_outs)
    return x, outs


def _cut(stacked: Any, at: int) -> tuple[Any, Any]:
    """The first `at` layers and the others."""
    # lax.split, not slices: its transpose is one concatenation, where every slice would pad a whole gradient.
    leaves, tree = jax.tree.flatten(stacked)
    cut = [jax.lax.split(leaf, (at, leaf.shape[0] - at)) for leaf in leaves]
    return jax.tree.unflatten(tree, [head for head, _ in cut]), jax.tree.unflatten(tree, [tail for _, tail in cut])


def _unstack(stacked: Any, num_layers: int) -> list[Any]:
    leaves, tree = jax.tree.flatten(stacked)
    slices = [jax.lax.split(leaf, (1,) * num_layers) for leaf in leaves]
    return [jax.tree.unflatten(tree, [s[i].reshape(s[i].shape[1:]) for s in slices]) for i in range(num_layers)]
