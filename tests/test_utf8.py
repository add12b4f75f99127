"""A byte-order mark is no text, in any file that others wrote."""

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from trainfw.data import ChatTemplate, DataConfig, load_tokenizer, open_source
from trainfw.errors import UserError
from trainfw.formats import tokenizer_metadata
from trainfw.interop import read_model_config
from trainfw.recipe import load_recipe

TEMPLATE = "{% for m in messages %}{{ m.content }}\r\n{% endfor %}"
CONFIG = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
RECIPE = "name: x\nmodel: {preset: tiny}\ndata: {sequence_length: 8}\ntrain: {steps: 1, global_batch_size: 1}\n"


def _documents(path: Path) -> Any:
    return list(open_source(DataConfig(source=str(path), sequence_length=8)).documents())


def _rows(path: Path) -> Any:
    return list(open_source(DataConfig(source=str(path), sequence_length=8, format="prompt_completion")).rows())


def _tokenizer(directory: Path) -> Any:
    tokenizer = load_tokenizer(directory)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    rendered = template.render([{"role": "user", "content": "hi"}])
    return tokenizer.fingerprint(), tokenizer.settings, rendered, tokenizer_metadata(directory, 300)


def _model(directory: Path) -> Any:
    return read_model_config(directory)


def _recipe(path: Path) -> Any:
    return load_recipe(path).model_dump()


ROWS = '{"text": "one", "prompt": "p", "completion": "c"}\r\n'
FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a.txt": ("Some text\r\nof two lines", _documents),
    "a.md": ("# Some text", _documents),
    "a.py": ("x = 1", _documents),
    "a.jsonl": (2 * ROWS, _documents),
    "list.json": (f"[{ROWS},{ROWS}]", _documents),
    "lines.json": (2 * ROWS, _documents),
    "rows.jsonl": (2 * ROWS, _rows),
    "rows.json": (f"[{ROWS},{ROWS}]", _rows),
    "tokenizer/tokenizer.json": ("", _tokenizer),
    "tokenizer/tokenizer_config.json": (json.dumps({"eos_token": "<|eos|>"}), _tokenizer),
    "tokenizer/special_tokens_map.json": (json.dumps({"bos_token": "<|bos|>"}), _tokenizer),
    "tokenizer/chat_template.jinja": (TEMPLATE, _tokenizer),
    "model/config.json": (json.dumps(CONFIG), _model),
    "recipe.yaml": (RECIPE, _recipe),
}


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<|bos|>", "<|eos|>"], show_progress=False)
    tokenizer.train_from_iterator([f"hi {i} and {i * i} are words" for i in range(500)], trainer)
    return tokenizer.to_str()


@pytest.mark.parametrize("name", FILES)
def test_a_mark_changes_nothing(tmp_path: Path, tokenizer_json: str, name: str) -> None:
    path, read = tmp_path / name, FILES[name][1]
    path.parent.mkdir(exist_ok=True)
    for other, (text, _) in FILES.items():
        if other == name or Path(other).parts[0] == Path(name).parts[0]:
            (tmp_path / other).write_bytes((text or tokenizer_json).encode())
    what = path.parent if path.parent != tmp_path else path
    plain, data = read(what), path.read_bytes()
    path.write_bytes(codecs.BOM_UTF8 + data)
    assert read(what) == plain
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes(data.decode().encode(encoding))
        with pytest.raises(UserError, match=encoding.upper()) as problem:
            read(what)
        assert str(path) in str(problem.value)


def test_files_that_were_put_together(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes((codecs.BOM_UTF8 + b'{"text": "x"}\n') * 2 + codecs.BOM_UTF8 + b"\n" + codecs.BOM_UTF8)
    assert [document.text for document in _documents(path)] == ["x", "x"]


def test_utf_16_without_a_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Some text".encode("utf-16-le"))
    with pytest.raises(UserError, match="UTF-16"):
        _documents(path)
    path.write_bytes(b"Some text with one \0 in it")
    assert len(_documents(path)) == 1
