from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath  # public by no other name

from trainfw.backends import exchange, release_freed_memory
from trainfw.checkpoint import stores
from trainfw.checkpoint.config import CheckpointConfig
from trainfw.checkpoint.holding import Hold, check_there
from trainfw.checkpoint.identity import Identity
from trainfw.checkpoint.manifest import find_damage, read_meta, write_manifest
from trainfw.checkpoint.stores import Directory, array_store
from trainfw.errors import RunError
from trainfw.parallel import reorder_layers
from trainfw.unfinished import sync, sync_tree

Tree = TypeVar("Tree")

LAYER_ORDER = "layer_order"
"""Key of `meta` for the order of the layers, where it is not their true one."""

AVERAGE = ("rest", "opt_state", "average")
"""Place of the average that `optimizer.ema` keeps."""

_CLEAR_SECONDS = 0.25
_QUIET = 4
"""Number of looks in a row that have to find no leftovers."""

_MOVE_SECONDS = 3600
"""Seconds that processes wait for damaged checkpoints to be moved, which a store does by copying."""

_LINE = 300
"""Most letters of an error of Orbax, which may hold a whole tree."""

_BARRIER_SECONDS = 600
"""Seconds that a process waits for the others to have written their parts."""


class Checkpoints:
    """The checkpoints of one run: each has `params`, `rest` (of the state), `meta` (JSON) and a manifest of its files.

    Saving is asynchronous and atomic: a checkpoint that a crash cut short is never listed, nor one whose files lack an
    array. Up to `config.max_failures` saves in a row may fail, and are only reported.

    Args:
        identity: identity of the run: saved checkpoints carry it, and checkpoints of other runs count as damaged.
        layer_order: the layer at each place of the stacked parameters, when saved and when restored; by default their
            true order. Checkpoints in another order are reordered when they are restored.
        report: called with a sentence about each save that failed.
    """

    def __init__(
        self,
        directory: stores.Directory,
        config: CheckpointConfig,
        *,
        identity: Identity | None = None,
        layer_order: Sequence[int] | None = None,
        read_only: bool = False,
        report: Callable[[str], None] = lambda text: None,
    ):
        self.directory = directory if stores.in_store(directory) else directory.absolute()
        self._config, self._identity, self._report = config, identity, report
        self._layer_order = None if layer_order is None else list(layer_order)
        self._saving: int | None = None
        self._failures = 0
        self._has_failed = False
        self._meta: Mapping[str, object] = {}
        self._expected: dict[str, Shapes] = {}
        self._deleting: threading.Thread | None = None
        self._not_deleted = ""
        # Orbax logs every file, and a failed save once for each of its tasks; errors that matter are raised here.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        spare_memory()
        self._read_only = read_only
        self._opened: ocp.CheckpointManager | None = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._opened is None:
            with failing_as(self.directory, "cannot be opened"):
                options = ocp.CheckpointManagerOptions(
                    max_to_keep=None,  # we delete them ourselves
                    create=True,
                    cleanup_tmp_directories=True,
                    # Where nothing can be renamed, another way to finish a checkpoint.
                    temporary_path_class=CommitFileTemporaryPath if stores.in_store(self.directory) else None,
                    async_options=ocp.AsyncOptions(
                        timeout_secs=_BARRIER_SECONDS, post_finalization_callback=self._finish
                    ),
                )
                self._opened = ocp.CheckpointManager(self.directory, options=options)
        return self._opened

    def _finish(self) -> None:
        """Complete a checkpoint whose files are all written, before the rename that makes them one."""
        if jax.process_index() != 0 or self._saving is None:
            return
        step = self._saving
        names = [str(step)]
        if not stores.in_store(self.directory):  # not by glob, which compiles and keeps a pattern for every step
            names = [name for name in os.listdir(self.directory) if name.startswith(f"{step}.orbax-checkpoint-tmp")]
        for directory in (self.directory / name for name in names):
            for item, expected in self._expected.items():
                if problem := find_absent(directory / item, expected):
                    raise ValueError(f"{item}: {problem}")
            write_manifest(directory, step, self._identity, self._meta)
            if not stores.in_store(directory):  # TensorStore does so with its own files, and Orbax with none
                sync_tree(directory)

    def steps(self) -> list[int]:
        return stores.steps_in(self.directory)

    def save(self, step: int, params: object, rest: object, meta: Mapping[str, object]) -> bool:
        """Start saving; return once the arrays are copied off the devices, and the save before is on disk.

        Returns False where saving failed already and the run may go on. Raises RunError where too many in a row have
        failed.
        """
        if self._layer_order is not None and self._layer_order != sorted(self._layer_order):
            meta = {**meta, LAYER_ORDER: self._layer_order}
        self._settle(self._config.max_failures)
        with self._forgiving(step, self._config.max_failures):
            self._saving, self._meta = step, meta
            self._expected = {"params": shapes_of(params), "rest": shapes_of(rest)}
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params), rest=ocp.args.StandardSave(rest), meta=ocp.args.JsonSave(meta)
                ),
            )
            if not saved:
                raise ValueError(f"step {step} is not newer than {max(self.steps(), default=None)}")
        return self._saving == step

    def check(self) -> None:
        """Report a save that has failed in the background. Raises RunError as `save` does; does not wait."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._settle(self._config.max_failures)

    def wait(self, *, must: bool = True) -> None:
        """Wait until the last save is on disk. Raises RunError where it fails; unless `must`, only as `save` does."""
        self._settle(0 if must else self._config.max_failures)

    def _settle(self, forgiven: int) -> None:
        if self._saving is None:
            return
        with self._forgiving(self._saving, forgiven):
            self._manager.wait_until_finished()
            release_freed_memory()  # several threads free a save's memory in pieces
            if jax.process_index() == 0 and not stores.in_store(self.directory):
                sync(self.directory)  # its new name, before older ones are deleted
            self._saving, self._failures = None, 0
            if jax.process_index() == 0:
                if self._has_failed:
                    stores.delete_leftovers(self.directory)
                self._delete_old()

    def _delete_old(self) -> None:
        """Start to delete the checkpoints that need not be kept, now that a newer one is on disk."""
        self._wait_for_deletion()
        every = self._config.keep_every
        old = [step for step in self.steps()[: -self._config.keep_last] if not (every and step % every == 0)]

        def delete() -> None:
            try:
                stores.delete_steps(self.directory, old)
            except Exception as error:  # stores raise many kinds; the next save tries again
                self._not_deleted = f"{self.directory}: old checkpoints cannot be deleted: {first_line(error)}"

        self._deleting = threading.Thread(target=delete, name="delete checkpoints", daemon=True)
        self._deleting.start()

    def _wait_for_deletion(self) -> None:
        if self._deleting is not None:
            self._deleting.join(_MOVE_SECONDS)
            self._deleting = None
        if self._not_deleted:
            self._report(self._not_deleted)
            self._not_deleted = ""

    def clear(self, seconds: float = 30.0) -> None:
        """Delete what a failed save left, until its writers, which outlive it, are done, to try the step again."""
        deadline = time.monotonic() + seconds
        quiet = 0
        while quiet < _QUIET and time.monotonic() < deadline:
            quiet = 0 if stores.delete_leftovers(self.directory) else quiet + 1
            time.sleep(_CLEAR_SECONDS)

    @contextlib.contextmanager
    def _forgiving(self, step: int, forgiven: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            self._saving = None
            self._failures += 1
            self._has_failed = True
            problem = f"{self.directory}: step {step} cannot be saved: {first_line(error)}"
            with contextlib.suppress(Exception):
                self._manager.close()
            # The next save opens another manager: this one would raise its failure again and again.
            self._opened = None
            if jax.process_index() == 0 and not stores.in_store(self.directory):
                stores.delete_leftovers(self.directory)
            if self._failures > forgiven:
                raise RunError(problem) from error
            self._report(f"{problem}; the run goes on ({self._failures} of at most {forgiven} failures in a row)")

    def newest_whole(self, report: Callable[[str], None]) -> int | None:
        """Return the newest step whose files are whole, and move newer ones, which are not, to `damaged_beside`.

        `report` is called with a line about each of these. Every process looks at its share of the files. Raises
        RunError where there are checkpoints, and none is whole.
        """
        steps = self.steps()
        index, count = jax.process_index(), jax.process_count()
        problem, whole = "", None
        for i, step in enumerate(reversed(steps)):
            damage = find_damage(self.directory / str(step), index, count, identity=self._identity)
            problem = next((text for text in exchange(f"damage/{step}", damage) if text is not None), "")
            if not problem:
                whole = step
                break
            older = f"; going back to step {steps[-i - 2]}" if i + 1 < len(steps) else ""
            report(f"warning: the checkpoint of step {step} is damaged: {problem}{older}")
        if steps and whole is None:
            raise RunError(f"{self.directory}: no checkpoint is whole (step {steps[0]}: {problem})")
        last = -1 if whole is None else whole
        aside = [later for later in steps if later > last] + stores.strangers_in(self.directory)
        if exchange("aside", bool(aside)) != [False] * count:
            strangers = stores.strangers_in(self.directory)
            for step in aside if index == 0 else ():
                target = stores.damaged_beside(self.directory) / str(step)
                while target.exists():
                    target = target.with_name(target.name + "-again")
                if step in strangers:
                    report(f"warning: {self.directory / str(step)} is no checkpoint; moved to {target}")
                stores.move(self.directory / str(step), target)
            exchange("damaged", None, _MOVE_SECONDS)  # moved, for all to see
            if self._opened is not None:
                self._opened.reload()
        if not self._read_only:
            self._opened = self._manager  # only whole checkpoints are left for it to read
        return whole

    def restore(self, step: int, params: Any, rest: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Restore (params, rest, meta) of a step, laid out as the given abstract arrays. Raises RunError."""
        restored, meta = self._restore(step, params=params, rest=rest)
        restored = self._in_order(restored, meta.pop(LAYER_ORDER, None))
        return restored["params"], restored["rest"], meta

    def restore_params(self, step: int, params: Tree, *, averaged: bool = False) -> Tree:
        """Restore the parameters alone, or their average, though the run may go on meanwhile.

        Raises RunError also where the checkpoint is not whole, Vanished where it is gone, or was deleted meanwhile.
        """
        directory = self.directory / str(step)
        with Hold(directory):
            if problem := find_damage(directory, identity=self._identity):
                check_there(directory)
                older = (other for other in reversed(self.steps()) if other < step)
                whole = (s for s in older if not find_damage(self.directory / str(s), identity=self._identity))
                hint = next((f"; step {s} is whole" for s in whole), "")
                raise RunError(f"{self.directory}: the checkpoint of step {step} is damaged: {problem}{hint}")
            keys, tree = AVERAGE if averaged else ("params",), params
            for key in reversed(keys[1:]):
                tree = {key: tree}  # type: ignore[assignment]
            restored, meta = self._restore(step, partial=averaged, **{keys[0]: tree})
            found: Any = restored
            for key in keys:
                found = found[key]
        return self._in_order(found, meta.get(LAYER_ORDER))

    def _in_order(self, tree: Tree, saved: list[int] | None) -> Tree:
        wanted = self._layer_order or sorted(saved or ())
        return reorder_layers(tree, saved or sorted(wanted), wanted, donate=True)

    def _restore(self, step: int, *, partial: bool = False, **items: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the trees of arrays by item, and `meta`; `partial`: an item may have more than the tree asks for."""
        directory = epath.Path(self.directory / str(step))
        others = [other for other in self.steps() if other < step]
        hint = f" (to fall back to step {others[-1]}, move {step} away)" if others else ""
        reader = ocp.PyTreeCheckpointHandler() if partial else ocp.StandardCheckpointHandler()
        problem = f"step {step} cannot be restored{hint}"
        with contextlib.closing(reader), failing_as(self.directory, problem, read=directory):
            meta = read_meta(directory)
            args = {item: part_of(tree) if partial else ocp.args.StandardRestore(tree) for item, tree in items.items()}
            return {item: reader.restore(directory / item, args=args[item]) for item in items}, meta

    def close(self) -> None:
        """Wait for the last save, then close. Raises RunError where it fails."""
        if self._opened is None:
            return
        self._settle(0)
        self._wait_for_deletion()
        with contextlib.suppress(Exception):  # every error that matters was raised above
            self._manager.close()

    def abandon(self) -> None:
        """Give up a save that another process can no longer take part in, instead of waiting for it."""
        self._saving = None
        self._opened = None


@contextlib.contextmanager
def failing_as(directory: stores.Directory, problem: str, *, read: stores.Directory | None = None) -> Iterator[None]:
    """Raise RunError, with the problem, for any error inside; Vanished where the checkpoint `read` is gone."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds
        if read is not None:
            check_there(read)
        raise RunError(f"{directory}: {problem}: {first_line(error)}") from error


def part_of(tree: object) -> ocp.args.CheckpointArgs:
    """Return what asks Orbax for these arrays of a larger tree, laid out as they are described."""
    described = ocp.checkpoint_utils.construct_restore_args(tree)
    return ocp.args.PyTreeRestore(item=tree, restore_args=described, partial_restore=True)


def first_line(error: Exception) -> str:
    """Return an error's first line, shortened where it is long."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= _LINE else f"{line[:_LINE]}..."


@functools.cache
def spare_memory() -> None:
    """Have Orbax ask TensorStore less often for JSON, of which TensorStore 0.1.86 leaks some: 40 KB a save.

    Orbax asks twice for counters, only to log them, and at every array for the spec of its directory.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils as utils

    if not hasattr(utils, "get_tensorstore_raw_bytes") or not hasattr(utils, "ts"):
        return  # another version, which may not need it
    utils.get_tensorstore_raw_bytes = lambda direction=None: 0
    utils.ts = _TensorStore(utils.ts)


class _TensorStore:
    """TensorStore's module, which remembers the specs of directories."""

    def __init__(self, module: Any):
        self._module, self.KvStore = module, _KvStore(module.KvStore)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


class _KvStore:
    def __init__(self, real: Any):
        self._real = real
        resolved = functools.lru_cache(maxsize=64)(lambda text: real.Spec(json.loads(text)).to_json())

        class Spec:
            def __init__(self, spec: dict[str, object]):
                self.spec = spec

            def to_json(self) -> dict[str, object]:
                spec = self.spec
                # TensorStore returns a file's path as it was given, and each step has other paths.
                request = spec | {"path": "/"} if spec.get("driver") == "file" else spec
                answer = dict(resolved(json.dumps(request)))
                return answer | {"path": spec["path"]} if answer.get("path") == "/" else answer

        self.Spec = Spec

    def open(self, spec: Any, **options: Any) -> Any:
        return self._real.open(spec.spec if isinstance(spec, self.Spec) else spec, **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)


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
