"""Instruction numbers of serialized HLO modules, rewritten so that compilers with an older XLA take them.

Today's XLA numbers an instruction `computation << 32 | index`; in jaxlib 0.10.2 already. The XLA inside neuronx-cc 2.26
holds a number in 32 bits, and dies of a larger one before it has looked at an operator ("Check failed: unique_id_ <
(2147483647)"), as third parties measured. Messages are walked field by field and all else is copied byte for byte.
Fields are those of xla/service/hlo.proto (openxla/xla 0b8fa9f2).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

MOST = 2**31 - 1
"""The largest number that fits 32 bits with a sign."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_HLO_MODULE = 1  # of HloProto
_COMPUTATIONS, _SCHEDULE = 3, 7  # of HloModuleProto
_INSTRUCTIONS, _COMPUTATION_ID, _ROOT_ID = 2, 5, 6  # of HloComputationProto
_ID, _OPERANDS, _PREDECESSORS = 35, 36, 37  # of HloInstructionProto
_KEY, _VALUE = 1, 2  # of an entry of a map
_SEQUENCES, _SEQUENCE_IDS = 1, 1  # of HloScheduleProto, and of its InstructionSequence


class _Field(NamedTuple):
    number: int
    kind: int
    value: int | bytes
    raw: bytes
    """Tag and value as they were."""


def module_of(hlo_proto: bytes) -> bytes:
    """Take the HloModuleProto out of a serialized HloProto, which is what XLA dumps. Raises ValueError."""
    return next((_submessage(field) for field in _fields(hlo_proto) if field.number == _HLO_MODULE), b"")


def renumbered(module: bytes) -> bytes:
    """Number the instructions of a serialized HloModuleProto from 1 on; as it was where all fit and are unique.

    Raises ValueError for bytes that are no such message, or refer to an instruction that is not there.
    """
    given: list[tuple[int, int]] = []
    for computation in (_submessage(field) for field in _fields(module) if field.number == _COMPUTATIONS):
        key = _number(computation, _COMPUTATION_ID)
        given += [(_number(_submessage(f), _ID), key) for f in _fields(computation) if f.number == _INSTRUCTIONS]
    if len(set(given)) < len(given):
        raise ValueError("HLO: a computation has two instructions of one number")
    if len({number for number, _ in given}) == len(given) and all(number <= MOST for number, _ in given):
        return module
    # In their old order, by which XLA sorts instructions where it reads a module.
    numbers: dict[int, dict[int, int]] = defaultdict(dict)
    for new, (old, key) in enumerate(sorted(given), 1):
        numbers[key][old] = new
    out = []
    for field in _fields(module):
        if field.number == _COMPUTATIONS:
            out.append(_bytes(field.number, _computation(_submessage(field), numbers)))
        elif field.number == _SCHEDULE:
            out.append(_bytes(field.number, _schedule(_submessage(field), numbers)))
        else:
            out.append(field.raw)
    return b"".join(out)


def instruction_ids(module: bytes) -> list[int]:
    """List the numbers of a serialized HloModuleProto's instructions in order."""
    return [
        _number(_submessage(field), _ID)
        for computation in _fields(module)
        if computation.number == _COMPUTATIONS
        for field in _fields(_submessage(computation))
        if field.number == _INSTRUCTIONS
    ]


def _computation(message: bytes, numbers: Mapping[int, Mapping[int, int]]) -> bytes:
    own = numbers[_number(message, _COMPUTATION_ID)]
    out = []
    for field in _fields(message):
        if field.number == _INSTRUCTIONS:
            out.append(_bytes(field.number, _instruction(_submessage(field), own)))
        elif field.number == _ROOT_ID:
            out.append(_tagged(field.number, _VARINT) + _renumber(field.value, own))
        else:
            out.append(field.raw)
    if _number(message, _ROOT_ID) == 0:  # which proto3 leaves out
        out.append(_tagged(_ROOT_ID, _VARINT) + _renumber(0, own))
    return b"".join(out)


def _instruction(message: bytes, own: Mapping[int, int]) -> bytes:
    # A number of 0 is left out by proto3, so that the new one is written whether or not there was one. Operands and
    # predecessors are of the same computation.
    out = [
        _rewritten(f, own) if f.number in (_OPERANDS, _PREDECESSORS) else f.raw
        for f in _fields(message)
        if f.number != _ID
    ]
    return b"".join([*out, _tagged(_ID, _VARINT), _renumber(_number(message, _ID), own)])


def _schedule(message: bytes, numbers: Mapping[int, Mapping[int, int]]) -> bytes:
    out = []
    for field in _fields(message):
        if field.number != _SEQUENCES:
            out.append(field.raw)
            continue
        entry = _submessage(field)
        own = numbers.get(_number(entry, _KEY), {})
        changed = [
            _bytes(
                _VALUE,
                b"".join(
                    _rewritten(f, own) if f.number == _SEQUENCE_IDS else f.raw for f in _fields(_submessage(part))
                ),
            )
            if part.number == _VALUE
            else part.raw
            for part in _fields(entry)
        ]
        out.append(_bytes(_SEQUENCES, b"".join(changed)))
    return b"".join(out)


def _rewritten(field: _Field, own: Mapping[int, int]) -> bytes:
    """Rewrite a repeated field of numbers, packed or one by one, with the new ones."""
    if field.kind == _VARINT:
        return _tagged(field.number, _VARINT) + _renumber(field.value, own)
    packed, at, out = _submessage(field), 0, []
    while at < len(packed):
        number, at = _read_varint(packed, at)
        out.append(_renumber(number, own))
    return _bytes(field.number, b"".join(out))


def _renumber(number: int | bytes, own: Mapping[int, int]) -> bytes:
    if not isinstance(number, int) or number not in own:
        raise ValueError(f"HLO: refers to instruction {number!r}, which its computation does not have")
    return _varint(own[number])


# --- The wire format of protocol buffers -----------------------------------------------------------


def _fields(message: bytes) -> Iterator[_Field]:
    at = 0
    while at < len(message):
        start = at
        tag, at = _read_varint(message, at)
        number, kind = tag >> 3, tag & 7
        value: int | bytes
        if kind == _VARINT:
            value, at = _read_varint(message, at)
        else:
            if kind == _BYTES:
                size, at = _read_varint(message, at)
            elif kind in (_FIXED32, _FIXED64):
                size = 4 if kind == _FIXED32 else 8
            else:
                raise ValueError(f"HLO: no protocol buffer: wire type {kind} at byte {start}")
            if at + size > len(message):
                raise ValueError(f"HLO: no protocol buffer: field {number} at byte {start} ends past the end")
            value, at = message[at : at + size], at + size
        yield _Field(number, kind, value, message[start:at])


def _submessage(field: _Field) -> bytes:
    if field.kind != _BYTES or not isinstance(field.value, bytes):
        raise ValueError(f"HLO: field {field.number} has wire type {field.kind}; expected a message")
    return field.value


def _number(message: bytes, number: int) -> int:
    """Return the last value of an integer field, which is the one that counts; 0 where there is none."""
    found = 0
    for field in _fields(message):
        if field.number == number:
            if not isinstance(field.value, int):
                raise ValueError(f"HLO: field {number} has wire type {field.kind}; expected an integer")
            found = field.value
    return found


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"HLO: no protocol buffer: an integer without an end before byte {at}")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _tagged(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _bytes(number: int, content: bytes) -> bytes:
    return _tagged(number, _BYTES) + _varint(len(content)) + content
