"""Weights that `model.from`, `adapter.from` and the commands about models name, in any of their forms."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainfw.adapters import AdapterConfig, EmbeddingLoRA, LoRA, adaptable, config_targets, weight_of
from trainfw.checkpoint import SavedParameters, locate, read_identity, steps_in, taking_the_next
from trainfw.confined import UnusableError
from trainfw.data import ChatTemplate, Tokenizer, chat_prompt, load_tokenizer
from trainfw.errors import UserError
from trainfw.interop import (
    LORA_WEIGHTS,
    decoder_config,
    is_lora,
    is_peft,
    model_kind,
    open_diffusers,
    open_model,
    part_of,
    peft_copies,
    read_lora,
    read_peft,
)
from trainfw.models import DiTConfig, FamilyConfig, abstract_model, dense, vocabulary_of
from trainfw.paths import resolve_path
from trainfw.recipe import Recipe, load_recipe, refuse_recipe
from trainfw.weights.frozen_storage import kept_weight

Which = Literal["ema", "raw"]
"""Weights of a run that keeps an average of them (`optimizer.ema`): that, or those that learn."""


class Weights(Protocol):
    """The weights of a model, by the names of our parameters."""

    @property
    def config(self) -> FamilyConfig: ...

    @property
    def dtype(self) -> str:
        """Dtype of most weights."""

    def read(self, name: str, like: jax.ShapeDtypeStruct, layer_order: Sequence[int] | None = None) -> jax.Array:
        """Read one array in the dtype and sharding of `like`. Raises UserError where it has another shape."""


class Base(Weights, Protocol):
    """Weights to start from."""

    def fingerprint(self) -> str:
        """Return a hash of the weights, the same wherever they lie."""


@dataclass(frozen=True)
class RunBase:
    """A checkpoint of a run that trained all weights."""

    config: FamilyConfig
    saved: SavedParameters
    dtype: str = "float32"

    def read(self, name: str, like: jax.ShapeDtypeStruct, layer_order: Sequence[int] | None = None) -> jax.Array:
        return self.saved.read(name, like, layer_order)

    def fingerprint(self) -> str:
        return self.saved.fingerprint()


@dataclass(frozen=True)
class Adapter:
    """An adapter's arrays, by our names."""

    config: AdapterConfig
    arrays: dict[str, np.ndarray]
    base: dict[str, str] | None
    """`path` and `hash` of the base that it was trained on, if known."""
    path: str
    copies: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Weights of that base that were saved with the adapter, by our names."""

    def check_base(self, base: Base, path: str) -> None:
        """Raise UserError where the adapter was trained on other weights than these."""
        for name, copy in self.copies.items():
            stored = "embedding.table" if ties_embeddings(base.config) else name
            expected = copy.T if stored != name else copy
            actual = np.asarray(base.read(stored, jax.ShapeDtypeStruct(expected.shape, jnp.float32)))
            differs = (actual.astype(copy.dtype) != expected).any(axis=1 if stored == "embedding.table" else 0)
            if differing := int(differs.sum()):
                raise UserError(
                    f"{self.path}: holds the {name} of its base, which differs from {path}'s in {differing:,} of "
                    f"{vocabulary_of(base.config):,} rows: it was changed or trained, and PEFT takes it. Give the "
                    "model that it was trained on as the base, or merge the adapter with PEFT where it was made"
                )
        if self.base is not None and self.base["hash"] != (actual_hash := base.fingerprint()):
            raise UserError(other_base(self.path, self.base, path, actual_hash))


def other_base(adapter: str, trained_on: dict[str, str], path: str, actual_hash: str) -> str:
    """Describe, for an error, a base that has other weights than the adapter was trained on."""
    return (
        f"{path}: is not the base that what is in {adapter} was trained on: its weights' hash is {actual_hash}, and "
        f"{trained_on['hash']} is expected, as of {trained_on['path']} then (of a run, its latest checkpoint counts: "
        "`trainfw export` keeps a model as it is)"
    )


def ties_embeddings(config: FamilyConfig) -> bool:
    """Tell whether a model's head is its embedding table; one of images has neither."""
    return bool(getattr(config, "tie_embeddings", False))


@dataclass(frozen=True)
class MergedBase:
    """A base with an adapter added to its weights, which are rounded as they were stored in training."""

    base: Base
    adapter: Adapter
    recipe: Recipe | None
    """Recipe of the adapter's run, which names the base's storage."""

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @cached_property
    def config(self) -> FamilyConfig:
        """Config of the base; untied, where the embedding has an adapter, which is not for the head."""
        untied = self._tied and "embedding" in self._sizes
        return self.base.config.model_copy(update={"tie_embeddings": False} if untied else {})

    @cached_property
    def _tied(self) -> bool:
        return ties_embeddings(self.base.config)

    @cached_property
    def _sizes(self) -> dict[str, tuple[int, float]]:
        return config_targets(self.adapter.config, self.base.config)

    def read(self, name: str, like: jax.ShapeDtypeStruct, layer_order: Sequence[int] | None = None) -> jax.Array:
        wide = jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=like.sharding)
        if name == "head.kernel" and self._tied:
            table = jax.ShapeDtypeStruct(like.shape[::-1], jnp.float32)
            return self._kept("embedding.table", self.base.read("embedding.table", table)).T.astype(like.dtype)
        weight = self._kept(name, self.base.read(name, wide, layer_order))
        module = name.rpartition(".")[0]
        if module in self._sizes and name.endswith((".kernel", ".table")):
            weight = self._merged(module, weight, layer_order)
        return weight.astype(like.dtype)

    def _kept(self, name: str, weight: jax.Array) -> jax.Array:
        return weight if self.recipe is None else dense(kept_weight(name, weight, self.recipe), jnp.float32)

    def _merged(self, module: str, weight: jax.Array, layer_order: Sequence[int] | None) -> jax.Array:
        order = None if layer_order is None or not module.startswith("layers.") else np.asarray(layer_order)
        parts = {}
        for part in ("lora_a", "lora_b", "magnitude"):
            array = self.adapter.arrays.get(f"{module}.adapter.{part}")
            if array is not None:
                value = jnp.asarray(array if order is None else array[order], jnp.float32)
                parts[part] = nnx.Param(value, axes=(None,) * value.ndim)
        scale = self.adapter.config.scale(*self._sizes[module])
        if module == "embedding":
            return EmbeddingLoRA(parts["lora_a"], parts["lora_b"], scale=scale).merged(weight)
        lora = LoRA(parts["lora_a"], parts["lora_b"], parts.get("magnitude"), scale=scale, dropout=0.0, name=module)
        return lora.merged(weight)  # not jitted: A and B would be constants, and folded


def check_tokenizer(path: str | Path, config: FamilyConfig, tokenizer: Tokenizer | None = None) -> None:
    """Raise UserError where a model's tokenizer, if any, encodes text to ids without a row of its embedding.

    Special tokens past the embedding that the chat template does not write around turns (Gemma 3's
    `<image_soft_token>`) only give a warning here; a text with them is refused.
    """
    try:
        tokenizer = tokenizer or load_tokenizer(path)
    except UnusableError:
        raise
    except UserError as error:  # weights alone; an error only where a tokenizer is needed
        if (resolve_path(path) / "tokenizer.json").is_file():
            warnings.warn(f"{error}; the weights come without a tokenizer that can be used", stacklevel=1)
        return
    rows, last = vocabulary_of(config), tokenizer.vocab_size - 1
    template = ChatTemplate.usable(tokenizer)
    around = {} if template is None else template.around_turns
    if past := {*tokenizer.past(rows), *((id_, token) for token, id_ in around.items() if id_ >= rows)}:
        id_, token = min(past)
        raise UserError(
            f"{path}: its tokenizer has ids to {last:,}, but its embedding has {rows:,} rows: none for {token!r} "
            f"({id_:,}). Make them, with Transformers' model.resize_token_embeddings(len(tokenizer)), or take those "
            "tokens out of tokenizer.json"
        )
    if last >= rows:
        warnings.warn(
            f"{path}: its tokenizer has special tokens to {tokenizer.backend.id_to_token(last)!r} ({last:,}), past the "
            f"{rows:,} rows of its embedding: a text with them is refused",
            stacklevel=1,
        )


def is_run(path: str | Path) -> bool:
    """Tell whether a path is a run directory. Raises UserError for a recipe, or a run's name without its directory."""
    refuse_recipe(path)
    return not str(path).startswith("package:") and (resolve_path(path) / "recipe.yaml").is_file()


def run_recipe(path: str | Path) -> Recipe:
    """Load the recipe of a run directory. Raises UserError also where a newer trainfw wrote it."""
    read_identity(resolve_path(path))
    return load_recipe(resolve_path(path) / "recipe.yaml")


def reads_average(path: str, weights: Which | None = None) -> bool:
    """Tell whether it is the average that is read at a path: where there is one, unless `raw` weights are asked for.

    Raises UserError where `ema` is asked for, and there is none.
    """
    if weights not in (None, *get_args(Which)):
        raise UserError(f"weights {weights!r} (--weights): expected {' or '.join(get_args(Which))}")
    averages = is_run(path) and run_recipe(path).optimizer.ema is not None
    if weights == "ema" and not averages:
        raise UserError(
            f"weights 'ema' (--weights): {path} has no average of its weights, as a run of optimizer.ema has"
        )
    return averages and weights != "raw"


def average_note(path: str, weights: Which | None = None) -> str:
    """Return a line that says which weights were read, of a run that keeps an average; else nothing."""
    if not is_run(path) or (decay := run_recipe(path).optimizer.ema) is None:
        return ""
    averaged = reads_average(path, weights)
    return f"the average of the weights (optimizer.ema = {decay})" if averaged else "the weights themselves, no average"


def open_base(path: str, step: int | None = None, weights: Which | None = None) -> Base:
    """Open the weights at a path: of a run, their average where it keeps one, unless `weights` says otherwise.

    Raises UserError where there is no model, and for a run of an adapter.
    """
    averaged = reads_average(path, weights)
    if not is_run(path):
        resolved = part_of(resolve_path(path), None)
        return open_diffusers(resolved) if model_kind(resolved) == "diffusers" else open_model(path)
    recipe = run_recipe(path)
    if recipe.adapter is not None:
        raise UserError(
            f"{path}: is a run of an adapter on {recipe.model.from_ or 'a drawn model'}; "
            f"`trainfw merge {path} --out MODEL` makes a model of both"
        )
    return RunBase(recipe.model, open_checkpoint(path, step, averaged=averaged))


def model_of(base: Base, config: FamilyConfig, dtype: str = "float32") -> Any:
    """Return the model of a config, with the weights of a base in `dtype` on this process's first device."""
    graphdef, variables = nnx.split(abstract_model(config, compute_dtype=dtype), nnx.Param)
    sharding, values = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), []
    for place, variable in nnx.to_flat_state(variables):
        like = jax.ShapeDtypeStruct(variable.shape, dtype, sharding=sharding)
        values.append((place, base.read(".".join(map(str, place)), like)))
    return nnx.merge(graphdef, nnx.from_flat_state(values))


def merge(
    adapter_path: str, base_path: str | None = None, step: int | None = None, weights: Which | None = None
) -> MergedBase:
    """Open an adapter (a run, or a directory in PEFT's or diffusers' form) merged into its base.
    `weights` are the adapter's.

    Raises UserError where the base is neither given nor known, or is another than the adapter was trained on.
    """
    recipe = run_recipe(adapter_path) if is_run(adapter_path) else None
    if recipe is not None and recipe.adapter is None:
        raise UserError(f"{adapter_path}: trained all weights, so that there is nothing to merge; see `trainfw export`")
    base_path = base_path or (recipe.model.from_ if recipe is not None else None)
    if base_path is None:
        reason = "its base was drawn from a seed" if recipe is not None else "its form does not hold its base"
        raise UserError(f"{adapter_path}: {reason}; name one with base (--base)")
    base = open_base(base_path)
    adapter = read_adapter(adapter_path, base.config, step, weights)
    adapter.check_base(base, base_path)
    return MergedBase(base, adapter, recipe)


def read_adapter(path: str, model: FamilyConfig, step: int | None = None, weights: Which | None = None) -> Adapter:
    """Read an adapter of a model of this shape, from a run or a directory in PEFT's or diffusers' form.

    Raises UserError.
    """
    averaged = reads_average(path, weights)
    if is_peft(path):
        config, arrays = read_peft(resolve_path(path), decoder_config(model, path))
        adapter = Adapter(config, arrays, None, path, peft_copies(resolve_path(path)))
    elif is_lora(resolve_path(path)):
        if not isinstance(model, DiTConfig):
            raise UserError(f"{path}: holds an adapter of a diffusion transformer, not of family {model.family!r}")
        adapter = Adapter(*read_lora(resolve_path(path), model), None, path)
    elif not is_run(path):
        files = f"an adapter_config.json or {LORA_WEIGHTS}"
        raise UserError(f"{path}: holds no adapter; expected a run directory, or one with {files}")
    elif (trained := run_recipe(path).adapter) is None:
        raise UserError(f"{path}: is a run that trained all weights, not an adapter")
    else:
        host = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def read() -> Adapter:
            saved = open_checkpoint(path, step, averaged=averaged)
            arrays = {
                name: np.asarray(saved.read(name, jax.ShapeDtypeStruct(shape, dtype, sharding=host)))
                for name, (shape, dtype) in saved.arrays.items()
            }
            return Adapter(trained, arrays, saved.meta.get("base"), path)

        adapter = taking_the_next(read, step)
    modules = adaptable(abstract_model(model))
    for name, (rank, _) in config_targets(adapter.config, model).items():
        shape = weight_of(modules[name]).get_value().shape
        shapes = {"lora_a": (*shape[:-1], rank), "lora_b": (*shape[:-2], rank, shape[-1])}
        if adapter.config.kind == "dora":
            shapes["magnitude"] = (*shape[:-2], shape[-1])
        for part, part_shape in shapes.items():
            array = adapter.arrays.get(f"{name}.adapter.{part}")
            if array is None or array.shape != part_shape:
                state = "missing" if array is None else f"of shape {array.shape}"
                raise UserError(f"{path}: {name}.adapter.{part} is {state}; this base takes {part_shape}")
    return adapter


def open_checkpoint(path: str | Path, step: int | None = None, *, averaged: bool = False) -> SavedParameters:
    """Open a run's checkpoint, `step` or the latest, or the average in it.

    Raises UserError if there is none, RunError if it is damaged.
    """
    identity = read_identity(resolve_path(path))
    directory = locate(resolve_path(path), run_recipe(path).checkpoint)

    def opened() -> SavedParameters:
        steps = steps_in(directory)
        if not steps:
            raise UserError(f"{path}: holds no checkpoint yet")
        if step is not None and step not in steps:
            raise UserError(f"{path}: has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        return SavedParameters(directory / str(steps[-1] if step is None else step), identity, averaged=averaged)

    return taking_the_next(opened, step)


@dataclass(frozen=True)
class PromptForm:
    """Default form of a model's prompts, which is that of its training data."""

    chat: bool = False
    system_prompt: str | None = None
    starts: bool = False
    """Flag: a text starts with bos, as the documents of a run do; else with the tokenizer's own prefix."""

    def encode(
        self, tokenizer: Tokenizer, text: str, *, chat: bool | None = None, system_prompt: str | None = None
    ) -> list[int]:
        """Encode a prompt: as a turn of the user by the chat template, or as text after bos or the tokenizer's prefix.

        Raises UserError for a system prompt without the template, and where there is no template.
        """
        if self.chat if chat is None else chat:
            return chat_prompt(tokenizer, text, system_prompt or self.system_prompt)
        if system_prompt is not None:
            raise UserError("system_prompt (--system): goes with chat (--chat)")
        begin = [tokenizer.bos_id] if self.starts or not text else tokenizer.prefix_ids
        return [*begin, *tokenizer.encode(text)]

    def echo(self, text: str, chat: bool | None) -> str:
        """Return the text that the model's answer continues: the prompt, or nothing for a chat."""
        return "" if (self.chat if chat is None else chat) else text


def prompt_form(path: str) -> PromptForm:
    """Return the form of the data that a run was trained on; plain text for other models."""
    if not is_run(path):
        return PromptForm()
    data = load_recipe(resolve_path(path) / "recipe.yaml").data
    return PromptForm(data.writes_turns, data.system_prompt, starts=True)
