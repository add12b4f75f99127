"""What drawn pictures are judged by, on pictures that a drawer of tests hands over."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from trainfw.data import DataConfig, prepare_images
from trainfw.training.image_tasks import evaluate_images, nearest_training


@pytest.fixture(scope="module", params=[8, 64])
def data(request, tmp_path_factory):
    config = DataConfig(
        source="digits", format="images", validation_fraction=0.2, cache_dir=str(tmp_path_factory.mktemp("cache"))
    )
    return prepare_images(config, size=request.param, channels=1)


class Drawer(SimpleNamespace):
    """Draws what `pictures` has for a prompt, by its turn."""

    usual_guidance = 4.0

    def draw(self, prompts, **_):
        return np.stack([self.pictures[prompt][i % len(self.pictures[prompt])] for i, prompt in enumerate(prompts)])


def by(store, name_of):
    pictures = {}
    for i in range(len(store)):
        pictures.setdefault(name_of(i), []).append(store.image(i))
    return pictures


def test_pictures_of_their_class_are_told_and_others_are_not(data):
    real = by(data.train, lambda i: str(data.train.label(i)))
    good = evaluate_images(Drawer(pictures=real), data, "class_accuracy", 100, 0, samples=2)
    assert good.value > 0.9
    assert good.samples[0] == "'0': nearest training picture '0', 0.000 away"  # it is one of them
    assert "nearest training picture 0.000 away; of held-out ones 0.1" in str(good)
    wrong = {name: real[str((int(name) + 1) % 10)] for name in real}
    assert evaluate_images(Drawer(pictures=wrong), data, "class_accuracy", 100, 0).value < 0.1


def test_a_captions_own_picture_is_the_nearest_to_itself(data):
    store = data.validation
    # Digits share ten captions: each gets one of its own.
    named = SimpleNamespace(train=data.train, validation=Captioned(store), classes=data.classes)
    own = {f"picture {i}": [store.image(i)] for i in range(len(store))}
    assert evaluate_images(Drawer(pictures=own), named, "retrieval", 50, 0).value == 1
    number = len(store)
    others = {f"picture {i}": [store.image((i + number // 2) % number)] for i in range(number)}
    assert evaluate_images(Drawer(pictures=others), named, "retrieval", 50, 0).value < 0.2


class Captioned(SimpleNamespace):
    def __init__(self, store):
        super().__init__(image=store.image, label=store.label, caption=lambda i: f"picture {i}", count=len(store))

    def __len__(self):
        return self.count


def test_the_nearest_of_many_is_found_among_those_that_are_looked_at(data, monkeypatch):
    monkeypatch.setattr("trainfw.training.image_tasks._MOST", 100)
    numbers, distances = nearest_training(data, np.stack([data.train.image(0), data.train.image(len(data.train) - 1)]))
    assert numbers.tolist() == [0, len(data.train) - 1]
    assert distances.max() < 1e-3
