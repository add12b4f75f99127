"""Checks of a recipe's inputs that need neither JAX nor a compiled model."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trainfw import backends
from trainfw.data import check_source, check_tokenizer_file
from trainfw.recipe import Recipe

if TYPE_CHECKING:
    from trainfw.program import Program


def check_inputs(recipe: Recipe, *, own_data: bool = False) -> None:
    """Raise UserError, with the key and where it was written, where the data or the tokenizer is not there.

    `own_data`: a script hands its data over.
    """
    if recipe.evaluation is not None and recipe.data.mixture is not None and recipe.reads_images:
        raise recipe.error("evaluation.metric", "pictures of a mixture are not evaluated: set evaluation to null")
    if recipe.evaluation is not None and recipe.data.formats == {"text"}:
        problem = "needs prompts and references: data.format chat, prompt_completion or preferences"
        raise recipe.error("evaluation.metric", problem)
    if own_data:
        with recipe.blamed("data"):
            check_tokenizer_file(recipe.data)
    for name, config in {} if own_data else recipe.data.parts.items():
        with recipe.blamed(f"data.mixture.{name}" if name else "data"):
            check_source(config)
    if recipe.data.cache_dir is None:
        return
    root = Path(os.path.expanduser(recipe.data.cache_dir))
    try:
        if not any(root.glob("*/meta.json")):
            existing = next(place for place in (root, *root.parents) if place.exists())
            tempfile.TemporaryFile(dir=existing).close()
    except (OSError, StopIteration) as error:
        problem = getattr(error, "strerror", None) or "no such directory"
        raise recipe.error("data.cache_dir", f"cannot be written: {problem}; name another directory") from None


def check_memory(program: Program, total: int | None = None) -> None:
    """Raise UserError where what a run surely holds is more than the memory of this machine, whose CPU it runs on.

    That is the state, a batch, and one array of activations: a step takes several times as much. Allocates nothing.

    Args:
        total: bytes; None: the machine's.
    """
    total = _host_memory() if total is None else total
    if not backends.current().on_host or not total:
        return
    import jax  # not before the environment for it is set

    def held(tree: object) -> int:
        """Bytes of this process's parts."""
        leaves = jax.tree.leaves(tree)
        parts = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves]
        return sum(parts) * len(program.mesh.local_devices)

    recipe = program.recipe
    state, batch = held(program.abstract_state), held(program.abstract_batch)
    state *= 1 if recipe.backend.donate else 2  # what a step reads, and what it writes
    passes = recipe.train.accumulation_steps
    if program.layout.pipeline > 1:
        passes *= recipe.parallel.pipeline_microbatches or recipe.train.global_batch_size
    tokens = program.tokens_per_step * len(program.mesh.local_devices) // program.mesh.size
    activations = tokens * recipe.model.hidden_size * 2 // passes
    for key, size, what in (
        (
            "train.global_batch_size",
            batch + activations,
            f"rows of {recipe.sequence_length:,} {'patches' if recipe.reads_images else 'tokens'}",
        ),
        ("model.hidden_size", state, f"with {program.num_parameters:,} parameters and their optimizer"),
    ):
        if size > total:
            problem = f"{what} take at least {size / 2**30:,.0f} GiB, and this machine has {total / 2**30:,.1f}"
            raise recipe.error(key, problem)


def _host_memory() -> int:
    """Bytes of this machine, or of what a container may take of it; 0 where that is not known."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(found, 0)
