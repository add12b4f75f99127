"""Where checkpoints are: a directory, or a place in an object store, which has no renames and no directories."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shutil
from pathlib import Path
from typing import Any, TypeAlias, cast
from urllib.parse import urlsplit

from etils import epath

from trainfw.checkpoint.config import STORES, CheckpointConfig
from trainfw.errors import UserError, pip_install

Directory: TypeAlias = Path
"""Of checkpoints, or of one of them: in a store an epath.Path, which has a Path's methods but for those below."""

COMMITTED = "commit_success.txt"
"""In a store: Orbax writes it into a checkpoint once all else is there."""


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


def damaged_beside(directory: Directory) -> Directory:
    """Where damaged checkpoints go: RUN/damaged for RUN/checkpoints, else DIRECTORY-damaged."""
    return directory.with_name("damaged" if directory.name == "checkpoints" else f"{directory.name}-damaged")


def steps_in(directory: Directory) -> list[int]:
    """Steps of the finished checkpoints in a directory, which need not exist.

    Raises UserError for a file, and where a store does not answer, or has no such bucket.
    """
    if not in_store(directory):
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory}: is a file; checkpoints need a directory")
        if not directory.is_dir():
            return []
        # Orbax renames a checkpoint to its step when it is whole.
        return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())
    store = _filesystem(directory)
    try:
        names = [path.rstrip("/").rpartition("/")[2] for path in store.ls(str(directory), detail=False)]
    except FileNotFoundError as error:
        if "bucket does not exist" in str(error):
            raise UserError(f"{directory}: {error}") from None
        return []
    except Exception as error:  # each library raises its own kinds
        raise UserError(f"{directory}: cannot be listed: {error}") from error
    return sorted(int(name) for name in names if name.isdecimal() and store.exists(f"{directory}/{name}/{COMMITTED}"))


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


def commit_by_file(directory: Directory) -> Any:
    """Orbax's way to finish a checkpoint where nothing can be renamed; None for its default."""
    if not in_store(directory):
        return None
    from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath  # public by no other name

    return CommitFileTemporaryPath


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

    def spec(path: Any) -> dict[str, Any]:
        return _s3_spec(str(path)) if _is_s3(path) else of_gcs(path)

    gcs_utils.get_kvstore_for_gcs = spec
    tensorstore_utils._use_gcs_driver = lambda path: _is_s3(path) or is_remote(path)


def _is_s3(path: Any) -> bool:
    return str(path).startswith("s3:/")


def _s3_spec(path: str) -> dict[str, Any]:
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
