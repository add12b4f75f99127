"""Where checkpoints are: a directory, or a place in an object store, which has no renames and no directories."""

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
from trainfw.checkpoint.holding import Held, Vanished, hold
from trainfw.errors import UserError, pip_install

Directory: TypeAlias = Path
"""Of checkpoints, or of one of them: in a store an epath.Path, which has a Path's methods but for those below."""

COMMITTED = "commit_success.txt"
"""In a store: Orbax writes it into a checkpoint once all else is there."""

ORBAX_METADATA = "_CHECKPOINT_METADATA"

_DELETED = ".orbax-checkpoint-tmp-deleted"
"""Ends the name of one that is being deleted, by which Orbax knows what a crash left."""

_PATTERN = re.compile(r"[*?\[\\\x00-\x1f\x7f]")
"""Orbax finds the parts of several processes by a pattern, of which the directory's own name becomes a part: it finds
nothing, or what another run in the same directory writes."""


def locate(run: Path, config: CheckpointConfig) -> Directory:
    """Where the checkpoints of the run in the directory `run` are. Raises UserError without the store's library."""
    if config.directory is None:
        return run / "checkpoints"
    scheme, found, _ = config.directory.partition("://")
    if not found:
        return Path(os.path.expanduser(config.directory))
    library, extra = STORES[scheme]
    try:
        importlib.import_module(library)
    except ImportError:
        raise UserError(
            f"checkpoint.directory = {config.directory}: needs the package {library}: {pip_install(extra)}"
        ) from None
    _see_what_others_write()
    if scheme == "s3":
        _teach_orbax()
    return cast(Path, epath.Path(config.directory.rstrip("/")))


def in_store(directory: Directory) -> bool:
    return "://" in str(directory)


def check_name(directory: Directory) -> None:
    """Raise UserError for a place whose name checkpoints cannot be written under."""
    path = str(directory) if in_store(directory) else os.path.abspath(directory)
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path!r}: is not UTF-8; checkpoints need another directory") from None
    if found := _PATTERN.search(path):
        raise UserError(
            f"{path!r}: checkpoints cannot be kept under a name with {found.group()!r} in it (to the library that "
            "writes them it is a pattern); choose another run_dir (--run-dir), working directory or "
            "checkpoint.directory"
        )


def damaged_beside(directory: Directory) -> Directory:
    """Where damaged checkpoints go: RUN/damaged for RUN/checkpoints, else DIRECTORY-damaged."""
    return directory.with_name("damaged" if directory.name == "checkpoints" else f"{directory.name}-damaged")


def steps_in(directory: Directory) -> list[int]:
    """Steps of the finished checkpoints in a directory, which need not exist.

    Raises UserError for a file, for a checkpoint that may not be looked into, and where a store does not answer, or
    has no such bucket.
    """
    if in_store(directory):
        store = _filesystem(directory)
        return [step for step in _numbers_in(directory) if store.exists(f"{directory}/{step}/{COMMITTED}")]
    # Twice, where there is none: one may have taken the place of another while they were listed.
    return _finished(directory) or _finished(directory)


def _finished(directory: Directory) -> list[int]:
    # Orbax renames a checkpoint to its step when it is whole. A directory of that name alone is none.
    marks = (MANIFEST, COMMITTED, ORBAX_METADATA)
    numbers = _numbers_in(directory)
    for path in (directory / str(step) for step in numbers):
        if not os.access(path, os.R_OK | os.X_OK) and os.path.lexists(path):  # it would seem to hold nothing
            raise UserError(f"{path}: cannot be read: {os.strerror(errno.EACCES)}")
    return [
        step
        for step in numbers
        if any(os.path.lexists(directory / str(step) / mark) for mark in marks)
        and not _stops_orbax(directory / str(step) / ORBAX_METADATA)
    ]


def _stops_orbax(file: Path) -> bool:
    """Tell whether it is a pipe, a device or a link: Orbax reads this file of every step, and would never finish."""
    return os.path.lexists(file) and (file.is_symlink() or not file.is_file())


def strangers_in(directory: Directory) -> list[int]:
    """Numbers of directories that are called as a checkpoint's, and are none."""
    return [] if in_store(directory) else sorted(set(_numbers_in(directory)) - set(_finished(directory)))


def _numbers_in(directory: Directory) -> list[int]:
    if not in_store(directory):
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory}: is a file; checkpoints need a directory")
        if not directory.is_dir():
            return []
        try:
            names = [path.name for path in directory.iterdir() if _is_number(path.name) and path.is_dir()]
        except OSError as error:
            raise UserError(f"{directory}: cannot be listed: {error.strerror}") from None
        return sorted(map(int, names))
    try:
        listed = _filesystem(directory).ls(str(directory), detail=False)
        names = [path.rstrip("/").rpartition("/")[2] for path in listed]
    except FileNotFoundError as error:
        if "bucket does not exist" in str(error):
            raise UserError(f"{directory}: {error}") from None
        return []
    except Exception as error:  # each library raises its own kinds
        raise UserError(f"{directory}: cannot be listed: {error}") from error
    return sorted(int(name) for name in names if _is_number(name))


def _is_number(name: str) -> bool:
    """Tell whether it is a step as we write it: no 08, no other script's digits."""
    return name.isascii() and name.isdecimal() and len(name) < 20 and str(int(name)) == name


def list_store(directory: Directory) -> dict[str, tuple[int, str]]:
    """(bytes, the store's own tag of the contents) of every object below, by name, without reading any."""
    found = {}
    root = str(directory).split("://", 1)[1]
    for path, about in _filesystem(directory).find(str(directory), detail=True).items():
        tag = about.get("ETag") or about.get("etag") or about.get("md5Hash") or ""
        found[path.removeprefix(f"{root}/")] = (int(about["size"]), str(tag).strip('"'))
    return found


def delete_leftovers(directory: Directory) -> bool:
    """What saves that failed have left, while none goes on; whether there was any.

    Their writers may outlive Orbax's own deletion of it.
    """
    if in_store(directory):
        with contextlib.suppress(Exception):  # of many kinds; there is a next time
            whole = {str(step) for step in steps_in(directory)}
            listed = _filesystem(directory).ls(str(directory), detail=False)
            left = [
                name for name in {path.rstrip("/").rpartition("/")[2] for path in listed} - whole if name.isdecimal()
            ]
            for name in left:
                _filesystem(directory).rm(f"{directory}/{name}", recursive=True)
            return bool(left)
        return False
    leftovers = list(directory.glob("*.orbax-checkpoint-tmp*"))
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    return bool(leftovers)


def delete_steps(directory: Directory, steps: Sequence[int]) -> None:
    """Delete checkpoints, but those that a process on this machine holds; and what an earlier try has left."""
    for left in [] if in_store(directory) else directory.glob(f"*{_DELETED}"):
        shutil.rmtree(left, ignore_errors=True)
    for step in steps:
        doomed = directory / str(step)
        if in_store(directory):
            store = _filesystem(directory)
            store.rm(f"{doomed}/{COMMITTED}")  # from here on it is none
            store.rm(str(doomed), recursive=True)
            continue
        with contextlib.suppress(Vanished, Held), hold(doomed, alone=True):
            # In one move: whoever lists them finds a whole one, or none.
            shutil.rmtree(doomed.rename(directory / f"{step}{_DELETED}"))


def move(source: Directory, target: Directory) -> None:
    """A checkpoint to another place, which does not exist; in a store, by copies."""
    if in_store(source):
        store = _filesystem(source)
        names = list(list_store(source))
        store.rm(f"{source}/{COMMITTED}")  # whoever is killed in between has not left it for another time
        names.remove(COMMITTED)
        store.copy([f"{source}/{name}" for name in names], [f"{target}/{name}" for name in names])
        store.rm(str(source), recursive=True)
    else:
        target.parent.mkdir(exist_ok=True)
        source.rename(target)


def commit_by_file(directory: Directory) -> object:
    """Orbax's way to finish a checkpoint where nothing can be renamed; None for its default."""
    if not in_store(directory):
        return None
    from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath  # public by no other name

    return CommitFileTemporaryPath


def array_store(directory: Directory) -> dict[str, object]:
    """TensorStore's spec of the arrays in a directory of a checkpoint."""
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
def _see_what_others_write() -> None:
    """TensorStore and other processes write past fsspec, whose listings would be out of date."""
    import fsspec

    for scheme in STORES:
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


@functools.cache
def _teach_orbax() -> None:
    """Arrays in S3. Orbax's own part knows directories and GCS (google/orbax pull request 2739 is to add S3)."""
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
    """TensorStore's, of a place in a bucket; with the endpoint and region that boto3, and so s3fs, reads."""
    bucket, _, prefix = path.removeprefix("s3:").lstrip("/").partition("/")
    # Its one file that TensorStore writes by its own name; all else is a prefix of keys.
    end = "" if prefix.endswith("/_sharding") else "/"
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": prefix.rstrip("/") + end}
    environ = os.environ
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if endpoint := environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint.rstrip("/")
        region = region or "us-east-1"  # TensorStore asks AWS otherwise
    if region:
        spec["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in environ:  # else it looks for files first, and complains of each that is not there
        spec["aws_credentials"] = {"type": "environment"}
    return spec
