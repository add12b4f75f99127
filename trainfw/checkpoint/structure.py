"""A fresh checkpoint read back, before it is called saved."""

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
    names = ocp.tree.get_param_names(tree, include_empty_nodes=False)
    leaves = zip(jax.tree.leaves(names), jax.tree.leaves(tree), strict=True)
    return {name: (np.shape(leaf), jnp.dtype(leaf.dtype)) for name, leaf in leaves}


def find_absent(directory: Directory, expected: Shapes) -> str | None:
    """Say which array is missing, or not whole, in a checkpoint's directory; None where all are there.

    Each is found by its name, with its shape, its dtype and the number of its chunks. That reads the index and a few
    hundred bytes an array, and no chunk: 2 ms for 30 arrays, 25 to 45 ms for a thousand, on a local disk.
    """
    import tensorstore as ts

    store = ts.KvStore.open(array_store(directory)).result()
    found = Counter(key.decode(errors="replace").rpartition("/")[0] for key in store.list().result())
    read = {name: store.read(f"{name}/.zarray") for name in expected}
    for name, (shape, dtype) in expected.items():
        answer = read[name].result()
        if answer.state != "value":
            return f"{name} is not among what was written"
        held = json.loads(answer.value)
        if tuple(held["shape"]) != shape or jnp.dtype(held["dtype"]) != dtype:
            return f"{name} was written as {held['dtype']} {held['shape']}, not {dtype} {list(shape)}"
        chunks = math.prod(-(-size // chunk) for size, chunk in zip(shape, held["chunks"], strict=True))
        if found[name] != chunks + 1:
            return f"{name} has {found[name] - 1} of {chunks} chunks"
    return None
