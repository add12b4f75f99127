"""Cache of latents: an autoencoder encodes the pictures of a split once, and again only when something has changed."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np

from trainfw.data.cache_directory import CacheDirectory, Meta, fingerprint_of, write_meta
from trainfw.data.config import DataConfig
from trainfw.data.images.store import ImageStore
from trainfw.data.progress import Progress, reported
from trainfw.data.store import BlockWriter, StoredArray, open_arrays
from trainfw.errors import RunError

FORMAT_VERSION = 1
BATCH_IMAGES = 32


class ImageEncoder(Protocol):
    """Frozen encoder of pictures. It is kept as long as its latents are read, to make them again where damaged."""

    identity: str
    """Name of everything that shapes the latents: weights, size, ..."""
    shape: tuple[int, int, int]
    """(h, w, c) of the latents of a picture."""

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Return the latents f32 (N, h, w, c) of pictures in [-1, 1], f32 (N, H, W, C)."""


def encode_images(
    config: DataConfig, store: ImageStore, split: str, encoder: ImageEncoder, progress: Progress | None = None
) -> tuple[StoredArray, str]:
    """Return the latents of a split's pictures, f32 (pictures * h * w * c,), and the damage mended, if any.

    They come from the cache unless the pictures or the encoder have changed. Raises UserError where the cache cannot be
    written.
    """
    return _LatentCache(config, store, split, encoder, progress).prepared(encoder)


class _LatentCache(CacheDirectory[StoredArray, ImageEncoder]):
    what = "cache of latents"

    def __init__(
        self, config: DataConfig, store: ImageStore, split: str, encoder: ImageEncoder, progress: Progress | None
    ) -> None:
        made_of = ["latents", FORMAT_VERSION, split, store.digest, store.shape, encoder.identity, encoder.shape]
        super().__init__(config, fingerprint_of(made_of), progress)
        self._store, self._shape = store, encoder.shape

    def _load(self, directory: Path, meta: Meta) -> tuple[StoredArray, list[str]]:
        kinds = {"values": (np.float32, len(self._store) * int(np.prod(self._shape)))}
        return open_arrays(directory, "latents", kinds, self._fingerprint, self._mend)["values"], [meta["latents"]]

    def _build(self, directory: Path, source: ImageEncoder) -> list[str]:
        whole, count = hashlib.blake2b(digest_size=16), len(self._store)
        starts = range(0, count, BATCH_IMAGES)
        with contextlib.closing(BlockWriter(directory / "latents.values", self._fingerprint)) as file:
            for start in reported(starts, "Encoding pictures, in batches", len(starts), self._progress):
                numbers = range(start, min(start + BATCH_IMAGES, count))
                images = np.stack([self._store.image(i) for i in numbers]).astype(np.float32) / 127.5 - 1
                latents = source.encode(images)
                if latents.shape != (len(numbers), *source.shape) or not np.isfinite(latents).all():
                    raise RunError(
                        f"the encoder of pictures gives latents {latents.shape} for {len(numbers)}; expected finite "
                        f"ones, {(len(numbers), *source.shape)}"
                    )
                data = latents.astype(np.float32).tobytes()
                file.write(data)
                whole.update(data)
        write_meta(directory, {"latents": whole.hexdigest()})
        return [whole.hexdigest()]
