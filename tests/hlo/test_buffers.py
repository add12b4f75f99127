"""XLA's dumps of where values lie, and when."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trainfw.hlo import Shape, partition
from trainfw.hlo.buffers import parse_assignment

ASSIGNMENT = """BufferAssignment:
allocation 0: size 64, parameter 0, shape |f32[16]| at ShapeIndex {}:
 value: <1 x @0> (size=64,offset=0): f32[16]{0}
allocation 1: size 224, preallocated-temp:
 value: <2 zeros @0> (size=64,offset=0): f32[4,4]{1,0}
 value: <3 loop{1} (phi) @0> (size=64,offset=0): f32[4,4]{1,0}
 value: <4 small @0> (size=32,offset=64): bf16[16]{0}
 value: <5 loop{} (phi) @0> (size=16,offset=96): (s32[], f32[4,4]{1,0})
 value: <6 later @0> (size=64,offset=160): f32[16]{0}

Total bytes used: 288
"""
LIVE_RANGES = """HloLiveRange (max 4):
  InstructionSequence:
    0:zeros
    1:small
    2:loop
    3:later
  BufferLiveRange:
    zeros{}:0-2
    small{}:1-2
    loop{1}:2-3
    loop{}:2-3
    later{}:3-4
  Live ranges at 2 (peak):
    zeros{}: 64 bytes (cumulative: 64 bytes)
"""


def test_temporaries_are_read_and_handed_on():
    assignment = parse_assignment(ASSIGNMENT, LIVE_RANGES)
    assert assignment.schedule == ("zeros", "small", "loop", "later")
    found = {(b.name, b.index): (b.shape, b.bytes, b.start, b.end, b.until) for b in assignment.buffers}
    assert found == {
        ("zeros", ()): (Shape("f32", (4, 4)), 64, 0, 1, 3),  # the same buffer as the loop's from 2 on
        ("loop", (1,)): (Shape("f32", (4, 4)), 64, 2, 3, 3),
        ("small", ()): (Shape("bf16", (16,)), 32, 1, 2, 2),
        ("loop", ()): (None, 16, 2, 3, 3),
        ("later", ()): (Shape("f32", (16,)), 64, 3, 4, 4),
    }


def test_a_compilation_says_what_it_keeps():
    partitioned = partition(jax.jit(lambda x: jnp.sin(x @ x) @ x).lower(jnp.ones((64, 64))))
    assignment = partitioned.assignment
    assert assignment is not None
    assert 64 * 64 * 4 in {buffer.bytes for buffer in assignment.buffers}
