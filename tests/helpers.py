"""What several tests need: small recipes and batches."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jaxlib
import numpy as np
import pytest
import yaml

from trainfw import Recipe, load_recipe
from trainfw.checking.jaxpr import sub_jaxprs
from trainfw.launch.local import _free_port
from trainfw.models import ModelConfig, abstract_model
from trainfw.training import Reporter

# Compiles a tiny step in a third of the time. XLA ends a process for a flag that it does not know, as newer ones do.
PLAIN_EMITTERS = "--xla_cpu_use_fusion_emitters=false" if jaxlib.__version__.startswith("0.10.") else ""
COMPILED_QUICKLY = (
    f"--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true {PLAIN_EMITTERS}".strip()
)
"""XLA's flags, without a number of devices."""

TINY = """
name: tiny
model: {preset: tiny, vocab_size: 258}
data: {source: [TEXT], sequence_length: 32, validation_fraction: 0.2}
train: {steps: 8, global_batch_size: 8, log_every: 1, validation_batches: 2}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 2}
checkpoint: {every: 4}
"""


def quicker(values: Iterable[Any], few: Collection[Any]) -> list[Any]:
    """Parameters, of which those of `few` are in the quicker suite: the others show the same of other shapes."""
    values = list(values)
    assert all(each in values for each in few)
    return [pytest.param(value, marks=[] if value in few else pytest.mark.long) for value in values]


def write_recipe(directory: Path, **replacements: Any) -> Path:
    """A tiny recipe over a few text files, both written into `directory`."""
    text = directory / "text"
    text.mkdir(exist_ok=True)
    for number in range(30):
        words = " ".join(f"word{number * i % 7} = {i};" for i in range(20))
        (text / f"{number}.txt").write_text(f"document {number}: {words}\n")
    path = directory / "recipe.yaml"
    path.write_text(TINY.replace("TEXT", str(text / "*.txt")))
    if replacements:
        tree = yaml.safe_load(path.read_text())
        for key, value in replacements.items():
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
        path.write_text(yaml.safe_dump(tree))
    return path


def tiny_recipe(directory: Path, *overrides: str) -> Recipe:
    return load_recipe(write_recipe(directory), overrides)


def chip_of_halves(directory: Path) -> Path:
    """A Trainium2 chip at LNC 1 that has no groups of two cores side by side: pairs lie half a chip apart."""
    topology = yaml.safe_load(resources.files("trainfw.hardware").joinpath("topologies/trn2.3xlarge.yaml").read_text())
    topology["splits"]["core"] = [s for s in topology["splits"]["core"] if s["parts"] == ["half", "quad"]]
    topology["groups"] = {1: [g for g in topology["groups"][1] if "core.pair" not in g["cover"][0]], 2: []}
    path = directory / "chip.yaml"
    path.write_text(yaml.safe_dump(topology))
    return path


def count_parameters(config: ModelConfig, *, active: bool = False) -> int:
    """Parameters of a model, a tied table counted once; `active`: those of one token's experts only."""
    import jax  # after conftest.py has set what it reads
    from flax import nnx

    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract_model(config), nnx.Param)))
    if not active or config.moe is None:
        return total
    idle = config.moe.num_experts - config.moe.experts_per_token
    return total - config.num_layers * idle * 3 * config.hidden_size * config.intermediate_size


def losses(run: Path) -> dict[int, float | None]:
    """Of the logged steps of a run, each of which is there once, in order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    return dict(found)


class Heard(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def random_pictures(recipe: Recipe, steps: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Batches of random pictures with what conditions them; the last row of each counts for nothing."""
    rng, model, rows = np.random.default_rng(seed), recipe.model, recipe.train.global_batch_size
    batches = []
    for step in range(steps):
        batch: dict[str, np.ndarray] = {
            "image": rng.uniform(-1, 1, (rows, model.image_size, model.image_size, model.channels)).astype(np.float32),
            "weight": np.append(np.ones(rows - 1, np.float32), np.float32(0)),
            "row": np.arange(step * rows, (step + 1) * rows),
        }
        if model.conditioning == "class":
            batch["label"] = rng.integers(0, model.num_classes, rows).astype(np.int32)
        elif model.conditioning != "none":
            shape = (rows, model.caption_length, model.caption_size)
            batch["caption"] = rng.normal(size=shape).astype(np.float32)
            lengths = rng.integers(1, model.caption_length + 1, (rows, 1))
            batch["caption_mask"] = (np.arange(model.caption_length) < lengths).astype(np.float32)
        batches.append(batch)
    return batches


def random_batches(recipe: Recipe, steps: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Batches of random tokens in two documents a row, the second of random length, some padded.

    Of pairs, two pairs of rows in each, of which about half of the tokens are learnt.
    """
    if recipe.reads_images:
        return random_pictures(recipe, steps, seed)
    rng = np.random.default_rng(seed)
    shape = (recipe.train.global_batch_size * recipe.group, recipe.data.sequence_length)
    batches = []
    for _ in range(steps):
        # Some tokens are likelier than others: something to learn.
        tokens = np.minimum(rng.geometric(0.1, (shape[0], shape[1] + 1)), recipe.model.vocab_size) - 1
        tokens = tokens.astype(np.int32)
        index = np.arange(shape[1])[None]
        start = rng.integers(1, shape[1], (shape[0], 1))
        padded = index >= rng.integers(shape[1] // 2, shape[1] + 1, (shape[0], 1))
        segment_ids = np.where(padded, 0, 1 + (index >= start)).astype(np.int32)
        learnt = segment_ids > 0
        if recipe.group > 1:
            learnt &= rng.random(shape) < 0.5
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": segment_ids,
            "positions": np.where(index >= start, index - start, index).astype(np.int32),
            "loss_mask": learnt.astype(np.float32),
        }
        if recipe.group > 1:
            batch = {name: x.reshape(-1, recipe.group, shape[1]) for name, x in batch.items()}
        batches.append(batch)
    return batches


def equations(jaxpr: Any) -> Iterator[Any]:
    """Of a jaxpr and of all inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in sub_jaxprs(equation):
            yield from equations(getattr(inner, "jaxpr", inner))


def in_two_processes(code: str, *arguments: object, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Run Python code in two processes of one run, which find each other; both end here."""
    known = {**os.environ, "TRAINFW_PROCESS_COUNT": "2", "TRAINFW_COORDINATOR": f"127.0.0.1:{_free_port()}"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**known, **environment, "TRAINFW_PROCESS_INDEX": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=240) for process in both]
    finally:
        for process in both:
            process.kill()
    return [subprocess.CompletedProcess(process.args, process.returncode, *texts) for process, texts in zip(both, said)]
