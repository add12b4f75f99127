from __future__ import annotations

import abc
import bisect
from typing import TYPE_CHECKING

import numpy as np

from trainfw.data.config import DataConfig
from trainfw.data.store import TokenStore
from trainfw.errors import UserError

if TYPE_CHECKING:
    import grain

FIELDS = {
    "tokens": np.int32,  # the inputs
    "targets": np.int32,  # the token after each input
    "segment_ids": np.int32,  # 1, 2, ... by document within the row; 0 is padding
    "positions": np.int32,  # within the document's part of this row, from 0
    "loss_mask": np.float32,  # 1 where the target continues the input's document, else 0
}
"""The arrays of a row, each (S,), or (2, S) of pairs, and their types."""


class RowSet(abc.ABC):
    """Rows that batches are made of, each a dict of arrays."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return a row's arrays. Raises IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._row(index)

    @abc.abstractmethod
    def _row(self, index: int) -> dict[str, np.ndarray]: ...

    @abc.abstractmethod
    def empty(self, count: int) -> dict[str, np.ndarray]:
        """Return the arrays of `count` rows that count for nothing."""

    def endless(self, stream: grain.MapDataset) -> grain.MapDataset:
        """Return the endless stream (Grain's) with what depends on a row's number in it: here, nothing."""
        return stream

    @abc.abstractmethod
    def order(self, visited: str) -> str:
        """Identify the rows and their order, `visited` being the way in which they are shuffled."""

    @abc.abstractmethod
    def require(self, count: int) -> None:
        """Raise UserError unless there are `count` rows at least."""


class AnyRows(RowSet):
    """Rows of S tokens made of a store; each is a dict of the arrays named in `FIELDS`."""

    store: TokenStore
    sequence_length: int
    content: str
    """Number and kind of what the rows are made of, in words."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each of a row's arrays."""
        return (self.sequence_length,)

    @property
    @abc.abstractmethod
    def filled(self) -> float:
        """Share of the rows' places that hold tokens, the rest being padding."""

    def empty(self, count: int) -> dict[str, np.ndarray]:
        """Return the arrays of `count` rows of padding, each (count, *shape)."""
        return empty(count, *self.shape)

    def order(self, visited: str) -> str:
        return f"{self.store.digest} {self.sequence_length} {visited}"

    def require(self, count: int) -> None:
        if len(self) < count:
            raise UserError(
                f"{self.content} make {len(self)} rows of {self.sequence_length}, "
                f"fewer than the {count} of one batch; give more data, or shorten sequence_length or the batch"
            )


def open_rows(store: TokenStore, config: DataConfig) -> AnyRows:
    """Return the training rows of a store: of text as `config.packing` asks, of examples and pairs packed whole."""
    if store.group == 2:
        return PairRows(store, config.sequence_length, config.pairs_per_row)
    if store.learnt is not None:
        return ExampleRows(store, config.sequence_length)
    if config.packing == "best_fit":
        return DocumentRows(store, config.sequence_length, whole=config.split == "never")
    return Rows(store, config.sequence_length)


def open_validation_rows(store: TokenStore, config: DataConfig) -> AnyRows:
    """Return the rows of held-out data: those of `open_rows`, but none of it is left out."""
    return open_rows(store, config.model_copy(update={"split": "long"}))


class Rows(AnyRows):
    """A store cut into rows of S tokens: row i has inputs [i*S, i*S + S) of the stream, and their next tokens.

    The rows together predict every token but each document's first (its bos) exactly once; the last row is padded
    with zeros. Rows are found by arithmetic, so any S can be read from one store.
    """

    def __init__(self, store: TokenStore, sequence_length: int) -> None:
        self.store, self.sequence_length = store, sequence_length
        self.content = f"{store.num_tokens} training tokens"

    @property
    def filled(self) -> float:
        return (self.store.num_tokens - 1) / max(len(self) * self.sequence_length, 1)

    def __len__(self) -> int:
        return -(-(self.store.num_tokens - 1) // self.sequence_length)

    def _row(self, index: int) -> dict[str, np.ndarray]:
        start = index * self.sequence_length
        stream = self.store.tokens[start : start + self.sequence_length + 1]
        place = np.arange(start, start + len(stream))
        first = self.store.offsets.searchsorted(start, side="right") - 1
        last = self.store.offsets.searchsorted(start + len(stream) - 1, side="right")
        bounds = self.store.offsets[first:last]  # the beginnings of this row's documents
        document = bounds.searchsorted(place, side="right") - 1
        part_start = np.maximum(bounds[document], start)
        row = empty(self.sequence_length)
        part = slice(len(stream) - 1)
        row["tokens"][part], row["targets"][part] = stream[:-1], stream[1:]
        row["segment_ids"][part] = document[:-1] + 1
        row["positions"][part] = (place - part_start)[:-1]
        row["loss_mask"][part] = document[1:] == document[:-1]
        return row


class PackedRows(AnyRows):
    """Stretches of a store packed into rows of S tokens, each a segment of its own; padding comes last.

    A stretch of n tokens takes n - 1 places: its last token is predicted, and never an input. Their lengths alone
    decide which of them share a row (`pack`). Rows are ordered by the first stretch in them, and stretches in a row as
    in the store.
    """

    group = 1

    def _pack(self, places: np.ndarray) -> None:
        """Pack items that take so many places."""
        rows = pack(places, self.sequence_length)
        self._items = np.argsort(rows, kind="stable")
        self._starts = np.searchsorted(rows[self._items], np.arange(int(rows.max(initial=-1)) + 2))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def groups(self, index: int) -> np.ndarray:
        """Return the numbers of the items in a row, i64 (n,): of pairs, pair i is the examples 2 i and 2 i + 1."""
        return self._items[self._starts[index] : self._starts[index + 1]]

    @abc.abstractmethod
    def _stretch(self, item: int) -> tuple[int, int]:
        """Return the places in the store where a stretch starts and ends."""

    def _row(self, index: int) -> dict[str, np.ndarray]:
        return self._join(self.groups(index))

    def _join(self, items: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays named in `FIELDS`, each (S,), of these stretches one after another."""
        learnt = self.store.learnt
        row = empty(self.sequence_length)
        place = 0
        for segment, item in enumerate(items, start=1):
            start, end = self._stretch(item)
            tokens, part = self.store.tokens[start:end], slice(place, place + int(end - start) - 1)
            row["tokens"][part], row["targets"][part] = tokens[:-1], tokens[1:]
            row["segment_ids"][part] = segment
            row["positions"][part] = np.arange(end - start - 1)
            row["loss_mask"][part] = 1 if learnt is None else learnt[start + 1 : end]
            place = part.stop
        return row


class DocumentRows(PackedRows):
    """Documents of text packed whole where they fit; a longer one is cut into full rows and a rest, or left out.

    Every token but a document's first is predicted once. Takes about 80 bytes of memory a document while packing, and
    24 afterwards.
    """

    def __init__(self, store: TokenStore, sequence_length: int, *, whole: bool = False) -> None:
        """Pack the documents; with `whole`, those that do not fit into a row are left out."""
        self.store, self.sequence_length = store, sequence_length
        places = np.maximum(np.diff(store.offsets[:]) - 1, 0)
        self.left_out = int(np.count_nonzero(places > sequence_length)) if whole else 0
        if whole:
            places = np.where(places > sequence_length, 0, places)
        pieces = -(-places // sequence_length)
        self._first = np.concatenate([[0], np.cumsum(pieces)])  # of each document's pieces
        number = np.arange(self._first[-1]) - np.repeat(self._first[:-1], pieces)
        lengths = np.minimum(np.repeat(places, pieces) - number * sequence_length, sequence_length)
        self._places = int(lengths.sum())
        self._whole = whole
        self._pack(lengths)
        kept = f" ({self.left_out} documents of more than sequence_length are left out)" if self.left_out else ""
        self.content = f"{store.num_tokens} training tokens{kept}"

    @property
    def filled(self) -> float:
        return self._places / max(len(self) * self.sequence_length, 1)

    def order(self, visited: str) -> str:
        return f"{super().order(visited)} best_fit {'never' if self._whole else 'long'}"

    def _stretch(self, item: int) -> tuple[int, int]:
        document = int(self._first.searchsorted(item, side="right")) - 1
        start, end = self.store.offsets[document : document + 2]
        start += (item - self._first[document]) * self.sequence_length
        return int(start), int(min(end, start + self.sequence_length + 1))


class ExampleRows(PackedRows):
    """Examples of a store packed whole into rows of S tokens."""

    noun = "examples"

    def __init__(self, store: TokenStore, sequence_length: int, least: int = 1) -> None:
        """Pack the groups of examples; each takes `least` places or more, whatever its length."""
        assert store.learnt is not None
        assert store.group == self.group
        self.store, self.sequence_length = store, sequence_length
        lengths = np.diff(store.offsets[:]) - 1
        self._places = int(lengths.sum())
        if len(lengths) and (longest := int(lengths.max())) > sequence_length:
            raise UserError(f"an example of {longest + 1} tokens does not fit into rows of {sequence_length}")
        self._pack(np.maximum(lengths.reshape(-1, self.group).max(axis=1), least))
        self.content = f"{len(self._items)} training {self.noun}"

    @property
    def filled(self) -> float:
        return self._places / max(len(self) * self.group * self.sequence_length, 1)

    def _stretch(self, item: int) -> tuple[int, int]:
        start, end = self.store.offsets[item : item + 2]
        return int(start), int(end)


class PairRows(ExampleRows):
    """Pairs packed whole into rows of (2, S) tokens: the chosen examples, and the rejected below them.

    The k-th pair of a row is segment k on both sides. A side takes as many places as it has, and padding comes last;
    a pair counts for its longer side, and for the share of a row that keeps to `pairs_per_row`.
    """

    group = 2
    noun = "pairs"

    def __init__(self, store: TokenStore, sequence_length: int, pairs_per_row: int) -> None:
        super().__init__(store, sequence_length, least=-(-sequence_length // pairs_per_row))
        self.pairs_per_row = pairs_per_row

    @property
    def shape(self) -> tuple[int, ...]:
        return (2, self.sequence_length)

    def order(self, visited: str) -> str:
        return f"{super().order(visited)} {self.pairs_per_row}"

    def _row(self, index: int) -> dict[str, np.ndarray]:
        chosen, rejected = (self._join(2 * self.groups(index) + side) for side in (0, 1))
        return {name: np.stack([chosen[name], rejected[name]]) for name in FIELDS}


def torn_share(store: TokenStore, sequence_length: int) -> float:
    """Return the share of documents that an end of a row cuts in two where text is one stream cut into rows."""
    offsets = store.offsets[:]
    starts, lasts = offsets[:-1], offsets[1:] - 2  # the last token is an input of no row
    return float(np.mean(starts // sequence_length < lasts // sequence_length)) if len(starts) else 0.0


def empty(*shape: int) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, dtype) for name, dtype in FIELDS.items()}


def pack(lengths: np.ndarray, size: int) -> np.ndarray:
    """Return the bin of `size` that each item of `lengths` (at least 1, at most `size`) goes to: i64, (items,).

    Best fit, longest first, of whole lengths rather than single items: bins with the same room left are one group, so
    a million items take about as long as a thousand (Krell et al., "Efficient sequence packing", arXiv:2107.02027,
    section 3.2). Bins are numbered by the first item in them.
    """
    order = np.argsort(lengths, kind="stable")
    left = np.bincount(lengths, minlength=size + 1)
    ends = np.cumsum(left)  # of each length's items in `order`
    taken = ends - left
    bins = np.empty(len(lengths), np.int64)
    groups: dict[int, list[np.ndarray]] = {}  # room left -> bins that have it
    rooms: list[int] = []  # its keys, in order
    count = 0
    for length in range(size, 0, -1):
        while items := int(ends[length] - taken[length]):
            at = bisect.bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                group = groups[room].pop()
                if not groups[room]:
                    del groups[room], rooms[at]
                if len(group) > items:
                    _keep(groups, rooms, room, group[items:])
                    group = group[:items]
            else:
                # Bins for as many as will come after the first ones filled them.
                room = size
                group = np.arange(count, count + -(-items // (size // length)))
                count += len(group)
            start = int(taken[length])
            bins[order[start : start + len(group)]] = group
            taken[length] += len(group)
            if room > length:
                _keep(groups, rooms, room - length, group)
    first = np.full(count, len(lengths))
    np.minimum.at(first, bins, np.arange(len(lengths)))
    rank = np.empty(count, np.int64)
    rank[np.argsort(first)] = np.arange(count)
    return rank[bins]


def _keep(groups: dict[int, list[np.ndarray]], rooms: list[int], room: int, group: np.ndarray) -> None:
    if room not in groups:
        bisect.insort(rooms, room)
    groups.setdefault(room, []).append(group)
