import logging
import re

import numpy as np
import pytest

from tests.data.test_pretokens import tokenizer_of
from trainfw.data import encoding
from trainfw.data.encoding import PieceEncoder
from trainfw.errors import UserError


def test_a_long_document_is_cut_and_the_same(monkeypatch):
    tokenizer = tokenizer_of("trainfw")
    text = "".join(f"def f{i}(x):\n    return x + {i * i}  # été {i}\n\n" for i in range(3000))
    encoder = PieceEncoder(tokenizer)
    monkeypatch.setattr(encoding, "PIECE", 1000)
    pieces = list(encoder.pieces(text, "a"))
    assert len(pieces) > 80
    assert max(map(len, pieces)) < 1100
    ids, counts = encoder.encode(pieces)
    assert ids.tolist() == tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert len(counts) == len(pieces)


def test_what_cannot_be_cut_is_refused(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 100)
    monkeypatch.setattr(encoding, "LONGEST_PIECE", 1000)
    encoder = PieceEncoder(tokenizer_of("GPT-2"))
    text = "a word " + "x" * 2000 + " and more"
    with pytest.raises(UserError, match=r"^file.txt: 2,00\d characters, and there is no space in it; expected 1,000 a"):
        list(encoder.pieces(text, "file.txt"))


def test_words_are_forgotten_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(encoding, "_WORDS", 50)
    tokenizer = tokenizer_of("GPT-4o")
    encoder = PieceEncoder(tokenizer)
    for start in range(0, 400, 40):
        text = " ".join(f"word{number}x" for number in range(start, start + 40))
        assert encoder.encode([text])[0].tolist() == tokenizer.encode(text)
        assert len(encoder._known) <= 50


def test_another_split_is_noticed(monkeypatch, caplog):
    tokenizer = tokenizer_of("GPT-2")
    encoder = PieceEncoder(tokenizer)
    # As if this version of the library split otherwise than the expression says.
    encoder._pretokens = encoder._pretokens._replace(words=re.compile(r"(?s)..|."))
    text = "these words are not two letters long " * 4
    with caplog.at_level(logging.WARNING, "trainfw"):
        pieces = list(encoder.pieces(text, ""))
    assert encoder.encode(pieces)[0].tolist() == tokenizer.encode(text)
    assert "in an unknown way" in caplog.text
    assert not encoder.by_words
