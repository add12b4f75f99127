"""Mixtures: several prepared sources, and the endless order of their rows through the stages of a run."""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import grain
import numpy as np

from trainfw.data.cache import PreparedData
from trainfw.data.cache_directory import cache_root, fingerprint_of, is_held_out
from trainfw.data.config import DataConfig
from trainfw.data.images.prepared import PreparedImages
from trainfw.data.interleave import Interleaving, Shares
from trainfw.data.locking import held
from trainfw.data.pipeline import GrainBatches, State, shuffled
from trainfw.data.progress import Progress
from trainfw.data.rows import RowSet
from trainfw.data.sources import Document, open_source
from trainfw.data.tokenizer import BPE_SAMPLE_BYTES, Tokenizer, first_bytes, load_tokenizer, train_bpe
from trainfw.errors import UserError, about
from trainfw.unfinished import writing


@dataclass(frozen=True)
class PreparedMixture:
    """Both splits of every source of a mixture, by its name."""

    parts: Mapping[str, PreparedData | PreparedImages]
    packed: Mapping[tuple[str, int], PreparedData] = field(default_factory=dict)
    """Sources of examples made for rows of other lengths, by name and length."""

    def at(self, name: str, length: int) -> PreparedData | PreparedImages:
        """Return a source, its examples made for rows of this length."""
        return self.packed.get((name, length), self.parts[name])

    @property
    def first(self) -> PreparedData | PreparedImages:
        """The first source, whose tokenizer, or whose classes, are those of all."""
        return next(iter(self.parts.values()))

    @property
    def held_out_digest(self) -> str:
        """Digests of the held-out splits, each after its source's name."""
        return " ".join(f"{name}:{part.held_out_digest}" for name, part in self.parts.items())

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the pictures' classes."""
        return self.first.classes if isinstance(self.first, PreparedImages) else ()

    @property
    def encoders(self) -> Mapping[str, str]:
        """Identities of what encoded the pictures and their captions."""
        return self.first.encoders if isinstance(self.first, PreparedImages) else {}

    def facts(self) -> dict[str, str]:
        """Return what all processes of a run must have alike."""
        of_parts = ((name, part.facts()) for name, part in self.parts.items())
        return {f"{fact} of {name}": value for name, facts in of_parts for fact, value in facts.items()}

    def save(self, directory: Path) -> None:
        """Write what the use of a model takes."""
        self.first.save(directory)

    def notes(self) -> list[str]:
        """Describe the sources in lines."""
        notes = ((name, note) for name, part in self.parts.items() for note in part.notes())
        return [
            f"warning: {name}: {note.removeprefix('warning: ')}" if note.startswith("warning: ") else f"{name}: {note}"
            for name, note in notes
        ]


Prepared = PreparedData | PreparedImages | PreparedMixture


def with_all_classes(parts: Mapping[str, PreparedImages]) -> dict[str, PreparedImages]:
    """Return sources of pictures that number their classes alike: those of all, in the order of their first source."""
    classes = tuple(dict.fromkeys(name for part in parts.values() for name in part.classes))
    changed = {}
    for name, part in parts.items():
        numbers = np.array([classes.index(one) for one in part.classes], np.int32)
        stores = []
        for store in (part.train, part.validation):
            digest = hashlib.blake2b(f"{store.digest} {classes}".encode(), digest_size=16).hexdigest()
            labels = None if store.labels is None else numbers[store.labels[:]]
            stores.append(replace(store, labels=labels, digest=digest))
        changed[name] = replace(part, classes=classes, train=stores[0], validation=stores[1])
    return changed


def train_mixture_bpe(config: DataConfig, progress: Progress | None = None) -> Tokenizer:
    """Return byte-level BPE trained on as much text of each source of a mixture, from the cache where it is there."""
    size, parts = config.tokenizer.vocab_size, config.parts
    assert size is not None
    sources = {}
    for name, part in parts.items():
        with about(f"mixture.{name}.source"):
            sources[name] = open_source(part)
    state = [
        size,
        config.validation_fraction,
        [(n, s.fingerprint(), parts[n].max_documents) for n, s in sources.items()],
    ]
    directory = cache_root(config) / f"bpe-{fingerprint_of(state)}"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with held(directory.with_suffix(".lock"), "the tokenizer", progress):
            if not directory.is_dir():
                each = BPE_SAMPLE_BYTES // len(sources)
                texts = (
                    first_bytes(_training_texts(source.documents(), parts[name]), each)
                    for name, source in sources.items()
                )
                with writing(directory, directory=True) as partial, about("tokenizer.vocab_size"):
                    train_bpe(itertools.chain.from_iterable(texts), size, progress).save(partial)
    except OSError as error:
        problem = f"cannot write a tokenizer in {directory.parent}: {error.strerror or error}"
        raise UserError(f"{problem}; name another in data.cache_dir") from error
    return load_tokenizer(directory)


def _training_texts(documents: Iterator[Document], config: DataConfig) -> Iterator[str]:
    texts = (document.text for document in itertools.islice(documents, config.max_documents))
    return (text for text in texts if not is_held_out(text, config.validation_fraction))


@dataclass(frozen=True)
class StageShares:
    """Part of a run: the sources that it draws rows of, and their shares."""

    names: tuple[str, ...]
    """Sources in the order of `shares`."""
    shares: Shares
    global_batch_size: int
    length: int
    """Places in a row."""

    def counts(self) -> dict[str, int]:
        """Return the most rows that each source gives to the stage."""
        totals = (self.shares.total(source, self.shares.rows) for source in range(len(self.names)))
        return {name: -(-total.numerator // total.denominator) for name, total in zip(self.names, totals)}

    @property
    def identity(self) -> str:
        """Hash of the sources' names, their shares, and the length of rows."""
        constant = self.shares.start == self.shares.end
        ends = [] if constant else [*map(str, self.shares.end), self.shares.rows]
        return fingerprint_of([self.length, self.names, [*map(str, self.shares.start)], ends])


def history(stages: Sequence[StageShares], number: int) -> str:
    """Identify the stages up to one, by its number from 0: past ones with their ends; of several, their batches."""
    past = [[stage.identity, stage.global_batch_size, stage.shares.rows] for stage in stages[:number]]
    batch = stages[number].global_batch_size if len(stages) > 1 else None
    return fingerprint_of([past, stages[number].identity, batch])


def check_history(stages: Sequence[StageShares], number: object, saved: object) -> None:
    """Raise UserError where the stages up to one are others than when `history` said this of them."""
    if not isinstance(number, int) or not 0 <= number < len(stages) or saved != history(stages, number):
        past = "the sources, weights, rows and batch of the stage that it is in, or stages before it or their ends"
        if len(stages) == 1:
            past = "its sources or their weights"
        raise UserError(
            f"mixture: {past} are not those that the run had when this state was saved, so its place means nothing "
            "here; what is to be another way from here on belongs into a stage that begins later, or start a new run"
        )


@dataclass(frozen=True)
class MixedStage(StageShares):
    """Part of a run whose sources are all there."""

    rows: Mapping[str, RowSet]
    """Rows of each source by its name."""


class MixedIterator(GrainBatches):
    """Training batches of a mixture without end, through the stages of a run; the interface is `TrainIterator`'s.

    A source goes on in each stage where the one before left it, as long as the length of its rows is the same; rows of
    another length have an order of their own.
    """

    def __init__(
        self, stages: Sequence[MixedStage], config: DataConfig, process_index: int, process_count: int
    ) -> None:
        super().__init__(stages[0].global_batch_size, config.prefetch, process_index, process_count)
        self._stages, self._config = stages, config
        self._orders: dict[str, str] = {}
        self._streams: dict[str, grain.MapDataset] = {}
        for stage in stages:
            for name, rows in stage.rows.items():
                seed = [config.seed, zlib.crc32(name.encode())]
                key = f"{stage.length} {name}"
                if key not in self._streams:
                    self._streams[key], self._orders[key] = shuffled(rows, config, seed)
        self.restart()

    @property
    def stage(self) -> int:
        """Number of the stage that the next batch is of, from 0."""
        return self._stage

    def enter(self, stage: int) -> None:
        """Go on with a stage's rows. Entering the one that it is in changes nothing."""
        while self._stage < stage:
            self._used = self._used_by_now()
            self._begin(self._stage + 1, self._next_row, self._used, None)

    def restart(self) -> None:
        self._next_row = 0
        self._begin(0, 0, {}, None)

    def get_state(self) -> State:
        """Return the place after the last batch, as JSON; the same in every process, whatever their number."""
        stage = self._stages[self._stage]
        return {
            "next_row": self._next_row,
            "stage": self._stage,
            "first_row": self._first_row,
            "used": self._used,
            "counts": self._interleaving.counts(self._next_row - self._first_row),
            "shares": history(self._stages, self._stage),
            "orders": {key: self._orders[key] for key in sorted({*self._used, *self._keys(stage)})},
        }

    def set_state(self, state: State) -> None:
        """Go on from `state`, with any number of processes. Raises UserError where it is of other sources or shares."""
        check_history(self._stages, state.get("stage"), state.get("shares"))
        number = state["stage"]
        for key, order in state["orders"].items():
            if self._orders.get(key) != order:
                raise UserError(
                    f"{f'mixture.{name}' if (name := key.partition(' ')[2]) else 'source'}: has changed since this "
                    "state was saved (its text, tokenizer, sequence_length, shuffle, flip or seed), so its place means "
                    "nothing here; restore the data, or start a new run"
                )
        done = state["next_row"] - state["first_row"]
        if len(state["counts"]) != len(self._stages[number].names) or sum(state["counts"]) != done:
            raise UserError("mixture: this state's rows by source are not those of its place; start a new run")
        self._next_row = state["next_row"]
        self._begin(number, state["first_row"], dict(state["used"]), state["counts"])

    def _keys(self, stage: MixedStage) -> list[str]:
        return [f"{stage.length} {name}" for name in stage.names]

    def _used_by_now(self) -> dict[str, int]:
        """Return how many rows were taken of each source, by the length of its rows."""
        counts = self._interleaving.counts(self._next_row - self._first_row)
        used = dict(self._used)
        for key, count in zip(self._keys(self._stages[self._stage]), counts):
            used[key] = used.get(key, 0) + count
        return used

    def _begin(self, number: int, first_row: int, used: dict[str, int], counts: Sequence[int] | None) -> None:
        stage = self._stages[number]
        self._stage, self._first_row, self._used = number, first_row, used
        self._global_batch_size = stage.global_batch_size
        done = self._next_row - first_row
        self._interleaving = Interleaving(stage.shares, done, counts, ahead=self._prefetch * stage.global_batch_size)
        keys = self._keys(stage)
        streams = [(self._streams[key], used.get(key, 0)) for key in keys]
        self._read(grain.MapDataset.source(_Mixed(self._interleaving, streams, first_row))[done:])


class _Mixed:
    """Rows of a stage by their place in it, as Grain reads them."""

    def __init__(self, order: Interleaving, streams: Sequence[tuple[grain.MapDataset, int]], first_row: int) -> None:
        self._order, self._streams, self._first_row = order, streams, first_row

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        source, number = self._order.place(place)
        stream, used = self._streams[source]
        row = stream[used + number]
        if "row" in row:  # what is drawn for a row is drawn by its number, of which no two sources may have the same
            row = row | {"row": np.array(self._first_row + place, np.int64)}
        return row
