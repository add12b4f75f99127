from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from trainfw.checkpoint.config import CheckpointConfig
from trainfw.errors import RunError
from trainfw.parallel import reorder_layers

LAYER_ORDER = "layer_order"
"""In `meta`: the order of the layers, where it is not their true one."""


class Checkpoints:
    """The checkpoints of one run. Each holds `params`, `rest` (of the state) and `meta` (JSON).

    Saving is asynchronous and atomic: a checkpoint that a crash cut short is never listed.

    Args:
        layer_order: the layer at each place of the stacked parameters that are saved and wanted back; by default their
            true order. What was saved in another order is reordered when it is restored.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        layer_order: Sequence[int] | None = None,
        read_only: bool = False,
    ):
        self._failed = False
        self._layer_order = None if layer_order is None else list(layer_order)
        # Orbax narrates every file, and a failed save once for each of its tasks; we raise what matters.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else config.keep_last,
                keep_period=config.keep_every,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, params: Any, rest: Any, meta: dict[str, Any]) -> None:
        """Start saving; returns once the arrays are copied off the devices."""
        if self._layer_order is not None and self._layer_order != sorted(self._layer_order):
            meta = {**meta, LAYER_ORDER: self._layer_order}
        with self._failing_as("cannot be saved"):
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    rest=ocp.args.StandardSave(rest),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
            if not saved:
                raise ValueError(f"step {step} is not newer than {self.latest}")

    def restore(self, step: int, params: Any, rest: Any) -> tuple[Any, Any, dict[str, Any]]:
        """(params, rest, meta) of a step, laid out as the given abstract arrays say."""
        restored = self._restore(
            step,
            params=ocp.args.StandardRestore(params),
            rest=ocp.args.StandardRestore(rest),
            meta=ocp.args.JsonRestore(),
        )
        meta = dict(restored.meta)
        params, rest = self._in_order((restored.params, restored.rest), meta.pop(LAYER_ORDER, None))
        return params, rest, meta

    def restore_params(self, step: int, params: Any) -> Any:
        restored = self._restore(step, params=ocp.args.StandardRestore(params), meta=ocp.args.JsonRestore())
        return self._in_order(restored.params, restored.meta.get(LAYER_ORDER))

    def _in_order(self, tree: Any, saved: list[int] | None) -> Any:
        wanted = self._layer_order or sorted(saved or ())
        return reorder_layers(tree, saved or sorted(wanted), wanted, donate=True)

    def _restore(self, step: int, **items: Any) -> Any:
        others = [other for other in self.steps() if other < step]
        hint = f" (to fall back to step {others[-1]}, move {step} away)" if others else ""
        with self._failing_as(f"step {step} cannot be restored{hint}"):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Until everything saved is on disk. Raises what a background save failed with."""
        with self._failing_as("cannot be saved"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then let go. After a failure was raised, what it left behind is let go quietly."""
        if self._failed:
            with contextlib.suppress(Exception):
                self._manager.close()
        else:
            with self._failing_as("cannot be saved"):
                self._manager.close()

    @contextlib.contextmanager
    def _failing_as(self, problem: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            self._failed = True
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(f"{self._manager.directory}: {problem}: {first}") from error
