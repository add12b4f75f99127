"""Pictures decoded by Pillow: refused, with a reason, rather than trusted."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import threading
import types
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trainfw.data.images.sources import Encoded, Picture
from trainfw.data.messages import Unusable
from trainfw.data.sources import Row
from trainfw.errors import UserError, pip_install

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats that are decoded. No others: some of Pillow's decoders run programs."""
MOST_BYTES = 2**26
"""Most bytes of a picture's file."""
MOST_PIXELS = 2**26
"""Most pixels of a picture: 64 million take 256 MB while they are decoded."""
LONGEST_SIDE = 2**15
_LARGE = 2**22
"""Pixels of a picture that is decoded alone, so that memory holds one such."""
_ALONE = threading.Lock()
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"}


class Decoded(NamedTuple):
    """One picture as it is kept, and the hash of its pixels, which decides its split."""

    image: np.ndarray
    """uint8 (size, size, channels)."""
    key: str


def pillow() -> types.ModuleType:
    """Return Pillow's module `Image`. Raises UserError where it is not installed."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise UserError(f"format: images needs {error.name}: {pip_install('diffusion')}") from error
    return PIL.Image


def decode_all(
    rows: Iterable[Row], size: int, channels: int, image_filter: str | None = None
) -> Iterator[tuple[Row, Decoded | str]]:
    """Yield each row with its picture, or with the reason why there is none, in order; threads decode ahead.

    `image_filter` is `DataConfig`'s.
    """
    pillow()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[tuple[Row, Future[Decoded | str]]] = deque()
    with ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bombs, which are refused, and of odd metadata
        for row in rows:
            waiting.append((row, pool.submit(_decoded, row, size, channels, image_filter)))
            if len(waiting) > 8 * threads:
                first, future = waiting.popleft()
                yield first, future.result()
        for row, future in waiting:
            yield row, future.result()


def decode(data: Encoded) -> Image:
    """Return a picture as RGB in its own size, upright, its first frame, on white where it is transparent.

    Colour profiles are not read: all is taken for sRGB. Raises Unusable where it cannot be decoded, or not safely.
    """
    Image = pillow()
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).convert("RGB")
    encoded = _read(data) if isinstance(data, Path) else data
    if len(encoded) > MOST_BYTES:
        raise Unusable(f"a file of more than {MOST_BYTES:,} bytes")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
                raise Unusable(f"more than {MOST_PIXELS:,} pixels, or a side of more than {LONGEST_SIDE:,}")
            with _ALONE if width * height > _LARGE else contextlib.nullcontext():
                return _as_rgb(image)
    except Unusable:
        raise
    except Image.DecompressionBombError:
        raise Unusable(f"more than {MOST_PIXELS:,} pixels, or a side of more than {LONGEST_SIDE:,}") from None
    except Image.UnidentifiedImageError:
        raise Unusable(f"no picture of a format that is read ({', '.join(FORMATS)})") from None
    except Exception as error:  # what decoders make of damaged files is not written down
        raise Unusable("a damaged picture, which cannot be decoded whole") from error


def _as_rgb(image: Image) -> Image:
    from PIL import Image as pil
    from PIL import ImageOps

    if image.mode not in _MODES:
        raise Unusable(f"pixels of mode {image.mode}, which have no plain colours")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts them off at 255
        return pil.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return pil.alpha_composite(pil.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _decoded(row: Row, size: int, channels: int, image_filter: str | None) -> Decoded | str:
    from PIL import Image as pil
    from PIL import ImageOps

    picture: Picture = row.value
    try:
        whole = decode(picture.data)
        key = _key(whole if picture.kin is None else decode(picture.kin))
    except Unusable as problem:
        return str(problem)
    square = ImageOps.fit(whole.convert("L") if channels == 1 else whole, (size, size), pil.Resampling.BICUBIC)
    if image_filter is not None:
        square = filtered(square, image_filter).convert("L" if channels == 1 else "RGB")
    return Decoded(np.asarray(square, np.uint8).reshape(size, size, channels), key)


def filtered(image: Image, name: str) -> Image:
    """Return a picture in grey, or its dark outlines on white, as `DataConfig.image_filter` names them."""
    from PIL import Image as pil
    from PIL import ImageFilter

    grey = image.convert("L")
    if name == "grey":
        return grey
    wider = pil.fromarray(np.pad(np.asarray(grey), 1, "edge"))  # Pillow copies the outermost pixels as they are
    return wider.filter(ImageFilter.CONTOUR).crop((1, 1, 1 + grey.width, 1 + grey.height))


def _key(image: Image) -> str:
    """Return a hash of a picture's pixels in its own size, so that copies are in one split at any size."""
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()


def _read(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Unusable("not a regular file")
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise Unusable("no such file") from None
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror or error}") from None
