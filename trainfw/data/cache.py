"""Cache of tokens: documents are read and tokenised once, and again only when something has changed."""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from trainfw.data.cache_directory import CacheDirectory, Meta, are_held_out, fingerprint_of, is_held_out, write_meta
from trainfw.data.chat import ChatTemplate, stop_ids
from trainfw.data.config import DataConfig
from trainfw.data.encoding import PieceEncoder
from trainfw.data.examples import Encoder, Refused
from trainfw.data.preferences import PairEncoder
from trainfw.data.progress import Progress, report_bytes, reported
from trainfw.data.python_rows import RowSource, held_tokens, source_of, tokens_of
from trainfw.data.shards import SHARD_BYTES, Measured, Shard, Shards, tokenise
from trainfw.data.sources import Source
from trainfw.data.store import StoreInfo, StoreWriter, TokenStore
from trainfw.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from trainfw.errors import UserError, about
from trainfw.paths import resolve_path

FORMAT_VERSION = 3
EXAMPLES_VERSION = 2
"""Version of the tokens of examples, to be raised with any change to them."""
BATCH_ROWS = 1000
"""Examples tokenised at once."""
GZIP_BYTES = 2**15
"""Least bytes of held-out text that gzip is measured on: its window. The 18 bytes around gzip's stream and the code
tables within are about a hundredth of so much text, and most of a few hundred bytes."""


class OneSource:
    """Prepared data that is of one source, as a mixture has several."""

    validation: Any

    @property
    def parts(self) -> dict[str, Self]:
        """The source, under an empty name."""
        return {"": self}

    def at(self, _name: str, _length: int) -> Self:
        """Return the source, whatever the length of rows."""
        return self

    @property
    def held_out_digest(self) -> str:
        digest: str = self.validation.digest
        return digest


@dataclass(frozen=True)
class PreparedData(OneSource):
    """Both splits, tokenised, and the tokenizer that did it."""

    train: TokenStore
    validation: TokenStore
    tokenizer: Tokenizer
    gzip_bits_per_byte: float | None
    """Size after `gzip -9` of the held-out documents in one stream, in bits a byte, which a model should beat. None
    where they have fewer than `GZIP_BYTES`."""
    fingerprint: str
    """Hash of the inputs and of every option that shapes the tokens."""
    refused: tuple[Refused, ...] = ()
    """Rows of examples that could not be used, and why."""
    remarks: tuple[str, ...] = ()
    skipped: str = ""
    """Files of the source that were not read, by kind; empty if there are none."""
    damage: str = ""
    """Damage for which the cache was made again; empty if there was none."""

    def facts(self) -> dict[str, str]:
        """Return what all processes of a run must have alike."""
        return {
            "digest of the training data": self.train.digest,
            "digest of the held-out data": self.validation.digest,
            "digest of the tokenizer": self.tokenizer.fingerprint(),
        }

    def save(self, directory: Path) -> None:
        """Write what the use of a model takes: the tokenizer, as `tokenizer/`."""
        self.tokenizer.save(directory / "tokenizer")

    def notes(self) -> list[str]:
        """Describe the data in lines: files that were not read, numbers of examples, refused rows."""
        damage = f"warning: the token cache was damaged, and was made again: {self.damage}" if self.damage else ""
        files = [note for note in (damage, self.skipped) if note]
        if self.train.learnt is None:
            return files
        refused = sum(one.count for one in self.refused)
        train, validation = (store.num_documents // store.group for store in (self.train, self.validation))
        things = "pairs" if self.train.group == 2 else "examples"
        counts = f"{train:,} {things} to train on, {validation:,} held out"
        counts += f"; {refused:,} row{'s' * (refused > 1)} refused:" if refused else ""
        return [*files, counts, *(f"  {one}" for one in self.refused), *self.remarks]


def prepare(
    config: DataConfig,
    *,
    source: Source | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Return both splits of the source that `config` names, from the cache unless something has changed.

    Of a source that is read as a stream (`data.stream`) it is the tokenizer, and the held-out documents of a part.

    `source` and `tokenizer` replace those that `config` names. Any number of processes may call this at once; one of
    them builds the cache. Raises UserError where the source cannot be read, no row of it can be used, a split would be
    empty, or the cache cannot be written.
    """
    if config.stream is not None and source is None:
        from trainfw.data.streaming import prepare_stream  # which gives what this module defines

        return prepare_stream(config, tokenizer=tokenizer, progress=progress)
    with about("source"):
        source = source or source_of(config)
    with about("tokenizer.path"):
        tokenizer = tokenizer or ready_tokenizer(config)
    data, damage = _Cache(_dated(config, tokenizer), source, tokenizer, progress).prepared(source)
    return replace(data, damage=damage, skipped=source.skipped)


def prepare_tokens(config: DataConfig, rows: Sequence[Any]) -> PreparedData:
    """Both splits of rows in memory that are tokenised already, with their own markers; nothing is cached.

    A hash of its tokens decides a row's side. Raises UserError where a split would be empty.
    """
    with about("tokenizer.path"):
        tokenizer = ready_tokenizer(config)
    if tokenizer is None:
        raise UserError("tokenizer.name: `bpe` trains on text, and these rows are tokens; name the file that made them")
    splits: dict[bool, list[Any]] = {False: [], True: []}
    for row in itertools.islice(rows, config.max_documents):
        tokens = tokens_of(row)
        if tokens is None:
            raise UserError(f"source: a row is {str(row)[:40]!r}, after rows of tokens; expected token ids")
        splits[is_held_out(tokens.tobytes().hex(), config.validation_fraction)].append(tokens)
    for held_out, name in ((False, "train"), (True, "validation")):
        if not splits[held_out]:
            raise UserError(f"validation_fraction = {config.validation_fraction}: the {name} split is empty")
    train, validation = (
        held_tokens(side, lambda tokens: len(tokenizer.decode(tokens.tolist()).encode())) for side in splits.values()
    )
    return PreparedData(train, validation, tokenizer, None, f"{train.digest} {validation.digest}")


class _Cache(CacheDirectory[PreparedData, Source]):
    what = "token cache"

    def __init__(
        self, config: DataConfig, source: Source, tokenizer: Tokenizer | None, progress: Progress | None
    ) -> None:
        super().__init__(config, _fingerprint(config, source, tokenizer), progress)
        self._shards = Shards(self._directory.with_suffix(".shards"))
        self._tokenizer = tokenizer

    def _source_again(self) -> Source:
        return self._source if isinstance(self._source, RowSource) else source_of(self._config)

    def _load(self, directory: Path, meta: Meta) -> tuple[PreparedData, list[str]]:
        """Open both splits.

        A tokenizer that was given is used as it is now: parts that do not shape tokens (a template, for text) may have
        changed since they were cached.
        """
        train, validation = (
            StoreInfo(**meta[split]).open(directory, split, self._fingerprint, self._mend)
            for split in ("train", "validation")
        )
        tokenizer = self._tokenizer or load_tokenizer(directory / "tokenizer")
        if tokenizer.fingerprint() != meta["tokenizer"]:
            raise ValueError(f"{directory / 'tokenizer'} is not the one that tokenised it")
        refused = tuple(Refused(**one) for one in meta["refused"])
        gzip = meta["gzip_bits_per_byte"] if validation.num_bytes >= GZIP_BYTES else None
        remarks = tuple(meta["remarks"])
        data = PreparedData(train, validation, tokenizer, gzip, self._fingerprint, refused, remarks)
        self._tokenizer = tokenizer
        return data, [train.digest, validation.digest]

    def _make(self, source: Source) -> None:
        super()._make(source)
        self._shards.remove()

    def _build(self, directory: Path, source: Source) -> list[str]:
        config = self._config
        tokenizer = self._tokenizer or self._trained(source)
        tokenizer.save(directory / "tokenizer")
        gzip = _Gzip()
        encoder: Encoder | None = None
        thing, group = "document", 1
        if config.format != "text":
            pairs = config.format == "preferences"
            encoder = (PairEncoder if pairs else Encoder)(config, tokenizer)
            thing, group = ("pair", 2) if pairs else ("example", 1)
        new = functools.partial(StoreWriter, directory, examples=encoder is not None, group=group)
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(new(split, tokenizer.vocab_size, self._fingerprint))
                for split in ("train", "validation")
            }
            if encoder is None:
                self._write_text(source, tokenizer, writers, gzip)
            else:
                self._write_examples(source, encoder, writers, gzip)

        infos = {split: writer.info() for split, writer in writers.items()}
        refused = () if encoder is None else encoder.refusals.summary()
        total = sum(info.num_documents // info.group for info in infos.values())
        if not total and refused:
            raise UserError("no row of the source can be used:" + "".join(f"\n  {one}" for one in refused))
        for split, info in infos.items():
            if info.num_documents == 0:
                more = f"{thing}s{' (of JSONL and Parquet, each row is one)' if encoder is None else ''}"
                raise UserError(
                    f"validation_fraction = {config.validation_fraction}: the {split} split is empty, of {total} "
                    f"{thing}(s); change the fraction, or give more {more}"
                )
        meta: Meta = {split: asdict(info) for split, info in infos.items()} | {
            "tokenizer": tokenizer.fingerprint(),
            "gzip_bits_per_byte": 8 * gzip.size() / max(infos["validation"].num_bytes, 1),
            "refused": [asdict(one) for one in refused],
            "remarks": () if encoder is None else encoder.remarks(),
        }
        write_meta(directory, meta)
        return [info.digest for info in infos.values()]

    def _trained(self, source: Source) -> Tokenizer:
        """Return a tokenizer trained on the training split, the one of before where that was interrupted."""
        config, place = self._config, self._shards.directory / "tokenizer"
        if place.exists():
            with contextlib.suppress(UserError):  # not all of it was written
                return load_tokenizer(place)
        self._shards.remove()  # tokenised with another
        assert config.tokenizer.vocab_size is not None
        texts = (document.text for document in itertools.islice(source.documents(), config.max_documents))
        training_texts = (text for text in texts if not is_held_out(text, config.validation_fraction))
        tokenizer = train_bpe(training_texts, config.tokenizer.vocab_size, self._progress)
        tokenizer.save(place)
        return tokenizer

    def _write_text(
        self, source: Source, tokenizer: Tokenizer, writers: Mapping[str, StoreWriter], gzip: _Gzip
    ) -> None:
        encoder, total, done = PieceEncoder(tokenizer), source.num_bytes(), 0
        documents = self._measured(source, gzip)
        with contextlib.closing(self._tokenised(documents, encoder)) as shards:
            for what, shard in shards:
                for split, held_out in (("train", False), ("validation", True)):
                    part = shard.split(held_out)
                    writers[split].extend(part.ids, part.lengths, int(part.num_bytes.sum()))
                done += int(shard.num_bytes.sum())
                report_bytes(what, done, total and max(total, done), self._progress)
        report_bytes("Tokenising", done, done, self._progress)

    def _measured(self, source: Source, gzip: _Gzip) -> Iterator[Measured]:
        for document in itertools.islice(source.documents(), self._config.max_documents):
            data = document.text.encode()
            held_out = are_held_out(data, self._config.validation_fraction)
            if held_out:
                gzip.add(data)
            size = len(data)
            del data  # it may be a gigabyte
            yield Measured(document.id, document.text, size, held_out)

    def _tokenised(
        self, documents: Iterator[Measured], encoder: PieceEncoder
    ) -> Generator[tuple[str, Shard], None, None]:
        """Yield all documents in order, those of shards that are there first, and keep a shard where more follow."""
        kept, number = self._shards, 0
        while (shard := kept.load(number)) is not None:
            again = [(one.num_bytes, one.held_out) for one in itertools.islice(documents, len(shard.lengths))]
            if again != list(zip(shard.num_bytes.tolist(), shard.held_out.tolist())):
                kept.remove()
                raise UserError("the source gives other documents than before; the same command begins anew")
            number += 1
            yield "Reading what was tokenised", shard
        parts: list[Shard] = []
        size = 0
        with contextlib.closing(tokenise(documents, encoder)) as new:
            for part in new:
                if size >= SHARD_BYTES:
                    kept.save(number, Shard.joined(parts))
                    number, parts, size = number + 1, [], 0
                parts.append(part)
                size += int(part.num_bytes.sum())
                yield "Tokenising", part

    def _write_examples(
        self, source: Source, encoder: Encoder, writers: Mapping[str, StoreWriter], gzip: _Gzip
    ) -> None:
        config = self._config
        rows = reported(itertools.islice(source.rows(), config.max_documents), "Tokenising", None, self._progress)
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            for one in encoder.encode(batch):
                text = encoder.tokenizer.decode([id_ for id_, learnt in zip(one.ids, one.learnt) if learnt])
                data, held_out = text.encode(), is_held_out(one.key, config.validation_fraction)
                writers["validation" if held_out else "train"].append(one.ids, len(data), one.learnt)
                if held_out:
                    gzip.add(data)


class _Gzip:
    """Bytes that `gzip -9` makes of what is added, one after another."""

    def __init__(self) -> None:
        self._stream, self._size = zlib.compressobj(level=9, wbits=31), 0

    def add(self, data: bytes) -> None:
        self._size += len(self._stream.compress(data))

    def size(self) -> int:
        """Return the size of all; nothing can be added any more."""
        self._size += len(self._stream.flush())
        return self._size


def check_source(config: DataConfig) -> None:
    """Raise UserError where the source, or the tokenizer's file, is not there. Neither is read."""
    with about("source"):
        if not isinstance(config.source, str | list):  # model_copy checks nothing
            raise UserError(f"{type(config.source).__name__} where a path, or a list of paths, is expected")
        source_of(config)
    check_tokenizer_file(config)


def check_tokenizer_file(config: DataConfig) -> None:
    """Raise UserError where the tokenizer's file is not there."""
    with about("tokenizer.path"):
        path = config.tokenizer.path
        if path is not None and not resolve_path(path).exists():
            raise UserError(f"no tokenizer at {path}: expected a tokenizer.json, or a directory that holds one")


def ready_tokenizer(config: DataConfig) -> Tokenizer | None:
    """Return the tokenizer, unless it is still to be trained."""
    if config.tokenizer.name == "bpe":
        return None
    return byte_tokenizer() if config.tokenizer.path is None else load_tokenizer(config.tokenizer.path)


def _dated(config: DataConfig, tokenizer: Tokenizer | None) -> DataConfig:
    """Return the config with a date where the data depends on one, and without where it does not."""
    template = ChatTemplate.of(tokenizer) if tokenizer is not None and config.format != "text" else None
    clock = template is not None and "strftime_now" in template.source
    return config.model_copy(update={"date": config.date or datetime.date.today().isoformat() if clock else None})


def _fingerprint(config: DataConfig, source: Source, tokenizer: Tokenizer | None) -> str:
    tokens = tokenizer.fingerprint() if tokenizer else config.tokenizer.vocab_size
    state = [FORMAT_VERSION, source.fingerprint(), tokens, config.validation_fraction, config.max_documents]
    if config.format != "text":
        shaping = {"format", "loss_on", "chat_template", "system_prompt", "date", "too_long", "sequence_length"}
        assert tokenizer is not None  # DataConfig: none of these is trained
        settings = {key: value for key, value in tokenizer.settings.items() if key.endswith(("_token", "_template"))}
        state += [EXAMPLES_VERSION, config.model_dump(include=shaping), settings, stop_ids(tokenizer)]
    return fingerprint_of(state)
