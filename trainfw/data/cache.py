"""The tokenised cache: documents are read and tokenised once, and again only when something has changed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from trainfw.data.config import DataConfig
from trainfw.data.progress import Progress, reported
from trainfw.data.sources import Document, Source, open_source
from trainfw.data.store import StoreInfo, StoreWriter, TokenStore
from trainfw.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from trainfw.errors import UserError

FORMAT_VERSION = 1
BATCH_CHARACTERS = 1_000_000
"""Text tokenised at once: enough for every core, little enough for any memory."""


@dataclass(frozen=True)
class PreparedData:
    """Both splits, tokenised, and the tokenizer that did it."""

    train: TokenStore
    validation: TokenStore
    tokenizer: Tokenizer
    gzip_bits_per_byte: float
    """What `gzip -9` makes of the held-out documents in one stream, in bits a byte: the least a model should beat."""
    fingerprint: str
    """Changes with the inputs and with every option that shapes the tokens."""


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/trainfw`, or `~/.cache/trainfw`."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "trainfw"


def prepare(config: DataConfig, *, progress: Progress | None = None) -> PreparedData:
    """Both splits of the source that `config` names, from the cache where nothing has changed since it was written.

    Any number of processes may call this at once; one of them builds. Raises UserError where the source cannot be
    read, a split would be empty, or the cache cannot be written.
    """
    source = open_source(config)
    tokenizer = _ready_tokenizer(config)
    fingerprint = _fingerprint(config, source, tokenizer)
    root = Path(os.path.expanduser(config.cache_dir)) if config.cache_dir else default_cache_dir()
    directory = root / fingerprint
    try:
        if (found := _open(directory, fingerprint)) is not None:
            return found
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{fingerprint}.lock"):
            if (found := _open(directory, fingerprint)) is not None:  # built while this process waited
                return found
            partial = root / f"{fingerprint}.partial"
            for leftover in (partial, directory):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
            _build(partial, config, source, tokenizer, progress)
            partial.rename(directory)
    except OSError as error:  # of the cache only: a source raises UserError
        raise UserError(
            f"cannot write the token cache in {root}: {error.strerror or error}; name another in cache_dir"
        ) from error
    found = _open(directory, fingerprint)
    assert found is not None, f"{directory} was just built, yet is not whole"
    return found


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation. Only its text decides, so that copies never face each other."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


def _ready_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer, unless it is still to be trained."""
    if config.tokenizer.name == "bpe":
        return None
    if config.tokenizer.name == "bytes":
        return byte_tokenizer()
    assert config.tokenizer.path is not None
    return load_tokenizer(config.tokenizer.path)


def _fingerprint(config: DataConfig, source: Source, tokenizer: Tokenizer | None) -> str:
    tokens = tokenizer.fingerprint() if tokenizer else config.tokenizer.vocab_size
    state = [FORMAT_VERSION, source.fingerprint(), tokens, config.validation_fraction, config.max_documents]
    return hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()


def _open(directory: Path, fingerprint: str) -> PreparedData | None:
    """What the cache holds, or None where it holds nothing whole."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
        train, validation = (StoreInfo(**meta[split]).open(directory, split) for split in ("train", "validation"))
        tokenizer = load_tokenizer(directory / "tokenizer")
        if tokenizer.fingerprint() != meta["tokenizer"]:
            return None
        return PreparedData(train, validation, tokenizer, meta["gzip_bits_per_byte"], fingerprint)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(
    directory: Path, config: DataConfig, source: Source, tokenizer: Tokenizer | None, progress: Progress | None
) -> None:
    if tokenizer is None:
        assert config.tokenizer.vocab_size is not None
        texts = (document.text for document in _documents(config, source))
        training_texts = (text for text in texts if not is_held_out(text, config.validation_fraction))
        tokenizer = train_bpe(training_texts, config.tokenizer.vocab_size, progress)
    tokenizer.save(directory / "tokenizer")

    gzip = zlib.compressobj(level=9, wbits=31)
    gzip_bytes = 0
    with ExitStack() as stack:
        train, validation = (
            stack.enter_context(StoreWriter(directory, split, tokenizer.vocab_size))
            for split in ("train", "validation")
        )
        documents = reported(_documents(config, source), "Tokenising", source.num_documents(), progress)
        for texts_in_batch in _batches(documents):
            for text, ids in zip(texts_in_batch, tokenizer.encode_batch(texts_in_batch)):
                data = text.encode()
                held_out = is_held_out(text, config.validation_fraction)
                (validation if held_out else train).append([tokenizer.bos_id, *ids, tokenizer.eos_id], len(data))
                if held_out:
                    gzip_bytes += len(gzip.compress(data))
        gzip_bytes += len(gzip.flush())

    infos = {"train": train.info(), "validation": validation.info()}
    for split, info in infos.items():
        if info.num_documents == 0:
            total = sum(info.num_documents for info in infos.values())
            raise UserError(
                f"the {split} split is empty: validation_fraction = {config.validation_fraction} of {total} "
                f"document(s) leaves it none; change the fraction, or give more documents (of JSONL and Parquet, "
                f"each row is one)"
            )
    meta = {split: info.as_dict() for split, info in infos.items()} | {
        "tokenizer": tokenizer.fingerprint(),
        "gzip_bits_per_byte": 8 * gzip_bytes / infos["validation"].num_bytes,
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=2))


def _documents(config: DataConfig, source: Source) -> Iterator[Document]:
    return itertools.islice(source.documents(), config.max_documents)


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document.text)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
