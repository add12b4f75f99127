"""Features of captions, computed once by a frozen text encoder and cached."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from trainfw.data.cache_directory import CacheDirectory, Meta, fingerprint_of, write_meta
from trainfw.data.config import DataConfig
from trainfw.data.images.store import CaptionFeatures, ImageStore, write_array
from trainfw.data.progress import Progress, reported
from trainfw.data.store import BlockWriter, StoredArray, open_arrays
from trainfw.errors import RunError

FORMAT_VERSION = 1
BATCH_TEXTS = 256


class CaptionEncoder(Protocol):
    """Frozen text encoder. It is kept as long as its features are read, to make them again where they are damaged."""

    identity: str
    """Name of everything that shapes the features: weights, layer, length, ..."""
    cut: int
    """Number of texts of all calls so far that were cut short."""

    def __call__(self, texts: Sequence[str], progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
        """Return features f32 (N, T, F) and their mask f32 (N, T), T and F the same in every call."""


@dataclass(frozen=True)
class EncodedCaptions:
    """Features of the captions of both splits."""

    train: CaptionFeatures
    validation: CaptionFeatures
    cut: int
    """Captions that were cut short."""
    damage: str = ""


def encode_captions(
    config: DataConfig,
    train: ImageStore,
    validation: ImageStore,
    encoder: CaptionEncoder,
    progress: Progress | None = None,
) -> EncodedCaptions:
    """Return the features of both splits' captions, from the cache unless the captions or the encoder have changed.

    Raises UserError where there are no captions, or the cache cannot be written.
    """
    captions = [list(store.captions()) for store in (train, validation)]
    texts = list(dict.fromkeys(text for split in captions for text in split))
    number = {text: i for i, text in enumerate(texts)}
    cache = _CaptionCache(config, texts, encoder, progress)
    (arrays, shape, cut), damage = cache.prepared(encoder)
    of_train, of_validation = (
        CaptionFeatures(arrays["features"], arrays["mask"], np.array([number[text] for text in split], np.int32), shape)
        for split in captions
    )
    return EncodedCaptions(of_train, of_validation, cut, damage)


_Found = tuple[dict[str, StoredArray], tuple[int, int], int]


class _CaptionCache(CacheDirectory[_Found, CaptionEncoder]):
    what = "cache of captions"

    def __init__(
        self, config: DataConfig, texts: Sequence[str], encoder: CaptionEncoder, progress: Progress | None
    ) -> None:
        whole = hashlib.blake2b(digest_size=16)
        for text in texts:
            whole.update(len(text).to_bytes(8, "little") + text.encode())
        super().__init__(
            config, fingerprint_of(["captions", FORMAT_VERSION, whole.hexdigest(), encoder.identity]), progress
        )
        self._texts = texts

    def _load(self, directory: Path, meta: Meta) -> tuple[_Found, list[str]]:
        (length, size), count = meta["shape"], len(self._texts)
        kinds = {"features": (np.float32, count * length * size), "mask": (np.float32, count * length)}
        arrays = open_arrays(directory, "captions", kinds, self._fingerprint, self._mend)
        return (arrays, (length, size), meta["cut"]), [meta["features"]]

    def _build(self, directory: Path, source: CaptionEncoder) -> list[str]:
        cut, shape, masks = source.cut, None, []
        whole = hashlib.blake2b(digest_size=16)
        starts = range(0, len(self._texts), BATCH_TEXTS)
        with contextlib.closing(BlockWriter(directory / "captions.features", self._fingerprint)) as file:
            for start in reported(starts, "Encoding captions, in batches", len(starts), self._progress):
                texts = self._texts[start : start + BATCH_TEXTS]
                features, mask = source(texts, None)
                shape = shape or features.shape[1:]
                if features.shape != (len(texts), *shape) or mask.shape != features.shape[:2]:
                    raise RunError(
                        f"the encoder of captions gives features {features.shape} and a mask {mask.shape} for "
                        f"{len(texts)} texts; expected {(len(texts), *shape)} and {(len(texts), shape[0])}"
                    )
                if not np.isfinite(features).all():
                    raise RunError("the encoder of captions gives features that are not finite")
                data = features.astype(np.float32).tobytes()
                file.write(data)
                whole.update(data)
                masks.append(mask.astype(np.float32))
        whole.update(write_array(directory, "captions", "mask", np.concatenate(masks), self._fingerprint))
        write_meta(directory, {"shape": shape, "cut": source.cut - cut, "features": whole.hexdigest()})
        return [whole.hexdigest()]
