"""Instruction numbers of serialized HLO modules, rewritten so that compilers with an older XLA take them.

Today's XLA numbers an instruction `computation << 32 | index`; in jaxlib 0.10.2 already. The XLA inside neuronx-cc 2.26
holds a number in 32 bits, and dies of a larger one before it has looked at an operator ("Check failed: unique_id_ <
(2147483647)"), as third parties measured. What has such numbers is declared here, by the fields of
xla/service/hlo.proto (openxla/xla 0b8fa9f2); all else is copied as it is.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

MOST = 2**31 - 1
"""The largest number that fits 32 bits with a sign."""

_MANY = True
_FIELDS: dict[str, list[tuple[str, int, str, bool]]] = {
    "HloProto": [("module", 1, "HloModuleProto", False)],
    "HloModuleProto": [("computations", 3, "HloComputationProto", _MANY), ("schedule", 7, "HloScheduleProto", False)],
    "HloComputationProto": [
        ("instructions", 2, "HloInstructionProto", _MANY),
        ("id", 5, "", False),
        ("root_id", 6, "", False),
    ],
    "HloInstructionProto": [("id", 35, "", False), ("operand_ids", 36, "", _MANY), ("predecessors", 37, "", _MANY)],
    "HloScheduleProto": [("sequences", 1, "SequencesEntry", _MANY)],  # a map
    "SequencesEntry": [("key", 1, "", False), ("value", 2, "InstructionSequence", False)],
    "InstructionSequence": [("instruction_ids", 1, "", _MANY)],
}
"""Message -> its fields: name, number, message ("" for an int64), whether there are many."""


def module_of(hlo_proto: bytes) -> bytes:
    """Take the HloModuleProto out of a serialized HloProto, which is what XLA dumps."""
    return bytes(_messages()["HloProto"].FromString(hlo_proto).module.SerializeToString())


def renumbered(module: bytes) -> bytes:
    """Number the instructions of a serialized HloModuleProto from 1 on; as it was where all fit and are unique."""
    found = _messages()["HloModuleProto"].FromString(module)
    given = [(i.id, computation.id) for computation in found.computations for i in computation.instructions]
    if len({number for number, _ in given}) == len(given) and all(number <= MOST for number, _ in given):
        return module
    # In their old order, by which XLA sorts instructions where it reads a module.
    numbers: dict[int, dict[int, int]] = defaultdict(dict)
    for new, (old, key) in enumerate(sorted(given), 1):
        numbers[key][old] = new
    for computation in found.computations:
        own = numbers[computation.id]
        computation.root_id = own[computation.root_id]
        for instruction in computation.instructions:
            instruction.id = own[instruction.id]
            for references in (instruction.operand_ids, instruction.predecessors):
                references[:] = [own[number] for number in references]
    for entry in found.schedule.sequences:
        scheduled = entry.value.instruction_ids
        scheduled[:] = [numbers[entry.key][number] for number in scheduled]
    return bytes(found.SerializeToString())


def instruction_ids(module: bytes) -> list[int]:
    """List the numbers of a serialized HloModuleProto's instructions in order."""
    found = _messages()["HloModuleProto"].FromString(module)
    return [i.id for computation in found.computations for i in computation.instructions]


@functools.cache
def _messages() -> dict[str, Any]:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="trainfw/hlo.proto", syntax="proto3")
    for name, fields in _FIELDS.items():
        declared = file.message_type.add(name=name).field
        for key, number, message, many in fields:
            declared.add(
                name=key,
                number=number,
                label=field.LABEL_REPEATED if many else field.LABEL_OPTIONAL,
                type=field.TYPE_MESSAGE if message else field.TYPE_INT64,
                type_name=message or None,
            )
    return message_factory.GetMessages([file], pool=descriptor_pool.DescriptorPool())
