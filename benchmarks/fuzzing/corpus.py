"""Small valid inputs, made by trainfw itself: `python -m benchmarks.fuzzing.corpus DIRECTORY`, a process of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from trainfw.data import Tokenizer
from trainfw.models import ModelConfig

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n{% generation %}{{ m.content | trim }}<|end|>\n"
    "{% endgeneration %}{% endfor %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}{{ strftime_now('%Y') }}"
)
MODEL = {"preset": "tiny", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2}
MODEL |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
RECIPE: dict[str, Any] = {
    "name": "fuzz",
    "model": {"preset": "tiny", "vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_layers": 1},
    "data": {"sequence_length": 16, "validation_fraction": 0.2, "tokenizer": {"name": "bytes"}},
    "train": {"steps": 4, "global_batch_size": 2, "log_every": 1, "validation_batches": 1},
    "optimizer": {"learning_rate": 3.0e-3, "warmup_steps": 2},
    "parallel": {"data": 1},
    "faults": {"non_finite": "skip"},
    "checkpoint": {"every": 2},
}
OVERRIDES = ("train.steps=5", "optimizer.learning_rate=1e-3", "data.source=['case/text.txt']", "name=other")


def tokenizer() -> Tokenizer:
    """A byte-level BPE with a chat template."""
    from trainfw.formats.gguf.token_types import PRE_TOKENIZERS

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    form = json.loads(backend.to_str())
    form["pre_tokenizer"] = PRE_TOKENIZERS["smollm"].form
    backend = tokenizers.Tokenizer.from_str(json.dumps(form))
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin|>", "<|start|>", "<|end|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([Path(json.__file__).read_text()], trainer)
    settings = {"bos_token": special[0], "eos_token": special[2], "chat_template": TEMPLATE}
    return Tokenizer(backend, 0, 2, settings)


def make(directory: Path) -> None:
    """A directory for each kind of `readers.READERS`."""
    from trainfw.adapters import AdapterConfig, config_targets
    from trainfw.interop import config_to_huggingface, open_model, parameter_shapes, save_gguf, save_model, save_peft

    rng = np.random.default_rng(0)
    model, words = ModelConfig(**MODEL), tokenizer()
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in parameter_shapes(model).items()}
    for kind, limit in (("safetensors", 30_000), ("config", 2**30)):
        save_model(directory / kind, model, arrays.__getitem__, companions=words.save, max_shard_size=limit)
    words.save(directory / "tokenizer")
    words.save(directory / "template")
    (directory / "template" / "chat_template.jinja").write_text(TEMPLATE)
    source = open_model(directory / "config")
    (directory / "gguf").mkdir()
    save_gguf(directory / "gguf" / "model.gguf", config_to_huggingface(model), source.used(), directory / "config")
    adapter = AdapterConfig(rank=2, alpha=4, patterns={"layers.mlp.up": {"rank": 3, "alpha": 2}})
    shapes = {name: arrays[f"{name}.kernel"].shape for name in config_targets(adapter, model)}
    ranks = {name: size[0] for name, size in config_targets(adapter, model).items()}
    parts = {f"{name}.adapter.lora_a": np.ones((*s[:-1], ranks[name]), np.float32) for name, s in shapes.items()}
    parts |= {f"{n}.adapter.lora_b": np.ones((*s[:-2], ranks[n], s[-1]), np.float32) for n, s in shapes.items()}
    save_peft(directory / "adapter", adapter, parts, model, "base")
    (directory / "recipe").mkdir()
    recipe = RECIPE | {"data": RECIPE["data"] | {"source": ["case/text.txt"]}}
    (directory / "recipe" / "recipe.yaml").write_text(json.dumps(recipe, indent=1))
    (directory / "recipe" / "overrides").write_text("\n".join(OVERRIDES))
    (directory / "recipe" / "text.txt").write_text("a text")
    make_run(directory / "checkpoint", directory / "data")


def make_run(run: Path, text: Path) -> None:
    """A finished run with two checkpoints, and a rollback in its past."""
    from trainfw import load_recipe
    from trainfw.training import Reporter, train

    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(
            f"document {number}: " + " ".join(f"word{number * i % 7}" for i in range(9))
        )
    data = RECIPE["data"] | {"source": [str(text / "*.txt")], "cache_dir": str(text / "cache")}
    train(load_recipe(RECIPE | {"data": data}), run_dir=run, reporter=Reporter())
    row = {"step": 1, "kind": "spike", "policy": "rollback", "row": 2, "rows": 2, "loss": 9.5}
    (run / "faults.jsonl").write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    from trainfw import backends

    backends.prepare(1)
    make(Path(sys.argv[1]))
