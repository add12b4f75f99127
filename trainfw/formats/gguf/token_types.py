"""Names that GGUF has for parts of tokenizers, and their full form in tokenizer.json: tables for both directions."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainfw.errors import UserError

Kind = enum.IntEnum("Kind", "NORMAL UNKNOWN CONTROL USER_DEFINED UNUSED BYTE")
"""Values of `tokenizer.ggml.token_type`."""

SPACE = "▁"
"""Letter that SentencePiece writes for a space."""

ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Keys of tokenizer_config.json, and the keys of `tokenizer.ggml` that give the same token by its id."""

STOPS = ("eot_token_id", "eom_token_id")
"""Keys of `tokenizer.ggml` that name further tokens at which generation stops: the end of a turn, and of a message that
calls a tool (llama.cpp, src/llama-vocab.cpp: `special_eog_ids`)."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST


def _byte_level(*, regex: bool) -> dict[str, object]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _splits(*patterns: str) -> dict[str, object]:
    """Return the pre-tokenizer that cuts a text at the matches of each pattern in turn, and then into bytes."""
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*steps, _byte_level(regex=False)]}


@dataclass(frozen=True)
class PreTokenizer:
    """A way to cut text before a byte-level tokenizer merges bytes."""

    form: Mapping[str, Any]
    """`pre_tokenizer` of tokenizer.json."""
    normalizer: str | None = None
    """Unicode form that published tokenizers of this kind convert text to first; llama.cpp does not."""
    ignore_merges: bool = False
    """Flag: a piece that is a token is taken whole, and not merged from bytes."""


_DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(_byte_level(regex=True)),
    "smollm": PreTokenizer({"type": "Sequence", "pretokenizers": [_DIGITS, _byte_level(regex=True)]}),
    "llama-bpe": PreTokenizer(_splits(_LLAMA3), ignore_merges=True),
    "qwen2": PreTokenizer(_splits(_QWEN2), "NFC"),
    "olmo": PreTokenizer(_byte_level(regex=True), "NFC"),
    # llama.cpp's own, for files that name none: the cuts of several models, one after the other.
    "default": PreTokenizer(_splits(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
"""Pre-tokenizers by `tokenizer.ggml.pre`; patterns as in llama.cpp's src/llama-vocab.cpp and in published files."""
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
"""Other names of some pre-tokenizers."""


def canonical(form: Mapping[str, Any] | None) -> tuple[Any, ...]:
    """Return a pre-tokenizer's steps in one spelling: two that cut alike are equal, however they are written."""
    match form:
        case None:
            return ()
        case {"type": "Sequence", "pretokenizers": [*steps]}:
            return tuple(itertools.chain.from_iterable(canonical(step) for step in steps))
        case {"type": "ByteLevel"}:
            return (("ByteLevel", form.get("add_prefix_space", True), form.get("use_regex", True)),)
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": behavior}:
            # llama.cpp and some published files write (?i:...) out in full.
            for spelling in (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", r"'(?i:[sdmt]|ll|ve|re)"):
                pattern = pattern.replace(spelling, _ENGLISH)
            return (("Split", pattern, behavior, form.get("invert", False)),)
    return (tuple(sorted((key, repr(value)) for key, value in form.items())),)


MAX_IMPLIED, _MARKS = 1 << 24, 12
"""Most characters of tokenizer.json for the merges that a vocabulary implies, and the characters around each merge.
Gemma's 262,144 tokens imply about 600,000 merges."""


def implied_merges(
    ids: Mapping[str, int], ranks: Mapping[str, float], where: object = "tokenizer"
) -> list[tuple[str, str]]:
    """Return the merges that a SentencePiece vocabulary implies: every cut of a token into two tokens.

    Merges of the token with the least rank come first; ties are in the order of Transformers' `generate_merges`, and
    then of `ranks`. Raises UserError, which begins with `where`, where they are so many that it would take minutes.
    """
    merges, left_over = [], MAX_IMPLIED
    for token, rank in ranks.items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
        left_over -= (len(token) + _MARKS) * len(cuts)
        if left_over < 0:
            raise UserError(f"{where}: the tokens imply merges of more than {MAX_IMPLIED:,} characters")
        cuts.sort(key=lambda cut: (ids[cut[0]], ids[cut[1]]))
        merges += [(rank, -len(left), -len(right), left, right) for left, right in cuts]
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]
