"""A checkpoint's manifest: its run, its step and its files, by which damage of a disk, a copy or a crash is noticed.

It has each file's size and SHA-256. In an object store, which returns the very bytes that it was given, the store's own
tag stands for SHA-256, so that no file has to be read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from trainfw.checkpoint.config import MANIFEST
from trainfw.checkpoint.identity import Identity, refuse_newer, stamp
from trainfw.checkpoint.stores import COMMITTED, ORBAX_METADATA, Directory, in_store, list_store

META_FILE = "meta/metadata"


class Damage(Exception):
    """Reason, in words, why a checkpoint is not trusted."""


class _Checked(BaseModel):
    # Keys of other versions pass: the format (`identity.FORMAT`) tells which versions can read a checkpoint.
    model_config = ConfigDict(strict=True, extra="allow")


class _Place(_Checked):
    next_row: int = Field(ge=0)
    order: str


class _MixedPlace(_Checked):
    """Place in a mixture: where its stage began, and the rows that each source has had."""

    next_row: int = Field(ge=0)
    stage: int = Field(ge=0)
    first_row: int = Field(ge=0)
    used: dict[str, Annotated[int, Field(ge=0)]]
    counts: list[Annotated[int, Field(ge=0)]]
    shares: str
    orders: dict[str, str]


_AnyPlace = Annotated[
    Annotated[_Place, Tag("one")] | Annotated[_MixedPlace, Tag("mixed")],
    Discriminator(lambda place: "mixed" if isinstance(place, dict) and "stage" in place else "one"),
]


class _Weights(_Checked):
    path: str
    hash: str


class _Meta(_Checked):
    """`data` is the place in the rows, `base` the weights that the run began with, `cut` the parts of a batch."""

    data: _AnyPlace | None = None
    held_out: str | None = None
    recipe: dict[str, Any] | None = None
    base: _Weights | None = None
    cut: dict[str, int | None] = Field(default_factory=dict)
    guard: dict[str, float | list[float]] = Field(default_factory=dict)
    layer_order: list[int] | None = None


def parse_meta(content: bytes, *, of_run: bool = False) -> dict[str, Any]:
    """Parse a checkpoint's metadata. Raises Damage where it does not have the right types.

    Args:
        of_run: require the recipe and the place in the data, which a run needs to go on.
    """
    try:
        meta = json.loads(content)
        _Meta.model_validate(meta)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("one", "mixed")) or "all of it"
        raise Damage(f"{META_FILE}: {where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    except (ValueError, RecursionError):
        raise Damage(f"{META_FILE} is no JSON") from None
    order = meta.get("layer_order")
    if order is not None and sorted(order) != list(range(len(order))):
        raise Damage(f"{META_FILE}: layer_order: expected each layer once")
    for key in ("recipe", "data") if of_run else ():
        if meta.get(key) is None:
            raise Damage(f"{META_FILE} has no {key}")
    return dict(meta)


def digest_recipe(meta: Mapping[str, object]) -> str | None:
    """Return the SHA-256 of the recipe in `meta`, in whatever order its keys are; None where there is none."""
    recipe = json.loads(json.dumps(meta.get("recipe")))
    return None if recipe is None else hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


_LATER = {MANIFEST, ORBAX_METADATA, COMMITTED}
"""Files that no manifest lists: itself, and Orbax's notes of when the checkpoint was committed."""

_THREADS = 4
"""Threads that hash files: hashlib releases the interpreter's lock, so that one reads while another computes."""

_MOST_JSON = 2**28
"""Most bytes of a manifest, or of `meta`: trainfw writes none so large."""

_BLOCK = 2**20


@dataclass(frozen=True)
class Manifest:
    """Files of a checkpoint, its run and its step. Manifests of format 1 name neither run nor step."""

    files: dict[str, tuple[int, str]]
    """(bytes, SHA-256 or the store's tag) by name."""
    tags: bool
    """Flag: a store's tags stand for SHA-256."""
    place: str | None = None
    step: int | None = None
    run: str | None = None
    recipe: str | None = None
    digest: str = ""
    """SHA-256 of the manifest itself."""


def write_manifest(directory: Directory, step: int, identity: Identity | None, meta: Mapping[str, object]) -> None:
    """Write the manifest of a checkpoint all of whose files are under `directory`."""
    files = inventory(directory)
    whose = {"step": step, "run": identity and identity.run, "recipe": digest_recipe(meta)}
    listed = {"place": str(directory), "tag": files} if in_store(directory) else {"sha256": files}
    (directory / MANIFEST).write_text(json.dumps(stamp() | whose | listed, indent=0), encoding="utf-8")


def read_manifest(directory: Directory) -> Manifest:
    """Read a checkpoint's manifest. Raises Damage where there is none; UserError for one of a newer trainfw."""
    try:
        content = read_regular(directory / MANIFEST, _MOST_JSON)
    except FileNotFoundError:
        raise Damage(f"it has no {MANIFEST}") from None
    except OSError as error:
        raise Damage(f"{MANIFEST} {error.strerror}") from None
    try:
        fields = json.loads(content)
        tags = "sha256" not in fields
        listed = fields["tag" if tags else "sha256"].items()
        files = {name: (size, digest) for name, (size, digest) in listed}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damage(f"{MANIFEST} cannot be read") from None
    refuse_newer(fields, directory)
    if not files:
        raise Damage(f"{MANIFEST} lists no files")
    for name, (size, digest) in files.items():
        path = PurePosixPath(name)
        # Below the checkpoint, and as `write_manifest` writes it.
        inside = str(path) == name != "." and not path.is_absolute() and ".." not in path.parts and "\0" not in name
        if not (inside and type(size) is int and size >= 0 and isinstance(digest, str)):
            raise Damage(f"{MANIFEST} lists {name[:80]!r}, which is no file of a checkpoint")
    place, step, run, recipe = (fields.get(key) for key in ("place", "step", "run", "recipe"))
    texts = all(value is None or isinstance(value, str) for value in (place, run, recipe))
    if not texts or not (step is None or type(step) is int) or ("format" in fields and step is None):
        raise Damage(f"{MANIFEST} does not say which step of which run it is")
    return Manifest(files, tags, place, step, run, recipe, hashlib.sha256(content).hexdigest())


def inventory(directory: Directory) -> dict[str, tuple[int, str]]:
    """Return (bytes, SHA-256 or the store's tag) of every file of a checkpoint, by name."""
    if in_store(directory):
        return {name: about for name, about in sorted(list_store(directory).items()) if name not in _LATER}
    paths: Any = (path for path in directory.rglob("*") if path.is_file() and path.name not in _LATER)
    return {name: _describe(directory / name) for name in sorted(p.relative_to(directory).as_posix() for p in paths)}


def find_mismatch(directory: Directory, identity: Identity | None = None) -> str | None:
    """Say where a checkpoint's manifest, its place and `meta` disagree; None where they agree.

    Its directory has to be that of its step, its run that of `identity` (None: any), its recipe the one in `meta`. Only
    the manifest and `meta` are read. Raises UserError for a checkpoint of a newer trainfw.
    """
    try:
        _check_mismatch(directory, read_manifest(directory), identity)
    except Damage as error:
        return str(error)
    return None


def _check_mismatch(directory: Directory, manifest: Manifest, identity: Identity | None) -> None:
    if manifest.step is not None and str(manifest.step) != directory.name:
        raise Damage(f"it is step {manifest.step}, not {directory.name}")
    if identity is not None and manifest.run != identity.run:
        if manifest.run is not None:
            raise Damage(f"it is of another run ({manifest.run[:32]}; this is {identity.run})")
        if identity.older.get(directory.name) != manifest.digest:
            raise Damage("it does not say of which run it is, and was not here when this run was given its id")
    if META_FILE not in manifest.files and identity is None:
        return
    content = _meta_bytes(directory)
    size, digest = manifest.files.get(META_FILE, (0, ""))
    if len(content) != size:
        raise Damage(f"{META_FILE} has {len(content):,} bytes, not {size:,}")
    if not manifest.tags and hashlib.sha256(content).hexdigest() != digest:
        raise Damage(f"{META_FILE} is not what was saved (its SHA-256 differs)")
    meta = parse_meta(content, of_run=identity is not None)
    if manifest.recipe is not None and digest_recipe(meta) != manifest.recipe:
        raise Damage(f"the recipe in {META_FILE} is not the one that {MANIFEST} names")


def read_meta(directory: Directory) -> dict[str, Any]:
    """Read the metadata beside the arrays. Raises Damage where it cannot be read."""
    return parse_meta(_meta_bytes(directory))


def _meta_bytes(directory: Directory) -> bytes:
    try:
        return read_regular(directory / META_FILE, _MOST_JSON)
    except OSError as error:
        raise Damage(f"{META_FILE} {_why(error)}") from None


def find_damage(
    directory: Directory, share: int = 0, shares: int = 1, *, identity: Identity | None = None
) -> str | None:
    """Say how a checkpoint is damaged; None where it is as it was saved.

    A copy from or to a store has other tags: only sizes are compared then. Raises UserError for a checkpoint of a newer
    trainfw.

    Args:
        share: number of the share of files to look at, one of `shares` equal ones.
        identity: the run that the checkpoint has to belong to, if one is known.
    """
    try:
        manifest = read_manifest(directory)
        _check_mismatch(directory, manifest, identity)
        if in_store(directory):
            copied = manifest.place != str(directory)
            return next(_differences(inventory(directory), manifest.files, copied), None)
        _check_kinds(directory)
    except Damage as error:
        return str(error)
    except OSError as error:
        return f"it {_why(error)}"
    listed = dict(sorted(manifest.files.items())[share::shares])
    if manifest.tags:
        present = {name: ((directory / name).stat().st_size, "") for name in listed if (directory / name).is_file()}
        return next(_differences(present, listed, True), None)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(listed, pool.map(lambda name: _damage(directory / name, *listed[name]), listed))
        return next((f"{name} {problem}" for name, problem in found if problem), None)


def _check_kinds(directory: Directory) -> None:
    """Raise Damage for any path that is no file or directory: a link leads elsewhere, and a FIFO never ends."""

    def fail(error: OSError) -> None:
        raise error

    for where, directories, files in os.walk(directory, onerror=fail):
        for name in (*directories, *files):
            path = os.path.join(where, name)
            with contextlib.suppress(FileNotFoundError):
                kind = os.lstat(path).st_mode
                if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                    raise Damage(f"{os.path.relpath(path, directory)} {_kind(kind)}")


def _differences(
    present: Mapping[str, tuple[int, str]], saved: Mapping[str, tuple[int, str]], sizes_alone: bool
) -> Iterator[str]:
    for name, (size, tag) in saved.items():
        if name not in present:
            yield f"{name} is missing"
        elif present[name][0] != size:
            yield f"{name} has {present[name][0]:,} bytes, not {size:,}"
        elif not sizes_alone and present[name][1] != tag:
            yield f"{name} is not what was saved (its tag differs)"


def _damage(path: Directory, size: int, digest: str) -> str:
    """Say how a file differs from what was saved; nothing where it does not."""
    try:
        actual = os.lstat(path).st_size
        if actual != size:  # without reading it
            return f"has {actual:,} bytes, not {size:,}"
        return "" if _describe(path) == (size, digest) else "is not what was saved (its SHA-256 differs)"
    except OSError as error:
        return _why(error)


def _describe(path: Directory) -> tuple[int, str]:
    """Return a file's (bytes, SHA-256)."""
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest, left = hashlib.sha256(), size
        while left and (block := file.read(min(left, _BLOCK))):  # without bytes that are appended meanwhile
            digest.update(block)
            left -= len(block)
        return size, digest.hexdigest()


def read_regular(path: Directory, most: int) -> bytes:
    """Read a file of `most` bytes or fewer. Raises OSError also for a link, a FIFO or a device."""
    if in_store(path):
        content: bytes = path.read_bytes()
        return content
    with _open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"has more than {most:,} bytes")
    return content


def _open_regular(path: Directory) -> io.BufferedReader:
    kind = os.lstat(path).st_mode
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, _kind(kind))
    # These flags are for a file that was replaced just now: no link is followed, and no FIFO waits for a writer.
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a directory", stat.S_IFSOCK: "a socket"}
    return f"is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file"


def _why(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return str(error.strerror) if error.errno in (errno.EINVAL, errno.EFBIG) else f"cannot be read: {error.strerror}"
