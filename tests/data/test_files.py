"""What a path, a directory and a glob stand for, and what is said of the rest."""

import json
import os
import socket
from pathlib import Path

import datasets
import pytest

from trainfw.data import DataConfig, Source, open_source, prepare
from trainfw.errors import UserError

from .test_compressed import COMPRESS


def _open(source: Path | str | list[str], **options: object) -> Source:
    source = str(source) if isinstance(source, Path) else source
    return open_source(DataConfig(source=source, sequence_length=8, **options))  # type: ignore[arg-type]


def _texts(source: Source) -> list[str]:
    return [document.text for document in source.documents()]


def _rows(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Every kind of thing that a directory may hold; the texts to read are the letters from a on, in order."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "D").mkdir(parents=True)
    (root / ".git").mkdir()
    outside.mkdir()
    (root / "A.JSONL").write_bytes(_rows("a"))
    (root / "B.jsonl.gz").write_bytes(COMPRESS["gzip"](_rows("b")))
    (root / "C.Txt.ZST").write_bytes(COMPRESS["Zstandard"](b"c"))
    (root / "D" / "a.json").write_text(json.dumps([{"text": "d"}]))
    datasets.Dataset.from_dict({"text": ["e"]}).save_to_disk(root / "D" / "saved")
    (outside / "x.md").write_text("f")
    (root / "D-linked").symlink_to(outside)
    (root / "E.md").write_text("g")
    (root / "F.txt").symlink_to(root / "E.md")
    (root / "loop").symlink_to(root)
    (root / "gone.txt").symlink_to("/nowhere/at/all")
    (root / ".git" / "no.txt").write_text("hidden")
    (root / "package.json").write_text('{"name": "x"}')
    (root / "tsconfig.json").write_text("// a comment\n{}")
    (root / "README").write_text("no")
    (root / "t.csv").write_text("no")
    (root / "u.CSV.gz").write_bytes(COMPRESS["gzip"](b"no"))
    (root / "v.csv").write_text("no")
    os.mkfifo(root / "pipe.txt")
    return root


def test_a_directory_is_read_whole_and_the_rest_is_said(mixed: Path) -> None:
    source = _open(mixed)
    assert "".join(_texts(source)) == "abcdefg"
    assert source.skipped == (
        "10 files skipped: 2 .json without rows (package.json: no 'text'), 2 .csv, 1 suffixless (README), "
        "1 dangling link (gone.txt -> /nowhere/at/all), 1 directory reached twice (loop), 1 pipe (pipe.txt), "
        "1 .csv.gz, 1 reached twice (F.txt)"
    )
    prepared = prepare(
        DataConfig(source=str(mixed), sequence_length=8, validation_fraction=0.5, cache_dir=str(mixed.parent / "cache"))
    )
    assert prepared.notes() == [source.skipped]
    assert "1 .txt" in _open(mixed, format="chat", messages_field="text").skipped  # rows are not read from text


def test_a_glob_and_a_list_are_the_directory(mixed: Path) -> None:
    whole = _open(mixed)
    for pattern in ("**/*", "**", "**/**/*"):
        glob = _open(f"{mixed}/{pattern}")
        assert (glob.inputs, glob.skipped, glob.fingerprint()) == (whole.inputs, whole.skipped, whole.fingerprint())
    listed = _open([str(item.path) for item in whole.inputs])
    assert (_texts(listed), listed.skipped) == (_texts(whole), "")
    overlapping = _open([str(mixed / "E.md"), f"{mixed}/*.md", str(mixed)])
    assert "".join(_texts(overlapping)) == "gabcdef"
    assert " 3 reached twice (E.md)" in overlapping.skipped
    assert "".join(_texts(_open(f"{mixed}/[A-C]*"))) == "abc"
    assert "".join(_texts(_open(f"{mixed}/D*/*"))) == "def"
    assert "2 directories (D)" in _open(f"{mixed}/[A-D]*").skipped
    assert _texts(_open(f"{mixed}/.g*/*")) == ["hidden"]  # asked for by name
    with pytest.raises(UserError, match=r"no file that can be read .* found \.csv$"):
        _open(f"{mixed}/*.csv")


def test_what_cannot_be_entered_is_said(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if Path(path).name == "D":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    source = _open(mixed)
    assert "".join(_texts(source)) == "abcfg"
    assert f"1 directory that cannot be read ({mixed}/D: Permission denied)" in source.skipped


def test_what_is_named_is_read_or_refused(mixed: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s.txt"))
    for name, message in {
        str(mixed / "gone.txt"): "is a dangling link to /nowhere/at/all",
        str(mixed / "pipe.txt"): "is a pipe",
        str(tmp_path / "s.txt"): "is a socket",
        "/dev/null": "is a device",
        str(mixed / "u.CSV.gz"): r"cannot read a \.csv\.gz file",
        "": "a name is empty",
    }.items():
        with pytest.raises(UserError, match=message):
            _open(name)
    with pytest.raises(UserError, match=r"package\.json, line 1: no key 'text'"):
        _texts(_open(mixed / "package.json"))
    with pytest.raises(UserError, match=r"tsconfig\.json, line 1: not JSON"):
        _texts(_open(mixed / "tsconfig.json"))


def test_git_lfs_pointers_are_not_the_files(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json", "a.parquet", "a.md.gz"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
        with pytest.raises(UserError, match=f"{name}: is a pointer of Git LFS, not the file itself, .*git lfs pull"):
            _texts(_open(tmp_path / name))
