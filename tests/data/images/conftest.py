"""Pictures made for tests: plain squares of a colour each, so that a resized one is known."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainfw.data import DataConfig


def colour(number: int) -> tuple[int, int, int]:
    return 16 * (number % 16), 16 * (number // 16 % 16), 7 * number % 256


def encoded(number: int, kind: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour(number)).save(file, kind)
    return file.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.fixture
def make(tmp_path: Path):
    """A config of pictures with a cache of its own; half of them held out, so that few are enough."""

    def made(source: object = "pictures", **options: Any) -> DataConfig:
        name = str(tmp_path / source) if source not in ("digits", "emoji") else source
        options = {"cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.5} | options
        return DataConfig(source=name, format="images", **options)

    return made


def shown(store) -> list[tuple[tuple[int, ...], int | None, str | None]]:
    """The colour of each picture's middle, its class and its caption."""
    return [
        (tuple(map(int, store.image(i)[tuple(np.array(store.shape[:2]) // 2)])), store.label(i), store.caption(i))
        for i in range(len(store))
    ]
