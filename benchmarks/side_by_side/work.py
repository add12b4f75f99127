"""The work that all do: the shape of the model, the batches, the optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 64,
    "norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}
"""A Llama of 58M parameters; embedding and head are apart."""
ROWS, LENGTH = 4, 512
"""Of a batch. Every row is whole: no padding, no documents to mask."""
BATCHES = 4
"""That come again and again: tokens are random, and so what is learnt is those batches, and losses move."""
OPTIMIZER = {"learning_rate": 3e-4, "b1": 0.9, "b2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}
"""AdamW at a constant rate, gradients clipped by their global norm. Norms' scales do not decay, where that can be
said: LitGPT and MaxText decay all."""
TOKENS_PER_STEP = ROWS * LENGTH


def num_parameters() -> int:
    width, hidden = MODEL["hidden_size"], MODEL["intermediate_size"]
    layer = 4 * width * width + 3 * width * hidden + 2 * width
    return int(2 * MODEL["vocab_size"] * width + MODEL["num_layers"] * layer + width)


def write(directory: Path, dtype: str, name: str, options: dict[str, Any]) -> Path:
    """The file that a worker is given."""
    work = {
        "model": MODEL,
        "rows": ROWS,
        "length": LENGTH,
        "optimizer": OPTIMIZER,
        "dtype": dtype,
        "batches": str(directory / "batches.npz"),  # `rows`: int32 (BATCHES, ROWS, LENGTH + 1)
        "weights": str(directory / "weights"),  # a Hugging Face directory
        "directory": str(directory / name),
        **options,
    }
    (directory / name).mkdir()
    file = directory / f"{name}.json"
    file.write_text(json.dumps(work))
    return file


def write_batches(directory: Path, seed: int = 0) -> None:
    import numpy as np

    shape = (BATCHES, ROWS, LENGTH + 1)
    rows = np.random.default_rng(seed).integers(0, MODEL["vocab_size"], shape, dtype=np.int32)
    np.savez(directory / "batches.npz", rows=rows)
