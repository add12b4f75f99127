"""Places of checkpoints: directories, and places in object stores, which have no renames and no directories."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast
from urllib.parse import urlsplit

from etils import epath

from trainfw.checkpoint.config import MANIFEST, STORES, CheckpointConfig
from trainfw.checkpoint.holding import Held, Hold, Vanished
from trainfw.errors import UserError, pip_install

Directory: TypeAlias = Path
"""Directory of checkpoints, or of one; in a store an epath.Path, whose missing methods are written below."""

COMMITTED = "commit_success.txt"
"""File that Orbax writes last into a checkpoint in a store."""

ORBAX_METADATA = "_CHECKPOINT_METADATA"

_DELETED = ".orbax-checkpoint-tmp-deleted"
"""End of the name of a checkpoint that is being deleted; Orbax removes such names after a crash."""

_PATTERN = re.compile(r"[*?\[\\\x00-\x1f\x7f]")
"""Characters that no directory's name may have. Orbax finds the parts of several processes by a pattern that includes
the name: with these it would find nothing, or the parts of another run."""


def locate(run: Path, config: CheckpointConfig) -> Directory:
    """Return the directory of a run's checkpoints. Raises UserError where a store's library is not installed."""
    if config.directory is None:
        return run / "checkpoints"
    scheme, is_store, _ = config.directory.partition("://")
    if not is_store:
        return Path(os.path.expanduser(config.directory))
    library, extra = STORES[scheme]
    try:
        importlib.import_module(library)
    except ImportError:
        needs = f"needs the package {library}: {pip_install(extra)}"
        raise UserError(f"checkpoint.directory = {config.directory}: {needs}") from None
    import fsspec

    for store in STORES:  # no cache of listings: TensorStore and other processes write past fsspec
        fsspec.config.conf.setdefault(store, {}).setdefault("use_listings_cache", False)
    if scheme == "s3":
        _teach_orbax()
    return cast(Path, epath.Path(config.directory.rstrip("/")))


def in_store(directory: Directory) -> bool:
    """Tell whether a directory is a place in an object store."""
    return "://" in str(directory)


def check_name(directory: Directory) -> None:
    """Raise UserError for a directory under whose name checkpoints cannot be written."""
    path = str(directory) if in_store(directory) else os.path.abspath(directory)
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path!r}: is not UTF-8; checkpoints need another directory") from None
    if match := _PATTERN.search(path):
        raise UserError(
            f"{path!r}: checkpoints cannot be kept under a name with {match.group()!r} in it (to the library that "
            "writes them it is a pattern); choose another run_dir (--run-dir), working directory or "
            "checkpoint.directory"
        )


def damaged_beside(directory: Directory) -> Directory:
    """Return the directory for damaged checkpoints: RUN/damaged for RUN/checkpoints, else DIRECTORY-damaged."""
    return directory.with_name("damaged" if directory.name == "checkpoints" else f"{directory.name}-damaged")


def steps_in(directory: Directory) -> list[int]:
    """List the steps of the finished checkpoints in a directory, which need not exist.

    Raises UserError for a file, for a checkpoint without the right to read it, and where a store does not answer or has
    no such bucket.
    """
    if in_store(directory):
        store = _filesystem(directory)
        return [step for step in _numbers_in(directory) if store.exists(f"{directory}/{step}/{COMMITTED}")]
    # Listed twice where there is none: one may have replaced another meanwhile.
    return _finished(directory) or _finished(directory)


def _finished(directory: Directory) -> list[int]:
    # Orbax renames a whole checkpoint to its step. A directory of such a name without these files is no checkpoint.
    marks = (MANIFEST, COMMITTED, ORBAX_METADATA)
    numbers = _numbers_in(directory)
    for path in (directory / str(step) for step in numbers):
        if not os.access(path, os.R_OK | os.X_OK) and os.path.lexists(path):  # it would seem to hold nothing
            raise UserError(f"{path}: cannot be read: {os.strerror(errno.EACCES)}")

    def is_finished(checkpoint: Path) -> bool:
        notes = checkpoint / ORBAX_METADATA
        # Orbax reads it for every step, and would never finish with a pipe, a device or what a link leads to.
        readable = not os.path.lexists(notes) or (notes.is_file() and not notes.is_symlink())
        return readable and any(os.path.lexists(checkpoint / mark) for mark in marks)

    return [step for step in numbers if is_finished(directory / str(step))]


def strangers_in(directory: Directory) -> list[int]:
    """List the numbers of directories that have a checkpoint's name, and are none."""
    return [] if in_store(directory) else sorted(set(_numbers_in(directory)) - set(_finished(directory)))


def _numbers_in(directory: Directory) -> list[int]:
    if not in_store(directory):
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory}: is a file; checkpoints need a directory")
        if not directory.is_dir():
            return []
        try:
            return sorted(int(p.name) for p in directory.iterdir() if _is_number(p.name) and p.is_dir())
        except OSError as error:
            raise UserError(f"{directory}: cannot be listed: {error.strerror}") from None
    try:
        return sorted(int(name) for name in _names_in_store(directory) if _is_number(name))
    except FileNotFoundError as error:
        if "bucket does not exist" in str(error):
            raise UserError(f"{directory}: {error}") from None
        return []
    except Exception as error:  # each library raises its own kinds
        raise UserError(f"{directory}: cannot be listed: {error}") from error


def _names_in_store(directory: Directory) -> list[str]:
    listed = _filesystem(directory).ls(str(directory), detail=False)
    return [path.rstrip("/").rpartition("/")[2] for path in listed]


def _is_number(name: str) -> bool:
    """Tell whether a name is a step as trainfw writes it: no 08, no other script's digits."""
    return name.isascii() and name.isdecimal() and len(name) < 20 and str(int(name)) == name


def list_store(directory: Directory) -> dict[str, tuple[int, str]]:
    """List (bytes, the store's own tag of the contents) of every object below, by name, without reading any."""
    objects = {}
    root = str(directory).split("://", 1)[1]
    for path, about in _filesystem(directory).find(str(directory), detail=True).items():
        tag = about.get("ETag") or about.get("etag") or about.get("md5Hash") or ""
        objects[path.removeprefix(f"{root}/")] = (int(about["size"]), str(tag).strip('"'))
    return objects


def delete_leftovers(directory: Directory) -> bool:
    """Delete what failed saves left, while no save goes on; tell whether there was anything.

    Their writers may outlive Orbax's own deletion of it.
    """
    if in_store(directory):
        with contextlib.suppress(Exception):  # stores raise many kinds; the next save tries again
            whole = {str(step) for step in steps_in(directory)}
            left = [name for name in set(_names_in_store(directory)) - whole if name.isdecimal()]
            for name in left:
                _filesystem(directory).rm(f"{directory}/{name}", recursive=True)
            return bool(left)
        return False
    leftovers = list(directory.glob("*.orbax-checkpoint-tmp*"))
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    return bool(leftovers)


def delete_steps(directory: Directory, steps: Sequence[int]) -> None:
    """Delete checkpoints, except those that a process on this machine holds; and the remains of an earlier try."""
    for left in [] if in_store(directory) else directory.glob(f"*{_DELETED}"):
        shutil.rmtree(left, ignore_errors=True)
    for step in steps:
        doomed = directory / str(step)
        if in_store(directory):
            store = _filesystem(directory)
            store.rm(f"{doomed}/{COMMITTED}")  # from here on it is no checkpoint
            store.rm(str(doomed), recursive=True)
            continue
        with contextlib.suppress(Vanished, Held), Hold(doomed, alone=True):
            # One move: a process that lists checkpoints finds a whole one, or none.
            shutil.rmtree(doomed.rename(directory / f"{step}{_DELETED}"))


def move(source: Directory, target: Directory) -> None:
    """Move a checkpoint to another place, which does not exist; a store does so by copies."""
    if in_store(source):
        store = _filesystem(source)
        names = list(list_store(source))
        store.rm(f"{source}/{COMMITTED}")  # first: if this is interrupted, the source is no checkpoint any more
        names.remove(COMMITTED)
        store.copy([f"{source}/{name}" for name in names], [f"{target}/{name}" for name in names])
        store.rm(str(source), recursive=True)
    else:
        target.parent.mkdir(exist_ok=True)
        source.rename(target)


def array_store(directory: Directory) -> dict[str, object]:
    """Return TensorStore's spec of the arrays in a directory of a checkpoint."""
    path = str(directory)
    if not in_store(directory):
        base: dict[str, Any] = {"driver": "file", "path": f"{path}/"}
    elif _is_s3(path):
        base = _s3_spec(path)
    else:
        bucket, _, prefix = path.split("://", 1)[1].partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": f"{prefix}/"}
    return {"driver": "ocdbt", "base": base}


def _filesystem(directory: Directory) -> Any:
    import fsspec

    return fsspec.filesystem(urlsplit(str(directory)).scheme)


@functools.cache
def _teach_orbax() -> None:
    """Let Orbax write arrays to S3: it knows directories and GCS alone (until google/orbax pull request 2739)."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    if not (hasattr(gcs_utils, "get_kvstore_for_gcs") and hasattr(tensorstore_utils, "_use_gcs_driver")):
        raise UserError("checkpoint.directory: s3:// is known to work with orbax-checkpoint 0.12.8; install that")
    of_gcs, is_remote = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._use_gcs_driver

    def spec(path: object) -> dict[str, object]:
        return _s3_spec(str(path)) if _is_s3(path) else of_gcs(path)

    gcs_utils.get_kvstore_for_gcs = spec
    tensorstore_utils._use_gcs_driver = lambda path: _is_s3(path) or is_remote(path)


def _is_s3(path: object) -> bool:
    return str(path).startswith("s3:/")


def _s3_spec(path: str) -> dict[str, object]:
    """Return TensorStore's spec of a place in a bucket, with the endpoint and region that boto3 (and so s3fs) reads."""
    bucket, _, prefix = path.removeprefix("s3:").lstrip("/").partition("/")
    # This one path is a file; TensorStore takes all others as prefixes of keys.
    end = "" if prefix.endswith("/_sharding") else "/"
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": prefix.rstrip("/") + end}
    environ = os.environ
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if endpoint := environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint.rstrip("/")
        region = region or "us-east-1"  # TensorStore asks AWS otherwise
    if region:
        spec["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in environ:  # without this it looks for files first, and logs each that is missing
        spec["aws_credentials"] = {"type": "environment"}
    return spec
