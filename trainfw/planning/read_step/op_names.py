"""Readers of JAX's paths to operations (`Instruction.op_name`): the pass and the scope of an operation."""

from __future__ import annotations

import re


def is_backward(op_name: str) -> bool:
    """Tell whether the backward pass runs it."""
    return "transpose(" in op_name


def is_recomputed(op_name: str) -> bool:
    """Tell whether it does again, for the backward pass, what the forward pass did.

    By `jax.checkpoint`, or where a gradient that is written out differentiates a layer anew: what it calls is, inside
    what is transposed, differentiated forward and not transposed again.
    """
    if "rematted_computation" in op_name:
        return True
    _, transposed, inside = op_name.partition("transpose(jvp(")
    written = inside.rpartition("checkpoint/")[2]
    return bool(transposed) and "/jvp(" in f"/{written}"


def is_forward(op_name: str) -> bool:
    """Tell whether it computes something of the forward pass, then or again."""
    return is_recomputed(op_name) or ("jvp(" in op_name and not is_backward(op_name))


def is_within(op_name: str, scope: str) -> bool:
    """Tell whether it runs in the `jax.named_scope` of this name, differentiated or not. (A function is no scope.)"""
    return re.search(rf"(?:^|/|(?<!jit)\(){re.escape(scope)}(?:[/)]|$)", op_name) is not None
