from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from trainfw.checkpoint.holding import Hold, check_there
from trainfw.checkpoint.identity import Identity
from trainfw.checkpoint.manager import AVERAGE, LAYER_ORDER, failing_as, part_of
from trainfw.checkpoint.manifest import find_damage, inventory, read_meta
from trainfw.checkpoint.stores import Directory, in_store
from trainfw.errors import RunError, UserError, did_you_mean
from trainfw.parallel import reorder_layers


class SavedParameters:
    """The parameters of one finished checkpoint, read array by array, onto any mesh and in any dtype.

    As long as it lives, the run does not delete the checkpoint (`Hold`).

    Args:
        directory: directory of a step.
        identity: the run that the checkpoint has to belong to, if one is known.
        averaged: whether it is their average that is read (`optimizer.ema`).

    Raises RunError where it is not what was saved, Vanished where it is gone.
    """

    def __init__(self, directory: Directory, identity: Identity | None = None, *, averaged: bool = False):
        self.directory = directory if in_store(directory) else directory.absolute()
        self._hold = Hold(self.directory)
        if problem := find_damage(self.directory, identity=identity):
            check_there(self.directory)
            raise RunError(f"{self.directory}: is damaged: {problem}")
        self._item, *keys = AVERAGE if averaged else ("params",)
        self._keys: list[str] = keys
        self._reader = ocp.PyTreeCheckpointHandler()

    @cached_property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
        """(shape, dtype) of each array, by dotted name."""
        with self._failing_as("its arrays cannot be listed"):
            tree = self._reader.metadata(self.directory / self._item).tree
            for key in self._keys:
                tree = tree[key]
            leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "dtype"))
            return {".".join(str(key.key) for key in path): (tuple(leaf.shape), leaf.dtype) for path, leaf in leaves}

    @cached_property
    def meta(self) -> dict[str, Any]:
        with self._failing_as("what it says of itself cannot be read"):
            return read_meta(self.directory)

    def read(self, name: str, like: jax.ShapeDtypeStruct, layer_order: Sequence[int] | None = None) -> jax.Array:
        """Read one array in the shape, dtype and sharding of `like`, its layers in `layer_order` (or their true order).

        Raises UserError where there is none of that name and shape, RunError where it cannot be read.
        """
        shape = self.arrays.get(name, (None, None))[0]
        if shape is None:
            raise UserError(f"{self.directory}: no array {name}{did_you_mean(name, self.arrays)}")
        if shape != tuple(like.shape):
            raise UserError(f"{self.directory}: {name} has shape {shape}, but {tuple(like.shape)} is expected")
        item: Any = like
        keys = [*self._keys, *name.split(".")]
        for key in reversed(keys):
            item = {key: item}
        with self._failing_as(f"{name} cannot be read"):
            value = self._reader.restore(self.directory / self._item, args=part_of(item))
        for key in self._keys:
            value = value[key]
        saved = self.meta.get(LAYER_ORDER)
        true = sorted(saved or layer_order or ())
        value = reorder_layers(value, saved or true, list(layer_order or true), donate=True)
        for key in name.split("."):
            value = value[key]
        return value

    def fingerprint(self) -> str:
        """Return a hash of the first and last 64 KiB of every file (in a store, of its tag): other weights, another
        hash."""
        digest = hashlib.blake2b(digest_size=16)
        if in_store(self.directory):
            digest.update(json.dumps(inventory(self.directory / self._item)).encode())
            return digest.hexdigest()
        for path in sorted(path for path in (self.directory / self._item).rglob("*") if path.is_file()):
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(f"{path.name} {size} ".encode() + file.read(2**16))
                file.seek(max(size - 2**16, 0))
                digest.update(file.read())
        return digest.hexdigest()

    def _failing_as(self, problem: str) -> contextlib.AbstractContextManager[None]:
        return failing_as(self.directory, problem, read=self.directory)
