"""Streams of files that may be compressed (gzip, bzip2, xz, Zstandard), which their first bytes tell."""

from __future__ import annotations

import bz2
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from trainfw.data.remote import RemoteFile
from trainfw.errors import UserError
from trainfw.paths import check_file

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

File = Path | RemoteFile
"""A file of this machine, or of a store."""

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")

LIMIT = 2**30
"""Most bytes of one document, line or value: more would not fit into memory as tokens."""

_BLOCK = 2**18
"""Bytes read, and bytes decompressed at most, at once: compressed data may become a million times as long."""
_MEMORY = 2**30
"""Bytes of memory that an xz file may ask for."""


def open_plain(path: File) -> BinaryIO:
    """Open a file as bytes, decompressed where its first bytes say that it is compressed, whatever its name.

    Raises UserError as `check_file` does, and for an empty file with the suffix of a compression; reading raises it
    where the data are damaged or end too early, with the last line before that. Raises OSError as `open` does.
    """
    if isinstance(path, Path):
        check_file(path, named=True)
        file: BinaryIO = path.open("rb")
    else:
        file = path.open()
    head = file.read(32)
    file.seek(0)
    for name, (magic, make) in _KINDS.items():
        if magic.match(head):
            return io.BufferedReader(_Decompressed(file, path, name, make), _BLOCK)
    if not head and path.suffix.lower() in SUFFIXES:
        file.close()
        raise UserError(f"{path}: is empty, which no compressed file is: was it cut short?")
    return file


def skip_to(file: BinaryIO, offset: int) -> None:
    """Go to an offset of what `open_plain` opened: where that is compressed, by reading all before it."""
    if file.seekable():
        file.seek(offset)
        return
    while offset and (block := file.read(min(offset, _BLOCK))):
        offset -= len(block)


class _Gzip:
    """zlib's decompressor with the methods of the other three."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        plain = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = not self._inner.unconsumed_tail and len(plain) < max_length
        return plain

    def __getattr__(self, name: str) -> Any:  # eof, unused_data
        return getattr(self._inner, name)


_WINDOW: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}  # as `zstd --long=31` writes
_KINDS: dict[str, tuple[re.Pattern[bytes], Callable[[], Any]]] = {
    "gzip": (re.compile(rb"\x1f\x8b\x08"), _Gzip),
    "bzip2": (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2Decompressor),
    "xz": (re.compile(rb"\xfd7zXZ\x00"), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY)),
    "Zstandard": (
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        lambda: zstd.ZstdDecompressor(None, _WINDOW),
    ),
}
"""First bytes of each kind (for Zstandard also those of a skippable frame), and the decompressor of one stream."""


class _Decompressed(io.RawIOBase):
    """The decompressed bytes of a file, which may hold several streams one after another and end in zeros."""

    def __init__(self, file: BinaryIO, path: File, kind: str, make: Callable[[], Any]) -> None:
        self._file, self._path, self._kind, self._make = file, path, kind, make
        self._stream = make()
        self._lines = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            plain = self._next(min(len(buffer), _BLOCK))
        except (zlib.error, lzma.LZMAError, zstd.ZstdError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # from the disk; bz2 raises OSError without a number
                raise
            raise UserError(
                f"{self._path}: {self._kind} data are damaged ({error}); read as far as line {self._lines}"
            ) from None
        self._lines += plain.count(b"\n")
        buffer[: len(plain)] = plain
        return len(plain)

    def _next(self, length: int) -> bytes:
        """Return some decompressed bytes, `length` at most; none at the end."""
        while True:
            data = b""
            if self._stream.eof:
                data = self._stream.unused_data.lstrip(b"\0")
                while not data and (block := self._file.read(_BLOCK)):
                    data = block.lstrip(b"\0")
                if not data:
                    return b""
                self._stream = self._make()
            elif self._stream.needs_input and not (data := self._file.read(_BLOCK)):
                raise EOFError("it was cut short")
            if plain := self._stream.decompress(data, length):
                return plain

    def close(self) -> None:
        self._file.close()
        super().close()
