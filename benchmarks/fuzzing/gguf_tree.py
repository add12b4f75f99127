"""A GGUF file as a tree that can be changed and written again, its lengths and offsets as the tree says them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def edited(data: bytes, rng: random.Random, hostile: Callable[[random.Random], Any]) -> bytes:
    """The file with one to three changes in its metadata or its list of tensors."""
    head, values, tensors, rest = read(data)
    if rng.random() < 0.02 and any(key == "tokenizer.ggml.tokens" for key, _, _ in values):
        _enlarge_vocabulary(values, rng)
    for _ in range(1 + rng.randrange(3)):
        if values and rng.random() < 0.7:
            _edit_value(values, rng, hostile)
        else:
            _edit_tensor(tensors, rng)
    if rng.random() < 0.1:
        head[rng.randrange(3)] = rng.choice([0, 1, 4, 2**31, 2**63])
    return write(head, values, tensors, rest)


def _edit_value(values: list[list[Any]], rng: random.Random, hostile: Callable[[random.Random], Any]) -> None:
    item = rng.choice(values)
    match rng.randrange(8):
        case 0:
            values.remove(item)
        case 1:
            values.append([*item])
        case 2:
            other = rng.choice(values)
            item[1:], other[1:] = other[1:], item[1:]
        case 3:
            item[0] = rng.choice([item[0] + "x", "", "general.architecture", "x" * 70_000, "\x1b[31m"])
        case 4 if item[1] == _ARRAY and item[2][1]:
            _edit_array(item[2], rng, hostile)
        case 5:
            item[1] = rng.choice([0, 4, 5, 6, 7, 8, 9, 12, 13, 99])
        case _:
            item[2] = hostile(rng)


def _enlarge_vocabulary(values: list[list[Any]], rng: random.Random) -> None:
    """200,000 tokens, as of a byte-level tokenizer or of SentencePiece: the last a duplicate, or one of a megabyte."""
    count, arrays = 200_000, {key: value[1] for key, kind, value in values if kind == _ARRAY}
    tokens, types = arrays["tokenizer.ggml.tokens"], arrays["tokenizer.ggml.token_type"]
    tokens += [f"t{number}" for number in range(len(tokens), count)]
    types += [1] * (count - len(types))
    tokens[-1] = rng.choice([tokens[-2], "ab" * 500_000, "a" * 1_000_000, "last"])
    if rng.random() < 0.5:
        next(item for item in values if item[0] == "tokenizer.ggml.model")[2] = "llama"
        values.append(["tokenizer.ggml.scores", _ARRAY, [6, [-float(number) for number in range(count)]]])


def _edit_array(array: list[Any], rng: random.Random, hostile: Callable[[random.Random], Any]) -> None:
    elements = array[1]
    at = rng.randrange(len(elements))
    match rng.randrange(6):
        case 0:
            elements[at] = elements[rng.randrange(len(elements))]
        case 1:
            del elements[at:]
        case 2:
            array[1] = elements * rng.choice([2, 50])
        case 3:
            array[0] = rng.choice([0, 4, 5, 6, 8, 9])
        case _:
            elements[at] = hostile(rng)


def _edit_tensor(tensors: list[list[Any]], rng: random.Random) -> None:
    item = rng.choice(tensors)
    match rng.randrange(6):
        case 0:
            tensors.remove(item) if len(tensors) > 1 else None
        case 1:
            tensors.append([*item])
        case 2:
            item[0] = rng.choice([tensors[0][0], item[0][:-1], "", "blk.99999999.attn_q.weight", "\x1b[31m" * 9])
        case 3:
            item[1] = rng.choice([item[1][::-1], [], [0], [2**63, 2], [2**32] * 4, [1] * 9, [*item[1], 1], [-1]])
        case 4:
            item[2] = rng.choice([0, 1, 2, 8, 12, 30, 39, 99, 2**31])
        case _:
            item[3] = rng.choice([0, 1, 32, 2**31, 2**63, 2**64 - 32, item[3] + 32])


def read(data: bytes) -> tuple[list[Any], list[list[Any]], list[list[Any]], bytes]:
    """(version, counts of both), [key, type, value], [name, dims, type, offset], what follows."""
    at = 4

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def string() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode("utf-8", "surrogateescape")

    def value(kind: int) -> Any:
        if kind == _STRING:
            return string()
        if kind == _ARRAY:
            inner, count = take("I"), take("Q")
            return [inner, [value(inner) for _ in range(count)]]
        return take(_SCALARS[kind])

    version, count, pairs = take("I"), take("Q"), take("Q")
    values = []
    for _ in range(pairs):
        key, kind = string(), take("I")
        values.append([key, kind, value(kind)])
    tensors = []
    for _ in range(count):
        name = string()
        tensors.append([name, [take("Q") for _ in range(take("I"))], take("I"), take("Q")])
    at = -(-at // 32) * 32
    return [version, None, None], values, tensors, data[at:]


def write(head: list[Any], values: list[list[Any]], tensors: list[list[Any]], rest: bytes) -> bytes:
    """Return the file's bytes. What a value's type cannot hold is written as text, or its length as the number."""
    count, pairs = (len(items) if said is None else said for items, said in zip((tensors, values), head[1:]))
    out = bytearray(b"GGUF" + _packed("I", head[0]) + _packed("Q", count) + _packed("Q", pairs))
    for key, kind, value in values:
        out += _string(key) + _packed("I", kind) + _value(kind, value)
    for name, dims, kind, offset in tensors:
        out += _string(name) + _packed("I", len(dims)) + b"".join(_packed("Q", dim) for dim in dims)
        out += _packed("I", kind) + _packed("Q", offset)
    return bytes(out) + bytes(-len(out) % 32) + rest


def _value(kind: int, value: Any) -> bytes:
    if kind == _ARRAY and isinstance(value, list) and len(value) == 2 and isinstance(value[1], list):
        return _packed("I", value[0]) + _packed("Q", len(value[1])) + b"".join(_value(value[0], v) for v in value[1])
    if kind in _SCALARS:
        return _packed(_SCALARS[kind], value)
    return _string(value if isinstance(value, str) else str(type(value)))


def _packed(code: str, value: Any) -> bytes:
    """A number in as many bytes, however large it is."""
    size = struct.calcsize("<" + code)
    if isinstance(value, str | list) or value is None:
        value = len(value or ())
    if code in "fd":
        try:
            return struct.pack("<" + code, float(value))
        except OverflowError:
            return struct.pack("<" + code, float("inf"))
    try:
        return (int(value) % 2 ** (8 * size)).to_bytes(size, "little")
    except (ValueError, OverflowError):  # not finite
        return b"\xff" * size


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass" if any("\ud800" <= c < "\udc80" for c in text) else "surrogateescape")
    return struct.pack("<Q", len(data)) + data
