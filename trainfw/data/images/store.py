"""Pictures on disk, all of one size, with their classes or captions; and the rows that batches are made of."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainfw.data.config import DataConfig
from trainfw.data.rows import RowSet
from trainfw.data.store import BlockWriter, Mend, Numbers, open_arrays
from trainfw.errors import UserError

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class CaptionFeatures:
    """Features of captions that a text encoder made; equal captions have them once."""

    features: Numbers
    """(texts * T * F,) f32."""
    mask: Numbers
    """(texts * T,) f32: 1 for a token of the caption, 0 for padding."""
    texts: Numbers
    """(pictures,) i32: number of each picture's text."""
    shape: tuple[int, int]
    """(T, F): tokens of a caption, features of a token."""

    def of(self, index: int) -> dict[str, np.ndarray]:
        """Return the features (T, F) of a picture's caption and their mask (T,)."""
        text, (length, size) = int(self.texts[index : index + 1][0]), self.shape
        features = self.features[text * length * size : (text + 1) * length * size]
        return {"caption": features.reshape(self.shape), "caption_mask": self.mask[text * length : (text + 1) * length]}


@dataclass(frozen=True)
class ImageStore:
    """The pictures of one split, read from their files on demand."""

    pixels: Numbers
    """(pictures * H * W * C,) uint8."""
    shape: tuple[int, int, int]
    """(H, W, C)."""
    digest: str
    """Hash of the pictures, classes and captions: the same data has the same digest anywhere."""
    labels: Numbers | None = None
    """(pictures,) i32; None where pictures have no class."""
    text: Numbers | None = None
    """UTF-8 bytes of the captions, one after another, uint8; None where pictures have none."""
    ends: Numbers | None = None
    """(pictures + 1,) int64: caption i is `text[ends[i]:ends[i + 1]]`."""
    features: CaptionFeatures | None = None
    latents: Numbers | None = None
    """(pictures * h * w * c,) f32: what stands for the pictures; None where they stand for themselves."""
    latent_shape: tuple[int, int, int] | None = None
    """(h, w, c)."""

    def __len__(self) -> int:
        return len(self.pixels) // math.prod(self.shape)

    def image(self, index: int) -> np.ndarray:
        """Return a picture, uint8 (H, W, C)."""
        size = math.prod(self.shape)
        return self.pixels[index * size : (index + 1) * size].reshape(self.shape)

    def learnt(self, index: int) -> np.ndarray:
        """Return what is learnt of a picture, f32 (h, w, c): its latents, or its pixels in [-1, 1]."""
        if self.latents is None or self.latent_shape is None:
            return self.image(index).astype(np.float32) / 127.5 - 1
        size = int(np.prod(self.latent_shape))
        return self.latents[index * size : (index + 1) * size].reshape(self.latent_shape)

    def label(self, index: int) -> int | None:
        """Return the number of a picture's class; None where there are no classes."""
        return None if self.labels is None else int(self.labels[index : index + 1][0])

    def caption(self, index: int) -> str | None:
        if self.text is None or self.ends is None:
            return None
        start, end = self.ends[index : index + 2]
        return self.text[int(start) : int(end)].tobytes().decode()

    def captions(self) -> Iterator[str]:
        """Yield the captions in order. Raises UserError where there are none."""
        if self.ends is None:
            raise UserError("source: its pictures have no captions")
        return (self.caption(index) or "" for index in range(len(self)))


class ImageRows(RowSet):
    """Pictures of a store as rows: dicts of `image` f32 (H, W, C) in [-1, 1], `weight` f32, `row` i64, and where there
    are such, `label` i32, or `caption` f32 (T, F) and `caption_mask` f32 (T,)."""

    def __init__(self, store: ImageStore, config: DataConfig) -> None:
        self.store, self._flip, self._seed = store, config.flip, config.seed

    def __len__(self) -> int:
        return len(self.store)

    def _row(self, index: int) -> dict[str, np.ndarray]:
        row = {
            "image": self.store.learnt(index),
            "weight": np.ones((), np.float32),
            "row": np.array(index, np.int64),  # its place in the store
        }
        if self.store.labels is not None:
            row["label"] = self.store.labels[index : index + 1].reshape(())
        return row if self.store.features is None else row | self.store.features.of(index)

    def empty(self, count: int) -> dict[str, np.ndarray]:
        """Return the arrays of `count` rows of weight 0."""
        return {name: np.zeros((count, *values.shape), values.dtype) for name, values in self[0].items()}

    def endless(self, stream: grain.MapDataset) -> grain.MapDataset:
        """Return the endless stream of rows with their numbers in it, some of them mirrored."""
        return stream.map_with_index(self._numbered)

    def order(self, visited: str) -> str:
        flipped = f" flipped by {self._seed}" if self._flip else ""
        return f"images {self.store.digest} {self.store.shape} {visited}{flipped}"

    def require(self, count: int) -> None:
        if len(self) < count:
            raise UserError(
                f"{len(self)} training pictures are fewer than the {count} of one batch; give more, or make the batch "
                "smaller"
            )

    def _numbered(self, number: int, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Number a row, and mirror it where the seed and the number say so, whatever else was drawn."""
        image = row["image"]
        if self._flip:
            coin = hashlib.blake2b(f"flip {self._seed} {number}".encode(), digest_size=1).digest()[0] & 1
            image = image[:, ::-1] if coin else image
        return row | {"image": image, "row": np.array(number, np.int64)}


@dataclass(frozen=True)
class ImageInfo:
    """Record of a store in the cache's meta.json."""

    count: int
    shape: tuple[int, int, int]
    digest: str
    labels: bool
    caption_bytes: int | None
    """Bytes of all captions; None where there are none."""

    def open(self, directory: Path, split: str, identity: str, mend: Mend) -> ImageStore:
        """Open the store that `ImageWriter` wrote under the same `identity`; `mend` mends blocks damaged later.

        Raises OSError or ValueError where a file is not there, or has another size.
        """
        shape: tuple[int, int, int] = tuple(self.shape)  # type: ignore[assignment]  # a list, in JSON
        kinds: dict[str, tuple[type, int]] = {"pixels": (np.uint8, self.count * math.prod(shape))}
        if self.labels:
            kinds["labels"] = (np.int32, self.count)
        if self.caption_bytes is not None:
            kinds |= {"text": (np.uint8, self.caption_bytes), "ends": (np.int64, self.count + 1)}
        arrays = open_arrays(directory, split, kinds, identity, mend)
        labels, text, ends = (arrays.get(kind) for kind in ("labels", "text", "ends"))
        return ImageStore(arrays["pixels"], shape, self.digest, labels, text, ends)


def write_array(directory: Path, split: str, kind: str, values: np.ndarray, identity: str) -> bytes:
    """Write a file that `open_arrays` opens, and return its numbers as bytes."""
    with contextlib.closing(BlockWriter(directory / f"{split}.{kind}", identity)) as file:
        data = values.tobytes()
        file.write(data)
    return data


class ImageWriter(contextlib.AbstractContextManager["ImageWriter"]):
    """Writer of one split's pictures, which are whole once `finish` has returned."""

    def __init__(self, directory: Path, split: str, identity: str, shape: tuple[int, int, int]) -> None:
        self._place, self._identity, self._shape = (directory, split), identity, shape
        self._pixels = BlockWriter(directory / f"{split}.pixels", identity)
        self._hash = hashlib.blake2b(repr(shape).encode(), digest_size=16)
        self.labels: list[str | None] = []
        self.captions: list[str | None] = []

    def append(self, image: np.ndarray, label: str | None, caption: str | None) -> None:
        """Add a picture, uint8 of the writer's shape."""
        assert image.shape == self._shape, image.shape
        assert image.dtype == np.uint8
        data = image.tobytes()
        self._pixels.write(data)
        self._hash.update(data)
        self.labels.append(label)
        self.captions.append(caption)

    def finish(self, classes: tuple[str, ...], captions: bool) -> ImageInfo:
        """Write the number of each picture's class, where there are `classes`, and the captions where asked."""
        self._pixels.close()
        if classes:
            number = {name: i for i, name in enumerate(classes)}
            labels = np.array([number[str(label)] for label in self.labels], np.int32)
            self._hash.update(write_array(*self._place, "labels", labels, self._identity) + "\0".join(classes).encode())
        size = None
        if captions:
            texts = [str(caption).encode() for caption in self.captions]
            ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
            text = np.frombuffer(b"".join(texts), np.uint8)
            size = len(text)
            self._hash.update(write_array(*self._place, "text", text, self._identity))
            self._hash.update(write_array(*self._place, "ends", ends, self._identity))
        return ImageInfo(len(self.labels), self._shape, self._hash.hexdigest(), bool(classes), size)

    def __exit__(self, *_: object) -> None:
        self._pixels.close()
