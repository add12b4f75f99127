"""The report on data as text that fits into 80 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from trainfw.data.report.describe import DataReport, SourceReport
from trainfw.data.report.lengths import Lengths
from trainfw.data.report.sample import NEAR_WORDS
from trainfw.tables import table
from trainfw.utf8 import printable

_WIDTH = 80
_NAME = 22
"""Most columns of a source's name."""
_BARS = " ▁▂▃▄▅▆▇█"
_LISTED = 6
"""Languages, classes and reasons that are listed."""


def report_text(report: DataReport) -> str:
    """Write a report for people."""
    parts = [_counts(report), _duplicates(report), _rows(report), _kinds(report), _overlaps(report), _near(report)]
    return "\n\n".join("\n".join(lines) for lines in [*parts, _samples(report), list(_notes(report))] if lines)


def _all(report: DataReport) -> list[SourceReport]:
    return [*report.sources, report.total] if len(report.sources) > 1 else report.sources


def _counts(report: DataReport) -> list[str]:
    images = report.config.format == "images"
    heads = ["source", "pictures" if images else "documents", "text", "tokens", "p1", "p50", "p99", "max", "lengths"]
    rows = [heads]
    span = _span(report.total.lengths)
    for source in _all(report):
        about = "~" if source.sampled != source.documents else ""
        tokens = "-" if source.tokens is None else f"{about}{compact(source.tokens)}"
        lengths = source.lengths or Lengths(0, 0, 0, 0, 0, 0, {})
        figures = [compact(getattr(lengths, name)) for name in ("p1", "p50", "p99", "max")]
        row = [_name(source), f"{source.documents:,}", f"{compact(source.bytes or source.characters)}B"]
        rows.append([*row, tokens, *figures, _bars(lengths, span)])
    first, last = (f"{2**power:,}" for power in (span[0], span[-1] + 1)) if span else ("0", "0")
    return [*table(rows, "<>>>>>>><"), f"lengths in {report.unit}; a bar for each power of two, {first} to {last}"]


def _span(lengths: Lengths | None) -> range:
    powers = [least.bit_length() - 1 for least in lengths.histogram] if lengths else []
    return range(min(powers), max(powers) + 1) if powers else range(0)


def _bars(lengths: Lengths, span: range) -> str:
    most = max(lengths.histogram.values(), default=1)
    counts = [lengths.histogram.get(2**power, 0) for power in span]
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in counts)


def _duplicates(report: DataReport) -> list[str]:
    near, overlap = report.near is not None, report.options.against is not None
    rows = [["source", "copies", "", *["near copies", ""] * near, *["overlapping", ""] * overlap]]
    for source in _all(report):
        row = [_name(source), f"{source.copies:,}", _share(source.copies, source.documents)]
        row += [f"{source.near_copies:,}", _share(source.near_copies, source.compared)] * near
        row += [f"{source.overlapping:,}", _share(source.overlapping, source.documents)] * overlap
        rows.append(row)
    things = "pictures" if report.config.format == "images" else "documents"
    heads = [f"copies: {things} that equal an earlier one{_part(report.copies_share)}"]
    if near:
        among = "all" if report.compared_share == 1 else f"{report.total.compared:,} texts of a sample"
        heads.append(
            f"near copies: others, by {NEAR_WORDS} words in a row (Jaccard {report.options.near:g} or more), among "
            f"{among}"
        )
    return [*table(rows, "<" + ">" * (len(rows[0]) - 1)), *heads]


def _part(share: float) -> str:
    return "" if share == 1 else f", estimated from 1 in {round(1 / share):,}"


def _rows(report: DataReport) -> list[str]:
    if not report.rows:
        return []
    text, length = report.config.format == "text", report.config.sequence_length
    things = "documents" if text else "examples"
    rows = [[f"rows of {length:,} tokens", "rows", "padding", f"{things} cut", "left out"]]
    for one in report.rows:
        name = f"packing: {one.packing}" if text else f"format: {report.config.format}"
        rows.append([name, f"{one.rows:,}", f"{1 - one.filled:.1%}", f"{one.torn:.1%}", f"{one.left_out:.1%}"])
    return table(rows, "<>>>>")


def _kinds(report: DataReport) -> list[str]:
    lines = []
    for name, of in (("languages", "languages"), ("classes", "classes")):
        for source in _all(report):
            counter = Counter[str](getattr(source, of))
            if counter:
                listed = [f"{kind} {_share(n, counter.total())}" for kind, n in counter.most_common(_LISTED)]
                more = [f"{len(counter) - _LISTED:,} more"] if len(counter) > _LISTED else []
                lines.append(f"{name} of {_name(source)}: {', '.join(listed + more)}")
    return lines


def _overlaps(report: DataReport) -> list[str]:
    options = report.options
    if options.against is None:
        return []
    seen, total = report.examples_seen, report.examples
    lines = [
        f"{options.against}: documents hold {options.against_words} words in a row of {seen:,} of its {total:,} "
        f"examples ({_share(seen, total)})",
    ]
    if short := report.examples_too_short:
        lines.append(f"of its examples, {short:,} have fewer than {options.against_words} words, and are never found")
    lines += [f"  {id_}, example {number}: {_cut(words, 48)}" for id_, number, words in report.overlaps]
    return lines


def _near(report: DataReport) -> list[str]:
    pairs = sorted(report.near or [], key=lambda pair: -pair[2])
    middle = len(pairs) // 2
    shown = [*pairs[:1], *pairs[middle : middle + 1], *pairs[-1:]] if len(pairs) > 2 else pairs
    return ["near copies, such as"] * bool(pairs) + [f"  {jaccard:.2f}  {a}  {b}" for a, b, jaccard in shown]


def _samples(report: DataReport) -> list[str]:
    lines = []
    for source in report.sources:
        for id_, text in source.samples:
            lines.append(_cut(f"{id_}: {' '.join(text.split())}", _WIDTH))
    return lines


def _notes(report: DataReport) -> Iterator[str]:
    total = report.total
    if total.sampled != total.documents:
        yield f"tokens and lengths are those of {total.sampled:,} documents, drawn at random (--sample)"
    if report.compared_share < 1:
        yield f"near copies are looked for in a sample of {total.compared:,} texts, drawn such that they come together"
    for source in report.sources:
        if source.skipped:
            yield f"{source.name}: {source.skipped}"
        yield from (f"{source.name}: {one}" for one in source.refused[:_LISTED])
    yield from report.notes


def _name(source: SourceReport) -> str:
    name = printable(source.name)
    return name if len(name) <= _NAME else f"...{name[3 - _NAME :]}"


def _share(count: int, whole: int) -> str:
    return f"{count / whole:.1%}" if whole else "-"


def _cut(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def compact(number: float) -> str:
    """Write a count in at most four columns, as long as it is below 1,000 trillions: 999, 1.2k, 45k, 6.7M."""
    if number < 999.5:
        return f"{number:.0f}"
    for unit in "kMGT":
        number /= 1000
        if number < 999.5 or unit == "T":
            return f"{number:.{int(number < 9.95)}f}{unit}"
    raise AssertionError("the last unit takes any number")
