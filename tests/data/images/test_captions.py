import json

import numpy as np
import pytest

from trainfw.data import prepare_images, train_iterator, validation_batches
from trainfw.errors import RunError, UserError

from .conftest import encoded, write

COUNT, LENGTH, SIZE = 40, 5, 7


class Encoder:
    """Features that tell the text: its characters' numbers, and its place in the caption."""

    def __init__(self, identity: str = "fake", length: int = LENGTH) -> None:
        self.identity, self.length, self.cut = f"{identity} {length}", length, 0
        self.texts: list[str] = []

    def __call__(self, texts, progress):
        self.texts += texts
        features = np.zeros((len(texts), self.length, SIZE), np.float32)
        mask = np.zeros((len(texts), self.length), np.float32)
        for i, text in enumerate(texts):
            self.cut += len(text) > self.length
            for j, letter in enumerate(text[: self.length]):
                features[i, j], mask[i, j] = ord(letter) / 7 + np.arange(SIZE), 1
        return features, mask


@pytest.fixture
def captioned(make, tmp_path):
    for i in range(COUNT):
        write(tmp_path / "pictures" / f"{i}.png", encoded(i))
    rows = [{"image": f"{i}.png", "text": f"n{i % 30}" if i else "a long one"} for i in range(COUNT)]
    write(tmp_path / "pictures" / "list.jsonl", "\n".join(map(json.dumps, rows)))
    return make()


def test_batches_hold_the_features_of_their_captions(captioned):
    encoder = Encoder()
    data = prepare_images(captioned, size=8, channels=3, encoder=encoder)
    assert sorted(encoder.texts) == sorted({*(f"n{i % 30}" for i in range(1, COUNT)), "a long one"})
    assert data.cut == 1
    assert "1 captions cut at the encoder's length" in data.notes()
    assert data.facts()["encoders of pictures and captions"] == "fake 5"
    for batch in (
        next(train_iterator(data.train, captioned.model_copy(update={"shuffle": False}), global_batch_size=6)),
        next(validation_batches(data.validation, captioned, global_batch_size=6)),
    ):
        assert batch["caption"].shape == (6, LENGTH, SIZE)
        assert batch["caption"].dtype == batch["caption_mask"].dtype == np.float32
    batch = next(train_iterator(data.train, captioned.model_copy(update={"shuffle": False}), global_batch_size=6))
    features, mask = Encoder()([data.train.caption(i) for i in range(6)], None)
    np.testing.assert_array_equal(batch["caption"], features)
    np.testing.assert_array_equal(batch["caption_mask"], mask)


def test_captions_are_encoded_once(captioned):
    encoder = Encoder()
    first = prepare_images(captioned, size=8, channels=3, encoder=encoder)
    count = len(encoder.texts)
    again = prepare_images(captioned, size=8, channels=3, encoder=encoder)
    prepare_images(captioned, size=16, channels=1, encoder=encoder)
    assert len(encoder.texts) == count
    assert again.cut == first.cut == 1
    for other in (Encoder("other"), Encoder(length=9)):
        prepare_images(captioned, size=8, channels=3, encoder=other)
        assert len(other.texts) == count


def test_damaged_features_are_computed_again(captioned, tmp_path):
    data = prepare_images(captioned, size=8, channels=3, encoder=Encoder())
    [file] = (tmp_path / "cache").glob("*/captions.features")
    damaged = bytearray(file.read_bytes())
    damaged[50] ^= 1
    file.write_bytes(damaged)
    expected, _ = Encoder()([data.train.caption(0)], None)
    np.testing.assert_array_equal(data.train.features.of(0)["caption"], expected[0])


def test_what_is_no_caption_or_no_feature_is_refused(captioned, make, tmp_path):
    class Wrong(Encoder):
        def __call__(self, texts, progress):
            features, mask = super().__call__(texts, progress)
            return features * np.nan, mask

    with pytest.raises(RunError, match="features that are not finite"):
        prepare_images(captioned, size=8, channels=3, encoder=Wrong("wrong"))
    (tmp_path / "pictures" / "list.jsonl").unlink()
    with pytest.raises(UserError, match="no caption"):
        prepare_images(make(), size=8, channels=3, encoder=Encoder())
