"""Cuts of a text at which its tokens never change, for the pre-tokenisers that are known.

Byte-level BPE first splits a text by an expression into pre-tokens (a word, a run of punctuation) and then encodes each
for itself. So the ids of a text are those of any of its parts, one after another, as long as the parts end where
pre-tokens end. The expressions below look at nothing to the left, and to the right only past white space: therefore a
place before which stands no white space, and which no pre-token spans, is such a cut.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import NamedTuple

import tokenizers
from tokenizers import models

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""The split of `Digits` and then of GPT-2, in one: a digit ends the text of what is before it."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_REST}"
)
# GPT-4's split, with numbers cut into two digits (not three), as a small vocabulary has no room for a thousand numbers.
OURS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST
KNOWN = {
    "GPT-2": _GPT2,
    "GPT-2, digits apart": _GPT2_DIGITS,
    "GPT-4, Llama 3": _GPT4,
    "Qwen 2": _GPT4.replace("{1,3}", ""),
    "GPT-4o": _GPT4O,
    "trainfw": OURS,
}
"""Expressions that are known to split as this module says, by who uses them."""

_SPACES = "\t-\r\x1c-\x20\x85\xa0\u1680\u180e\u2000-\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
"""Characters that are white space in some version of Unicode, or that some library takes for it."""
_CUT_BEFORE_LINE_FEED = re.compile(rf"(?<=[^{_SPACES}])(?=[ \n])")
_CUT_AFTER_LINE_FEED = re.compile(rf"(?<=[^{_SPACES}])(?= )|(?<=\n)(?=[^{_SPACES}/])")
_ANYWHERE = re.compile("")
_CLASS = re.compile(r"\[(\^?)((?:\\p\{\w+\}|\\.|[^\]\\])*)\]|(\\p\{\w+\}|\\[sS])")
_PART = re.compile(r"\\p\{(\w+)\}|(\\.)|(.)")
_ASCII_SPACES = "[\t-\r ]"


class Pretokens(NamedTuple):
    """Places at which a tokenizer's text may be cut."""

    cut: re.Pattern[str]
    """Matches, empty, at places where a text may be cut into pieces."""
    words: re.Pattern[str] | None
    """Matches the parts of a text one after another: a pre-token in ASCII, or all up to a cut. None for bytes, which
    need no such parts."""
    whole: re.Pattern[str] | None
    """Matches added tokens: a piece that holds one is not cut further."""


def pretokens_of(backend: tokenizers.Tokenizer) -> Pretokens | None:
    """Return where the text of a tokenizer may be cut; None where that is not known."""
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.special]
    around = any(token.lstrip or token.rstrip or re.search(r"\s", token.content) for token in added)
    normal = None if backend.normalizer is None else json.loads(backend.normalizer.__getstate__())
    model = backend.model
    if around or normal not in (None, {"type": "NFC"}) or not isinstance(model, models.BPE) or model.dropout:
        return None
    if normal and not all(token.content.isascii() for token in added):
        return None
    whole = re.compile("|".join(re.escape(token.content) for token in added)) if added else None
    expression = _expression(backend)
    if expression == "":
        alone = backend.get_vocab_size(with_added_tokens=False) == 256  # so there is nothing to merge
        return Pretokens(_ANYWHERE, None, None) if alone and normal is None and not added else None
    if expression is None or expression not in KNOWN.values():
        return None
    cut = _CUT_AFTER_LINE_FEED if r"[\r\n" in expression else _CUT_BEFORE_LINE_FEED
    return Pretokens(cut, _words(expression), whole)


def _expression(backend: tokenizers.Tokenizer) -> str | None:
    """Return the one expression that splits a text; empty if nothing does, None if it is done otherwise."""
    if backend.pre_tokenizer is None:
        return None
    state = json.loads(backend.pre_tokenizer.__getstate__())
    *first, last = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    match first:
        case []:
            return _GPT2 if last["use_regex"] else ""
        case [{"type": "Digits", "individual_digits": True}] if last["use_regex"]:
            return _GPT2_DIGITS
        case [{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": str(text)}}]:
            return None if last["use_regex"] else text
    return None


def _words(expression: str) -> re.Pattern[str]:
    """Return an expression for Python that finds the same pre-tokens where all is ASCII, and else the text up to a cut.

    Versions of Unicode, and libraries, differ in what is a letter; in ASCII they agree. A pre-token is taken where what
    follows is ASCII too, past white space if it ends in that, and past an apostrophe, which may begin a contraction:
    further the expressions do not look.
    """
    ascii_ = _CLASS.sub(_in_ascii, expression)
    follows = rf"(?!(?:(?<={_ASCII_SPACES}){_ASCII_SPACES}*+|'?)[^\x00-\x7f])"
    to_a_cut = rf"(?s:.)[^ ]*+(?:(?<=[{_SPACES}]) [^ ]*+)*+"
    return re.compile(rf"(?>{ascii_}){follows}|{to_a_cut}", re.ASCII)


def _in_ascii(found: re.Match[str]) -> str:
    """Write a class of characters as its members in ASCII."""
    negated, inside, alone = found.groups()
    letters = [chr(code) for code in range(128)]
    members = {one for part in _PART.finditer(inside or alone) for one in letters if _holds(part, one)}
    if negated:
        members = set(letters) - members
    return "[" + "".join(f"\\x{ord(one):02x}" for one in sorted(members)) + "]" if members else "(?!)"


def _holds(part: re.Match[str], letter: str) -> bool:
    category, escape, itself = part.groups()
    if category:
        return unicodedata.category(letter).startswith(category)
    if escape in (r"\s", r"\S"):
        return (letter in "\t\n\v\f\r ") == (escape == r"\s")
    return letter == ({r"\r": "\r", r"\n": "\n"}[escape] if escape else itself)
