import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from trainfw.data import DataConfig, open_source
from trainfw.errors import UserError


def _config(source: str | list[str], **options: object) -> DataConfig:
    return DataConfig(source=source, sequence_length=8, **options)  # type: ignore[arg-type]


def _read(source: Path | str | list[str], **options: object) -> list[tuple[str, str]]:
    source = str(source) if isinstance(source, Path) else source
    return [tuple(document) for document in open_source(_config(source, **options)).documents()]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes("zwölf\r\n".encode())
    (tmp_path / "a.md").write_text("# A")
    (tmp_path / "sub" / "c.py").write_text("x = 1\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    (tmp_path / ".hidden.txt").write_text("no")
    everything = [("a.md", "# A"), ("b.txt", "zwölf\r\n"), ("sub/c.py", "x = 1\n")]
    assert _read(tmp_path) == everything
    assert _read(tmp_path / "b.txt") == everything[1:2]
    assert _read(f"{tmp_path}/**/*.py") == everything[2:]
    assert _read([f"{tmp_path}/sub", f"{tmp_path}/a.md"]) == [("c.py", "x = 1\n"), everything[0]]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": "", "n": 1}\n{"body": "tw\\u00f6"}')
    assert _read(path, text_field="body") == [("rows.jsonl:1", "one"), ("rows.jsonl:4", "twö")]
    also = path.rename(tmp_path / "rows.ndjson")
    assert _read(also, text_field="body") == [("rows.ndjson:1", "one"), ("rows.ndjson:4", "twö")]


def test_only_a_newline_ends_a_line_of_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["a\u2028b", "c\u0085\x0b\x0cd", "e"]
    path.write_text("\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), newline="")
    assert [text for _, text in _read(path)] == texts


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["one", "two"]}), path)
    assert _read(path) == [("rows.parquet#0", "one"), ("rows.parquet#1", "two")]


def test_saved_dataset(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(tmp_path / "several")
    datasets.DatasetDict(test=one.select([1])).save_to_disk(tmp_path / "untrained")
    assert _read(tmp_path / "one") == [("one#0", "one"), ("one#1", "two")]
    assert _read(tmp_path / "several") == [("several#0", "one"), ("several#1", "two")]
    assert _read(tmp_path / "several" / "test") == [("test#0", "two")]
    with pytest.raises(UserError, match=r"no `train` split; .*\(test\)"):
        _read(tmp_path / "untrained")
    with pytest.raises(UserError, match=r"no column 'txt' .* found: 'text', 'n'; did you mean 'text'\?"):
        _read(tmp_path / "one", text_field="txt")


def test_python_stdlib() -> None:
    documents = dict(_read("python-stdlib"))
    assert "def dataclass(" in documents["dataclasses.py"]
    assert 5e6 < sum(map(len, documents.values())) < 50e6
    assert {"unittest/mock.py", "json/decoder.py"} < set(documents)
    assert not any("/tests/" in name or name.startswith(("test/", "site-packages/", "_sysc")) for name in documents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON \(Expecting value, column \d+\)"),
        ("a.jsonl", b"[1]\n", r"line 1: expected an object with a 'text' key, found list '\[1\]'"),
        ("a.jsonl", b'{"texts": "x", "n": 1}', r"line 1: no key 'text' .* found: 'texts', 'n'; did you mean 'texts'\?"),
        ("a.jsonl", b"{}", r"line 1: no key 'text' .* found: none"),
        ("a.jsonl", b'{"text": null}', "line 1: expected 'text' to be text, found null"),
        ("a.jsonl", b'{"text": 5}', "line 1: expected 'text' to be text, found int '5'"),
        ("a.jsonl", b'\n{"text": "\xff"}', "a.jsonl, line 2: expected UTF-8, found byte 0xff"),
        ("a.jsonl", rb'{"text": "a\ud800"}', "'text' has a lone surrogate at character 1"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', r"line 1: not JSON \(key 'text' is written twice\)"),
        ("a.txt", b"one\ntwo\xe9\n", "a.txt, line 2: expected UTF-8, found byte 0xe9"),
        ("a.parquet", b"PAR0", "not a Parquet file that can be read"),
        ("a.csv", b"x", r"cannot read a \.csv file; one of: \.txt, \.md, \.py, \.jsonl, \.parquet"),
        ("a.jsnl", b"{}", r"cannot read a \.jsnl file; did you mean '\.jsonl'\?"),
        ("data", b"", "cannot read a suffixless file"),
    ],
)
def test_unreadable(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        _read(tmp_path / name)


def test_parquet_rows_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    with pytest.raises(UserError, match=r"a\.parquet, row 1: expected 'text' to be text, found null"):
        _read(path)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(UserError, match=r"does not exist .*; did you mean '.*/corpus\.txt'\?"):
        _read(tmp_path / "corpsu.txt")
    with pytest.raises(UserError, match=r"'python-stdib' does not exist .*; did you mean 'python-stdlib'\?"):
        _read("python-stdib")
    with pytest.raises(UserError, match="matches no file"):
        _read(f"{tmp_path}/*.jsonl")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_text("x")
    with pytest.raises(UserError, match=r"no file that can be read .* found \.png"):
        _read(tmp_path / "sub")
    with pytest.raises(UserError, match="empty list"):
        _read([])
    with pytest.raises(UserError, match=r"python-stdlib is not one of a list; name both in data\.mixture"):
        _read(["python-stdlib", str(tmp_path)])


def test_fingerprint_follows_the_inputs(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x"}))

    def fingerprint(**options: object) -> str:
        return open_source(_config(str(tmp_path), **options)).fingerprint()

    first = fingerprint()
    assert fingerprint() == first != fingerprint(text_field="body")
    os.utime(path, ns=(0, 0))
    assert fingerprint() != first
    second = fingerprint()
    (tmp_path / "b.txt").write_text("new")
    assert fingerprint() != second
