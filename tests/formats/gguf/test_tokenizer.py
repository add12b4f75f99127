import contextlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from tests.gguf_files import SPECIAL, UNICODE, byte_level, sentencepiece, smollm2_file, texts, write_gguf
from tests.llama import Llama
from trainfw.data import byte_tokenizer, load_tokenizer, train_bpe
from trainfw.errors import UserError
from trainfw.formats import Header, huggingface_tokenizer, tokenizer_metadata
from trainfw.formats.gguf.token_types import PRE_TOKENIZERS

TEXTS = texts() + UNICODE


def to_gguf(directory, file, rows=700, arch="llama"):
    metadata = tokenizer_metadata(directory, rows) | {"general.architecture": arch}
    return write_gguf(file, metadata, {"token_embd.weight": ("F32", np.zeros((rows, 32), np.float32))})


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_tokenizers_come_back_as_they_were(pre, tmp_path):
    directory = byte_level(tmp_path / "tokenizer", pre)
    before, after = load_tokenizer(directory), load_tokenizer(to_gguf(directory, tmp_path / "model.gguf"))
    assert before.encode_batch(TEXTS) == after.encode_batch(TEXTS)
    assert all(after.decode(after.encode(text)) == text for text in TEXTS if PRE_TOKENIZERS[pre].normalizer is None)
    assert (after.bos_id, after.eos_id, after.vocab_size) == (before.bos_id, before.eos_id, 700)
    assert after.settings["chat_template"] == before.settings["chat_template"]
    with Llama(tmp_path / "model.gguf", vocab_only=True) as llama:
        assert [llama.tokenize(text) for text in TEXTS if text.isascii()] == [
            after.encode(text) for text in TEXTS if text.isascii()
        ]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
def test_unicode_is_cut_as_llama_cpp_cuts_it(pre, tmp_path):
    file = to_gguf(byte_level(tmp_path / "tokenizer", pre), tmp_path / "model.gguf")
    tokenizer = load_tokenizer(file)
    with Llama(file, vocab_only=True) as llama:
        assert [llama.tokenize(text) for text in UNICODE] == tokenizer.encode_batch(UNICODE)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_sentencepiece_tokenizers_come_back_as_they_were(arch, tmp_path):
    prefix = arch == "llama"
    directory = sentencepiece(tmp_path / "tokenizer", prefix=prefix)
    file = to_gguf(directory, tmp_path / "model.gguf", arch=arch)
    before, after = load_tokenizer(directory), load_tokenizer(file)
    assert before.encode_batch(TEXTS) == after.encode_batch(TEXTS)
    plain = [text for text in TEXTS if text]
    assert [after.decode(ids) for ids in after.encode_batch(plain)] == plain
    with Llama(file, vocab_only=True) as llama:
        assert [llama.tokenize(text) for text in TEXTS] == after.encode_batch(TEXTS)
    # Transformers reads the same file alike, but for texts that start with a space, before which it puts none.
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="model.gguf")
    same = [text for text in TEXTS if text and not text.startswith((" ", "<|"))]
    assert theirs(same, add_special_tokens=False).input_ids == after.encode_batch(same)
    assert theirs("x").input_ids[0] == after.bos_id


def test_what_a_gguf_tokenizer_is_saved_as_transformers_reads(tmp_path):
    file = to_gguf(sentencepiece(tmp_path / "tokenizer", prefix=True), tmp_path / "model.gguf")
    tokenizer = load_tokenizer(file)
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("hello world").input_ids == [tokenizer.bos_id, *tokenizer.encode("hello world")]
    assert load_tokenizer(tmp_path / "saved").fingerprint() == tokenizer.fingerprint()


def test_rows_without_a_token_are_unused_and_too_few_rows_are_refused(tmp_path):
    directory = byte_level(tmp_path, size=600)
    metadata = tokenizer_metadata(directory, 603)
    assert metadata["tokenizer.ggml.tokens"][600:] == ["[PAD600]", "[PAD601]", "[PAD602]"]
    assert metadata["tokenizer.ggml.token_type"][598:] == [1, 1, 5, 5, 5]
    assert [metadata["tokenizer.ggml.token_type"][i] for i in range(len(SPECIAL))] == [3, 3, 3]
    with pytest.raises(UserError, match="has 599 rows"):
        tokenizer_metadata(directory, 599)


@pytest.mark.parametrize(
    ("setting", "template"),
    [
        ([1, {"name": ["x"]}, {"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
        ([{"name": "default", "template": 5}], None),
        ({"default": "d"}, None),
        ("d", "d"),
    ],
)
def test_the_default_of_chat_templates(setting, template, tmp_path):
    directory = byte_level(tmp_path)
    settings = json.loads((directory / "tokenizer_config.json").read_text()) | {"chat_template": setting}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer_metadata(directory, 600).get("tokenizer.chat_template") == template


def test_tokenizers_that_llama_cpp_would_cut_otherwise_are_refused(tmp_path):
    train_bpe(texts(), 400).save(tmp_path / "ours")
    with pytest.raises(UserError, match="no name for how this tokenizer cuts text"):
        tokenizer_metadata(tmp_path / "ours", 400)
    byte_tokenizer().save(tmp_path / "bytes")
    with pytest.raises(UserError, match="without merges"):
        tokenizer_metadata(tmp_path / "bytes", 258)
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    (tmp_path / "unigram").mkdir()
    backend.save(str(tmp_path / "unigram/tokenizer.json"))
    with pytest.raises(UserError, match="a Unigram tokenizer"):
        tokenizer_metadata(tmp_path / "unigram", 2)
    with pytest.raises(UserError, match="a GGUF file holds the model's tokenizer"):
        tokenizer_metadata(tmp_path, 2)


def test_merges_that_a_vocabulary_does_not_imply_are_refused(tmp_path):
    directory = sentencepiece(tmp_path, prefix=True)
    form = json.loads((directory / "tokenizer.json").read_text())
    form["model"]["merges"].pop(5)
    (directory / "tokenizer.json").write_text(json.dumps(form))
    with pytest.raises(UserError, match="not a SentencePiece tokenizer"):
        tokenizer_metadata(directory, 700)


NUMBERED = [f"t{i}" for i in range(200_000)]
RUNS = [letter * (i + 1) for letter in "abcdefgh" for i in range(500)]
HUGE = {
    "a token that comes again at the end": ("gpt2", [*NUMBERED, "t0"], "tokens has 't0' twice"),
    "a token of megabytes": ("gpt2", ["a", "a" * 5_000_000], "..., of 5,000,000 letters: expected 1,000 at most"),
    "a token of megabytes, merged by scores": ("llama", ["a", "a" * 5_000_000], "of 5,000,000 letters: expected 1,000"),
    "many long tokens": ("gpt2", [f"{i:999}" for i in range(9_999)], "has 9,989,001 letters: expected 4,194,304"),
    "too many tokens": ("gpt2", NUMBERED * 3, "has 600,000 tokens: expected 524,288 at most"),
    "tokens that all begin others": ("llama", RUNS, "the tokens imply merges of more than 16,777,216 characters"),
    "none of these": ("llama", NUMBERED, None),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_vocabulary_is_read_or_refused_in_seconds(name):
    model, tokens, message = HUGE[name]
    scores = {"tokenizer.ggml.scores": [0.0] * len(tokens)} if model == "llama" else {"tokenizer.ggml.merges": []}
    metadata = {"general.architecture": "llama", "tokenizer.ggml.model": model, "tokenizer.ggml.tokens": [*tokens]}
    start = time.thread_time()
    with contextlib.nullcontext() if message is None else pytest.raises(UserError) as error:
        huggingface_tokenizer(Header(Path("some.gguf"), metadata | scores, {}))
    assert message is None or message in str(error.value)
    assert time.thread_time() - start < 5


def test_smollm2_is_cut_as_transformers_and_llama_cpp_cut_it():
    file = smollm2_file()
    ours = load_tokenizer(file)
    thousands = texts(4000, "*.py") + UNICODE
    with Llama(file, vocab_only=True) as llama:
        assert [llama.tokenize(text) for text in thousands] == ours.encode_batch(thousands)
    theirs = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    backend = theirs.backend_tokenizer
    backend.encode_special_tokens = True
    without = [text for text in thousands if not any(letter.isnumeric() for letter in text)]
    assert len(without) > 1500

    def encoded(batch):
        return [each.ids for each in backend.encode_batch(batch, add_special_tokens=False)]

    assert encoded(without) == ours.encode_batch(without)
    # Of this file Transformers leaves out that each digit stands alone, as SmolLM2's own tokenizer.json has it.
    steps = [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(False)]
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    assert encoded(thousands) == ours.encode_batch(thousands)
