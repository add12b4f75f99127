"""Check of a fresh checkpoint's arrays, before it counts as saved."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from trainfw.checkpoint.stores import Directory, array_store

Shapes = dict[str, tuple[tuple[int, ...], Any]]
"""(shape, dtype) of arrays, by dotted name."""


def shapes_of(tree: object) -> Shapes:
    """Return (shape, dtype) of a tree's arrays, by the names that Orbax gives them."""
    names = ocp.tree.get_param_names(tree, include_empty_nodes=False)
    leaves = zip(jax.tree.leaves(names), jax.tree.leaves(tree), strict=True)
    return {name: (np.shape(leaf), jnp.dtype(leaf.dtype)) for name, leaf in leaves}


def find_absent(directory: Directory, expected: Shapes) -> str | None:
    """Say which array of a checkpoint's directory is missing or not whole; None where all are there.

    Names, shapes, dtypes and numbers of chunks are compared. That reads the index and a few hundred bytes an array, and
    no chunk: 2 ms for 30 arrays, 25 to 45 ms for a thousand, on a local disk.
    """
    import tensorstore as ts

    store = ts.KvStore.open(array_store(directory)).result()
    counts = Counter(key.decode(errors="replace").rpartition("/")[0] for key in store.list().result())
    read = {name: store.read(f"{name}/.zarray") for name in expected}
    for name, (shape, dtype) in expected.items():
        answer = read[name].result()
        if answer.state != "value":
            return f"{name} is not among what was written"
        array = json.loads(answer.value)
        if tuple(array["shape"]) != shape or jnp.dtype(array["dtype"]) != dtype:
            return f"{name} was written as {array['dtype']} {array['shape']}, not {dtype} {list(shape)}"
        chunks = math.prod(-(-size // chunk) for size, chunk in zip(shape, array["chunks"], strict=True))
        if counts[name] != chunks + 1:
            return f"{name} has {counts[name] - 1} of {chunks} chunks"
    return None
