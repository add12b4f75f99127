"""Data that a script hands over: rows that are all there, or a stream of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainfw import data
from trainfw.errors import UserError
from trainfw.models import vocabulary_of
from trainfw.pieces import blaming
from trainfw.program import Program
from trainfw.recipe import Recipe


def name_data(recipe: Recipe, given: Any) -> Recipe:
    """Return a recipe that names the data which a script hands over. Raises UserError where it cannot be used."""
    if given is None:
        return recipe
    with recipe.blamed("data"):
        source = data.data_name(given)
    if not data.is_rows(given):
        if recipe.data.format != "text":
            raise recipe.error("data.format", "a stream is packed as text; hand over rows that are all there")
        if recipe.train.validation_batches != 0:
            raise recipe.error(
                "train.validation_batches",
                "of a stream nothing is held out; set it to 0, or hand over rows that are all there",
            )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": source})})


def prepare_data(recipe: Recipe, given: Any, progress: data.Progress) -> data.PreparedData:
    """Return the data of a run: the recipe's, or what a script hands over in its place."""
    config = recipe.data
    if given is None:
        return data.prepare(config, progress=progress)
    if not data.is_rows(given):
        tokenizer = data.ready_tokenizer(config)
        if tokenizer is None:
            raise UserError("tokenizer.name: `bpe` trains on text that is all there; name a file")
        nothing = data.held_tokens((), len)
        return data.PreparedData(nothing, nothing, tokenizer, None, "stream")
    with blaming(f"source = {data.data_name(given)!r}"):
        if not len(given):
            raise UserError("source: has no rows")
        of_tokens = config.format == "text" and data.tokens_of(given[0]) is not None
    if of_tokens:
        return data.prepare_tokens(config, given)
    return data.prepare(config, source=data.memory_source(given, config), progress=progress)


def open_batches(
    program: Program, prepared: data.PreparedData, given: Any, report: Callable[[str], None]
) -> data.TrainIterator | data.StreamIterator:
    """Return this process's share of the training batches."""
    recipe, (share, shares) = program.recipe, program.batch_share
    batch = {"global_batch_size": recipe.train.global_batch_size, "process_index": share, "process_count": shares}
    with recipe.blamed("data"):
        if given is None or data.is_rows(given):
            return data.train_iterator(prepared.train, recipe.data, **batch)
        vocabulary = vocabulary_of(recipe.model)
        return data.StreamIterator(
            given, recipe.data, prepared.tokenizer, vocab_size=vocabulary, report=report, **batch
        )
