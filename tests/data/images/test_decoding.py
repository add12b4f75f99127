import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainfw.data.images.decoding import decode
from trainfw.data.messages import Unusable

from .conftest import encoded

RANDOM = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data) -> np.ndarray:
    return np.asarray(decode(data))


def on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(float) / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha))


def test_every_mode_becomes_rgb_on_white():
    rgb, grey = RANDOM[..., :3], RANDOM[..., 0]
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(rgb))), rgb)
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(grey))), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(pixels(grey), np.stack([grey] * 3, -1))
    assert abs(pixels(saved(Image.fromarray(RANDOM))) - on_white(RANDOM)).max() <= 1
    layered = np.stack([grey, RANDOM[..., 3]], -1)
    expected = on_white(np.concatenate([np.stack([grey] * 3, -1), RANDOM[..., 3:]], -1))
    assert abs(pixels(saved(Image.fromarray(layered, "LA"))) - expected).max() <= 1
    bits = Image.fromarray(grey).convert("1")
    np.testing.assert_array_equal(pixels(saved(bits))[..., 0], np.asarray(bits) * 255)
    deep = RANDOM[..., 0].astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(deep)))[..., 1], grey)
    cmyk = Image.fromarray(np.tile(np.array([0, 255, 255, 0], np.uint8), (16, 16, 1)), "CMYK")
    assert abs(pixels(saved(cmyk, "JPEG")).astype(int) - (255, 0, 0)).max() <= 8


def test_a_palette_with_a_transparent_entry():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 2, 4))
    found = pixels(saved(image, transparency=1))
    np.testing.assert_array_equal(found[0, 0], (255, 255, 255))
    np.testing.assert_array_equal(found[0, 3], (255, 0, 0))


def test_an_animation_is_its_first_frame_and_a_turned_picture_stands_upright():
    frames = [Image.new("RGB", (6, 4), (200 * i, 255 - 200 * i, 0)) for i in range(2)]
    for kind in ("GIF", "PNG"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(pixels(data)[0, 0], (0, 255, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter to the left
    image = Image.fromarray(RANDOM[..., :3])
    np.testing.assert_array_equal(pixels(saved(image, exif=exif)), np.rot90(RANDOM[..., :3], -1))


def png_of(width: int, height: int) -> bytes:
    """A PNG that says of itself to be so large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png_of(100_000, 100_000), "more than 67,108,864 pixels"),
        (png_of(12_000, 9_000), "more than 67,108,864 pixels"),
        (png_of(40_000, 3), "a side of more than 32,768"),
        (png_of(200, 300), "a damaged picture"),
        (saved(Image.fromarray(RANDOM))[:200], "a damaged picture"),
        (encoded(1, "JPEG", (200, 100))[:-300], "a damaged picture"),
        (b"", "no picture of a format that is read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no picture of a format that is read"),
        (saved(Image.new("L", (4, 4)), "TIFF"), "no picture of a format that is read"),
        (bytes(2**26 + 1), "a file of more than 67,108,864 bytes"),
    ],
    ids=range(10),
)
def test_what_cannot_be_decoded_is_refused(data, reason):
    with pytest.raises(Unusable, match=reason):
        decode(data)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_damage_is_refused_or_harmless(data):
    whole = bytearray(encoded(3, data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP"]))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    del whole[data.draw(st.integers(8, len(whole))) :]
    with contextlib.suppress(Unusable):
        assert decode(bytes(whole)).mode == "RGB"
