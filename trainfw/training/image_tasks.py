"""Evaluation of drawn pictures by what a reader can believe: whether they are told for what was asked for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainfw.data import ImageStore, PreparedImages
from trainfw.errors import UserError, pip_install
from trainfw.training.drawing import Drawer

IMAGE_METRICS = ("class_accuracy", "retrieval")
NEAREST = 10
"""Pictures among which a caption's own is to be found."""
_COMPONENTS = 64


@dataclass(frozen=True)
class ImageScore:
    """Share of drawn pictures that are told for what they were asked to be, and what that is to be compared with."""

    metric: str
    value: float
    count: int
    """Pictures drawn."""
    beside: str
    """Figures that give the value a meaning, in words."""

    def __str__(self) -> str:
        error = math.sqrt(self.value * (1 - self.value) / self.count)
        return f"{self.metric} {self.value:.3f} ± {error:.3f} of {self.count:,} drawn pictures ({self.beside})"


@dataclass(frozen=True)
class ImageComparison:
    """The same measure before training and after it."""

    before: float | None
    after: ImageScore

    def __str__(self) -> str:
        first = "" if self.before is None else f"{self.after.metric} {self.before:.3f} before training; now "
        return f"{first}{self.after}"


def evaluate_images(drawer: Drawer, data: PreparedImages, metric: str, count: int, seed: int) -> ImageScore:
    """Draw `count` pictures of classes or held-out captions, and count those that are told for them.

    `class_accuracy`: a classifier (scikit-learn's SVC with its defaults, on pixels), trained on held-out pictures
    alone, takes a drawn picture for its class; classes in turn. `retrieval`: among all held-out pictures, that of the
    caption is one of the ten nearest to the drawn one, by the cosine of their first 64 principal components, which are
    fitted to the training pictures and scaled to unit variance. Raises UserError where the data does not have these.
    """
    if metric == "class_accuracy":
        return _class_accuracy(drawer, data, count, seed)
    return _retrieval(drawer, data, count, seed)


def _class_accuracy(drawer: Drawer, data: PreparedImages, count: int, seed: int) -> ImageScore:
    with _needing_scikit_learn():
        from sklearn.svm import SVC
    labels, held_out = _labels(data.validation), _pixels(data.validation)
    if len(data.classes) < 2 or set(labels) != set(range(len(data.classes))):
        raise UserError("evaluation.metric: class_accuracy needs held-out pictures of every class, and two or more")
    classifier = SVC().fit(held_out, labels)
    asked = np.arange(count) % len(data.classes)
    drawn = drawer.draw([data.classes[i] for i in asked], seed=seed)
    right = float(np.mean(classifier.predict(_flat(drawn)) == asked))
    real = float(np.mean(classifier.predict(_pixels(data.train)) == _labels(data.train)))
    beside = (
        f"by a classifier that learnt from {len(labels):,} held-out ones, and tells {real:.3f} of the training ones"
    )
    return ImageScore("class_accuracy", right, count, beside)


def _retrieval(drawer: Drawer, data: PreparedImages, count: int, seed: int) -> ImageScore:
    with _needing_scikit_learn():
        from sklearn.decomposition import PCA
    real, number = _pixels(data.validation), len(data.validation)
    count = min(count, number)
    parts = min(_COMPONENTS, len(data.train), real.shape[1])
    features = PCA(parts, whiten=True, random_state=0).fit(_pixels(data.train))
    drawn = drawer.draw([data.validation.caption(i) for i in range(count)], seed=seed)
    ours, theirs = (_unit(features.transform(x)) for x in (_flat(drawn), real))
    similarity = ours @ theirs.T
    better = np.sum(similarity > np.diagonal(similarity[:, :count])[:, None], axis=1)
    found, chance = float(np.mean(better < NEAREST)), NEAREST / number
    beside = f"the caption's own among the {NEAREST} nearest of {number:,} held-out ones; by chance {chance:.3f}"
    return ImageScore("retrieval", found, count, beside)


def nearest_training(data: PreparedImages, drawn: np.ndarray) -> list[tuple[int, float]]:
    """Find the training picture that is nearest to each drawn one: (its number, root mean squared difference in 0..1).

    Args:
        drawn: u8[N, H, W, C].
    """
    real, ours = _pixels(data.train), _flat(drawn)
    squares = (ours**2).sum(1)[:, None] - 2 * ours @ real.T + (real**2).sum(1)
    best = squares.argmin(1)
    return [(int(i), math.sqrt(max(float(squares[n, i]), 0.0) / ours.shape[1])) for n, i in enumerate(best)]


@contextlib.contextmanager
def _needing_scikit_learn() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise UserError(f"evaluation.metric: needs scikit-learn: {pip_install('diffusion')}") from None


def _pixels(store: ImageStore) -> np.ndarray:
    return _flat(np.stack([store.image(i) for i in range(len(store))]))


def _labels(store: ImageStore) -> np.ndarray:
    return np.array([store.label(i) for i in range(len(store))])


def _flat(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(len(pictures), -1).astype(np.float32) / 255


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
