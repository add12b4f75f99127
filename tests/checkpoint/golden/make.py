"""Keep a run directory as this version writes it: python tests/checkpoint/golden/make.py"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from trainfw import load_recipe, train
from trainfw.checkpoint import FORMAT

RECIPE = """
name: golden
model: {preset: tiny, vocab_size: 258, hidden_size: 8, intermediate_size: 16, num_heads: 2, num_kv_heads: 1,
        head_dim: 4}
data: {source: ["text/*.txt"], sequence_length: 32, validation_fraction: 0.34}
train: {steps: 8, global_batch_size: 4, log_every: 1, validation_batches: 2}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 2}
checkpoint: {every: 4}
"""


def main() -> None:
    target = Path(__file__).parent.absolute() / f"format-{FORMAT}.tar.xz"
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        Path("text").mkdir()
        for number in range(6):
            words = " ".join(f"word{number * i % 7} = {i};" for i in range(12))
            Path(f"text/{number}.txt").write_text(f"document {number}: {words}\n")
        Path("recipe.yaml").write_text(RECIPE)
        train(load_recipe("recipe.yaml"), run_dir="run")
        shutil.rmtree("run/tensorboard")
        shutil.rmtree("run/checkpoints/8")  # which the test is to make again
        with tarfile.open(target, "w:xz") as archive:
            for name in ("run", "text"):
                archive.add(name, filter=lambda info: info.replace(uid=0, gid=0, uname="", gname="", deep=False))
        os.chdir(target.parent)


if __name__ == "__main__":
    main()
