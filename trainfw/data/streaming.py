"""Streaming: documents of files of any size, read, tokenised, packed and shuffled while the steps go on."""

from __future__ import annotations

import hashlib
import queue
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainfw.data.block_cache import CachedBlocks
from trainfw.data.cache import GZIP_BYTES, PreparedData, ready_tokenizer
from trainfw.data.cache_directory import cache_root, fingerprint_of, is_held_out
from trainfw.data.config import DataConfig, StreamConfig
from trainfw.data.files import Input, file_kind
from trainfw.data.pipeline import State
from trainfw.data.progress import Progress
from trainfw.data.python_rows import RowSource, source_of
from trainfw.data.readers import BEGIN, Place, documents_from
from trainfw.data.remote import BLOCK, RemoteFile, StoreBlocks
from trainfw.data.row_stream import Row, RowStream
from trainfw.data.rows import Rows
from trainfw.data.sources import Source, ends_of, readable
from trainfw.data.store import TokenStore
from trainfw.data.tokenizer import BATCH_BYTES, Tokenizer
from trainfw.errors import RunError, UserError, about

_FIRST_WINDOW = 64
"""Rows of the first window; each has twice as many as the one before, up to `window`."""
_VALIDATION_FILES = 4
"""Files, at least, that held-out documents are looked for in."""
_POLL_SECONDS, _HANGS_SECONDS = 1.0, 120.0
"""Seconds between two looks for a window, and those without one, beyond what a store is waited for, after which it is
no longer said that something goes on: the watchdog then ends a run whose reader hangs."""
_SMALLEST_BLOCK = 2**16


class At(NamedTuple):
    """Place of a document in a corpus without end."""

    epoch: int
    file: int
    """Number of its file in the order of the epoch."""
    place: Place


class Corpus:
    """Documents of a source's files, in an order without end: files in a new random order in each epoch."""

    def __init__(self, source: Source, config: DataConfig, blocks: CachedBlocks) -> None:
        if isinstance(source, RowSource):
            raise UserError("source: a function's rows are read as it gives them; a stream is read from files")
        self.inputs = tuple(_through(item, blocks) for item in source.inputs)
        self._columns, self._config = source.columns, config
        self._seen = [_seen(item) for item in self.inputs]
        self.num_bytes = sum(size for size, _ in self._seen)
        named = source.identity is not None  # its files are those of one version
        parts = [] if named else [[item.name, *_contents(item)] for item in self.inputs]
        self.fingerprint = fingerprint_of([source.identity, source.columns, parts])

    def documents(self, begin: At) -> Iterator[tuple[At, str]]:
        """Yield the training documents from a place on, each with its own place, without end.

        Raises UserError where a file cannot be read, or is not what it was, and where there is no such document.
        """
        epoch, first, place = begin
        found = begin != At(epoch, 0, BEGIN)  # of an epoch begun elsewhere that is not known
        while True:
            order = self._order(epoch)
            for index in range(first, len(order)):
                for text, after in self.read(order[index], place):
                    if not is_held_out(text, self._config.validation_fraction):
                        found = True
                        yield At(epoch, index, place), text
                    place = after
                place = BEGIN
            if not found:
                raise UserError("source: no document is left to train on; give more, or a smaller validation_fraction")
            epoch, first, found = epoch + 1, 0, False

    def read(self, number: int, place: Place = BEGIN) -> Iterator[tuple[str, Place]]:
        """Yield the documents of a file from a place on that are not empty, and the place after each."""
        item = self.inputs[number]
        with readable(item.path):
            self._check(number)
            kind = file_kind(item.path)[0]
            for text, after in documents_from(kind, item.read, item.path, self._columns, place):
                if text:
                    yield text, after
            self._check(number)

    def _check(self, number: int) -> None:
        """Raise UserError where a file of this machine is not what it was when it was listed (others see to it)."""
        item = self.inputs[number]
        if isinstance(item.path, Path) and _seen(item) != self._seen[number]:
            raise UserError(f"{item.path}: has changed since it was listed; give files that stay as they are")

    def _order(self, epoch: int) -> np.ndarray:
        count, config = len(self.inputs), self._config
        return shuffled(count, f"files {config.seed} {epoch}") if config.shuffle else np.arange(count)


class Window(NamedTuple):
    """Consecutive rows of a stream, which are shuffled together."""

    number: int
    rows: Rows
    end: tuple[At, int]
    """Place of the next window: the document that its first token is in, and the tokens of it before."""


class StreamedRows(RowStream):
    """Rows of text that is read and tokenised as they are drawn, in a thread of its own.

    Row i before the shuffle has the tokens [i S, i S + S] of the documents one after another, as `Rows` has them; each
    window of rows is permuted. A state says where the window begins in the corpus, and how many of its rows were
    drawn: reading begins there again, and no row is held in it.
    """

    _begin: tuple[int, tuple[At, int]]
    """Number of the window that the next row is of, and its place."""
    _end: tuple[At, int]
    """Place of the one after it, once it is here."""
    _window: Window | None
    _drawn: int

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        source: Source | None = None,
        report: Callable[[str], None] = lambda _: None,
        progress: Progress | None = None,
    ) -> None:
        """Open the stream that `config` describes, or that of another `source`.

        Args:
            report: told in a few words where a store does not answer, and where it does again.
            progress: told of every second that a row is waited for.
        """
        assert config.stream is not None
        self._config, self._tokenizer, self._stream, self._progress = config, tokenizer, config.stream, progress
        self._closed = threading.Event()
        self._blocks = open_blocks(config, report, self._closed)
        self.corpus = Corpus(source or source_of(config), config, self._blocks)
        shuffle = [config.seed, self._stream.window] if config.shuffle else None
        split = [config.validation_fraction, config.sequence_length]
        self.order = fingerprint_of([self.corpus.fingerprint, tokenizer.fingerprint(), split, shuffle])
        self._dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self._reader: _Reader | None = None
        self._asked: Callable[[], bool] = lambda: False
        self.restart()

    def __next__(self) -> Row:
        if self._window is None or self._drawn == len(self._window.rows):
            window = self._next_window()
            self._begin, self._drawn = (window.number, self._end), self._drawn if self._window is None else 0
            self._window, self._end = window, window.end
            count = len(window.rows)
            seed = f"rows {self._config.seed} {window.number}"
            self._permutation = shuffled(count, seed) if self._config.shuffle else np.arange(count)
        row = self._window.rows[int(self._permutation[self._drawn])]
        self._drawn += 1
        return row

    def get_state(self) -> State:
        """Return the place after the last row, as JSON; the same in every process."""
        (number, begin), drawn = self._begin, self._drawn
        if self._window is not None and drawn == len(self._window.rows):
            number, begin, drawn = number + 1, self._end, 0
        at, tokens = begin
        place = {"epoch": at.epoch, "file": at.file, "place": list(at.place), "tokens": tokens}
        return {"window": number, "begins": place, "drawn": drawn}

    def set_state(self, state: State) -> None:
        """Go to a place of the same `order`."""
        place = state["begins"]
        offset, lines = place["place"]
        at = At(place["epoch"], place["file"], (offset, lines))
        self._seek(state["window"], (at, place["tokens"]), state["drawn"])

    def restart(self) -> None:
        self._seek(0, (At(0, 0, BEGIN), 0), 0)

    def give_up_when(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    def close(self) -> None:
        """Stop reading ahead. Closing twice is harmless."""
        self._closed.set()
        self._stop()
        self._blocks.close()

    def _seek(self, window: int, begin: tuple[At, int], drawn: int) -> None:
        if self._reader is not None and self._window is None and self._begin == (window, begin):
            self._drawn = drawn
            return  # it reads from there already
        self._stop()
        self._begin, self._end, self._drawn = (window, begin), begin, drawn
        self._window = None
        self._reader = _Reader(self._windows(window, begin))

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _next_window(self) -> Window:
        if self._reader is None:
            raise RunError("the stream is closed")
        seconds = 0
        while (window := self._reader.get(_POLL_SECONDS)) is None:
            if self._asked():
                raise RunError("the wait for data was given up, as the run was asked to stop")
            seconds += 1
            if self._progress is not None and seconds < self._stream.wait_seconds + _HANGS_SECONDS:
                self._progress("waiting for data, seconds", seconds, None)
        return window

    def _windows(self, number: int, begin: tuple[At, int]) -> Iterator[Window]:
        """Yield the windows from one on, whose place is given."""
        length = self._config.sequence_length
        documents = self._tokenised(*begin)
        held: deque[tuple[At, int, np.ndarray]] = deque()  # (document, tokens of it before, tokens)
        while True:
            rows = min(_FIRST_WINDOW << min(number, 32), self._stream.window)
            parts, starts, left = [], [], rows * length + 1  # and the last input's target
            while left:
                at, before, tokens = held.popleft() if held else next(documents)
                starts.append(rows * length + 1 - left)
                parts.append(tokens[:left])
                left -= len(parts[-1])
            # The last token is the first of the next window, as an input.
            used = len(parts[-1]) - 1
            end = at, before + used
            held.appendleft((*end, tokens[used:]))
            whole = np.concatenate(parts)
            offsets = np.array([*starts, len(whole)], np.int64)
            yield Window(number, Rows(TokenStore(whole, offsets, 0, ""), length), end)
            number += 1

    def _tokenised(self, begin: At, skipped: int) -> Iterator[tuple[At, int, np.ndarray]]:
        """Yield each document's place, the tokens of it that are left out (of the first alone), and the others."""
        tokenizer, documents = self._tokenizer, self.corpus.documents(begin)
        while True:
            batch, size = [], 0
            while size < BATCH_BYTES:
                at, text = next(documents)
                batch.append((at, text))
                size += len(text)
            for (at, _), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch])):
                tokens = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], self._dtype)
                yield at, skipped, tokens[skipped:]
                skipped = 0


class _Reader:
    """Thread that makes windows ahead: one waits while the next is in the making."""

    def __init__(self, windows: Iterator[Window]) -> None:
        self._windows, self._ended = windows, threading.Event()
        self._queue: queue.Queue[Window | BaseException] = queue.Queue(1)
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def get(self, timeout: float) -> Window | None:
        """Return the next window, or None where it has not come yet. Raises what making it did, each time."""
        try:
            got = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(got, BaseException):
            self._queue.put_nowait(got)
            raise got
        return got

    def close(self) -> None:
        self._ended.set()
        self._thread.join(timeout=2 * _POLL_SECONDS)  # a store that hangs is not waited for

    def _run(self) -> None:
        try:
            for window in self._windows:
                if not self._put(window):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Window | BaseException) -> bool:
        while not self._ended.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def prepare_stream(
    config: DataConfig, *, tokenizer: Tokenizer | None = None, progress: Progress | None = None
) -> PreparedData:
    """Return the held-out documents among the first text of a source that is read as a stream, and the tokenizer.

    They are taken from the beginnings of files in an order that no seed changes. Raises UserError where there is none,
    or a file cannot be read.
    """
    assert config.stream is not None
    with about("tokenizer.path"):
        tokenizer = tokenizer or ready_tokenizer(config)
    assert tokenizer is not None  # DataConfig: none is trained
    with about("source"):
        source = source_of(config)
        blocks = open_blocks(config, None, threading.Event(), ahead=False)
        try:
            corpus = Corpus(source, config, blocks)
            texts = list(_held_out(corpus, config, progress))
        finally:
            blocks.close()
    if not texts:
        raise UserError(
            f"validation_fraction = {config.validation_fraction}: the first {config.stream.validation_bytes:,} bytes "
            "of text (stream.validation_bytes) have no held-out document; raise one of them"
        )
    ids = [np.array([tokenizer.bos_id, *one, tokenizer.eos_id], np.int32) for one in tokenizer.encode_batch(texts)]
    tokens, ends = np.concatenate(ids), np.cumsum([0, *map(len, ids)], dtype=np.int64)
    data = "".join(texts).encode()
    digest = hashlib.blake2b(tokens.tobytes() + ends.tobytes(), digest_size=16).hexdigest()
    gzip = 8 * len(zlib.compress(data, 9, wbits=31)) / len(data) if len(data) >= GZIP_BYTES else None
    nothing = TokenStore(np.zeros(0, np.int32), np.zeros(1, np.int64), 0, f"stream {corpus.fingerprint}")
    total, unit = (corpus.num_bytes / 1e9, "GB") if corpus.num_bytes >= 1e8 else (corpus.num_bytes / 1e6, "MB")
    size = f"{len(corpus.inputs):,} file{'s' * (len(corpus.inputs) > 1)}, {total:.2f} {unit}"
    held_out = TokenStore(tokens, ends, len(data), digest)
    return PreparedData(nothing, held_out, tokenizer, gzip, corpus.fingerprint, remarks=(size,), skipped=source.skipped)


def _held_out(corpus: Corpus, config: DataConfig, progress: Progress | None) -> Iterator[str]:
    assert config.stream is not None
    left, share = config.stream.validation_bytes, -(-config.stream.validation_bytes // _VALIDATION_FILES)
    names = [hashlib.blake2b(item.name.encode()).digest() for item in corpus.inputs]
    for number in sorted(range(len(names)), key=names.__getitem__):
        of_file = min(share, left) if len(names) >= _VALIDATION_FILES else left
        for text, _ in corpus.read(number):
            if is_held_out(text, config.validation_fraction):
                yield text
            size = len(text.encode())
            of_file, left = of_file - size, left - size
            if of_file <= 0:
                break
        if progress is not None:
            total = config.stream.validation_bytes
            progress("looking for held-out documents, bytes", total - max(left, 0), total)
        if left <= 0:
            return


def open_blocks(
    config: DataConfig, report: Callable[[str], None] | None, stop: threading.Event, *, ahead: bool = True
) -> CachedBlocks:
    """Return a reader of a store's blocks that keeps some on the disk, as `data.stream` says."""
    stream = config.stream or StreamConfig()
    size = min(BLOCK, max(stream.cache_bytes // 8, _SMALLEST_BLOCK)) if stream.cache_bytes else BLOCK
    blocks = StoreBlocks(stream.wait_seconds, report, stop, size)
    return CachedBlocks(blocks, cache_root(config) / "blocks", stream.cache_bytes, ahead=ahead)


def shuffled(count: int, seed: str) -> np.ndarray:
    """Return a permutation, i64 (count,), that is the same with every version of every library."""
    keys = np.frombuffer(hashlib.shake_128(seed.encode()).digest(8 * count), "<u8")
    return np.argsort(keys, kind="stable")


def _through(item: Input, blocks: CachedBlocks) -> Input:
    """Return an input that is read by way of `blocks` where it is of a store."""
    return item._replace(path=replace(item.path, blocks=blocks)) if isinstance(item.path, RemoteFile) else item


def _seen(item: Input) -> tuple[int, str]:
    """Return the size of a file, and what changes with it."""
    if isinstance(item.path, RemoteFile):
        return item.path.num_bytes, item.path.mark
    with readable(item.path):
        stats = [path.stat() for path in _files(item)]
    return sum(stat.st_size for stat in stats), str(max(stat.st_mtime_ns for stat in stats))


def _contents(item: Input) -> list[object]:
    """Return what identifies the contents of a file, wherever it lies."""
    if isinstance(item.path, RemoteFile):
        return [item.path.num_bytes, item.path.mark]
    with readable(item.path):
        return [[path.stat().st_size, ends_of(path, path.stat().st_size)] for path in _files(item)]


def _files(item: Input) -> list[Path]:
    """Return a file, or those of a saved dataset's directory."""
    return sorted(item.local.rglob("*")) if item.local.is_dir() else [item.local]
