"""Files of object stores and of other places that fsspec knows: listed, and read in blocks, with patience."""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from trainfw.errors import RunError, UserError, did_you_mean, first_line, pip_install

T = TypeVar("T")

BLOCK = 2**23
"""Bytes that are asked of a store at once."""
START_SECONDS, HUB_SECONDS = 15.0, 2.0
"""Seconds for which a store that fails is asked again at the start, while its files are listed; the second for the
Hugging Face hub, which has a cache on this machine."""
READ_SECONDS = 300.0
"""Seconds for which it is asked again while it is read, counted from its last answer."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
"""Seconds between two tries: twice as long after each, up to the longest."""
_SAID_SECONDS = 60.0
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_USUAL = ("s3", "gs", "hf", "abfs", "https")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_HUB = re.compile(r"hf://(?:(datasets|spaces|models)/)?([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")
_MARKS = ("ETag", "etag", "blob_id", "md5Hash", "content_md5", "checksum", "sha256", "generation", "crc32c")
"""Keys, in what stores say of an object, of a value that is another for other contents."""
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
_FATAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, TypeError, ImportError, KeyError)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound")
_MAGIC, _HIDDEN = re.compile(r"[*?\[]"), re.compile(r"(^|/)\.")


def is_remote(name: str) -> bool:
    """Tell whether a name of a source is a URL, such as s3://bucket/texts/."""
    return _URL.match(name) is not None


class StoreError(UserError):
    """A file of a store that cannot be read, whatever is in it."""


class Blocks(Protocol):
    """Reader of a file's blocks."""

    size: int
    """Bytes of a block; the last one of a file may have fewer."""

    def read(self, file: RemoteFile, index: int) -> bytes: ...


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere, as it was when it was listed: what is read of it is of these contents, or an error."""

    url: str
    num_bytes: int
    mark: str
    """The store's own tag of the contents (its ETag, say)."""
    store: Any = field(repr=False, compare=False)
    """The filesystem of fsspec."""
    blocks: Blocks = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def __str__(self) -> str:
        return self.url

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Remote(self), 2**18)

    def check(self) -> None:
        """Raise UserError where it is not what it was, and what the store raises."""
        self.store.invalidate_cache(self.url)
        now = self.store.info(self.url)
        if (_mark(now), now.get("size")) != (self.mark, self.num_bytes):
            raise StoreError(
                f"{self.url}: has changed since it was listed: {self.num_bytes:,} bytes ({self.mark}) then, "
                f"{now.get('size'):,} ({_mark(now)}) now; give files that stay as they are, or start anew"
            )


class _Remote(io.RawIOBase):
    """The bytes of a remote file."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at = file, 0
        self._held: tuple[int, bytes] = (-1, b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._at, self._file.num_bytes)[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._file.num_bytes:
            return 0
        index, start = divmod(self._at, self._file.blocks.size)
        if self._held[0] != index:
            self._held = index, self._file.blocks.read(self._file, index)
        part = memoryview(self._held[1])[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


class Patience:
    """Tries of one thing that a store may fail at: again after 0.5 s, 1 s, 2 s, and so on up to 30 s.

    It ends with RunError (UserError at the `start`) once so many `seconds` have passed since it first failed.
    """

    def __init__(
        self,
        what: str,
        seconds: float,
        report: Callable[[str], None],
        stop: threading.Event | None = None,
        *,
        start: bool = False,
    ) -> None:
        self._what, self._seconds, self._report, self._start = what, seconds, report, start
        self._stop = stop or threading.Event()
        self._since: float | None = None
        self._wait, self._said = _FIRST_WAIT, 0.0

    def call(self, ask: Callable[[], T]) -> T:
        """Return what `ask` does. Raises UserError for what another try would not mend."""
        while True:
            try:
                answer = ask()
            except (UserError, RunError):
                raise
            except Exception as error:  # each library has its own kinds
                if (problem := _lasting(error)) is not None:
                    raise StoreError(f"{self._what}: {problem}") from error
                self._failed(error)
                continue
            if self._said and self._since is not None:
                self._report(f"{self._what}: answers again, after {time.monotonic() - self._since:.0f} s")
            return answer

    def _failed(self, error: Exception) -> None:
        now = time.monotonic()
        self._since = self._since or now
        said = f"{type(error).__name__}: {first_line(error)[:200]}"
        if now - self._since >= self._seconds:
            kind = UserError if self._start else RunError
            raise kind(f"{self._what}: cannot be read, tried for {now - self._since:.0f} s: {said}") from error
        if not self._start and now - self._said > _SAID_SECONDS:
            self._said = now
            self._report(f"warning: {self._what}: no answer ({said}); trying again for {self._seconds:g} s")
        if self._stop.wait(min(self._wait, max(self._seconds - (now - self._since), 0.01))):
            raise RunError(f"{self._what}: given up, as the reader was closed")
        self._wait = min(2 * self._wait, _LONGEST_WAIT)


def _lasting(error: Exception) -> str | None:
    """Describe an error that another try would not mend; None for one that may pass."""
    said = first_line(error)[:300]
    if type(error).__name__ in _NO_CREDENTIALS:
        return f"no credentials ({said}); set those of the store in the environment (AWS_ACCESS_KEY_ID, say)"
    if isinstance(error, PermissionError):
        return f"the store refuses it ({said}); look at the credentials in the environment"
    if isinstance(error, FileNotFoundError):
        return f"is not there ({said})"
    lasting = isinstance(error, _FATAL) or type(error).__name__ == "OfflineModeIsEnabled"
    return f"{type(error).__name__}: {said}" if lasting else None


class StoreBlocks:
    """Reader of blocks from the store itself, which compares the file's mark after each."""

    def __init__(
        self,
        seconds: float | None = None,
        report: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
        size: int | None = None,
    ) -> None:
        self.size, self._seconds = size or BLOCK, READ_SECONDS if seconds is None else seconds
        self._report, self._stop = report or logging.getLogger("trainfw").warning, stop

    def read(self, file: RemoteFile, index: int) -> bytes:
        """Return a block. Raises UserError where the file has changed, RunError where the store does not answer."""
        start = index * self.size
        end = min(start + self.size, file.num_bytes)

        def ask() -> bytes:
            try:
                data: bytes = file.store.cat_file(file.url, start=start, end=end)
            except Exception as error:
                _check_after(file, error)
                raise
            file.check()  # after it, so that what was read is of this file
            if len(data) != end - start:
                raise EOFError(f"{len(data):,} bytes where {end - start:,} were asked for: it was cut short")
            return data

        return Patience(file.url, self._seconds, self._report, self._stop).call(ask)


def _check_after(file: RemoteFile, error: Exception) -> None:
    """Raise UserError where a file cannot be read because it has changed: it is shorter now, say."""
    try:
        file.check()
    except UserError as changed:
        raise changed from error
    except Exception:  # what the store said first is raised
        return


def list_remote(name: str, blocks: Blocks) -> tuple[list[tuple[RemoteFile, str]], bool]:
    """List the files that a URL of a file, a directory or a glob stands for, with their paths within it, in order.

    Also returned: a flag that the URL is that of one file. Hidden ones are left out. Raises UserError where there is
    none, no library for it, or no answer.
    """
    scheme = name.partition("://")[0]
    store, path = _filesystem(name, scheme)
    seconds = HUB_SECONDS if scheme == "hf" else START_SECONDS
    listed = Patience(f"source {name!r}", seconds, lambda _: None, start=True).call(lambda: _list(store, path))
    if listed is None:
        siblings: list[str] = []
        with contextlib.suppress(Exception):  # only for the advice
            found = store.ls(path.rstrip("/").rpartition("/")[0], detail=False)
            siblings = [store.unstrip_protocol(one) for one in found]
        near = did_you_mean(name.rstrip("/"), siblings) if len(siblings) < 10_000 else ""
        raise UserError(f"source {name!r} does not exist{near}")
    root, entries, alone = listed
    files = []
    for at, about in entries.items():
        shown = at.removeprefix(root).strip("/")
        if about.get("type") != "file" or (not alone and _HIDDEN.search(shown)):
            continue
        if not isinstance(about.get("size"), int):
            raise UserError(f"{store.unstrip_protocol(at)}: the server does not say how long it is")
        file = RemoteFile(store.unstrip_protocol(at), about["size"], _mark(about), store, blocks)
        files.append((file, shown or file.name))
    return sorted(files, key=lambda one: one[1].split("/")), alone


def _filesystem(name: str, scheme: str) -> tuple[Any, str]:
    import fsspec

    if "::" in name:
        raise UserError(f"source {name!r}: chains of URLs are not read; name the file itself")
    if scheme not in fsspec.available_protocols():
        raise UserError(f"source {name!r}: unknown protocol {scheme!r}{did_you_mean(scheme, _USUAL)}")
    try:  # without a cache of listings: files change
        found: tuple[Any, str] = fsspec.core.url_to_fs(name, use_listings_cache=False)
        return found
    except ImportError as error:
        advice = pip_install(_EXTRAS[scheme]) if scheme in _EXTRAS else first_line(error)
        raise UserError(f"source {name!r}: {scheme}:// needs another package: {advice}") from None
    except Exception as error:
        raise UserError(f"source {name!r}: {_lasting(error) or first_line(error)}") from error


def _list(store: Any, path: str) -> tuple[str, dict[str, Any], bool] | None:
    """Return the place to which paths are relative, what is there by path, and a flag: it is one file's. None where
    nothing is there."""
    store.invalidate_cache()
    with contextlib.suppress(FileNotFoundError):
        about = store.info(path)
        if about["type"] != "directory":
            return about["name"].rpartition("/")[0], {about["name"]: about}, True
        return path, store.find(path, detail=True), False
    if magic := _MAGIC.search(path):
        return path[: magic.start()].rpartition("/")[0], store.glob(path, detail=True), False
    return None


def _mark(about: Mapping[str, object]) -> str:
    """Return the tag of an object's contents, or its time where the store has none."""
    found = next((about[key] for key in (*_MARKS, *_TIMES) if about.get(key)), "")
    return str(found.timestamp() if isinstance(found, datetime.datetime) else found).strip('"')


def cached_of_hub(name: str) -> str | None:
    """Return where the Hugging Face hub's own cache has a file or a whole directory; None where it has not."""
    found = _HUB.fullmatch(name)
    if found is None:
        return None
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    kind, repository, revision, path = found.groups()
    path = (path or "").rstrip("/")
    kind = {"datasets": "dataset", "spaces": "space"}.get(kind, "model")
    if path and not _MAGIC.search(path):
        file = try_to_load_from_cache(repository, path, repo_type=kind, revision=revision)
        if isinstance(file, str):
            return file
    try:  # raises where it knows that a file is missing
        wanted = [path, f"{path}/**"] if path else None
        root = Path(
            snapshot_download(
                repository, repo_type=kind, revision=revision, local_files_only=True, allow_patterns=wanted
            )
        )
    except Exception:  # many kinds, each for a cache that has not all of it
        return None
    place = root / path if path else root
    return str(place) if _MAGIC.search(path) or place.exists() else None


def hub_cache_place() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
