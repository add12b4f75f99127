"""Count what `trainfw data report` finds: python benchmarks/duplicates.py [--planted N] [--json FILE] [--save]

1,000 distinct documents of Python's library and of this machine's man pages (or of the help texts of Python's modules,
where it has none), distinct since the Jaccard similarity of every pair of them, computed exactly here, is below 0.8;
and N copies, of N of them, in which words are replaced at random until the true similarity to the original is between
0.80 and 0.95. The true similarity is that of sets of five words in a row, computed here from the words themselves.

Exits 1 where fewer than 95% of the planted copies are found, or anything is found among the 1,000.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import Check, Table, add_arguments, at_least, at_most, finish, positive, say, table

DISTINCT, WORDS, LEAST, MOST = 1000, 5, 0.80, 0.95
MANUAL = Path("/usr/share/man")
LEAST_FOUND = 0.95


def man_pages(count: int) -> Iterator[tuple[str, str]]:
    """Sources of man pages in English, drawn at random."""
    pages = [page for page in sorted(MANUAL.glob("man[1-8]/*.gz")) if not page.is_symlink()]
    random.Random(0).shuffle(pages)
    for page in pages[:count]:
        yield page.name, gzip.decompress(page.read_bytes()).decode(errors="replace")


def help_texts() -> Iterator[tuple[str, str]]:
    """Texts that `help` shows of each topic and module of Python's library."""
    import pydoc
    from pydoc_data.topics import topics

    yield from topics.items()
    for name in sorted(sys.stdlib_module_names - {"antigravity", "this"}):
        try:
            yield name, pydoc.plain(pydoc.render_doc(name))
        except Exception:  # a module of another system
            continue


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Sets of words in a row, without hashes: the truth."""
    from trainfw.data.report.ngrams import words_of

    words = words_of(text)
    return frozenset(zip(*(words[start:] for start in range(WORDS)), strict=False))


def jaccard(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    return len(a & b) / max(len(a | b), 1)


def distinct(documents: list[tuple[str, str]], count: int) -> list[tuple[str, str, frozenset[tuple[str, ...]]]]:
    """The first `count` documents none of which is near another one: each is compared with all before it."""
    chosen: list[tuple[str, str, frozenset[tuple[str, ...]]]] = []
    holders: dict[tuple[str, ...], list[int]] = {}
    for name, text in documents:
        own = shingles(text)
        if len(own) < 100:
            continue
        shared: dict[int, int] = {}
        for one in own:
            for holder in holders.get(one, ()):
                shared[holder] = shared.get(holder, 0) + 1
        if any(both / (len(own) + len(chosen[holder][2]) - both) >= LEAST for holder, both in shared.items()):
            continue
        for one in own:
            holders.setdefault(one, []).append(len(chosen))
        chosen.append((name, text, own))
        if len(chosen) == count:
            break
    return chosen


def plant(text: str, own: frozenset[tuple[str, ...]], vocabulary: list[str], dice: random.Random) -> tuple[str, float]:
    """A copy with random words in random places, and its true similarity to the original."""
    while True:
        target, words = dice.uniform(LEAST, MOST), text.split()
        found = 1.0
        while found > target:
            for _ in range(max(1, int((found - target) * len(words) / 40))):
                words[dice.randrange(len(words))] = dice.choice(vocabulary)
            found = jaccard(own, shingles(" ".join(words)))
        if LEAST <= found <= MOST:
            return " ".join(words), found


def find(texts: list[str]) -> tuple[set[tuple[int, int]], float, float]:
    """Pairs that the report joins into one group, by the documents' numbers; its seconds, and its megabytes."""
    from trainfw.data import DataConfig, ReportOptions, describe_data

    with tempfile.TemporaryDirectory(prefix="trainfw-duplicates-") as place:
        file = Path(place) / "documents.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        start = time.perf_counter()
        report = describe_data(DataConfig(source=str(file), sequence_length=2048), ReportOptions())
        seconds = time.perf_counter() - start
    group = list(range(len(texts)))
    for first, second, _ in report.near or ():
        old, new = (group[int(id_.rpartition(":")[2]) - 1] for id_ in (first, second))
        group = [new if one == old else one for one in group]
    members: dict[int, list[int]] = {}
    for number, one in enumerate(group):
        members.setdefault(one, []).append(number)
    pairs = {(a, b) for some in members.values() for a in some for b in some if a < b}
    return pairs, seconds, report.total.bytes / 1e6


def judge(
    planted: list[tuple[int, int, float]], pairs: set[tuple[int, int]], speed: list[list[object]]
) -> tuple[list[Table], list[Check]]:
    """`planted`: (original, copy, true similarity)."""
    rows: list[list[object]] = []
    for low in (0.80, 0.85, 0.90):
        inside = [one for one in planted if low <= one[2] < low + 0.05 or one[2] == low + 0.05 == MOST]
        found = sum(one[:2] in pairs for one in inside)
        rows.append([f"{low:.2f} to {low + 0.05:.2f}", len(inside), found, found / max(len(inside), 1)])
    found = sum(one[:2] in pairs for one in planted)
    rows.append(["all", len(planted), found, found / len(planted)])
    false = [pair for pair in pairs if pair[1] < DISTINCT]
    tables = [
        table("Planted copies by their true Jaccard similarity", ["similarity", "planted", "found", "share"], rows),
        table("The report", ["documents", "MB", "seconds", "MB/s"], speed),
    ]
    checks = [at_least(f"share found, {row[0]}", float(str(row[3])), LEAST_FOUND) for row in rows]
    return tables, [*checks, at_most("false ones among 1,000 distinct documents", len(false), 0)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", type=positive, default=500, help="copies, at most 1000 (default: 500)")
    add_arguments(parser)
    arguments = parser.parse_args()
    from trainfw.data import DataConfig, open_source

    library = [(one.id, one.text) for one in open_source(DataConfig(sequence_length=1)).documents()]
    manual = list(man_pages(1500)) or list(help_texts())
    say(f"{len(library):,} files of Python's library, {len(manual):,} pages of manuals")
    half = distinct(library, DISTINCT // 2)
    chosen = distinct([*((name, text) for name, text, _ in half), *manual], DISTINCT)
    if len(chosen) < DISTINCT:
        parser.error(f"this machine has {len(chosen)} distinct documents, fewer than {DISTINCT}")
    dice = random.Random(1)
    vocabulary = sorted({word for _, text, _ in chosen[::20] for word in text.split()})
    originals = dice.sample(range(DISTINCT), min(arguments.planted, DISTINCT))
    texts, planted = [text for _, text, _ in chosen], []
    for original in originals:
        copy, similarity = plant(chosen[original][1], chosen[original][2], vocabulary, dice)
        planted.append((original, len(texts), similarity))
        texts.append(copy)
    pairs, seconds, megabytes = find(texts)
    speed: list[list[object]] = [[len(texts), megabytes, seconds, megabytes / seconds]]
    return finish("duplicates", *judge(planted, pairs, speed), arguments, ["datasketch"])


if __name__ == "__main__":
    raise SystemExit(main())
