"""A changed file is seen."""

from __future__ import annotations

import os
import random

import pytest

from trainfw.checkpoint.manifest import MANIFEST, find_damage, write_manifest


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "3"
    (directory / "params").mkdir(parents=True)
    for name, size in {"params/a": 5000, "params/b": 1, "meta": 40, "empty": 0}.items():
        (directory / name).write_bytes(random.Random(name).randbytes(size))
    write_manifest(directory, 3, None, {})
    return directory


def test_what_was_written_is_whole(checkpoint):
    (checkpoint / "added later").write_text("such as Orbax's note of the commit")
    assert find_damage(checkpoint) is None


@pytest.mark.parametrize("name", ["params/a", "params/b", "meta"])
def test_one_bit_is_seen(checkpoint, name):
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 4
    (checkpoint / name).write_bytes(content)
    assert find_damage(checkpoint) == f"{name} is not what was saved (its SHA-256 differs)"


def test_truncated_and_missing_files_are_seen(checkpoint):
    (checkpoint / "params" / "a").write_bytes(b"x" * 4999)
    assert find_damage(checkpoint) == "params/a has 4,999 bytes, not 5,000"
    (checkpoint / "params" / "a").unlink()
    assert find_damage(checkpoint) == "params/a is missing"


BAD = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"[" * 100_000,
    b"\xff\xfe",
    b'{"sha256": {}}',
    b'{"sha256": {"a": 3}}',
    b'{"sha256": {"a": [null, "b"]}}',
    b'{"sha256": {"a": [true, "b"]}}',
    b'{"sha256": {"a": [-1, "b"]}}',
    b'{"sha256": {"/dev/zero": [1, "b"]}}',
    b'{"sha256": {"../3/meta": [40, "b"]}}',
    b'{"sha256": {"params/./a": [5000, "b"]}}',
    b'{"sha256": {"": [5000, "b"]}}',
    b'{"sha256": {"params": [4096, "b"]}}',
    b'{"sha256": {"empty": [0, 3]}}',
    b'{"format": 2, "sha256": {"empty": [0, ""]}}',
    b'{"format": 2, "step": "3", "sha256": {"empty": [0, ""]}}',
    b'{"step": 3, "run": 7, "sha256": {"empty": [0, ""]}}',
    b'{"step": 4, "sha256": {"empty": [0, ""]}}',
]


@pytest.mark.parametrize("content", BAD, ids=lambda content: content[:60].decode(errors="replace"))
def test_a_manifest_that_is_none_is_damage(checkpoint, content):
    (checkpoint / MANIFEST).write_bytes(content)
    assert find_damage(checkpoint)


@pytest.mark.parametrize("name", ["params/a", "manifest.json", "meta", "params/not listed"])
@pytest.mark.parametrize("kind", ["FIFO", "link", "directory", "device"])
def test_only_files_are_read(checkpoint, name, kind):
    """None of them hangs, and none is followed."""
    path = checkpoint / name
    content = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    match kind:
        case "FIFO":
            os.mkfifo(path)
        case "link":
            (checkpoint.parent / "elsewhere").write_bytes(content)
            path.symlink_to(checkpoint.parent / "elsewhere")
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
    found = find_damage(checkpoint)
    if kind == "directory" and name == "params/not listed":
        assert found is None
    else:
        assert found.startswith(f"{name} ")
        assert {"device": "a link"}.get(kind, kind) in found or "has" in found


def test_each_share_sees_its_own_files(checkpoint):
    (checkpoint / "params" / "b").write_bytes(b"")
    found = [find_damage(checkpoint, share, 2) for share in range(2)]
    assert sum(text is not None for text in found) == 1
