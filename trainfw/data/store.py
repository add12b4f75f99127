from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TokenStore:
    """The documents of one split as one stream of tokens, memory-mapped."""

    tokens: np.ndarray
    """(num_tokens,) uint16 or uint32: each document is bos, its tokens, eos."""
    offsets: np.ndarray
    """(num_documents + 1,) int64: document i is `tokens[offsets[i]:offsets[i + 1]]`."""
    num_bytes: int
    """UTF-8 bytes of the documents' text."""
    digest: str
    """A hash of the tokens and where documents end: the same data has the same digest anywhere."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class StoreInfo:
    """What the cache's meta.json records of a store."""

    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    digest: str

    def open(self, directory: Path, split: str) -> TokenStore:
        """Map the store that `StoreWriter` wrote. Raises OSError or ValueError where its files are not whole."""
        tokens = np.memmap(directory / f"{split}.tokens", self.dtype, "r")
        offsets = np.memmap(directory / f"{split}.offsets", np.int64, "r")
        if len(tokens) != self.num_tokens or len(offsets) != self.num_documents + 1 or offsets[-1] != self.num_tokens:
            raise ValueError(f"{directory}: {split} is not whole")
        return TokenStore(tokens, offsets, self.num_bytes, self.digest)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class StoreWriter:
    """Appends documents to a store's files. The files are whole once the `with` block has ended."""

    def __init__(self, directory: Path, split: str, vocab_size: int) -> None:
        self._dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self._tokens = (directory / f"{split}.tokens").open("wb")
        self._offsets = (directory / f"{split}.offsets").open("wb")
        self._hash = hashlib.blake2b(digest_size=16)
        self._num_tokens = self._num_documents = self._num_bytes = 0
        self._offsets.write(np.int64(0).tobytes())

    def append(self, ids: list[int], num_bytes: int) -> None:
        """Add a document of `ids` (bos and eos included), whose text has `num_bytes` bytes in UTF-8."""
        data = np.array(ids, self._dtype).tobytes()
        self._num_tokens += len(ids)
        self._num_documents += 1
        self._num_bytes += num_bytes
        end = np.int64(self._num_tokens).tobytes()
        self._tokens.write(data)
        self._offsets.write(end)
        self._hash.update(data + end)

    def info(self) -> StoreInfo:
        return StoreInfo(
            self._dtype.name, self._num_tokens, self._num_documents, self._num_bytes, self._hash.hexdigest()
        )

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._tokens.close()
        self._offsets.close()
