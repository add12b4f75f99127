"""Compressed files: the same text, as a stream, or an error that says how far it was read."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from trainfw.data import DataConfig, json_values, open_source, readers
from trainfw.data.compressed import open_plain
from trainfw.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "Zstandard": zstd.compress,
}
SUFFIX = {"gzip": ".gz", "bzip2": ".bz2", "xz": ".xz", "Zstandard": ".zst"}
ROWS = "".join(json.dumps({"text": f"row {i}: {i * i * 7919 % 10007}"}) + "\n" for i in range(4000)).encode()

kinds = pytest.mark.parametrize("kind", COMPRESS)


def read(path: Path, **options: object) -> list[str]:
    return [d.text for d in open_source(DataConfig(source=str(path), sequence_length=8, **options)).documents()]  # type: ignore[arg-type]


@kinds
def test_the_text_is_that_of_the_plain_file(tmp_path: Path, kind: str) -> None:
    compress, half = COMPRESS[kind], len(ROWS) // 2 + 5
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(ROWS)
    forms = {
        "one": compress(ROWS),
        "parts": compress(ROWS[:half]) + compress(b"") + compress(ROWS[half:]),  # as pigz, pbzip2 and cat write
        "padded": compress(ROWS) + bytes(512),  # as tapes do
    }
    if kind == "Zstandard":
        forms["skippable"] = b"\x50\x2a\x4d\x18\x03\0\0\0abc" + forms["one"] + b"\x5e\x2a\x4d\x18\0\0\0\0"  # pzstd
        long = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 28})
        forms["long"] = long.compress(ROWS) + long.flush()  # as `zstd --long=28` writes a stream
    for name, data in forms.items():
        path = tmp_path / f"{name}.jsonl{SUFFIX[kind]}"
        path.write_bytes(data)
        assert read(path) == read(plain), name
    misnamed = tmp_path / "b.jsonl"
    misnamed.write_bytes(forms["one"])
    text = tmp_path / f"b.md{SUFFIX[kind]}"
    text.write_bytes(ROWS)  # what a browser makes of it that unpacks and keeps the name
    assert read(misnamed) == read(plain)
    assert read(text) == [ROWS.decode()]


@kinds
def test_damage_is_found_and_its_place_said(tmp_path: Path, kind: str) -> None:
    whole = COMPRESS[kind](ROWS)
    path = tmp_path / f"a.jsonl{SUFFIX[kind]}"
    middle = len(whole) // 2
    for data in (
        whole[:-1],
        whole[:middle],
        whole[:12],
        whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        whole + b"{}",
        whole + COMPRESS[kind](ROWS)[:-3],
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"a\.jsonl\S+: {kind} data are damaged \(.+\); read as far as line \d+$"):
            read(path)
        with pytest.raises(UserError, match="read as far as line"):  # no row that is refused and counted
            list(open_source(DataConfig(source=str(path), sequence_length=8, format="prompt_completion")).rows())
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty, which no compressed file is"):
        read(path)
    path = path.rename(tmp_path / f"a.txt{SUFFIX[kind]}")
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"cut short|damaged"):
        read(path)


def test_the_line_said_is_the_last_that_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(ROWS)[:-9])
    lines, file = 0, open_plain(path)
    with pytest.raises(UserError) as problem:  # noqa: PT012
        for _ in file:
            lines += 1
    assert str(problem.value).endswith(f"(it was cut short); read as far as line {lines}")


@kinds
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_bomb_fills_no_memory(tmp_path: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (readers, json_values):
        monkeypatch.setattr(module, "LIMIT", 2**20)
    path = tmp_path / (name + SUFFIX[kind])
    path.write_bytes(COMPRESS[kind](b'[{"text": "' + b"a" * 2**25))
    assert path.stat().st_size < 2**17
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"more than|longer than"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24  # xz alone takes 8 MiB
    finally:
        tracemalloc.stop()


def test_the_programs_of_the_formats_agree(tmp_path: Path) -> None:
    """zstd's own program, where it is installed, writes what is read here."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROWS)
    try:
        subprocess.run(["zstd", "-q", "--ultra", "-22", str(path)], check=True)
    except FileNotFoundError:
        pytest.skip("no zstd here")
    assert read(tmp_path / "a.jsonl.zst") == read(path)
