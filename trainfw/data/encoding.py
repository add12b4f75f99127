"""Encoding of much text: pieces of documents to arrays of ids, each different word only once."""

from __future__ import annotations

import itertools
import logging
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from trainfw.data.pretokens import pretokens_of
from trainfw.data.store import ids_dtype
from trainfw.data.tokenizer import Tokenizer
from trainfw.errors import UserError

PIECE = 2**18
"""Characters after which a document is cut at the next place where it may be."""
LONGEST_PIECE = 2**27
"""Most characters of a piece, for which the library takes some hundred bytes each."""
_WORDS, _CHARACTERS = 2**18, 2**23
"""Words, and characters of words, that are remembered."""
_TRIED = 2**15
"""Characters of the first text that are encoded both ways."""


class PieceEncoder:
    """Encoder of pieces of text to what `Tokenizer.encode` gives for each.

    Words are remembered with their ids, as nine of ten occur again, and looking one up takes a tenth of the time of
    encoding it. Words that a text has for the first time are encoded by the tokenizer itself. So is all text where the
    tokenizer's words are not known.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.dtype = tokenizer, ids_dtype(tokenizer.vocab_size)
        self._pretokens = pretokens_of(tokenizer.backend)
        self._tried = False
        self._characters = 0
        self._ids: np.ndarray
        self._starts: np.ndarray
        self._lengths: np.ndarray
        self._forget()

    @property
    def by_words(self) -> bool:
        return self._pretokens is not None and self._pretokens.words is not None

    def pieces(self, text: str, where: str) -> Iterator[str]:
        """Yield the pieces of a document. Raises UserError for one that is too long."""
        if not self._tried:
            self._try(text[:_TRIED])
        start = 0
        while start < len(text):
            end = len(text)
            if self._pretokens is not None and len(text) - start > PIECE:
                found = self._pretokens.cut.search(text, start + PIECE)
                end = found.start() if found else end
            if end - start > LONGEST_PIECE:
                why = "this tokenizer needs a text as a whole" if self._pretokens is None else "there is no space in it"
                raise UserError(f"{where}: {end - start:,} characters, and {why}; expected {LONGEST_PIECE:,} at most")
            yield text if (start, end) == (0, len(text)) else text[start:end]
            start = end

    def _try(self, text: str) -> None:
        """Encode a text both ways, and give the faster one up where they differ: another version of the library."""
        self._tried = True
        if self._pretokens is None:
            return
        found = self._pretokens.cut.search(text, len(text) // 2)
        middle = found.start() if found else len(text)
        ids, _ = self.encode([text[:middle], text[middle:]])
        if ids.tolist() != self.tokenizer.encode(text):
            logging.getLogger("trainfw").warning("the tokenizer splits text in an unknown way: encoding takes longer")
            self._pretokens = None

    def encode(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all pieces, (n,), and how many each of them has, (pieces,)."""
        if self._pretokens is None:
            lists = self.tokenizer.encode_batch(pieces)
            return self._joined(lists), np.array([len(ids) for ids in lists], np.int64)
        return self._encode_words(pieces) if self._pretokens.words else self._encode_bytes(pieces)

    def _encode_bytes(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        data = [piece.encode() for piece in pieces]
        ids = np.frombuffer(b"".join(data), np.uint8).astype(self.dtype)
        return ids, np.array([len(one) for one in data], np.int64)

    def _encode_words(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        words: list[str] = []
        ends = []
        for piece in pieces:
            words += self._words_of(piece)
            ends.append(len(words))
        ids, lengths = self._looked_up(words)
        token_ends = np.concatenate([[0], np.cumsum(lengths)])[[0, *ends]]
        return ids, np.diff(token_ends)

    def _words_of(self, piece: str) -> list[str]:
        assert self._pretokens is not None and self._pretokens.words is not None  # noqa: PT018
        whole = self._pretokens.whole
        # NFC makes ASCII of a few other letters, such as the sign of kelvins.
        if whole is not None and whole.search(piece if piece.isascii() else unicodedata.normalize("NFC", piece)):
            return [piece]
        words = self._pretokens.words.findall(piece)
        return words if "".join(words) == piece else [piece]

    def _looked_up(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all words, and how many each has."""
        before = len(self._known)
        places = np.fromiter(map(self._known.__getitem__, words), np.int64, len(words))
        if count := len(self._known) - before:
            new = list(itertools.islice(reversed(self._known), count))[::-1]
            lists = self.tokenizer.encode_batch(new)
            lengths = np.array([len(ids) for ids in lists], np.int64)
            self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(lengths) - lengths])
            self._lengths = np.concatenate([self._lengths, lengths])
            self._ids = np.concatenate([self._ids, self._joined(lists)])
            self._characters += sum(map(len, new))
        lengths = self._lengths[places]
        ends = np.cumsum(lengths)
        # The place of each id: its word's first, and its number within the word.
        first = np.repeat(self._starts[places] - (ends - lengths), lengths)
        ids = self._ids[first + np.arange(len(first))]
        if len(self._known) > _WORDS or self._characters > _CHARACTERS:
            self._forget()
        return ids, lengths

    def _forget(self) -> None:
        self._known, self._characters = _Numbers(), 0
        self._ids = np.empty(0, self.dtype)
        self._starts = self._lengths = np.empty(0, np.int64)

    def _joined(self, lists: Sequence[Sequence[int]]) -> np.ndarray:
        return np.fromiter(itertools.chain.from_iterable(lists), self.dtype, sum(map(len, lists)))


class _Numbers(dict[str, int]):
    """Numbers of words in the order of their first use."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number
