"""Rows are the same from JSONL, Parquet and saved datasets, but for what Arrow cannot hold."""

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from trainfw.data import DataConfig, open_source
from trainfw.data.arrow import NotText
from trainfw.errors import UserError

from .test_chat import make_tokenizer
from .test_examples import encode

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ m.when }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tool(name: str, **properties: object) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", **properties}}}


def _call(name: str, arguments: object) -> dict:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _chat(*messages: dict, tools: list | None = None) -> dict:
    return {"messages": [{"role": "user", "content": "do"}, *messages], **({"tools": tools} if tools else {})}


WEATHER = _tool("weather", properties={"city": {"type": "string", "enum": ["Oslo", None]}}, required=["city"])
ADD = _tool("add", properties={"a": {"type": "integer"}, "b": {"type": "integer"}}, strict=True)
CHATS = [
    _chat(_call("weather", {"city": "Oslo"}), {"role": "tool", "content": "ok"}, tools=[WEATHER, ADD]),
    _chat(_call("add", {"a": 1, "b": [1, None, 2], "c": {"deep": {"x": True}}}), tools=[ADD]),
    _chat(_call("add", {"c": {"deep": {"y": ["z"]}}})),
    _chat({"role": "assistant", "content": "no call", "name": "bot"}),
]


def _read(path: Path) -> list[Any]:
    config = DataConfig(source=str(path), sequence_length=8, format="chat")
    return [row.value for row in open_source(config).rows()]


def _saved(directory: Path, dataset: Any) -> Path:
    dataset.save_to_disk(directory)
    return directory


def test_rows_are_those_of_jsonl(tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    expected = _read(text)
    assert expected == CHATS
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CHATS), tmp_path / "a.parquet")
    for path in (tmp_path / "a.parquet", _saved(tmp_path / "a", datasets.Dataset.from_list(CHATS))):
        rows = _read(path)
        assert [{"tools": None, **row} for row in expected] == [{"tools": None, **row} for row in rows]
        # Every key in its place, since a template writes them in order.
        assert [json.dumps(row["messages"]) for row in rows] == [json.dumps(row["messages"]) for row in expected]
    shuffled = _saved(tmp_path / "b", datasets.Dataset.from_list(CHATS).select([3, 1]))  # by indices, not by copies
    assert [row["messages"] for row in _read(shuffled)] == [CHATS[3]["messages"], CHATS[1]["messages"]]


def test_what_is_json_or_a_map_in_arrow_keeps_its_nulls(tmp_path: Path) -> None:
    rows = [_chat(_call("f", {"city": None, "n": [1]})), _chat(_call("f", {"n": "x"}))]
    json_rows = datasets.Features({"messages": datasets.List(datasets.Json())})
    dataset = datasets.Dataset.from_list(rows, features=json_rows)
    dataset.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "a.parquet", _saved(tmp_path / "a", dataset)):
        assert [row["messages"] for row in _read(path)] == [row["messages"] for row in rows]

    arguments = pyarrow.map_(pyarrow.string(), pyarrow.string())
    message = pyarrow.struct({"role": pyarrow.string(), "arguments": arguments, "text": pyarrow.string()})
    maps = [{"role": "user", "arguments": {"a": "x", "b": None}}, {"role": "user", "arguments": {}}]
    table = pyarrow.table({"messages": pyarrow.array([maps], pyarrow.list_(message))})
    pyarrow.parquet.write_table(table, tmp_path / "map.parquet")
    assert _read(tmp_path / "map.parquet") == [{"messages": maps}]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (datetime.datetime(2026, 1, 2), "timestamp[us]"),
        (datetime.date(2026, 1, 2), "date32[day]"),
        (decimal.Decimal("1.5"), "decimal128(2, 1)"),
        (b"picture", "binary"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_has_no_form_for_is_not_written(tmp_path: Path, value: Any, kind: str) -> None:
    said = {"role": "assistant", "content": "hi"}
    tokenizer = make_tokenizer(tmp_path / "t", TEMPLATE)
    path = tmp_path / "a.parquet"
    rows = [
        _chat({**said, "when": value}),
        _chat(said),
        _chat(_call("f", {"when": value})),
        _chat({**said, "seen": value}),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = _read(path)
    assert isinstance(read[0]["messages"][1]["when"], NotText)
    examples, refused = encode(read, tokenizer)
    assert len(examples) == 2  # where the template does not write it, it does no harm
    assert any(f"the chat template refuses it: {kind} is not text" in reason for reason in refused)
    assert any("is not JSON serializable" in reason for reason in refused)

    pyarrow.parquet.write_table(pyarrow.table({"text": [value]}), path)
    with pytest.raises(UserError) as problem:
        list(open_source(DataConfig(source=str(path), sequence_length=8)).documents())
    assert str(problem.value) == f"{path}, row 0: expected 'text' to be text, found {kind}"
