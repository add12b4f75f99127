"""Each kind's reader: it uses a directory of `corpus.make`, of which something was changed, as trainfw's commands do.

It returns where what came of it is right, raises trainfw's own errors where the files are refused, and `Wrong` where
there is a result that cannot be.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzzing import corpus
from trainfw.checkpoint import Checkpoints
from trainfw.cli.terminal import say
from trainfw.data import (
    ChatTemplate,
    DataConfig,
    Tokenizer,
    chat_prompt,
    load_tokenizer,
    prepare,
    stop_ids,
    train_iterator,
)
from trainfw.data.examples import Encoder
from trainfw.data.sources import Row
from trainfw.formats import SafetensorsTensors, Tensors, tokenizer_metadata
from trainfw.interop import (
    GGUFTensors,
    config_from_huggingface,
    open_model,
    peft_copies,
    peft_fields,
    read_huggingface,
    read_peft,
)
from trainfw.models import ModelConfig
from trainfw.program import build_program
from trainfw.recipe import load_recipe
from trainfw.training import Reporter, RunDirectory, check_inputs
from trainfw.training.loop import FaultLog, MetricsLog, Sessions, _state_at


class Wrong(AssertionError):
    """A result that the input does not say."""


@dataclass(frozen=True)
class Kind:
    """Reader of a kind of directory, and which of its files are changed, each in which form (of `mutations.FORMS`)."""

    read: Callable[[Path, Path], None]
    """Function that reads a directory; its second argument is the undamaged original."""
    files: Mapping[str, str]
    """Patterns of names -> form."""

    def places(self, directory: Path) -> Iterator[tuple[Path, str]]:
        for pattern, form in self.files.items():
            yield from ((file.relative_to(directory), form) for file in sorted(directory.glob(pattern)))


# --- Weights -------------------------------------------------------------------------------------


def read_safetensors(directory: Path, _: Path) -> None:
    tensors = SafetensorsTensors(directory)
    said: dict[str, Any] = {}
    for file in directory.glob("*.safetensors"):
        data = file.read_bytes() if file.is_file() else b""
        said |= json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")] or b"{}")
    _read_all(tensors, {name: tuple(said[name]["shape"]) for name in tensors.infos})


def _read_all(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
    for name, info in tensors.infos.items():
        if shapes is not None and info.shape != shapes[name]:
            raise Wrong(f"a tensor of shape {shapes[name]} is read as one of {info.shape}")
        value = tensors.read(name)
        if (value.shape, value.dtype) != (info.shape, info.dtype):
            raise Wrong(f"a tensor of {info.shape}, {info.dtype} has {value.shape}, {value.dtype}")
    tensors.fingerprint()


def read_gguf(directory: Path, _: Path) -> None:
    file = directory / "model.gguf"
    check_model(config_from_huggingface(read_huggingface(file)))
    _read_all(GGUFTensors(file))
    open_model(file)
    use_tokenizer(load_tokenizer(file))


def read_config(directory: Path, _: Path) -> None:
    source = open_model(directory)
    check_model(source.config)
    load_recipe({"name": "x", "model": {"from": str(directory)}, "data": {"source": "x", "sequence_length": 8}})


def check_model(config: ModelConfig) -> None:
    """Raise Wrong where a number of the model is none in its own arithmetic, float32."""
    for name, value in config.model_dump().items():
        if isinstance(value, float) and value and not (np.isfinite(np.float32(value)) and np.float32(value)):
            raise Wrong(f"{name} is {np.float32(value)} in float32")
        if isinstance(value, int) and abs(value) >= 2**31:
            raise Wrong(f"{name} is beyond 32 bits")


def read_adapter(directory: Path, _: Path) -> None:
    peft_fields(directory)
    config, arrays = read_peft(directory, ModelConfig(**corpus.MODEL))
    peft_copies(directory)
    for name, value in arrays.items():
        if name.endswith("lora_a") and value.shape[-1] > 10_000:
            raise Wrong(f"{config.kind} of rank {value.shape[-1]}")


# --- Tokenizers and templates --------------------------------------------------------------------

TEXTS = ("", "def f(x):\n    return x", "  a\tb ", "naïve 日本 🙂\u200b", "<|end|> <|start|>", "a" * 2000, "x1" * 500)
CHATS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
LARGE = 50_000
"""Tokens of a vocabulary that an honest tokenizer may need a second for, each time that it is built."""
LONGEST = 10_000_000
"""Characters that a short conversation may become."""


def read_tokenizer(directory: Path, _: Path) -> None:
    tokenizer = load_tokenizer(directory)
    use_tokenizer(tokenizer)
    tokenizer_metadata(directory, 320)


def use_tokenizer(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(text) for text in TEXTS]
    texts = [tokenizer.decode(one) for one in ids]
    if tokenizer.vocab_size > LARGE:
        stop_ids(tokenizer)
        return
    tokenizer.starting_texts().encode("a b")
    if any(id_ >= 320 for id_ in tokenizer.prefix_ids) and not tokenizer.past(0):
        raise Wrong("ids that are none")
    use_template(tokenizer)
    saved = Path("saved")
    shutil.rmtree(saved, ignore_errors=True)
    tokenizer.save(saved)
    again = load_tokenizer(saved)
    if again.fingerprint() == tokenizer.fingerprint() and [again.encode(text) for text in TEXTS] != ids:
        raise Wrong("a tokenizer that was saved encodes other tokens")
    if any(len(text) > LONGEST for text in texts):
        raise Wrong("a short text is decoded as megabytes")


def read_template(directory: Path, _: Path) -> None:
    use_template(load_tokenizer(directory))


def use_template(tokenizer: Tokenizer) -> None:
    stop_ids(tokenizer)
    template = ChatTemplate.of(tokenizer, "2020-01-02")
    if template is None:
        return
    for messages in CHATS:
        text = template.render(messages, tools=TOOLS if len(messages) > 1 else None)
        if not isinstance(text, str) or len(text) > LONGEST:
            raise Wrong(f"a short conversation becomes {len(text):,} characters")
    template.end_pattern.sub("", template.marker_pattern.sub("", "hi"))
    source = {"source": "x", "tokenizer": {"name": "file", "path": "x"}, "format": "chat", "sequence_length": 256}
    encoder = Encoder(DataConfig.model_validate(source | {"date": "2020-01-02"}), tokenizer)
    examples = list(encoder.encode(Row(str(i), {"messages": chat, "tools": TOOLS}) for i, chat in enumerate(CHATS)))
    if any(len(example.ids) != len(example.learnt) for example in examples):
        raise Wrong("an example learns of more tokens than it has, or of fewer")
    say("\n".join([*map(str, encoder.refusals.summary()), *encoder.remarks()]), err=True)
    chat_prompt(tokenizer, "hi", "be brief")


# --- Recipes -------------------------------------------------------------------------------------


def read_recipe(directory: Path, _: Path) -> None:
    overrides = (directory / "overrides").read_text("utf-8", "surrogateescape").split("\n")
    recipe = load_recipe(directory / "recipe.yaml", [text for text in overrides if text])
    Path("again.yaml").write_text(recipe.to_yaml(), encoding="utf-8", errors="surrogateescape")
    if differ := recipe.differences(load_recipe("again.yaml")):
        raise Wrong(f"a recipe that was written and read again has another {next(iter(differ))}")
    run = RunDirectory(Path("runs") / recipe.name, recipe.checkpoint)
    if not recipe.checkpoint.directory or "://" not in recipe.checkpoint.directory:
        run.check(recipe, "auto")
    check_inputs(recipe)


# --- Checkpoints ---------------------------------------------------------------------------------


@functools.cache
def _undamaged(run: Path) -> tuple[Any, Any, dict[int, list[bytes]]]:
    """(recipe, program, the bytes of every array by step) of a run before anything was changed."""
    import jax

    recipe = load_recipe(run / "recipe.yaml")
    program = build_program(recipe, jax.devices()[:1])
    identity = RunDirectory(run, recipe.checkpoint).identity()
    checkpoints = Checkpoints(run / "checkpoints", recipe.checkpoint, read_only=True, identity=identity)
    data = prepare(recipe.data)
    states = {step: _arrays(_restored(recipe, program, checkpoints, data, step)) for step in checkpoints.steps()}
    checkpoints.close()
    return recipe, program, states


def _restored(recipe: Any, program: Any, checkpoints: Any, data: Any, step: int) -> Any:
    batches = train_iterator(data.train, recipe.data, global_batch_size=recipe.train.global_batch_size)
    try:
        return _state_at(program, checkpoints, batches, data.validation.digest, Reporter().progress, step)
    finally:
        batches.close()


def _arrays(state: Any) -> list[bytes]:
    import jax

    parts = (state.params, state.opt_state, state.rng, state.step)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(parts)]


def read_checkpoint(directory: Path, original: Path) -> None:
    recipe, program, states = _undamaged(original)
    run = RunDirectory(directory, recipe.checkpoint)
    if run.check(recipe, "auto") is None:
        return
    checkpoints = Checkpoints(run.checkpoints, recipe.checkpoint, identity=run.identity())
    try:
        step = checkpoints.newest_whole(lambda text: None)
        if step is None:
            raise Wrong("a run with checkpoints starts anew")
        if step not in states:
            raise Wrong(f"step {step} was never saved")
        state = _restored(recipe, program, checkpoints, prepare(recipe.data), step)
        if _arrays(state) != states[step]:
            raise Wrong(f"step {step} is restored with other values")
    finally:
        checkpoints.close()
    run.open(recipe, step, identity=run.identity())
    faults = FaultLog(run, recipe.faults, step, writes=True)
    if any(not isinstance(row, int) or row < 0 for row in faults.rows):
        raise Wrong("rows that are none are left out")
    log = MetricsLog(run, step, Reporter())
    log.write({"step": step + 1, "loss": 1.25})
    log.close()
    Sessions(run.sessions_file, step).goodput(step + 1, {"step": 1.0})
    if list(run.metrics())[-1] != {"step": step + 1, "loss": 1.25}:
        raise Wrong("a row that was written to metrics.jsonl is not read again")


READERS: dict[str, Kind] = {
    "safetensors": Kind(read_safetensors, {"*.safetensors": "safetensors", "*.index.json": "json"}),
    "gguf": Kind(read_gguf, {"model.gguf": "gguf"}),
    "config": Kind(read_config, {"config.json": "json"}),
    "tokenizer": Kind(read_tokenizer, {"tokenizer.json": "tokenizer", "tokenizer_config.json": "json"}),
    "adapter": Kind(read_adapter, {"adapter_config.json": "adapter", "adapter_model.safetensors": "safetensors"}),
    "template": Kind(read_template, {"chat_template.jinja": "jinja"}),
    "recipe": Kind(read_recipe, {"recipe.yaml": "yaml", "overrides": "overrides"}),
    "checkpoint": Kind(
        read_checkpoint,
        {
            "*.jsonl": "lines",
            "recipe.yaml": "yaml",
            "checkpoints/*/manifest.json": "json",
            "checkpoints/*/meta/metadata": "json",
            "checkpoints/*/_CHECKPOINT_METADATA": "json",
            "checkpoints/*/*/_METADATA": "json",
            "checkpoints/*/*/_sharding": "json",
            "checkpoints/*/*/array_metadatas/*": "json",
            "checkpoints/*/*/manifest.ocdbt": "bytes",
        },
    ),
}
