import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trainfw.data import TextStream, Tokenizer, TokenizerConfig, byte_tokenizer, load_tokenizer, train_bpe, vocab_size
from trainfw.errors import UserError

TEXTS = [f"def f{i}(x):\n    return x + {i * i * 37} {i * 'ab'[i % 2]}  # naïve café, 东京, 🚀\n" for i in range(300)]
BYTES, BPE = byte_tokenizer(), train_bpe(TEXTS, 400)
TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])

# Any text, and text dense in what tokenizers stumble over.
texts = st.text() | st.lists(st.sampled_from([*"<|>s \n\t09é京🚀", "eos", "bos", "<|eos|>", "  ", "\r\n"])).map("".join)


@TOKENIZERS
@given(text=texts)
@settings(deadline=None)
def test_lossless(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids), "a text cannot forge a special token"
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


@given(text=texts)
@settings(deadline=None)
def test_bytes_are_their_own_ids(text: str) -> None:
    assert BYTES.encode(text) == list(text.encode())


@TOKENIZERS
@given(data=st.data())
@settings(deadline=None)
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1))
    ids = data.draw(any_ids | texts.map(tokenizer.encode))
    stream = TextStream(tokenizer)
    parts = [stream.push(id_) for id_ in ids]
    assert not any(part.endswith("\ufffd") for part in parts), "an incomplete character was shown"
    assert "".join(parts) + stream.flush() == tokenizer.decode(ids)


def test_streaming_shows_text_at_once() -> None:
    stream = TextStream(BYTES)
    assert [stream.push(byte) for byte in "aé🚀".encode()] == ["a", "", "é", "", "", "", "🚀"]


def test_sizes_are_known_beforehand() -> None:
    assert BYTES.vocab_size == vocab_size(TokenizerConfig()) == 258
    assert BPE.vocab_size == vocab_size(TokenizerConfig(name="bpe", vocab_size=400)) == 400


def test_bpe_is_deterministic_and_shortens() -> None:
    assert train_bpe(TEXTS, 400).fingerprint() == BPE.fingerprint() != train_bpe(TEXTS, 401).fingerprint()
    assert len(BPE.encode(TEXTS[0])) < len(BYTES.encode(TEXTS[0])) / 2


def test_bpe_refuses_too_little_text() -> None:
    with pytest.raises(UserError, match=r"vocab_size = 5000: .* it gives 26\d tokens at most"):
        train_bpe(["abc abc"], 5000)


@TOKENIZERS
def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.encode("a<|eos|>b") == tokenizer.encode("a<|eos|>b")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert theirs("def f(x): 12345", add_special_tokens=False)["input_ids"] == tokenizer.encode("def f(x): 12345")


def _write(directory: Path, special: list[str], **siblings: dict) -> Path:
    backend = json.loads(BPE.backend.to_str())
    for old, new in zip(("<|bos|>", "<|eos|>"), special):
        next(token for token in backend["added_tokens"] if token["content"] == old)["content"] = new
        backend["model"]["vocab"][new] = backend["model"]["vocab"].pop(old)
    backend["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (directory / "tokenizer.json").write_text(json.dumps(backend))
    for name, value in siblings.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def test_special_tokens_of_a_file(tmp_path: Path) -> None:
    assert load_tokenizer(_write(tmp_path, ["<s>", "</s>"])).eos_id == BPE.eos_id
    tokenizer = load_tokenizer(_write(tmp_path, ["[A]", "<|im_end|>"]))
    assert tokenizer.bos_id == tokenizer.eos_id == BPE.eos_id, "no bos: eos stands between documents"
    assert len(tokenizer.encode("a b c d e f g h")) > 4, "a file's truncation does not apply"
    _write(tmp_path, ["[A]", "[B]"], special_tokens_map={"eos_token": {"content": "[A]"}})
    assert load_tokenizer(tmp_path).eos_id == BPE.bos_id
    config = {"eos_token": "[B]", "bos_token": "[A]", "chat_template": "hello"}
    tokenizer = load_tokenizer(_write(tmp_path, ["[A]", "[B]"], tokenizer_config=config))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (BPE.bos_id, BPE.eos_id)
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").settings["chat_template"] == "hello"


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer at .*: expected a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json that can be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no token that ends a document; name it as eos_token in"):
        load_tokenizer(_write(tmp_path, ["[A]", "[B]"]))
