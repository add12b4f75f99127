"""The report on the data of a recipe: one pass over its sources, then a closer look at a sample of them."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainfw.data.cache import ready_tokenizer
from trainfw.data.cache_directory import is_held_out
from trainfw.data.config import PICTURES, STDLIB, TASK_SOURCES, TOPICS, DataConfig
from trainfw.data.examples import Refusals, Refused
from trainfw.data.images.decoding import decode_all
from trainfw.data.progress import Progress, reported
from trainfw.data.python_rows import RowSource, source_of
from trainfw.data.readers import Unreadable, document
from trainfw.data.report.duplicates import Groups, Link, near_duplicates
from trainfw.data.report.lengths import Lengths, RowFill, document_lengths, example_lengths, fill_rows
from trainfw.data.report.ngrams import ngram_set, words_of
from trainfw.data.report.overlap import WORDS, EvaluationSet
from trainfw.data.report.sample import NEAR_WORDS, Copies, Sample, Sampled, hash_of, near_key
from trainfw.data.sources import Row, Source
from trainfw.data.tokenizer import Tokenizer, train_bpe
from trainfw.errors import UserError, about

_EXAMPLES = 3
"""Overlaps, and groups of near duplicates, that are shown."""


@dataclass(frozen=True)
class ReportOptions:
    """Choices of a report that are no keys of a recipe."""

    against: str | None = None
    """Source of an evaluation set, whose overlap with the data is looked for."""
    against_fields: tuple[str, ...] = ()
    """Columns of the evaluation set, if they are not those of the data."""
    against_words: int = WORDS
    """Words in a row that make an overlap."""
    near: float = 0.8
    """Least Jaccard similarity of near duplicates."""
    language_field: str | None = None
    """Column that names a document's language."""
    sample: int = 100_000
    """Most documents that are tokenised and compared with each other."""
    shown: int = 2
    """Documents of each source that are shown."""


@dataclass
class SourceReport:
    """Figures of one source, or of all together."""

    name: str
    documents: int = 0
    characters: int = 0
    bytes: int = 0
    sampled: int = 0
    """Documents whose tokens were counted, copies included."""
    compared: int = 0
    """Texts that were compared with each other, and come first in this source; those of `near_copies` are among them.
    """
    copies: int = 0
    """Documents that equal an earlier one, of this source or of one before it."""
    near_copies: int = 0
    """Texts that are near duplicates of an earlier one."""
    overlapping: int = 0
    """Documents that share words with the evaluation set."""
    tokens: int | None = None
    """Tokens, markers included; estimated where the sample is not all; None where they cannot be counted."""
    lengths: Lengths | None = None
    languages: dict[str, int] = field(default_factory=dict)
    """Numbers of documents by language."""
    classes: dict[str, int] = field(default_factory=dict)
    """Numbers of pictures by class."""
    refused: tuple[Refused, ...] = ()
    skipped: str = ""
    """Files that are not read."""
    samples: list[tuple[str, str]] = field(default_factory=list)
    """Places and texts of a few documents."""


@dataclass
class DataReport:
    """Report on the data of a recipe; `report_text` writes it for people."""

    config: DataConfig
    options: ReportOptions
    sources: list[SourceReport]
    total: SourceReport
    unit: str = "tokens"
    """Unit of the lengths: `tokens`, or `characters` where tokens cannot be counted."""
    notes: list[str] = field(default_factory=list)
    compared_share: float = 1.0
    """Share of the texts that were compared with each other, nearly."""
    copies_share: float = 1.0
    """Share of the documents of which copies were counted."""
    rows: list[RowFill] = field(default_factory=list)
    near: list[tuple[str, str, float]] | None = None
    """Near duplicates by their places, with their similarity; None where they were not looked for."""
    examples: int = 0
    """Examples of the evaluation set."""
    examples_too_short: int = 0
    examples_seen: int = 0
    """Examples of which a document holds some words in a row."""
    overlaps: list[tuple[str, int, str]] = field(default_factory=list)
    """Some overlaps: the document's place, the number of the example, and the words."""

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON writes it."""
        made = {name: value for name, value in dataclasses.asdict(self).items() if name != "config"}
        parts = {name: part.source for name, part in self.config.parts.items()}
        data = {"source": parts.get("", parts), "format": self.config.format, "tokenizer": self.config.tokenizer.name}
        return {"data": data | {"sequence_length": self.config.sequence_length}} | made


def by_format(config: DataConfig) -> list[DataConfig]:
    """Return a config for each format of its sources and ways of reading it, of which documents are not compared."""
    if config.mixture is None:
        return [config]
    of_one = {"source", "weight", "repeats", "max_documents", "validation_fraction"}
    groups: dict[str, list[str]] = {}
    for name, one in config.mixture.items():
        groups.setdefault(one.model_dump_json(exclude=of_one), []).append(name)
    return [
        config.model_copy(
            update={
                "mixture": {name: config.mixture[name] for name in names},
                "format": config.part(names[0]).format,
            }
        )
        for names in groups.values()
    ]


def describe_data(config: DataConfig, options: ReportOptions, progress: Progress | None = None) -> DataReport:
    """Read the sources of a recipe's text and report on them.

    Memory is bounded, whatever their size: two samples of 128 MiB of text each, the hashes of the words of one, and 200
    MB of hashes of documents. Raises UserError where a source cannot be read, as training would.
    """
    if config.format == "images":
        return _describe_pictures(config, options, progress)
    report = _Reader(config, options, progress)
    report.read()
    report.look_closer()
    return report.made


def _describe_pictures(config: DataConfig, options: ReportOptions, progress: Progress | None) -> DataReport:
    """Report on pictures: classes, captions, and copies, pixel by pixel."""
    if options.against is not None or options.language_field is not None:
        raise _refused("--against and --language-field", "are for text, and data.format is images; leave them out")
    named = list(_sources_of(config, None))
    sources, copies = [SourceReport(name, skipped=source.skipped) for name, source in named], Copies()
    made = DataReport(config, options, sources, SourceReport("together"), unit="words of captions")
    lengths: list[list[int]] = [[] for _ in sources]
    refusals = [Refusals() for _ in sources]
    left = config.max_documents
    for number, (source, (_, given)) in enumerate(zip(sources, named, strict=True)):
        rows = (row for row in itertools.islice(given.rows(), left) if _is_picture(row, refusals[number]))
        decoded = decode_all(rows, size=1, channels=3)
        for row, one in reported(decoded, "Decoding pictures", given.num_documents(), progress):
            if isinstance(one, str):
                refusals[number].add(one, row.id)
                continue
            source.documents += 1
            copies.add(hash_of(one.key), number)
            label, caption = row.value.label, row.value.caption
            if label is not None:
                source.classes[str(label)[:40]] = source.classes.get(str(label)[:40], 0) + 1
            if isinstance(caption, str):
                source.characters += len(caption)
                lengths[number].append(len(words_of(caption)))
            if len(source.samples) < options.shown:
                source.samples.append((row.id, str(caption or label or "")[:1000]))
        left = None if left is None else left - source.documents
    for number, source in enumerate(sources):
        source.refused, source.lengths = refusals[number].summary(), Lengths.of(np.array(lengths[number], np.int64))
        source.copies, source.sampled = int(copies.by_source(len(sources))[number]), source.documents
    made.copies_share, made.total = 0.5**copies.halvings, _together(sources)
    made.total.lengths = Lengths.of(np.concatenate([np.array(own, np.int64) for own in lengths]))
    made.notes.append("copies are pictures of the same pixels; near copies and overlaps of pictures are not looked for")
    return made


def _is_picture(row: Row, refusals: Refusals) -> bool:
    if isinstance(row.value, Unreadable):
        refusals.add(row.value.reason, row.id)
        return False
    return True


class _Reader:
    """The making of a report."""

    def __init__(self, config: DataConfig, options: ReportOptions, progress: Progress | None) -> None:
        self._config, self._options, self._progress = config, options, progress
        self._sources = list(_sources_of(config, options.language_field))
        self._sample, self._near, self._copies = Sample(options.sample), Sample(options.sample), Copies()
        names = [SourceReport(name, skipped=source.skipped) for name, source in self._sources]
        self.made = DataReport(config, options, names, SourceReport("together"))
        self._refusals = [Refusals() for _ in names]
        self._evaluation = _evaluation_set(config, options)

    def read(self) -> None:
        """Read every document once: counts, copies, languages, overlaps, and the sample."""
        items = itertools.islice(self._items(), self._config.max_documents)
        for number, id_, value, language in reported(items, "Reading documents", self._count(), self._progress):
            if isinstance(value, Unreadable):
                self._refusals[number].add(value.reason, id_)
                continue
            text, source = text_of(value), self.made.sources[number]
            size, hashed = len(text.encode(errors="surrogatepass")), hash_of(text)
            source.documents += 1
            source.characters += len(text)
            source.bytes += size
            if self._options.language_field is not None:
                source.languages[language] = source.languages.get(language, 0) + 1
            self._copies.add(hashed, number)
            self._sample.add(hashed, hashed, number, id_, value, size)
            self._near.add(near_key(text, hashed), hashed, number, id_, value, size)
            if self._evaluation is not None and (found := self._evaluation.find(text)) is not None:
                source.overlapping += 1
                if len(self.made.overlaps) < _EXAMPLES:
                    self.made.overlaps.append((id_, found.example, found.words))
        field = self._options.language_field
        for source in self.made.sources if field is not None else ():
            if source.languages.get("none") == source.documents:
                raise _refused(f"--language-field {field}", f"no row of {source.name} has it; name another column")

    def look_closer(self) -> None:
        """Tokenise the sample, compare its texts with each other, and sum up."""
        made, sample, compared = self.made, self._sample.items(), self._near.items()
        made.compared_share, made.copies_share = 0.5**self._near.halvings, 0.5**self._copies.halvings
        for number, copies in enumerate(self._copies.by_source(len(made.sources)).tolist()):
            source = made.sources[number]
            source.copies = copies
            source.sampled = sum(one.counts.get(number, 0) for one in sample)
            source.compared = sum(min(one.counts) == number for one in compared)
            some = self._sample.some(number, self._options.shown)
            source.samples = [(one.id, text_of(one.value)[:1000]) for one in some]
        lengths = self._lengths(sample)
        for number, (source, own) in enumerate(zip(made.sources, lengths, strict=True)):
            source.refused = (*self._refusals[number].summary(), *source.refused)
            source.lengths = Lengths.of(own)
            read = sum(one.size * one.counts.get(number, 0) for one in sample)
            if made.unit == "tokens" and read:
                source.tokens = round(int(own.sum()) * (source.bytes / read))  # exactly the sum where all is read
        everything = np.concatenate(lengths)
        made.rows = fill_rows(everything, self._config) if made.unit == "tokens" else []
        self._compare(compared)
        if self._evaluation is not None:
            made.examples, made.examples_too_short = self._evaluation.examples, self._evaluation.too_short
            made.examples_seen = self._evaluation.examples_seen()
        made.total = _together(made.sources)
        made.total.lengths = Lengths.of(everything)

    def _items(self) -> Iterator[tuple[int, str, object, str]]:
        """Yield (source, place, document or row, language) of everything."""
        field, text = self._options.language_field, self._config.format == "text"
        for number, (_, source) in enumerate(self._sources):
            if text and field is None:
                yield from ((number, id_, value, "") for id_, value in source.documents())
                continue
            for id_, value in source.rows():
                language = value.get(field) if isinstance(value, dict) else None
                if text and isinstance(value, Unreadable):
                    raise UserError(f"{id_}: {value.reason}")
                if text:
                    value = document(value, (self._config.text_field,), id_)
                    if not value:
                        continue
                elif field is not None and isinstance(value, dict):
                    value = {key: one for key, one in value.items() if key != field}
                yield number, id_, value, "none" if language is None else str(language)[:40]

    def _count(self) -> int | None:
        counts = [source.num_documents() for _, source in self._sources]
        return None if None in counts else sum(count or 0 for count in counts)

    def _lengths(self, sample: Sequence[Sampled]) -> list[np.ndarray]:
        """Return the lengths of each source's documents or examples, copies included."""
        config, made = self._config, self.made
        counts = [[one.counts.get(number, 0) for one in sample] for number in range(len(made.sources))]
        tokenizer = ready_tokenizer(config) or self._trained()
        if config.format == "text":
            lengths = document_lengths(sample, tokenizer, self._progress)
            return [np.repeat(lengths, own) for own in counts]
        found = []
        try:
            for number, source in enumerate(made.sources):
                own, refusals = example_lengths(sample, number, config, tokenizer, self._progress)
                source.refused = refusals.summary()
                found.append(own)
        except UserError as error:
            made.notes.append(f"tokens are not counted: {error}")
            made.unit = "characters"
            characters = np.array([len(text_of(one.value)) for one in sample], np.int64)
            return [np.repeat(characters, own) for own in counts]
        return found

    def _trained(self) -> Tokenizer:
        """Train the tokenizer that training would."""
        config = self._config
        assert config.tokenizer.vocab_size is not None
        documents = itertools.islice(self._items(), config.max_documents)
        texts = (str(value) for _, _, value, _ in documents)
        training = (text for text in texts if not is_held_out(text, config.validation_fraction))
        return train_bpe(training, config.tokenizer.vocab_size, self._progress)

    def _compare(self, sample: Sequence[Sampled]) -> None:
        """Look for near duplicates in a sample."""
        made = self.made
        counted = reported(sample, "Reading words", len(sample), self._progress)
        sets = [ngram_set(text_of(one.value), NEAR_WORDS) for one in counted]
        try:
            links = near_duplicates(sets, self._options.near, self._progress)
        except UserError as error:  # the library is not there
            made.notes.append(f"near copies are not looked for: {error}")
            return
        made.near = [(sample[one.first].id, sample[one.second].id, one.jaccard) for one in links]
        for number in _later(len(sample), links):
            made.sources[min(sample[number].counts)].near_copies += 1


def _later(count: int, links: Sequence[Link]) -> list[int]:
    """Return the numbers that belong to a group, but for the first of each group."""
    groups = Groups(count)
    for link in links:
        groups.join(link.first, link.second)
    linked = sorted({number for link in links for number in link[:2]})
    return [number for number in linked if groups.root(number) != number]


def text_of(value: object) -> str:
    """Return the text of a document, or all texts of a row, but for the roles of its messages."""
    return value if isinstance(value, str) else "\n".join(_texts(value))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "role":
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _sources_of(config: DataConfig, language_field: str | None) -> Iterator[tuple[str, Source]]:
    """Open each source of a recipe by itself; a file that two of them reach is read in the first."""
    parts = [
        (part, name, one)
        for part, one in config.parts.items()
        for name in ([one.source] if isinstance(one.source, str) else one.source)
    ]
    built_in = [name for _, name, _ in parts if name in (STDLIB, TOPICS, *TASK_SOURCES, *PICTURES)]
    if language_field is not None and built_in:
        raise _refused(f"--language-field {language_field}", f"{built_in[0]} has no columns; leave it out")
    reached: set[str] = set()
    for part, given, one in parts:
        alone = part and (isinstance(one.source, str) or len(one.source) == 1)
        name = part if alone else f"{part}: {given}" if part else given
        with about(f"mixture.{part}.source" if part else "source"):
            source = source_of(_with_columns(one, given, language_field))
        if isinstance(source, RowSource):
            columns = source.columns if language_field is None else (*source.columns, language_field)
            yield name, dataclasses.replace(source, columns=columns, text=source.text and language_field is None)
            continue
        if config.format != "text" and language_field is not None:
            source = dataclasses.replace(source, columns=(*source.columns, language_field))
        paths = [
            os.path.realpath(item.path) if isinstance(item.path, Path) else item.path.url for item in source.inputs
        ]
        new = tuple(item for item, path in zip(source.inputs, paths, strict=True) if path not in reached)
        reached.update(paths)
        yield name, dataclasses.replace(source, inputs=new)


def _with_columns(config: DataConfig, name: str, language_field: str | None) -> DataConfig:
    """Return the config of one source; of text with a language beside it, as rows of two columns."""
    changed: dict[str, object] = {"source": [name]}
    if config.format == "text" and language_field is not None:
        changed |= {"format": "prompt_completion", "prompt_field": config.text_field}
        changed |= {"completion_field": language_field}
    return config.model_copy(update=changed)


def _evaluation_set(config: DataConfig, options: ReportOptions) -> EvaluationSet | None:
    """Read the evaluation set. Raises UserError where it cannot be read, or none of it is long enough to be found."""
    if options.against is None:
        return None
    changed: dict[str, object] = {"source": [options.against], "max_documents": None}
    try:
        if fields := options.against_fields:
            changed |= {"format": "prompt_completion", "prompt_field": fields[0], "completion_field": fields[-1]}
            source = source_of(config.model_copy(update=changed))
            source = dataclasses.replace(source, columns=tuple(dict.fromkeys(fields)))
            values: Iterator[object] = (row.value for row in source.rows())
        else:
            source = source_of(config.model_copy(update=changed))
            items = source.documents() if config.format == "text" else source.rows()
            values = (one[1] for one in items)
        found = EvaluationSet((_readable(value) for value in values), options.against_words)
    except UserError as error:
        hint = "" if options.against_fields else "; name its columns with --against-field"
        raise _refused(f"--against {options.against}", f"{error}{hint}") from error
    if found.examples == found.too_short:
        problem = f"none of its {found.examples:,} examples has {found.size} words"
        raise _refused(f"--against {options.against}", f"{problem}; give a smaller number to --against-words")
    return found


def _refused(option: str, problem: str) -> UserError:
    """Make a UserError about an option, which is no key of a recipe."""
    error = UserError(f"{option}: {problem}")
    error.placed = True
    return error


def _readable(value: object) -> str:
    """Return the text of an example. Raises UserError for a row without one."""
    if isinstance(value, Unreadable):
        raise UserError(f"a row cannot be read: {value.reason}")
    return text_of(value)


def _together(sources: Sequence[SourceReport]) -> SourceReport:
    """Return the sums over all sources."""
    total = SourceReport("together")
    for name in ("documents", "characters", "bytes", "sampled", "compared", "copies", "near_copies", "overlapping"):
        setattr(total, name, sum(getattr(source, name) for source in sources))
    counted = [source.tokens for source in sources if source.tokens is not None]
    total.tokens = sum(counted) if counted else None
    total.languages = dict(sum((Counter(source.languages) for source in sources), Counter()))
    total.classes = dict(sum((Counter(source.classes) for source in sources), Counter()))
    return total
