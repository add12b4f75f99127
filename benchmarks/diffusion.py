"""Diffusion models learn and draw, beside diffusers: python benchmarks/diffusion.py [--model pixart] [--save]

The same model, DiT of classes or PixArt of captions, from the same weights; the same images, noise, times and
conditions handed to both; AdamW, gradients clipped; the same number of threads. --dtype bfloat16: products in bfloat16
and parameters in float32, of diffusers by torch.autocast. Each:

  trainfw            the program of a recipe, as its training loop runs it; its `denoise`
  diffusers          DiTTransformer2DModel or PixArtTransformer2DModel, PyTorch eager: SDPA, fused AdamW
  diffusers-compile  the same through torch.compile, where there is a C++ compiler

A picture is drawn by Euler's steps of a flow, guided, with and without its condition in one batch. Diffusers' layers
share what embeds time and class, which its class has a copy of in each: the model is then the same, and so are losses.

Each is a process of its own; in one run they take turns of a few steps, first to learn, then to draw, so that whatever
else the machine does meets all alike. Peaks of memory are each process's own, from its start.

Exits 1 where trainfw does not train RATIO times as many steps a second, or draw RATIO times as many images, as the
faster of the others, takes more memory than the smaller of them, or where losses or pictures differ by more than
LIMITS, of their size; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from peers import WORKERS, make_say, variables
from side_by_side.driver import Record, Say, Worker, take_turns

from benchmarks.reporting import Check, Table, add_arguments, at_least, at_most, finish, positive, table
from trainfw.paths import cache_dir

RATIO, MEMORY = 1.5, 1.0
LIMITS = {"float32": (1e-5, 1e-3, 1e-3), "bfloat16": (1e-2, 2e-2, 1e-1)}
"""Of the first loss, of all, and of pictures, by dtype."""
OPTIMIZER = {"learning_rate": 3e-4, "b1": 0.9, "b2": 0.95, "epsilon": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0}
TRAIN: dict[str, Any] = {"scan_layers": False, "remat": "dots"}
"""Of the recipe's `train`."""
BATCHES = 4
"""That come again and again."""
CONDITIONS: dict[str, dict[str, Any]] = {
    "dit": {"conditioning": "class", "num_classes": 10},
    "pixart": {"conditioning": "cross", "caption_size": 384, "caption_length": 16},
}
PEERS = ("trainfw", "diffusers", "diffusers-compile")
OURS, *OTHERS = PEERS
DOES = {"train": "learns", "draw": "draws"}


@dataclass(frozen=True)
class Results:
    records: dict[str, dict[str, Record]]
    """By task and peer, of those that ran."""
    problems: dict[str, str]
    """By peer and task, why it did not run."""
    left_out: dict[str, str]
    """By peer, why it cannot run here, which is no failure."""
    pictures: dict[str, np.ndarray]

    def cpu(self, task: str, peer: str) -> float | None:
        """Seconds of all cores from the end of a step to that of the next, of which a busy machine takes no more."""
        ends = self.records[task][peer].more
        return float(np.median(np.diff(ends))) if len(ends) > 1 else None

    def median(self, task: str, peer: str) -> float:
        return statistics.median(self.records[task][peer].seconds)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def peers(text: str) -> list[str]:
        names = text.split(",")
        if bad := [name for name in names if name not in PEERS]:
            raise argparse.ArgumentTypeError(f"unknown peer {bad[0]!r}: expected some of {', '.join(PEERS)}")
        return names

    parser.add_argument("--model", choices=list(CONDITIONS), default="dit", help="of classes (dit), or of captions")
    sizes = {"image-size": 32, "channels": 3, "patch-size": 4, "hidden-size": 256, "layers": 8, "heads": 4}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=size, help=f"of the model ({size})")
    parser.add_argument("--batch", type=positive, default=32, help="images of a training step (32)")
    parser.add_argument("--pictures", type=positive, default=16, help="drawn at once (16)")
    parser.add_argument("--denoising-steps", type=positive, default=20, help="of each picture (20)")
    parser.add_argument("--steps", type=positive, default=5, help="timed steps of training of each at its turn (5)")
    parser.add_argument("--rounds", type=positive, default=4, help="turns of each, in one of which it draws once (4)")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of each (all cores)")
    parser.add_argument("--dtype", choices=list(LIMITS), default="float32", help="of products (float32)")
    parser.add_argument("--train", default="", metavar="KEY=VALUE,...", help="more of the recipe's `train`")
    parser.add_argument("--peers", type=peers, default=list(PEERS), help=f"some of {','.join(PEERS)}")
    parser.add_argument("--timeout", type=positive, default=1200, help="seconds for a start or a turn (1200)")
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    parts = [part for part in chosen.train.split(",") if part]
    if bad := [part for part in parts if part.count("=") != 1]:
        parser.error(f"--train: {bad[0]!r}: expected KEY=VALUE")
    given = {}
    for key, value in (part.split("=") for part in parts):
        given[key] = json.loads(value) if value in ("true", "false") or value.isdecimal() else value
    chosen.train = TRAIN | {"compute_dtype": chosen.dtype} | given
    return chosen


def model_of(chosen: argparse.Namespace) -> dict[str, Any]:
    """The recipe's `model`."""
    return {
        "family": "dit",
        "image_size": chosen.image_size,
        "channels": chosen.channels,
        "patch_size": chosen.patch_size,
        "hidden_size": chosen.hidden_size,
        "num_layers": chosen.layers,
        "num_heads": chosen.heads,
        **CONDITIONS[chosen.model],
    }


def write_inputs(chosen: argparse.Namespace, directory: Path) -> int:
    """Write weights, as diffusers' directory, and batches; returns how many parameters there are."""
    from trainfw.interop import parameter_shapes, save_transformer
    from trainfw.models import DiTConfig

    config, random = DiTConfig(**model_of(chosen)), np.random.default_rng(0)
    shapes = parameter_shapes(config)
    # None is zero, so that every gradient has something to be compared by.
    save_transformer(
        directory / "weights", config, lambda path: 0.02 * random.standard_normal(shapes[path], np.float32)
    )
    for file, batches, rows in (("batches.npz", BATCHES, chosen.batch), ("pictures.npz", 1, chosen.pictures)):
        np.savez(directory / file, **random_batches(chosen, random, batches, rows))
    return sum(int(np.prod(shape)) for shape in shapes.values())


def random_batches(chosen: argparse.Namespace, random: np.random.Generator, batches: int, rows: int) -> dict[str, Any]:
    """What a program of images reads, each array with a leading dim of batches."""
    shape, model = (batches, rows), model_of(chosen)
    image = (*shape, chosen.image_size, chosen.image_size, chosen.channels)
    arrays: dict[str, Any] = {
        "image": random.uniform(-1, 1, image).astype(np.float32),
        "noise": random.standard_normal(image, np.float32),
        "time": random.uniform(0, 1000, shape).astype(np.float32),
        "weight": np.ones(shape, np.float32),
        "keep": (random.uniform(size=shape) >= 0.1).astype(np.float32),
    }
    if chosen.model == "dit":
        arrays["label"] = random.integers(0, model["num_classes"], shape, dtype=np.int32)
    else:
        length = model["caption_length"]
        arrays["caption"] = random.standard_normal((*shape, length, model["caption_size"]), np.float32)
        lengths = random.integers(1, length + 1, shape)
        arrays["caption_mask"] = (np.arange(length) < lengths[..., None]).astype(np.float32)
    return arrays


def measure(chosen: argparse.Namespace, say: Say) -> tuple[Results, int]:
    records: dict[str, dict[str, Record]] = {}
    problems: dict[str, str] = {}
    left_out, pictures, names = {}, {}, list(chosen.peers)
    if "diffusers-compile" in names and not (shutil.which("g++") or shutil.which("clang++")):
        names.remove("diffusers-compile")
        left_out["diffusers-compile"] = "there is no C++ compiler here"
    with tempfile.TemporaryDirectory(prefix="diffusion-") as temporary:
        directory = Path(temporary)
        parameters = write_inputs(chosen, directory)
        for task, does in DOES.items():
            workers = [make_worker(chosen, directory, task, name) for name in names]
            steps = {worker.name: chosen.steps if task == "train" else 1 for worker in workers}
            problems |= take_turns(workers, chosen.rounds, steps, say)
            ran = {name: worker.record for name, worker in zip(names, workers) if worker.name not in problems}
            records[does] = ran
        for name in records["draws"]:
            pictures[name] = np.load(directory / f"{name}-draw.npy")
    return Results(records, problems, left_out, pictures), parameters


def make_worker(chosen: argparse.Namespace, directory: Path, task: str, peer: str) -> Worker:
    name = f"{peer}-{task}"
    work = {
        "task": task,
        "model": model_of(chosen),
        "rows": chosen.batch if task == "train" else chosen.pictures,
        "optimizer": OPTIMIZER,
        "train": chosen.train,
        "threads": chosen.threads,
        "dtype": chosen.dtype,
        "denoising_steps": chosen.denoising_steps,
        "guidance": 4.0,
        "compile": peer.endswith("-compile"),
        "weights": str(directory / "weights"),
        "batches": str(directory / ("batches.npz" if task == "train" else "pictures.npz")),
        "pictures": str(directory / f"{name}.npy"),
        "recipe": str(directory / f"{name}.yaml"),
    }
    file = directory / f"{name}.json"
    file.write_text(json.dumps(work))
    script = WORKERS / f"denoise_on_{peer.removesuffix('-compile')}.py"
    log = cache_dir() / "peers" / "logs" / f"diffusion-{name}.log"
    return Worker(
        name, [sys.executable, str(script), str(file)], variables(directory / name, True), log, chosen.timeout
    )


def judge(results: Results, chosen: argparse.Namespace, parameters: int) -> tuple[list[Table], list[Check]]:
    shape = f"{chosen.image_size} x {chosen.image_size} x {chosen.channels}, patches of {chosen.patch_size}"
    title = f"{chosen.model} of {parameters:,} parameters ({chosen.layers} layers, {chosen.hidden_size} wide), {shape}"
    title += f"; {chosen.batch} images a step; {chosen.pictures} pictures at once, {chosen.denoising_steps} steps each"
    title += f"; {chosen.threads} threads; train: {json.dumps(chosen.train)}"
    columns = ["", "does", "steps/s", "images/s", "s", "least", "most", "CPU s", "trainfw is, times", "MB at the peak"]
    columns += ["first step after, s", "first loss", "last loss"]
    lines: list[list[Any]] = []
    for does, records in results.records.items():
        images = chosen.batch if does == "learns" else chosen.pictures
        for name, record in records.items():
            median = results.median(does, name)
            times = median / results.median(does, OURS) if OURS in records else None
            losses = [loss for loss in record.losses if loss is not None]
            line = [name, does, 1 / median, images / median, median, min(record.seconds), max(record.seconds)]
            line += [results.cpu(does, name), times, round(record.memory / 1e6), record.first_step]
            lines.append([*line, *([f"{losses[0]:.5f}", f"{losses[-1]:.5f}"] if losses else [None, None])])
    for name, problem in (results.problems | results.left_out).items():
        lines.append([name, f"did not run: {problem}", *[None] * (len(columns) - 2)])
    return [table(title, columns, lines)], checks(results, *LIMITS[chosen.dtype])


def checks(results: Results, first_loss: float, loss: float, picture: float) -> list[Check]:
    made: list[Check] = []
    for does, records in results.records.items():
        others = [name for name in OTHERS if name in records]
        if OURS not in records or not others:
            continue
        fastest = min(others, key=lambda name: results.median(does, name))
        ratio = results.median(does, fastest) / results.median(does, OURS)
        made.append(at_least(f"trainfw {does}: times as fast as {fastest}", ratio, RATIO))
        smallest = min(others, key=lambda name: records[name].memory)
        share = records[OURS].memory / records[smallest].memory
        made.append(at_most(f"trainfw {does}: peak memory over that of {smallest}", share, MEMORY))
        for name in others:
            if does == "learns":
                pairs = list(zip(records[OURS].losses, records[name].losses))
                apart = np.array([abs(a - b) / abs(b) for a, b in pairs if a is not None and b is not None])
                made.append(at_most(f"the first loss, apart from that of {name}", float(apart[0]), first_loss))
                losses = f"losses of {len(apart)} steps, apart from those of {name}"
                made.append(at_most(losses, float(apart.max()), loss))
            else:
                ours, theirs = results.pictures[OURS], results.pictures[name]
                error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
                made.append(at_most(f"pictures, apart from those of {name}", error, picture))
    if results.problems:
        made.append(at_most("processes that did not run to their end", len(results.problems), 0))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    results, parameters = measure(chosen, make_say())
    tables, made = judge(results, chosen, parameters)
    return finish("diffusion", tables, made, chosen, ["diffusers", "torch"])


if __name__ == "__main__":
    raise SystemExit(main())
