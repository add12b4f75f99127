"""Evaluation of drawn pictures by what a reader can believe: whether they are told for what was asked for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from trainfw.data import ImageStore, PreparedImages, Progress
from trainfw.errors import UserError, pip_install
from trainfw.training.drawing import Drawer, grid, scale_of

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
    beside: tuple[str, ...]
    """Figures that give the value a meaning, in words, a line each."""
    drawn: np.ndarray
    """Those pictures, u8[count, H, W, C]."""
    samples: tuple[str, ...] = ()
    """Of each of some drawn pictures: its prompt, and the training picture that is nearest to it."""
    picture: np.ndarray | None = None
    """These, u8[height, width, channels]: drawn ones in the first row, the nearest below."""

    def __str__(self) -> str:
        error = math.sqrt(self.value * (1 - self.value) / self.count)
        said = f"{self.metric} {self.value:.3f} ± {error:.3f} of {self.count:,} drawn pictures"
        return "\n  ".join([said, *self.beside])


@dataclass(frozen=True)
class ImageComparison:
    """The same measure before training and after it."""

    before: float | None
    after: ImageScore

    def __str__(self) -> str:
        first = "" if self.before is None else f"{self.after.metric} {self.before:.3f} before training; now "
        return f"{first}{self.after}"


def evaluate_images(
    drawer: Drawer,
    data: PreparedImages,
    metric: str,
    count: int,
    seed: int,
    *,
    samples: int = 0,
    progress: Progress | None = None,
) -> ImageScore:
    """Draw `count` pictures of classes or held-out captions, and count those that are told for them.

    `class_accuracy`: a classifier (scikit-learn's SVC with its defaults, on pixels), trained on held-out pictures
    alone, takes a drawn picture for its class; classes in turn. `retrieval`: among all held-out pictures, that of the
    caption is one of the ten nearest to the drawn one, by the cosine of their first 64 principal components, which are
    fitted to the training pictures and scaled to unit variance; captions spread over all. Beside either stands the
    distance (root mean square of pixels in 0..1) of drawn pictures to the nearest training picture, and that of
    held-out ones: a model that has learnt its pictures by heart draws much nearer to them.

    Args:
        samples: pictures that are shown beside the nearest training picture.

    Raises UserError where the data does not have these.
    """
    judge = _Classes(data) if metric == "class_accuracy" else _Captions(data, count)
    numbers = judge.asked(count)
    prompts = [judge.prompts[i] for i in numbers]
    drawn = drawer.draw(prompts, seed=seed, progress=progress)
    score, beside = judge.judge(drawn, numbers)
    nearest, distances = nearest_training(data, drawn)
    _, usual = nearest_training(data, _images(data.validation))
    memorised = f"nearest training picture {np.mean(distances):.3f} away; of held-out ones {np.mean(usual):.3f}"
    shown = np.unique(np.linspace(0, len(drawn) - 1, min(samples, len(drawn))).round().astype(int))
    lines, picture = tuple(_line(data, prompts[i], int(nearest[i]), distances[i]) for i in shown), None
    if len(shown):
        pairs = np.stack([drawn[shown], _images(data.train, nearest[shown])])
        picture = grid(pairs.reshape(-1, *drawn.shape[1:]), len(shown), scale_of(drawn))
    drawn_with = f"drawn with guidance {drawer.usual_guidance:g}"
    return ImageScore(metric, score, len(drawn), (drawn_with, *beside, memorised), drawn, lines, picture)


class _Classes:
    """Judge of pictures of classes: `class_accuracy`."""

    def __init__(self, data: PreparedImages):
        with _needing_scikit_learn():
            from sklearn.svm import SVC
        self.prompts, labels = data.classes, _labels(data.validation)
        if len(data.classes) < 2 or set(labels) != set(range(len(data.classes))):
            raise UserError("evaluation.metric: class_accuracy needs held-out pictures of every class, and two or more")
        self._classifier = SVC().fit(_pixels(data.validation), labels)
        real = float(np.mean(self._classifier.predict(_pixels(data.train)) == _labels(data.train)))
        learnt = f"by a classifier that learnt from {len(labels):,} held-out ones"
        self._beside = (learnt, f"which tells {real:.3f} of the training ones")

    def asked(self, count: int) -> np.ndarray:
        return np.arange(count) % len(self.prompts)

    def judge(self, drawn: np.ndarray, numbers: np.ndarray) -> tuple[float, tuple[str, ...]]:
        return float(np.mean(self._classifier.predict(_flat(drawn)) == numbers)), self._beside


class _Captions:
    """Judge of pictures of held-out captions: `retrieval`."""

    def __init__(self, data: PreparedImages, count: int):
        with _needing_scikit_learn():
            from sklearn.decomposition import PCA
        self._real, self.prompts = _pixels(data.validation), list(data.validation.captions())
        parts = min(_COMPONENTS, len(data.train), self._real.shape[1])
        self._features = PCA(parts, whiten=True, random_state=0).fit(_pixels(data.train))

    def asked(self, count: int) -> np.ndarray:
        number = len(self.prompts)
        return np.unique(np.linspace(0, number - 1, min(count, number)).round().astype(int))

    def judge(self, drawn: np.ndarray, numbers: np.ndarray) -> tuple[float, tuple[str, ...]]:
        ours, theirs = (_unit(self._features.transform(x)) for x in (_flat(drawn), self._real))
        similarity = ours @ theirs.T
        better = np.sum(similarity > similarity[np.arange(len(numbers)), numbers][:, None], axis=1)
        own = f"the caption's own among the {NEAREST} nearest of {len(theirs):,} held-out ones"
        return float(np.mean(better < NEAREST)), (f"{own}; {NEAREST / len(theirs):.3f} by chance",)


def _line(data: PreparedImages, prompt: str, nearest: int, distance: float) -> str:
    """Say what a picture was asked to be, and which training picture is nearest to it."""
    label = data.train.label(nearest)
    name = data.train.caption(nearest) if label is None else data.classes[label]
    return f"{prompt!r}: nearest training picture {name!r}, {distance:.3f} away"


def nearest_training(data: PreparedImages, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the training picture that is nearest to each, and their root mean squared difference.

    Args:
        pictures: u8[N, H, W, C]; differences are of values in 0..1.
    """
    real, ours = _pixels(data.train), _flat(pictures)
    squares = (ours**2).sum(1)[:, None] - 2 * ours @ real.T + (real**2).sum(1)
    return squares.argmin(1), np.sqrt(np.maximum(squares.min(1), 0) / ours.shape[1])


@contextlib.contextmanager
def _needing_scikit_learn() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise UserError(f"evaluation.metric: needs scikit-learn: {pip_install('diffusion')}") from None


def _images(store: ImageStore, numbers: Iterable[int] | None = None) -> np.ndarray:
    return np.stack([store.image(int(i)) for i in (range(len(store)) if numbers is None else numbers)])


def _pixels(store: ImageStore) -> np.ndarray:
    return _flat(_images(store))


def _labels(store: ImageStore) -> np.ndarray:
    return np.array([store.label(i) for i in range(len(store))])


def _flat(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(len(pictures), -1).astype(np.float32) / 255


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
