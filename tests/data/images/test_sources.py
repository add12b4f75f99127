import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from trainfw.data import PreparedImages, prepare_images
from trainfw.errors import UserError

from .conftest import colour, encoded, shown, write

COUNT = 24


def prepared(config, **options) -> tuple[PreparedImages, list]:
    """The data, and what all its pictures are, sorted."""
    data = prepare_images(config, size=8, channels=3, **options)
    return data, sorted([*shown(data.train), *shown(data.validation)], key=str)


def expected(*of, labels=None, captions=None) -> list:
    numbers = of or range(COUNT)
    rows = [(colour(i), labels and labels[i % len(labels)], captions and captions.format(i)) for i in numbers]
    return sorted(rows, key=str)


def reasons(data: PreparedImages) -> dict[str, int]:
    return {one.reason: one.count for one in data.refused}


def test_folders_are_classes(make, tmp_path):
    for i in range(COUNT):
        write(tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png", encoded(i))
    write(tmp_path / "pictures" / "cat" / "broken.png", b"nothing")
    write(tmp_path / "pictures" / "notes.md", "hello")
    data, found = prepared(make())
    assert data.classes == ("cat", "dog")
    assert found == expected(labels=[0, 1])
    assert list(reasons(data).items()) == [("no picture of a format that is read (PNG, JPEG, WEBP, GIF, BMP)", 1)]
    notes = "\n".join(data.notes())
    assert "1 file skipped: 1 .md" in notes
    assert "(8 x 8, in colour, of 2 classes); 1 refused:" in notes
    assert "(the first: cat/broken.png)" in notes


def test_text_beside_a_picture_is_its_caption(make, tmp_path):
    for i in range(COUNT):
        write(tmp_path / "pictures" / f"{i}.jpg", encoded(i, "PNG"))  # whatever the name says
        write(tmp_path / "pictures" / f"{i}.txt", f" picture {i}\n")
    write(tmp_path / "pictures" / "readme.txt", "hello")
    data, found = prepared(make(), condition="caption")
    assert found == expected(captions="picture {}")
    assert "1 .txt without a picture (readme.txt)" in data.skipped
    write(tmp_path / "pictures" / "0.txt", b"\xff")
    write(tmp_path / "pictures" / "1.txt", " ")
    write(tmp_path / "pictures" / "none.png", encoded(30))
    data, found = prepared(make(), condition="caption")
    assert found == expected(*range(2, COUNT), captions="picture {}")
    assert reasons(data) == {"no caption": 2, "a caption that is not UTF-8": 1}
    data, found = prepared(make())
    assert found == expected(*range(1, COUNT), 30)
    assert data.remarks == ("2 pictures have no caption: those of the others are not read",)


def test_a_list_names_pictures_below_its_own_directory_alone(make, tmp_path):
    write(tmp_path / "secret.png", encoded(40))
    outside = write(tmp_path / "elsewhere" / "a.png", encoded(41)).parent
    for i in range(COUNT):
        write(tmp_path / "pictures" / "of" / f"{i}.png", encoded(i))
    os.symlink(tmp_path / "secret.png", tmp_path / "pictures" / "link.png")
    os.symlink(outside, tmp_path / "pictures" / "linked")
    rows = [{"file_name": f"of/{i}.png", "text": f"picture {i}", "label": i % 3} for i in range(COUNT - 1)]
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "linked/a.png", "of/../../secret.png"):
        rows.append({"file_name": path, "text": "secret", "label": 0})
    rows += [{"file_name": "of", "text": "a directory", "label": 0}, {"file_name": "of/x\0.png", "label": 0}]
    rows += [{"file_name": "gone.png", "text": "x", "label": 0}, {"name": "of/1.png"}, ["of/1.png"]]
    lines = [json.dumps(row) for row in rows] + ["{", '{"file_name": 3}']
    write(tmp_path / "pictures" / "metadata.jsonl", "\n".join(lines))
    data, found = prepared(make())
    assert found == expected(*range(COUNT - 1), labels=[0, 1, 2], captions="picture {}")
    assert data.classes == ("0", "1", "2")
    assert reasons(data) == {
        "a path that leads out of the source's directory": 6,
        "not a regular file": 1,
        "no such file": 1,
        "no 'image' or 'file_name' (see image_field)": 1,
        "not an object": 1,
        "not JSON": 1,
        "'file_name' is neither a path nor a file's bytes": 1,
        "not named by the list or table of pictures above it": 1,
    }
    assert "link out of the source (link.png)" in data.skipped
    lines = [json.dumps({"picture": f"of/{i}.png", "title": f"T{i}", "kind": "ab"[i % 2]}) for i in range(COUNT)]
    write(tmp_path / "pictures" / "metadata.jsonl", "\n".join(lines))
    config = make(Path("pictures", "metadata.jsonl"), image_field="picture", caption_field="title", label_field="kind")
    assert prepared(config)[1] == expected(labels=[0, 1], captions="T{}")


def test_the_pictures_that_a_list_names_are_part_of_its_fingerprint(make, tmp_path):
    for i in range(COUNT):
        write(tmp_path / "of" / f"{i}.png", encoded(i))
    rows = [{"image": f"of/{i}.png"} for i in range(COUNT)]
    write(tmp_path / "list.jsonl", "\n".join(map(json.dumps, rows)))
    first = prepared(make("list.jsonl"))[0]
    write(tmp_path / "of" / "0.png", encoded(50, size=(30, 30)))
    assert prepared(make("list.jsonl"))[0].fingerprint != first.fingerprint


def test_links_into_the_store_of_a_hugging_face_cache_are_followed(make, tmp_path):
    for i in range(COUNT):
        write(tmp_path / "hub" / "blobs" / f"{i:040x}", encoded(i))
        link = write(tmp_path / "hub" / "snapshots" / "1a2b" / f"{i}.png", b"")
        link.unlink()
        link.symlink_to(tmp_path / "hub" / "blobs" / f"{i:040x}")
    assert prepared(make(Path("hub", "snapshots", "1a2b")))[1] == expected()
    _, found = prepared(make(Path("hub", "snapshots", "1a2b", "1?.png")))
    assert found == expected(*range(10, 20))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables_hold_pictures_as_datasets_write_them(make, tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ape"])}
    rows = {
        "image": [{"bytes": encoded(i), "path": None} for i in range(COUNT)],
        "label": [i % 2 for i in range(COUNT)],
    }
    table = datasets.Dataset.from_dict(rows | {"text": [f"picture {i}" for i in range(COUNT)]})
    table = table.cast(datasets.Features(features | {"text": datasets.Value("string")}))
    if kind == "parquet":
        table.to_parquet(str(tmp_path / "pictures.parquet"))
    else:
        table.save_to_disk(str(tmp_path / "pictures.parquet"))
    data, found = prepared(make("pictures.parquet"))
    assert data.classes == ("ape", "zebra")
    assert found == expected(labels=[1, 0], captions="picture {}")
    with pytest.raises(
        UserError, match=r"no column 'picture' \(see image_field\); columns found: 'image', 'label', 'text'"
    ):
        prepared(make("pictures.parquet", image_field="picture"))


def test_tables_name_pictures(make, tmp_path):
    import pyarrow
    import pyarrow.parquet

    for i in range(COUNT):
        write(tmp_path / "pictures" / "of" / f"{i}.png", encoded(i))
    column = [f"of/{i}.png" for i in range(COUNT)] + ["../secret.png", None]
    write(tmp_path / "secret.png", encoded(40))
    pyarrow.parquet.write_table(pyarrow.table({"image": column}), tmp_path / "pictures" / "table.parquet")
    for source in (Path("pictures", "table.parquet"), "pictures"):
        data, found = prepared(make(source))
        assert found == expected()
        assert set(reasons(data)) == {
            "a path that leads out of the source's directory",
            "no 'image' or 'file_name' (see image_field)",
        }


def tar_of(*members: tuple[str, bytes], suffix: str = "") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w" + suffix) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["", ":gz"])
def test_samples_of_a_tar(make, tmp_path, suffix):
    members = []
    for i in range(COUNT):
        members += [(f"a/{i}.png", encoded(i)), (f"a/{i}.cls", b"%d" % (i % 3))]
        members.append((f"a/{i}.txt", b"picture %d" % i) if i % 2 else (f"a/{i}.json", b'{"text": "picture %d"}' % i))
    members += [("b.txt", b"no picture"), ("c.png", encoded(1)), ("c.txt", b"\xff"), ("d.png", encoded(1)[:50])]
    name = f"shard-000.tar{suffix.replace(':', '.')}"
    write(tmp_path / name, tar_of(*members, suffix=suffix))
    data, found = prepared(make(name), condition="caption")
    assert found == expected(captions="picture {}")
    assert reasons(data) == {
        "no picture in its sample": 1,
        "a caption or class that is not UTF-8, or not JSON": 1,
        "no caption": 1,
    }
    data, found = prepared(make(name), condition="label")
    assert found == expected(labels=[0, 1, 2])


def test_a_hostile_tar_is_an_error_or_has_nothing(make, tmp_path):
    whole = tar_of(*[(f"{i}.png", encoded(i)) for i in range(COUNT)])
    write(tmp_path / "cut.tar", whole[: 3 * 512 + 100])
    with pytest.raises(UserError, match=r"cut\.tar: not a tar that can be read"):
        prepared(make("cut.tar"))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("x" * (2 << 20)))
    write(tmp_path / "names.tar", file.getvalue())
    with pytest.raises(UserError, match="a header that is too long"):
        prepared(make("names.tar"))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    write(tmp_path / "links.tar", file.getvalue())
    with pytest.raises(UserError, match="no picture of the source can be used: it has none"):
        prepared(make("links.tar"))


def test_classes_and_captions_that_are_none(make, tmp_path):
    for i in range(COUNT):
        write(tmp_path / f"{i}.png", encoded(i))
    odd = [
        {"label": True},
        {"label": "x" * 300},
        {"label": 0.5},
        {"label": " "},
        {"text": ["a", "b"]},
        {"text": "\ud800"},
    ]
    rows = [{"image": f"{i}.png", "label": 9 + i % 3} | (odd[i] if i < len(odd) else {}) for i in range(COUNT)]
    write(tmp_path / "list.jsonl", "\n".join(map(json.dumps, rows)))
    data, found = prepared(make("list.jsonl"), condition="label")
    assert data.classes == ("9", "10", "11")
    assert found == expected(*range(len(odd), COUNT), labels=[0, 1, 2])
    assert reasons(data) == {
        "a class that is neither a whole number nor a name of up to 200 characters": 4,
        "a caption that is not text": 1,
        "the caption has a lone surrogate": 1,
    }
    with pytest.raises(UserError, match=r"no picture of the source can be used:\n  18 rows: no caption \(the first: "):
        prepared(make("list.jsonl"), condition="caption")


def test_nothing_to_read(make, tmp_path):
    write(tmp_path / "texts" / "a.txt", "hello")
    with pytest.raises(UserError, match="no picture, and nothing that names or holds some"):
        prepared(make("texts"))
    with pytest.raises(UserError, match="does not exist"):
        prepared(make("gone"))
    write(tmp_path / "one" / "a.png", encoded(1))
    with pytest.raises(UserError, match=r"the (train|validation) split is empty, of 1 picture"):
        prepared(make("one"))
