"""JSON files of many values, against Python's own parser of the whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.data import DataConfig, json_values, open_source
from trainfw.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


INDENTS, BLOCKS = st.sampled_from([None, 0, 3]), st.integers(1, 40)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json") / "a.json"


@settings(deadline=None, max_examples=150)
@given(st.lists(JSON, max_size=5), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 40))
def test_a_list_is_read_as_python_reads_it(
    path: Path, values: list, indent: int | None, ascii: bool, block: int
) -> None:
    path.write_text(f"\n {json.dumps(values, indent=indent, ensure_ascii=ascii)}\r\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_BLOCK", block)
        assert [value for *_, value in json_values.json_values(path)] == values


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=4), st.sampled_from([None, 3]), st.integers(1, 40)
)
def test_objects_one_after_another(path: Path, values: list, indent: int | None, block: int) -> None:
    texts = [json.dumps(value, indent=indent) for value in values]
    path.write_text("\n\n".join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_BLOCK", block)
        found = list(json_values.json_values(path))
    assert [value for *_, value in found] == values
    lines = [1 + sum(text.count("\n") + 2 for text in texts[:i]) for i in range(len(texts))]
    assert [place for place, *_ in found] == [f":{line}" for line in lines]


def _documents(path: Path, **options: object) -> list[Any]:
    return list(open_source(DataConfig(source=str(path), sequence_length=8, **options)).documents())  # type: ignore[arg-type]


def test_the_forms_of_a_json_file(path: Path) -> None:
    path.write_text('[{"text": "x", "n": 1},\n {"text": "y"}]')
    assert [tuple(one) for one in _documents(path)] == [("a.json#0", "x"), ("a.json#1", "y")]
    for text in ('{"text": "x"}\n{"text": "y"}\n', '{\n "text": "x"\n}', " [ ] ", ""):
        path.write_text(text)
        assert [one.text for one in _documents(path)] == ["x", "y"][: text.count("text")]
    rows = '[{"prompt": "p", "completion": "c", "n": 1}, 5]'
    path.write_text(rows)
    source = open_source(DataConfig(source=str(path), sequence_length=8, format="prompt_completion"))
    assert [tuple(row) for row in source.rows()] == [("a.json#0", {"prompt": "p", "completion": "c"}), ("a.json#1", 5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "x"},\n]', r"line 2: not JSON \(Expecting value\): \]"),
        ('[{"text": "x"}\n{"text": "y"}]', r"line 2: not JSON: expected ',', found '\{\"text\": \"y\"\}\]'"),
        ('[{"text": "x"},\n{"text": "y', r"line 2: not JSON \(Unterminated string"),
        ('[{"text": "x"}\n', "line 2: not JSON: expected ',', found the end: was it cut short"),
        ('[{"text": "x"}]\n[]', r"line 2: not JSON: something follows the list: \[\]"),
        ('{"text": "x"}\n{"text":\ntru}' + 400 * " ", r"line 3: not JSON \(Expecting value\): tru"),
        ('["x", "y"]', r"row 0 \(line 1\): expected an object with a 'text' key, found str 'x'"),
        ('[{"text": "x"},\n{"texts": "y"}]', r"row 1 \(line 2\): no key 'text'"),
        ("[" * 100_000, "line 1: not JSON"),
        ('[{"text": "x", "n": ' + 5000 * "1" + "}]", "line 1: not JSON"),
    ],
)
def test_what_is_no_json_is_refused_with_its_line(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match=rf"a\.json, {message}"):
        _documents(path)


def test_a_mistake_is_found_before_the_rest_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "_BLOCK", 100)
    monkeypatch.setattr(json_values, "LIMIT", 1000)
    path.write_text('[{"text": "x"},\n{"text": x},' + 2000 * " ")
    with pytest.raises(UserError, match="line 2: not JSON"):
        _documents(path)
    path.write_bytes(b'[{"text": "' + 120 * b"x" + b'"},\n\n{"text": "\xff"}]')
    with pytest.raises(UserError, match=r"a\.json, line 3: expected UTF-8"):
        _documents(path)
