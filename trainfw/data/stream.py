"""Streams: documents of a script's own iterator, packed into rows in the order in which they come."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trainfw import backends
from trainfw.data.config import DataConfig
from trainfw.data.pipeline import Batch, EndlessBatches, State
from trainfw.data.python_rows import begin_rows, data_name, tokens_of
from trainfw.data.rows import FIELDS, Rows
from trainfw.data.store import TokenStore
from trainfw.data.tokenizer import Tokenizer
from trainfw.errors import RunError, UserError
from trainfw.pieces import blaming

_END = object()
_SURROGATE = re.compile("[\ud800-\udfff]")


class StreamIterator(EndlessBatches):
    """Training batches of a stream; the interface is `TrainIterator`'s.

    Every process reads the whole stream and keeps its share of each batch. A state says how many documents were read
    and what is left of them. An iterator with `get_state` and `set_state` is moved there by these; any other is made
    anew and read up to there, which `report` says, and what it then gave must be what it gave before.
    """

    _digest: str  # of all documents that were read, each after the hash before it

    def __init__(
        self,
        given: Any,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        global_batch_size: int,
        process_index: int,
        process_count: int,
        vocab_size: int,
        report: Callable[[str], None],
    ) -> None:
        self._given, self._config, self._tokenizer, self._report = given, config, tokenizer, report
        self._vocab_size = vocab_size
        self._name = data_name(given)
        super().__init__(global_batch_size)
        share = global_batch_size // process_count
        self._mine = range(process_index * share, (process_index + 1) * share)
        self._used = False
        self._begin()

    def get_state(self) -> State:
        """Return where the last batch ended. JSON-serialisable, the same in every process.

        Raises RunError where another process has read other documents.
        """
        if len(set(backends.exchange("stream", self._digest))) > 1:
            raise RunError("the processes of the run have read other documents than each other, of their own streams")
        return {
            "next_row": self._next_row,
            "order": self._order(),
            "documents": self._documents,
            "digest": self._digest,
            "held": [self._tokens.tolist(), self._starts.tolist()],
            "place": self._source.get_state() if hasattr(self._source, "get_state") else None,
        }

    def set_state(self, state: State) -> None:
        """Go on from a state. Raises UserError where the stream does not lead there."""
        if state["order"] != self._order():
            raise UserError(
                "the run's place is in other data, or in rows of another length, and means nothing in this stream; "
                "restore the data, or start a new run"
            )
        self._begin()
        if state["place"] is not None and hasattr(self._source, "set_state"):
            self._source.set_state(state["place"])
        else:
            first = f"first {state['documents']:,} documents"
            self._report(f"data: reading the stream's {first} again, to go on after them")
            for _ in range(state["documents"]):
                self._draw()
            if self._digest != state["digest"]:
                raise UserError(f"the stream's {first} are others than they were; give the same, or start a new run")
        self._documents, self._digest, self._next_row = state["documents"], state["digest"], state["next_row"]
        self._tokens, self._starts = (np.array(part, np.int64) for part in state["held"])

    def restart(self) -> None:
        if self._documents:
            self._begin()

    def close(self) -> None:
        """End it."""

    def _begin(self) -> None:
        source = begin_rows(self._name, self._given if callable(self._given) else lambda: self._given)
        if self._used and source is self._given:
            raise RunError(
                "the data is an iterator, which cannot go back to its beginning; hand over a function that makes one"
            )
        self._source, self._used = source, False
        self._documents, self._next_row, self._digest = 0, 0, ""
        self._tokens, self._starts = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def _order(self) -> str:
        return f"stream of rows of {self._config.sequence_length}, {self._tokenizer.fingerprint()}"

    def _take(self) -> Batch:
        length = self._config.sequence_length
        needed = self._global_batch_size * length + 1  # and the last input's target
        tokens, starts, size = [self._tokens], [self._starts], len(self._tokens)
        while size < needed:
            document = self._draw()
            if isinstance(document, str):
                if not document:  # dropped from rows in memory, too
                    continue
                ids = self._tokenizer.encode(document)
                document = np.array([self._tokenizer.bos_id, *ids, self._tokenizer.eos_id])
            if document.size and (largest := document.max()) >= self._vocab_size:
                raise UserError(
                    f"source: document {self._documents - 1} has token {largest}; expected ids below "
                    f"model.vocab_size = {self._vocab_size}"
                )
            tokens.append(document.astype(np.int64))
            starts.append(np.array([size], np.int64))
            size += len(document)
        whole, begins = np.concatenate(tokens), np.concatenate(starts)
        ends = begins[begins < needed]
        store = TokenStore(whole[:needed], np.append(ends if len(ends) and not ends[0] else [0, *ends], needed), 0, "")
        rows = Rows(store, length)
        mine = [rows[index] for index in self._mine]
        self._tokens, self._starts = whole[needed - 1 :], begins[begins >= needed - 1] - (needed - 1)
        self._next_row += self._global_batch_size
        return {name: np.stack([row[name] for row in mine]) for name in FIELDS}

    def _draw(self) -> str | np.ndarray:
        self._used = True
        with blaming(f"source = {self._name!r}"):
            row: Any = next(self._source, _END)
        if row is _END:
            raise RunError(
                f"the data has ended after {self._documents:,} documents, {self._next_row:,} rows of "
                f"{self._config.sequence_length} tokens; give more of it, or rows in memory, which are read again"
            )
        document = tokens_of(row)
        if document is None:
            document = row.get(self._config.text_field) if isinstance(row, Mapping) else row
        if not isinstance(document, str | np.ndarray):
            raise UserError(f"source: document {self._documents} is {str(row)[:40]!r}; expected text, or token ids")
        if isinstance(document, str) and (found := _SURROGATE.search(document)):
            raise UserError(f"source: document {self._documents} has a lone surrogate at character {found.start()}")
        data = document.encode() if isinstance(document, str) else document.tobytes()
        self._digest = hashlib.blake2b(self._digest.encode() + data, digest_size=16).hexdigest()
        self._documents += 1
        return document
