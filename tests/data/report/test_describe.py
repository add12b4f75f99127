"""The report as a whole: figures of sources whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trainfw.data import DataConfig, ReportOptions, describe_data, report_text
from trainfw.data.report.lengths import Lengths
from trainfw.data.report.render import compact
from trainfw.errors import UserError


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(start: int, count: int) -> str:
    return " ".join(f"word{n}" for n in range(start, start + count))


@pytest.fixture
def two(tmp_path: Path) -> DataConfig:
    """Ten documents, a copy and a near copy of one; then one more, and a copy of one of the first source."""
    texts = [words(1000 * n, 60) for n in range(10)]
    near = " ".join([*texts[3].split()[:-1], "other"])
    a = [{"text": text, "lang": "en"} for text in [*texts, texts[0], near]]
    b = [{"text": text, "lang": "de"} for text in (texts[5], words(50_000, 200))]
    sources = [write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)]
    return DataConfig(source=sources, sequence_length=1024)


def test_figures_of_each_source_and_of_all(two: DataConfig) -> None:
    report = describe_data(two, ReportOptions(language_field="lang"))
    a, b = report.sources
    assert (a.documents, b.documents, report.total.documents) == (12, 2, 14)
    assert (a.copies, b.copies) == (1, 1), "a copy counts where it comes later"
    assert (a.near_copies, b.near_copies) == (1, 0)
    assert [(first, second) for first, second, _ in report.near or ()] == [("a.jsonl:4", "a.jsonl:12")]
    assert a.languages == {"en": 12}
    assert report.total.languages == {"en": 12, "de": 2}
    sizes = [len(json.loads(line)["text"]) + 2 for name in two.source for line in Path(name).read_text().splitlines()]
    assert report.total.tokens == sum(sizes), "bytes and two markers"
    assert report.total.lengths == Lengths.of(np.array(sizes))
    plain, packed, whole = report.rows
    assert plain.rows == -(-(sum(sizes) - 1) // 1024)
    assert (packed.left_out, whole.torn) == (0, 0)
    assert whole.left_out == packed.torn == 1 / 14, "the long one"
    assert json.loads(json.dumps(report.to_json()))["sources"][0]["documents"] == 12


def test_text_of_a_report_fits_eighty_columns(two: DataConfig) -> None:
    report = describe_data(two, ReportOptions())
    for source in report.sources:
        source.name = f"/a/very/long/path/of/a/source/{source.name[-7:]}"
    lines = report_text(report).splitlines()
    assert lines[0].split() == ["source", "documents", "text", "tokens", "p1", "p50", "p99", "max", "lengths"]
    assert max(map(len, lines)) <= 80
    assert [len(compact(n)) <= 5 for n in (0, 999, 1000, 999_499, 999_500, 10**9, 10**14)].count(False) == 0


def test_overlap_with_an_evaluation_set(two: DataConfig, tmp_path: Path) -> None:
    asked = [{"q": f"Say: {words(2010, 13).upper()}!"}, {"q": words(2010, 12)}, {"q": words(90_000, 30)}]
    options = ReportOptions(against=write(tmp_path / "eval.jsonl", asked), against_fields=("q",))
    report = describe_data(two, options)
    assert (report.examples, report.examples_too_short, report.examples_seen) == (3, 1, 1)
    assert [source.overlapping for source in report.sources] == [1, 0]
    assert report.overlaps == [("a.jsonl:3", 0, words(2010, 13))]
    shorter = describe_data(two, ReportOptions(options.against, ("q",), against_words=12))
    assert (shorter.examples_seen, shorter.examples_too_short) == (2, 0)


def test_a_sample_says_that_it_is_one(two: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    report = describe_data(two, ReportOptions(sample=6))
    assert report.total.documents == 14
    assert report.total.sampled < 14
    assert report.compared_share < 1
    text = report_text(report)
    assert f"tokens and lengths are those of {report.total.sampled} documents, drawn at random" in text
    assert f"among {report.total.compared} texts of a sample" in text
    assert "~" in text


def test_examples_and_refused_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * n}."} for n in range(20)]
    config = DataConfig(
        source=write(tmp_path / "a.jsonl", [*rows, rows[0], {"x": 1}, {"prompt": "a" * 80, "completion": "b"}]),
        format="prompt_completion",
        chat_template=False,
        sequence_length=64,
    )
    report = describe_data(config, ReportOptions())
    [source], [row] = report.sources, report.rows
    assert (source.documents, source.copies) == (22, 1)
    assert source.tokens == sum(len(f"{one['prompt']}{one['completion']}") + 2 for one in [*rows, rows[0]]) + 83
    assert row.left_out == pytest.approx(1 / 22), "longer than a row"
    assert sum(one.count for one in source.refused) == 1
    assert "no 'prompt'" in report_text(report)


def test_chats_without_a_template_are_counted_in_characters(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    config = DataConfig(source=write(tmp_path / "a.jsonl", [{"messages": messages}]), format="chat", sequence_length=64)
    report = describe_data(config, ReportOptions())
    assert (report.unit, report.total.tokens, report.total.lengths.max) == ("characters", None, len("hi\nhello"))
    assert "tokens are not counted: format: chat: the tokenizer has no chat template" in report_text(report)


def test_pictures() -> None:
    report = describe_data(DataConfig(source="digits", format="images", max_documents=50), ReportOptions())
    [source] = report.sources
    assert (source.documents, source.copies, sum(source.classes.values())) == (50, 0, 50)
    assert "near copies and overlaps of pictures are not looked for" in report_text(report)


def test_a_file_of_two_sources_is_read_once(two: DataConfig) -> None:
    twice = two.model_copy(update={"source": [two.source[0], two.source[0]]})
    assert [source.documents for source in describe_data(twice, ReportOptions()).sources] == [12, 0]


def test_what_cannot_be_done_is_refused(two: DataConfig, tmp_path: Path) -> None:
    short = write(tmp_path / "eval.jsonl", [{"text": "too short"}])
    stdlib, images = DataConfig(sequence_length=8), DataConfig(source="digits", format="images")
    for config, options, message in (
        (two, {"against": short}, "none of its 1 examples has 13 words; give a smaller number to --against-words"),
        (two, {"against": short, "against_fields": ("q",)}, "a row cannot be read: no 'q'"),
        (two, {"against": str(tmp_path / "none")}, "--against .*none: source .* does not exist"),
        (two, {"language_field": "language"}, "--language-field language: no row of .*a.jsonl has it"),
        (stdlib, {"language_field": "lang"}, "python-stdlib has no columns"),
        (images, {"against": short}, "are for text, and data.format is images"),
    ):
        with pytest.raises(UserError, match=message):
            describe_data(config, ReportOptions(**options))
