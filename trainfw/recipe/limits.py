"""Limits of a recipe's layouts: one list, by which programs are built and layouts searched."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

from trainfw import parallel
from trainfw.models import Limit, dims_of, image_config, limits_of, unspread_of
from trainfw.recipe.recipe import Recipe


@dataclass(frozen=True)
class LayoutProblem:
    """A reason why a recipe cannot have a layout."""

    key: str
    """The key of the recipe to blame."""
    reason: str
    """The same words for all layouts that have the problem."""
    text: str
    """Problem of the key's value, with the sizes of the layout, and what would do."""


def layout_problems(
    recipe: Recipe, layout: parallel.Layout, accumulation_steps: int | None = None
) -> Iterator[LayoutProblem]:
    """List why a recipe cannot have a layout: what its model, its sequences and its batch do not divide over.

    Args:
        accumulation_steps: in place of the recipe's.
    """
    yield from _of_model(recipe, layout)
    length, model = recipe.sequence_length, recipe.model
    if problem := parallel.context_problem(length, layout.context, layout.tensor):
        key, size, what = "data.sequence_length", length, ""
        if recipe.reads_images:
            key, size = "model.image_size", image_config(model).image_size
            what = f"is of {length:,} patches, a number that "
        reason = f"{key} = {size:,} does not divide over context and tensor"
        yield LayoutProblem(key, reason, what + problem)
    chunks = recipe.parallel.interleave if layout.pipeline > 1 else 1
    if problem := parallel.layers_problem(model.num_layers, layout.pipeline, chunks, model.layer_period):
        reason = f"model.num_layers = {model.num_layers} does not divide over pipeline"
        yield LayoutProblem("model.num_layers", reason, problem)
    yield from _of_batch(recipe, layout, accumulation_steps or recipe.train.accumulation_steps)


def _of_model(recipe: Recipe, layout: parallel.Layout) -> Iterator[LayoutProblem]:
    for axis, why in unspread_of(recipe.model).items():
        if layout.sizes[axis] > 1:
            yield LayoutProblem(f"parallel.{axis}", f"the model is not to be spread over {axis}", why)
    rules = parallel.SPLIT_RULES | parallel.GATHERED_RULES | dims_of(recipe.model) | recipe.parallel.rules
    for limit in limits_of(recipe.model):
        axes = tuple(rules[limit.dim])
        parts = math.prod(layout.sizes.get(axis, 1) for axis in axes)  # of an axis that is none, the rules tell
        if limit.size % parts and not (limit.shared and parts % limit.size == 0):
            used = [axis for axis in axes if layout.sizes.get(axis, 1) > 1]
            named = " * ".join(axis for axis in axes if axis == axes[0] or axis in used)
            key, value = f"model.{limit.field}", operator.attrgetter(limit.field)(recipe.model)
            if isinstance(value, tuple):  # of several sizes, each with a limit
                whole, shown = f"of which {limit.size:,} ", f"{list(value)}"
            else:
                whole = "" if limit.size == value else f"of which there are {limit.size:,} in all, "
                shown = f"{value:,}"
            verb = "is no multiple nor divisor of" if limit.shared else "does not divide over"
            yield LayoutProblem(key, f"{key} = {shown} {verb} {named}", whole + _why(limit, layout, used))


def _why(limit: Limit, layout: parallel.Layout, axes: list[str]) -> str:
    """Say over what a size does not divide, and what would do."""
    parts = math.prod(layout.sizes[axis] for axis in axes)
    one = f"parallel.{axes[0]} = {parts}"
    over = one if len(axes) == 1 else " * ".join(f"{a}({layout.sizes[a]})" for a in axes) + f" = {parts}"
    if limit.shared:
        below = next(n for n in range(parts, 0, -1) if limit.size % n == 0 or n % limit.size == 0)
        return f"must divide {over} or be a multiple of it; the nearest size that does: {below}"
    if limit.pads:
        more = -(-limit.size // parts) * parts
        return f"does not divide over {over}; {more:,} does, with rows that no token uses"
    return f"does not divide over {over}{parallel.nearest_divisors(limit.size, parts)}"


def _of_batch(recipe: Recipe, layout: parallel.Layout, parts: int) -> Iterator[LayoutProblem]:
    rows, microbatches = recipe.train.global_batch_size, recipe.parallel.pipeline_microbatches
    if problem := layout.batch_problem(rows, parts):
        axes = ("pipeline", "data", "fsdp", "expert")
        over = " * ".join(axis for axis in axes if axis in ("data", "fsdp") or layout.sizes[axis] > 1)
        times = f" * accumulation_steps({parts})" if parts > 1 else ""
        reason = f"train.global_batch_size = {rows:,} does not divide over {over}{times}"
        yield LayoutProblem("train.global_batch_size", reason, problem)
    elif microbatches is not None and layout.pipeline > 1:
        each = rows // (layout.batch_shards * parts)
        if problem := parallel.microbatches_problem(microbatches, layout.pipeline, each):
            reason = f"parallel.pipeline_microbatches = {microbatches} does not divide the rows of the stages"
            yield LayoutProblem("parallel.pipeline_microbatches", reason, problem)
