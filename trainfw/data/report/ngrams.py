"""Words in a row as numbers: what near duplicates and overlaps are found by."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence

import numpy as np

# Thai and Lao, Burmese, Khmer, Japanese and Chinese: written without spaces, so that each sign counts as a word.
_SIGNS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_SIGNS}]|[^\\W{_SIGNS}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_WORDS_KEPT = 2**18


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; of scripts without spaces, the signs."""
    return _WORD.findall(text.lower())


def ngrams(words: Sequence[str], size: int) -> np.ndarray:
    """Return a hash of each `size` words in a row, in order: u64, (len(words) - size + 1,); none of fewer words.

    Hashes of 64 bits: among ten million n-grams, two that differ have the same one with a chance of one to 400,000.
    """
    count = len(words) - size + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    numbers = np.fromiter(map(_number, words), np.uint64, len(words))
    hashes = np.zeros(count, np.uint64)
    for place in range(size):
        hashes = hashes * _FACTOR + numbers[place : place + count]  # wraps around, as is meant
    return hashes


def ngram_set(text: str, size: int) -> np.ndarray:
    """Return the hashes of a text's n-grams, each once and sorted; of a shorter text, that of all its words."""
    words = words_of(text)
    return np.unique(ngrams(words, min(size, len(words)))) if words else np.zeros(0, np.uint64)


@functools.lru_cache(_WORDS_KEPT)
def _number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest())
