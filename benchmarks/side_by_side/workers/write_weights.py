"""Writes the weights that trainfw and Transformers both start from, as a Hugging Face directory."""

from __future__ import annotations

from typing import Any

from turns import read_work

WORK = read_work()


def main() -> None:
    import numpy as np

    from trainfw.interop import save_model
    from trainfw.models import ModelConfig, abstract_model

    model = WORK["model"]
    config = ModelConfig(**model, max_position=WORK["length"], tie_embeddings=False)
    abstract, random = abstract_model(config), np.random.default_rng(0)

    def read(path: str) -> np.ndarray:
        node: Any = abstract
        for name in path.split("."):
            node = getattr(node, name)
        if path.endswith("scale"):
            return np.ones(node.shape, np.float32)
        return 0.02 * random.standard_normal(node.shape, np.float32)

    save_model(WORK["weights"], config, read, extra={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None})


main()
