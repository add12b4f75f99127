"""Trials of tokenizers that others made, in the helper process (`confined.py`) before this process opens them.

A tokenizer's file holds expressions, replacements and tables, and each of these may make the library take forever, fill
the memory, or end its process.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

import tokenizers

from trainfw.confined import UnusableError
from trainfw.data.added_tokens import TokenizerFiles
from trainfw.errors import UserError

MOST_IDS = 2**24
"""Most ids of a vocabulary: the largest that is published has a sixteenth of that."""
_LENGTH = 400
"""Characters of each text that is tried."""
_GROWTH = 64
"""Most tokens that a character may become: Unicode's normal forms make up to 18 characters of one, of 4 bytes each."""
_SEEDS = (*"abA1 '!é好🎉\n\t\0\u0301", "ab", "12", "  a", " \n", "'s", "a ", "a1", "a-")


def try_tokenizer(_: None, text: str, files: TokenizerFiles | None) -> None:
    """Open the text of a tokenizer.json, add what stands beside it, and encode and decode with it.

    Raises UnusableError where the library fails at any of these, UserError for tokens that are described amiss.
    """
    backend = opened(text)
    vocabulary = backend.get_vocab(with_added_tokens=False)
    by_id = {id_: token for token, id_ in vocabulary.items()}
    for token, id_ in vocabulary.items():
        if by_id[id_] != token:  # the library would write only one of them
            raise UnusableError(f"the tokens {token[:60]!r} and {by_id[id_][:60]!r} have one id, {id_}")
    if files is not None:
        files.add_to(backend)
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= MOST_IDS:
        raise UnusableError(f"the tokenizer has the id {largest:,}; expected less than {MOST_IDS:,}")
    backend.no_truncation()
    backend.no_padding()
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    texts = _strings([json.loads(part.__getstate__()) for part in parts if part is not None])
    pieces = sorted({piece for text in texts for piece in (text[:20], *re.findall(r"\w", text))})
    # Repetitions of a short text, alone and with another end: expressions are slowest at these, and one is tried only
    # where a text has all characters that it asks for.
    end = "!" + "".join(piece for piece in pieces if len(piece) == 1)[:100] + "1a \n"
    repeated = [(seed * _LENGTH)[:_LENGTH] for seed in (*_SEEDS, *pieces[:200]) if seed]
    for probe in (text + after for text in repeated for after in ("", "!", end)):
        for special in (True, False):
            backend.encode_special_tokens = special
            with guarded(f"the tokenizer fails at {probe[:20]!r} and so on"):
                try:
                    ids = backend.encode(probe).ids
                    backend.decode(ids)
                except Exception:  # a word that it has no token for, which is said where a text holds it
                    continue
            if len(ids) > _GROWTH * (len(probe) + 16):
                raise UnusableError(f"the tokenizer makes {len(ids):,} tokens of {len(probe):,} characters")
    with guarded("the tokenizer fails to decode its tokens"):
        backend.decode(list(range(min(largest + 1, 1000))))


def opened(text: str) -> tokenizers.Tokenizer:
    """Open the tokenizer in the text of a tokenizer.json. Raises UnusableError where there is none."""
    with guarded("not a tokenizer.json that can be read"):
        return tokenizers.Tokenizer.from_str(text)


@contextlib.contextmanager
def guarded(problem: str) -> Iterator[None]:
    """Raise UnusableError, which begins with `problem`, where the library fails or panics inside."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, UserError):
        raise
    except BaseException as error:  # the library raises bare Exception, and panics, which are no Exception
        raise UnusableError(f"{problem}: {' '.join(str(error)[:200].split())}") from error


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
