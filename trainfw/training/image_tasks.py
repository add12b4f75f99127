"""Evaluation of drawn pictures by what a reader can believe: whether they are told for what was asked for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainfw.data import ImageStore, PreparedImages, Progress
from trainfw.errors import UserError, pip_install
from trainfw.training.drawing import Drawer, grid, scale_of

IMAGE_METRICS = ("class_accuracy", "retrieval")
NEAREST = 10
"""Pictures among which a caption's own is to be found."""
_COMPONENTS = 64
_MOST = 10_000
"""Pictures of a split that are looked at, at most, spread evenly over it."""
_SIDE = 32
"""Pixels of a side at which they are, at most: larger ones are averaged over squares."""


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
    """The pictures, u8[count, H, W, C]."""
    samples: tuple[str, ...] = ()
    """A line for each of some of them: its prompt, and the training picture that is nearest to it."""
    picture: np.ndarray | None = None
    """The same ones, u8[height, width, channels]: drawn ones in the first row, the nearest below."""

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
    held-out ones: a model that has learnt its pictures by heart draws much nearer to them. All this looks at 10,000
    pictures of a split at most, at 32 pixels a side at most.

    Args:
        samples: pictures that are shown beside the nearest training picture.

    Raises UserError where the data does not have these.
    """
    judge = Classes(data) if metric == "class_accuracy" else Captions(data)
    numbers = judge.asked(count)
    prompts = [judge.prompts[i] for i in numbers]
    drawn = drawer.draw(prompts, seed=seed, progress=progress)
    score, beside = judge.judge(drawn, numbers)
    nearest, distances = nearest_training(data, drawn)
    _, usual = _nearest(data, _pixels(data.validation, _spread(len(data.validation), _MOST)))
    memorised = f"nearest training picture {np.mean(distances):.3f} away; of held-out ones {np.mean(usual):.3f}"
    shown = _spread(len(drawn), samples)
    lines, picture = tuple(_line(data, prompts[i], int(nearest[i]), distances[i]) for i in shown), None
    if len(shown):
        pairs = np.stack([drawn[shown], [data.train.image(int(i)) for i in nearest[shown]]])
        picture = grid(pairs.reshape(-1, *drawn.shape[1:]), len(shown), scale_of(drawn))
    drawn_with = f"drawn with guidance {drawer.usual_guidance:g}"
    return ImageScore(metric, score, len(drawn), (drawn_with, *beside, memorised), drawn, lines, picture)


class Classes:
    """Judge of pictures of classes: `class_accuracy`."""

    def __init__(self, data: PreparedImages):
        with _needing_scikit_learn():
            from sklearn.svm import SVC
        held_out, train = (_spread(len(store), _MOST) for store in (data.validation, data.train))
        self.prompts, labels = data.classes, _labels(data.validation, held_out)
        if len(data.classes) < 2 or set(labels) != set(range(len(data.classes))):
            raise UserError("evaluation.metric: class_accuracy needs held-out pictures of every class, and two or more")
        self._classifier = SVC().fit(_pixels(data.validation, held_out), labels)
        told = self._classifier.predict(_pixels(data.train, train))
        real = float(np.mean(told == _labels(data.train, train)))
        learnt = f"by a classifier that learnt from {len(labels):,} held-out ones"
        self._beside = (learnt, f"which tells {real:.3f} of the training ones")

    def asked(self, count: int) -> np.ndarray:
        return np.arange(count) % len(self.prompts)

    def judge(self, drawn: np.ndarray, numbers: np.ndarray) -> tuple[float, tuple[str, ...]]:
        return float(np.mean(self._classifier.predict(_flat(drawn)) == numbers)), self._beside


class Captions:
    """Judge of pictures of held-out captions: `retrieval`."""

    def __init__(self, data: PreparedImages):
        with _needing_scikit_learn():
            from sklearn.decomposition import PCA
        held_out, learnt = _spread(len(data.validation), _MOST), _pixels(data.train, _spread(len(data.train), _MOST))
        self.prompts = [data.validation.caption(int(i)) or "" for i in held_out]
        self._real = _pixels(data.validation, held_out)
        self._features = PCA(min(_COMPONENTS, *learnt.shape), whiten=True, random_state=0).fit(learnt)

    def asked(self, count: int) -> np.ndarray:
        return _spread(len(self.prompts), count)

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
    return _nearest(data, _flat(pictures))


def _nearest(data: PreparedImages, ours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    numbers = _spread(len(data.train), _MOST)
    real = _pixels(data.train, numbers)
    lengths, best, distances = (real**2).sum(1), [], []
    for part in np.array_split(ours, -(-len(ours) // 512)):
        squares = (part**2).sum(1)[:, None] - 2 * part @ real.T + lengths
        best.append(squares.argmin(1))
        distances.append(np.sqrt(np.maximum(squares.min(1), 0) / ours.shape[1]))
    return numbers[np.concatenate(best)], np.concatenate(distances)


def _spread(length: int, most: int) -> np.ndarray:
    """Return up to `most` numbers below `length`, spread evenly."""
    return np.unique(np.linspace(0, length - 1, min(most, length)).round().astype(int))


@contextlib.contextmanager
def _needing_scikit_learn() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise UserError(f"evaluation.metric: needs scikit-learn: {pip_install('diffusion')}") from None


def _pixels(store: ImageStore, numbers: np.ndarray) -> np.ndarray:
    return np.concatenate([_flat(store.image(int(i))[None]) for i in numbers])


def _labels(store: ImageStore, numbers: np.ndarray) -> np.ndarray:
    return np.array([store.label(int(i)) for i in numbers])


def _flat(pictures: np.ndarray) -> np.ndarray:
    """Return values in 0..1 in rows, f32[N, ...], of pictures of `_SIDE` at most."""
    count, height, width, channels = pictures.shape
    step = -(-max(height, width) // _SIDE)
    kept = pictures[:, : height // step * step, : width // step * step].astype(np.float32)
    squares = kept.reshape(count, height // step, step, width // step, step, channels)
    return squares.mean((2, 4)).reshape(count, -1) / 255


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
