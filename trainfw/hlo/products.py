"""Matrix products of a module: sizes of a `dot`, and of the product that a convolution is of its patches."""

from __future__ import annotations

import math
import re

from trainfw.hlo.module import Instruction, Shape

PRODUCTS = frozenset({"dot", "convolution"})
"""Opcodes."""


def product_sizes(instruction: Instruction, left: Shape, right: Shape) -> tuple[int, int, int, int]:
    """Return the sizes (batch, m, n, k) of a product (batch, m, k) x (batch, k, n), one of `PRODUCTS`."""
    return (_convolved if instruction.opcode == "convolution" else _dotted)(instruction, left, right)


def _dotted(dot: Instruction, left: Shape, right: Shape) -> tuple[int, int, int, int]:
    """Sizes (batch, m, n, k) of a `dot`."""

    def size(key: str) -> int:
        dims = dot.attributes.get(key, "{}").strip("{}")
        return math.prod(left.dims[int(dim)] for dim in dims.split(",") if dim)

    batch, k = size("lhs_batch_dims"), size("lhs_contracting_dims")
    m, n = (math.prod(shape.dims) // (batch * k) for shape in (left, right))
    return batch, m, n, k


def _convolved(convolution: Instruction, left: Shape, right: Shape) -> tuple[int, int, int, int]:
    """Sizes (batch, m, n, k) of the product that a convolution is. What its window meets of the padding counts too."""
    attributes = convolution.attributes
    of_left, of_right, _ = re.split("_|->", attributes["dim_labels"])
    window = dict(part.split("=") for part in attributes.get("window", "{}").strip("{}").split())
    groups = max(int(attributes.get(f"{kind}_group_count", 1)) for kind in ("feature", "batch"))
    channels = right.dims[of_right.index("o")]
    places = math.prod(convolution.shapes[0].dims) // channels
    if "lhs_dilate" in window:  # between the input's places there are zeros: the gradient of a stride
        places = math.prod(left.dims) // left.dims[of_left.index("f")]
    size = math.prod(map(int, window["size"].split("x"))) if "size" in window else 1
    return groups, places, channels // groups, size * right.dims[of_right.index("i")]
