from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import orbax.checkpoint as ocp

from trainfw.checkpoint.manager import LAYER_ORDER
from trainfw.checkpoint.manifest import find_damage, inventory
from trainfw.checkpoint.stores import Directory, in_store
from trainfw.errors import RunError, UserError, did_you_mean
from trainfw.parallel import reorder_layers


class SavedParameters:
    """The parameters of one finished checkpoint, read array by array, onto any mesh and in any dtype.

    Args:
        directory: of a step.
        verify: look at its files first.

    Raises RunError where its files are not what was saved.
    """

    def __init__(self, directory: Directory, *, verify: bool = True):
        self.directory = directory if in_store(directory) else directory.absolute()
        if verify and (problem := find_damage(self.directory)):
            raise RunError(f"{self.directory}: is damaged: {problem}")
        self._reader = ocp.PyTreeCheckpointHandler()

    @cached_property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """(shape, dtype) of each, by dotted name."""
        tree = self._reader.metadata(self.directory / "params").tree
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "dtype"))
        return {".".join(str(key.key) for key in path): (tuple(leaf.shape), leaf.dtype) for path, leaf in leaves}

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What was saved beside them."""
        return dict(json.loads((self.directory / "meta" / "metadata").read_text(encoding="utf-8")))

    def read(self, name: str, like: jax.ShapeDtypeStruct, layer_order: Sequence[int] | None = None) -> jax.Array:
        """One of them as `like` says, its layers in `layer_order` (by default, their true order).

        Raises UserError where there is none of that name and shape, RunError where it cannot be read.
        """
        shape = self.arrays.get(name, (None, None))[0]
        if shape is None:
            raise UserError(f"{self.directory}: no array {name}{did_you_mean(name, self.arrays)}")
        if shape != tuple(like.shape):
            raise UserError(f"{self.directory}: {name} has shape {shape}, but {tuple(like.shape)} is expected")
        item: Any = like
        for key in reversed(name.split(".")):
            item = {key: item}
        restore = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        try:
            value = self._reader.restore(self.directory / "params", args=restore)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise RunError(f"{self.directory}: {name} cannot be read: {str(error).splitlines()[0]}") from error
        saved = self.meta.get(LAYER_ORDER)
        true = sorted(saved or layer_order or ())
        value = reorder_layers(value, saved or true, list(layer_order or true), donate=True)
        for key in name.split("."):
            value = value[key]
        return value

    def fingerprint(self) -> str:
        """Of the first and last 64 KiB of every file (in a store, of its tag): two sets of weights differ in it."""
        digest = hashlib.blake2b(digest_size=16)
        if in_store(self.directory):
            digest.update(json.dumps(inventory(self.directory / "params")).encode())
            return digest.hexdigest()
        for path in sorted(path for path in (self.directory / "params").rglob("*") if path.is_file()):
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(f"{path.name} {size} ".encode() + file.read(2**16))
                file.seek(max(size - 2**16, 0))
                digest.update(file.read())
        return digest.hexdigest()
