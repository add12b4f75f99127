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
    """UTF-8 bytes of the documents' text; of examples, of what is learnt."""
    digest: str
    """A hash of the tokens, where documents end and what is learnt: the same data has the same digest anywhere."""
    learnt: np.ndarray | None = None
    """(num_tokens,) bool: which tokens of examples are to be predicted. None for text, which is learnt whole."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_targets(self) -> int:
        """Tokens to predict: of text every token but a document's first, the begin marker."""
        return self.num_tokens - self.num_documents if self.learnt is None else int(np.count_nonzero(self.learnt))


@dataclass(frozen=True)
class StoreInfo:
    """What the cache's meta.json records of a store."""

    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    digest: str
    examples: bool = False

    def open(self, directory: Path, split: str) -> TokenStore:
        """Map the store that `StoreWriter` wrote. Raises OSError or ValueError where its files are not whole."""
        tokens = np.memmap(directory / f"{split}.tokens", self.dtype, "r")
        offsets = np.memmap(directory / f"{split}.offsets", np.int64, "r")
        if len(tokens) != self.num_tokens or len(offsets) != self.num_documents + 1 or offsets[-1] != self.num_tokens:
            raise ValueError(f"{directory}: {split} is not whole")
        learnt = np.memmap(directory / f"{split}.learnt", np.bool_, "r") if self.examples else None
        if learnt is not None and len(learnt) != self.num_tokens:
            raise ValueError(f"{directory}: {split} is not whole")
        return TokenStore(tokens, offsets, self.num_bytes, self.digest, learnt)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class StoreWriter:
    """Appends documents, or `examples`, to a store's files, which are whole once the `with` block has ended."""

    def __init__(self, directory: Path, split: str, vocab_size: int, *, examples: bool = False) -> None:
        self._dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self._tokens = (directory / f"{split}.tokens").open("wb")
        self._offsets = (directory / f"{split}.offsets").open("wb")
        self._learnt = (directory / f"{split}.learnt").open("wb") if examples else None
        self._hash = hashlib.blake2b(digest_size=16)
        self._num_tokens = self._num_documents = self._num_bytes = 0
        self._offsets.write(np.int64(0).tobytes())

    def append(self, ids: list[int], num_bytes: int, learnt: list[bool] | None = None) -> None:
        """Add a document of `ids` (bos and eos included), whose text has `num_bytes` bytes in UTF-8.

        Of an example, `learnt` says which tokens are, and `num_bytes` how many bytes these have.
        """
        data = np.array(ids, self._dtype).tobytes()
        self._num_tokens += len(ids)
        self._num_documents += 1
        self._num_bytes += num_bytes
        end = np.int64(self._num_tokens).tobytes()
        self._tokens.write(data)
        self._offsets.write(end)
        self._hash.update(data + end)
        if self._learnt is not None:
            assert learnt is not None
            mask = np.array(learnt, np.bool_).tobytes()
            self._learnt.write(mask)
            self._hash.update(mask)

    def info(self) -> StoreInfo:
        return StoreInfo(
            self._dtype.name,
            self._num_tokens,
            self._num_documents,
            self._num_bytes,
            self._hash.hexdigest(),
            self._learnt is not None,
        )

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._tokens.close()
        self._offsets.close()
        if self._learnt is not None:
            self._learnt.close()
