"""Every key that we read of a stranger's config, with every value that could do harm: a result, or a sentence."""

import json
import math
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.formats.gguf.test_header import METADATA, SHAPES
from tests.gguf_files import string
from trainfw.errors import UserError
from trainfw.formats import huggingface_tokenizer, read_header
from trainfw.interop import config_from_huggingface, config_to_huggingface, gguf_config, peft_fields
from trainfw.interop.configs import _EXPECTED, unread_keys
from trainfw.interop.families import FAMILIES
from trainfw.interop.peft_config import _READ
from trainfw.json_text import read_json

VALUES = [
    *("null", "true", "false", "0", "-0", "-0.0", "-1", "2147483648", "1" + "0" * 400, "1" + "0" * 5000),
    *("1e400", "1e308", "1e40", "1e-40", "1e-320", "1e-400", "0.5", "5.0", "NaN", "-Infinity"),
    *('""', '"5"', r'"\ud800"', r'"\u001b[2J"', "[]", "[1]", "[null]", "{}", '{"a": 1}', '["full_attention", []]'),
    *("[" * 900 + "]" * 900, '{"full_attention":' * 900 + "1" + "}" * 900, '{"a": 1, "a": 1}'),
    *('{"factor": 1e40}', '{"rope_type": null}', '{"full_attention": {"rope_theta": -1}}', '{"": ""}'),
]
CONFIG = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "head_dim": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}


def said_or_done(file: Path, content: str | bytes, read: Callable[[], object]) -> None:
    """Read it: in seconds, and what is refused is refused in a short sentence that a terminal can show."""
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    start, message = time.thread_time(), ""
    try:
        read()
    except UserError as error:
        message = str(error)
    assert len(message) < 700, message
    assert message.replace("\n", "").isprintable(), message
    assert time.thread_time() - start < 5, content[:80]


def with_value(config: dict, key: str, value: str) -> str:
    rest = json.dumps({name: each for name, each in config.items() if name != key})
    return f'{rest[:-1]}, "{key}": {value}}}'


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json(family, tmp_path):
    file = tmp_path / "config.json"

    def read() -> None:
        found = read_json(file)
        config = config_from_huggingface(found)
        assert all(str(key).isprintable() for key in unread_keys(found))
        (tmp_path / "out").write_text(json.dumps(config_to_huggingface(config, extra=found)))

    for key in [*_EXPECTED, "quantization_config", "eos_token_id", "an unknown key"]:
        for value in VALUES:
            said_or_done(file, with_value(CONFIG | {"model_type": family}, key, value), read)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('"query_pre_attn_scalar": 1' + "0" * 400, "query_pre_attn_scalar = 1000"),
        ('"hidden_activation": null', "hidden_activation = null: expected text, such as 'gelu_pytorch_tanh'"),
        ('"rope_theta": 1e40', "rope_theta = 1e+40: expected a number from 1e-30 to 1e+30"),
        ('"rms_norm_eps": 1e-60', "rms_norm_eps = 1e-60: expected a number from 1e-30 to 1e+30"),
        ('"id2label": ' + "[" * 70 + "]" * 70, "nested too deeply"),
        (r'"architectures": ["\ud800"]', "half of a surrogate pair"),
        ('"vocab_size": 2147483648', "vocab_size = 2147483648: expected a whole number of 1 or more, below 2**31"),
    ],
)
def test_numbers_that_no_program_holds_are_named(tmp_path, change, message):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG | {"model_type": "gemma2"})[:-1] + f", {change}}}")
    file.write_text(file.read_text().replace('"vocab_size": 96, ', "" if "vocab" in change else '"vocab_size": 96, '))
    with pytest.raises(UserError) as error:
        config_from_huggingface(read_json(file))
    assert message in str(error.value)


def test_adapter_config_json(tmp_path):
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": True}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    arrays = {name.format("A"): np.ones((4, 8), np.float32), name.format("B"): np.ones((8, 4), np.float32)}
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    file = tmp_path / "adapter_config.json"
    patterns = ["(a+)+$", "(?i)a", r"(.)\1", "a{9999999999}", "(" * 2000 + ")" * 2000, "[" * 99, "a|" * 99_999, "("]
    nested = [f"{{{json.dumps(pattern)}: 4}}" for pattern in ("(((a?){400}){400}){400}", "^(.|q)*x", *patterns)]
    for key in (*_READ, "bias", "layers_to_transform", "an unknown key"):
        for value in [*VALUES, *map(json.dumps, patterns), *nested]:
            said_or_done(file, with_value(adapter, key, value), lambda: peft_fields(tmp_path))


def gguf_of(metadata: dict) -> bytes:
    """A file whose tensors are zeros, with metadata of any type."""

    def typed(value: object) -> bytes:
        if isinstance(value, list):
            items = [typed(each) for each in value]
            return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
        if isinstance(value, str):
            return struct.pack("<I", 8) + string(value.encode())
        number, code = {bool: (7, "?"), int: (11, "q"), float: (12, "d")}[type(value)]
        return struct.pack(f"<I{code}", number, value)

    data = b"GGUF" + struct.pack("<IQQ", 3, len(SHAPES), len(metadata))
    data += b"".join(string(key.encode()) + typed(value) for key, value in metadata.items())
    offset = 0
    for name, shape in SHAPES.items():
        data += string(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 0, offset)
        offset += 4 * math.prod(shape)
    return data + bytes(-len(data) % 32 + offset)


def test_gguf_metadata(tmp_path):
    """Every key with a value of every type that the format has."""
    file = tmp_path / "some.gguf"
    values = [True, 0, -1, 2**31, 2**63 - 1, 1e40, 1e-45, math.nan, "", "\x1b[2J", "a" * 99_999, [1], ["a"], [0.5]]

    def read() -> None:
        config_from_huggingface(gguf_config(file))
        huggingface_tokenizer(read_header(file))

    for key in (*METADATA, "llama.rope.scaling.factor", "llama.expert_count", "split.count", "general.alignment"):
        for value in values:
            said_or_done(file, gguf_of(METADATA | {key: value}), read)
