import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainfw.data import (
    ChatTemplate,
    TextStream,
    Tokenizer,
    TokenizerConfig,
    byte_tokenizer,
    load_tokenizer,
    train_bpe,
    vocab_size,
)
from trainfw.errors import UserError
from trainfw.weights import PromptForm

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


@TOKENIZERS
def test_texts_that_start_with_bos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As documents do in training, in Transformers too."""
    assert tokenizer.prefix_ids == []
    starting = tokenizer.starting_texts()
    starting.save(tmp_path)
    assert load_tokenizer(tmp_path).prefix_ids == [tokenizer.bos_id]
    assert AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"] == [tokenizer.bos_id, *tokenizer.encode("a b")]
    assert starting.fingerprint() == tokenizer.fingerprint()
    assert starting.encode("a b") == tokenizer.encode("a b")
    for form, ids in ((PromptForm(), []), (PromptForm(starts=True), [tokenizer.bos_id])):
        assert form.encode(tokenizer, "a b") == [*ids, *tokenizer.encode("a b")]
    assert PromptForm().encode(starting, "a") == [tokenizer.bos_id, *tokenizer.encode("a")]
    assert PromptForm().encode(tokenizer, "") == [tokenizer.bos_id], "a model cannot go on from nothing"


@pytest.mark.parametrize("name", ["a:b", "$A", "$0", "<s>:1", "naïve 日本"])
def test_a_bos_of_any_name_starts_texts(name: str, tmp_path: Path) -> None:
    _write(tmp_path, [name, "</s>"], tokenizer_config={"bos_token": name, "eos_token": "</s>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.starting_texts().prefix_ids == [BPE.bos_id]
    assert tokenizer.starting_texts().encode("a b") == BPE.encode("a b")


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
    (tmp_path / "special_tokens_map.json").unlink()
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
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="is a pointer of Git LFS"):
        load_tokenizer(tmp_path)
    panics = json.loads(BPE.backend.to_str())
    panics["model"]["continuing_subword_prefix"] = "##"
    (tmp_path / "tokenizer.json").write_text(json.dumps(panics))
    with pytest.raises(UserError, match=r"not a tokenizer\.json that can be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no token that ends a document; name it as eos_token in"):
        load_tokenizer(_write(tmp_path, ["[A]", "[B]"]))


# --- Against Transformers, whatever file a token is in ------------------------------------------------------------


def _flags(content: str, **flags: bool) -> dict:
    return (
        {"content": content}
        | dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
        | flags
    )


DIRECTORIES: dict[str, dict[str, dict]] = {
    "tokenizer.json alone": {},
    "roles": {
        "tokenizer_config": {"bos_token": "<s>", "pad_token": "<pad>", "image_token": "<image>", "sep_token": None}
    },
    "roles with flags": {"tokenizer_config": {"pad_token": {"__type": "AddedToken", **_flags("<pad>", lstrip=True)}}},
    "decoder": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "403": _flags("<im_end>"),
                "402": _flags("<im_start>", special=True, rstrip=True),
                "1": _flags("<|eos|>", special=True),
            },
            "additional_special_tokens": ["<im_start>", "<extra>"],
        },
        "special_tokens_map": {"eos_token": "<im_start>", "additional_special_tokens": ["<unseen>"]},
        "added_tokens": {"<unseen>": 400},
    },
    "other flags": {
        "tokenizer_config": {
            "added_tokens_decoder": {"402": _flags("  ", special=True), "403": _flags("naïve", single_word=True)}
        }
    },
    "map": {
        "tokenizer_config": {"eos_token": "<|eos|>", "additional_special_tokens": ["<a>", "<|bos|>"]},
        "special_tokens_map": {"eos_token": _flags("</s>", lstrip=True), "additional_special_tokens": ["<b>"]},
    },
    "extra": {
        "tokenizer_config": {"extra_special_tokens": {"boi_token": "<boi>"}, "additional_special_tokens": ["<a>"]}
    },
    "extra list": {
        "tokenizer_config": {"extra_special_tokens": ["<a>"]},
        "special_tokens_map": {"extra_special_tokens": [{"content": "<b>", "rstrip": True}, "<a>"]},
    },
    "two roles": {
        "tokenizer_config": {
            "extra_special_tokens": {"boi_token": "<boi>", "image_token": "<a>"},
            "additional_special_tokens": ["<extra>"],
            "image_token": "<image>",
            "pad_token": {"__type": "AddedToken", **_flags("<boi>", lstrip=True)},
        },
        "special_tokens_map": {"additional_special_tokens": ["<b>"], "unk_token": _flags("<a>", rstrip=True)},
        "added_tokens": {"<boi>": 402, "<a>": 403},
    },
    "added": {
        "tokenizer_config": {"additional_special_tokens": ["<im_start>"]},
        "added_tokens": {"<im_end>": 403, "<im_start>": 402},
    },
}
"""Files beside a tokenizer.json that has `<|bos|>`, `<|eos|>` and two tokens of its own, 400 and 401."""

_PIECES = [
    *("<s>", "</s>", "<pad>", "<image>", "<im_start>", "<im_end>", "<extra>", "<unseen>", "<a>", "<b>", "<boi>"),
    *("<|bos|>", "<|eos|>", "<own>", "<tool>", "naïve", "<im_", "start>", " ", "  ", "\n", "a", "<", "é", "def f(x):"),
]


@pytest.fixture(scope="module", params=DIRECTORIES)
def directory(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    BPE.save(path)
    (path / "tokenizer_config.json").unlink()
    backend = BPE.backend.from_str(BPE.backend.to_str())
    backend.add_tokens([AddedToken("<own>", special=True), AddedToken("<tool>", normalized=False)])
    backend.save(str(path / "tokenizer.json"))
    for name, value in DIRECTORIES[request.param].items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def test_tokens_are_those_of_transformers(directory: Path, tmp_path: Path) -> None:
    """Of every text: markers as such, as chat templates are read, and special tokens as text, as documents are."""
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(directory), load_tokenizer(directory)
    ours.save(tmp_path)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    as_markers = ChatTemplate(ours, "").encode

    @given(text=st.lists(st.sampled_from(_PIECES)).map("".join) | st.text(max_size=8))
    @settings(deadline=None, max_examples=60)
    def check(text: str) -> None:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert as_markers([text])[0].ids == expected
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
        assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert saved(text, add_special_tokens=False)["input_ids"] == expected

    check()
    assert ours.vocab_size == len(theirs)
    if theirs.eos_token_id is not None:
        assert ours.eos_id == theirs.eos_token_id


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<x>": 500}}, r"'<x>' is to have the id 500, but its place is 400"),
        ({"added_tokens": {"<x>": "500"}}, r"added_tokens.json: '<x>' = '500': expected its id"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"402": 3}}},
            "added_tokens_decoder: '3': expected a token",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": ["<x>"]}}, "expected an object of tokens by their ids"),
        ({"tokenizer_config": {"pad_token": {"content": "x", "strip": True}}}, "pad_token: .*: expected a token's te"),
        ({"tokenizer_config": {"additional_special_tokens": "<x>"}}, "expected a list of tokens"),
    ],
)
def test_added_tokens_that_are_not_understood(tmp_path: Path, files: dict, message: str) -> None:
    BPE.save(tmp_path)
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    if "added_tokens" in files:
        (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_the_bytes_of_tokens_alone():
    tokenizer = byte_tokenizer()
    assert [tokenizer.token_bytes(i) for i in (65, 0xC3, 256, 999)] == [b"A", b"\xc3", b"<|bos|>", b""]
    vocabulary = {"<unk>": 0, "▁a": 1, "<0xE2>": 2, "é": 3}
    pieces = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    found = Tokenizer(pieces, bos_id=0, eos_id=0)
    assert [found.token_bytes(i) for i in (1, 2, 3)] == [b" a", b"\xe2", "é".encode()]
