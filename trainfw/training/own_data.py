"""Data that a script hands over: rows that are all there, or a stream of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainfw.data import (
    PreparedData,
    Progress,
    StreamIterator,
    TrainIterator,
    data_name,
    held_tokens,
    is_rows,
    memory_source,
    prepare,
    prepare_tokens,
    ready_tokenizer,
    tokens_of,
    train_iterator,
)
from trainfw.errors import UserError
from trainfw.program import Program
from trainfw.recipe import Recipe


def name_data(recipe: Recipe, given: Any) -> Recipe:
    """Return a recipe that names the data which a script hands over. Raises UserError where it cannot be used."""
    if given is None:
        return recipe
    with recipe.blamed("data"):
        source = data_name(given)
    if not is_rows(given):
        if recipe.data.format != "text":
            raise recipe.error("data.format", "a stream is packed as text; hand over rows that are all there")
        if recipe.train.validation_batches != 0:
            raise recipe.error(
                "train.validation_batches",
                "of a stream nothing is held out; set it to 0, or hand over rows that are all there",
            )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": source})})


def prepare_data(recipe: Recipe, given: Any, progress: Progress) -> PreparedData:
    """Return the data of a run: the recipe's, or what a script hands over in its place."""
    config = recipe.data
    if given is None:
        return prepare(config, progress=progress)
    if not is_rows(given):
        tokenizer = ready_tokenizer(config)
        if tokenizer is None:
            raise UserError("tokenizer.name: `bpe` trains on text that is all there; name a file")
        nothing = held_tokens((), len)
        return PreparedData(nothing, nothing, tokenizer, None, "stream")
    if not len(given):
        raise UserError("source: has no rows")
    if config.format == "text" and tokens_of(given[0]) is not None:
        return prepare_tokens(config, given)
    return prepare(config, source=memory_source(given, config), progress=progress)


def open_batches(
    program: Program, data: PreparedData, given: Any, report: Callable[[str], None]
) -> TrainIterator | StreamIterator:
    """Return this process's share of the training batches."""
    recipe, (share, shares) = program.recipe, program.batch_share
    batch = {"global_batch_size": recipe.train.global_batch_size, "process_index": share, "process_count": shares}
    with recipe.blamed("data"):
        if given is None or is_rows(given):
            return train_iterator(data.train, recipe.data, **batch)
        return StreamIterator(given, recipe.data, data.tokenizer, report=report, **batch)
