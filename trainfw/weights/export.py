"""Export of models and adapters to the formats of other libraries."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainfw import interop
from trainfw.adapters import AdapterConfig
from trainfw.checkpoint import taking_the_next
from trainfw.data import GENERATION, Progress, Tokenizer, load_tokenizer, stop_ids
from trainfw.errors import UserError, did_you_mean
from trainfw.formats import FLOATS, Tensors
from trainfw.json_text import read_json
from trainfw.models import FamilyConfig, LanguageModel, family_of
from trainfw.objectives import schedule_of
from trainfw.unfinished import scratch_directory
from trainfw.weights.export_images import export_images, is_of_images, reader_of, write_images
from trainfw.weights.folded import without_mup
from trainfw.weights.open import (
    Adapter,
    Base,
    MergedBase,
    Weights,
    Which,
    average_note,
    check_tokenizer,
    is_run,
    merge,
    open_base,
    read_adapter,
    run_recipe,
)

Format = Literal["hf", "gguf", "peft", "gguf-lora", "diffusers"]
_QUANTIZATIONS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "q8_0": "Q8_0"}


def export_model(
    source: str,
    out: str,
    *,
    format: Format | None = None,
    dtype: str | None = None,
    step: int | None = None,
    weights: Which | None = None,
    base: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Write a run's model or adapter, or any model, and return a line about it.

    Args:
        source: a run, or any path that `model.from` takes.
        out: a new directory; with `gguf` and `gguf-lora`, a new file.
        format: `hf`, a Hugging Face directory; `gguf`, for llama.cpp; `peft`, the adapter of a run that trained one;
            `gguf-lora`, an adapter that llama.cpp reads beside its base, of a run or in PEFT's form; `diffusers`, a
            model of images or its adapter, of which it is the default, as `hf` is of others.
        dtype: dtype of the weights; by default the source's, and in GGUF float16. GGUF takes q8_0 as well.
        weights: of a run with `optimizer.ema`, `ema` (the average, by default) or `raw`.
        base: with `gguf-lora`, the base of the adapter; by default that of the run.

    Raises UserError, and writes nothing, where the format has no form for it.
    """
    images = is_of_images(source)
    if format is not None and images != (format == "diffusers"):
        raise UserError(
            f"format {format!r} (--format): is for models of {'text' if images else 'images'}, and {source} is one of "
            f"{'images: diffusers is' if images else 'text: hf, gguf, peft and gguf-lora are'} for these"
        )
    if base is not None and format != "gguf-lora":
        raise UserError(f"base {base!r} (--base): goes with format gguf-lora")
    if images:
        return _noted(export_images(source, out, dtype=dtype, step=step, weights=weights), source, weights)
    if format in ("peft", "gguf-lora"):
        if dtype not in (None, "float32"):
            raise UserError(f"dtype {dtype!r}: an adapter is written as it is, in float32")
        if format == "peft":
            return _noted(_export_peft(source, out, step, weights), source, weights)
        return _noted(_export_gguf_lora(source, out, base, step, weights), source, weights)

    def export() -> str:
        opened = open_base(source, step, weights)
        check_tokenizer(source, opened.config)
        if format == "gguf":
            return _write_gguf(opened, source, out, dtype)
        if isinstance(opened, interop.ModelSource):
            companions = functools.partial(_Beside(source, opened).write, trained=False)
            return interop.copy_model(opened, out, dtype=dtype, companions=companions, progress=progress)
        return write_model(opened, source, out, dtype, progress)

    return _noted(taking_the_next(export, step), source, weights)


def merge_adapter(
    adapter: str,
    out: str,
    *,
    base: str | None = None,
    dtype: str | None = None,
    step: int | None = None,
    weights: Which | None = None,
    progress: Progress | None = None,
) -> str:
    """Merge an adapter into its base, write the model, and return a line about it.

    It is written as a Hugging Face directory; a model of images as one of diffusers.

    Args:
        adapter: a run of an adapter, or a directory in PEFT's or diffusers' form.
        base: the base model; by default that of the run.
        dtype: dtype of the weights; by default the base's.
        weights: of a run with `optimizer.ema`, `ema` (the average, by default) or `raw`.

    Raises UserError where the base is unknown, or another than the adapter was trained on.
    """
    merged = merge(adapter, base, step, weights)
    if family_of(merged.config).reads == "images":
        schedule = None if merged.recipe is None else schedule_of(merged.recipe.objective)
        return _noted(write_images(merged, out, dtype, schedule), adapter, weights)
    source = adapter if merged.recipe is not None else base
    assert source is not None
    check_tokenizer(source, merged.config)
    return _noted(write_model(merged, source, out, dtype, progress), adapter, weights)


def _noted(written: str, source: str, weights: Which | None) -> str:
    note = average_note(source, weights)
    return f"{written}\nnote: {note}" if note else written


def _export_peft(source: str, out: str, step: int | None, weights: Which | None) -> str:
    if interop.is_peft(source):
        raise UserError(f"{source}: is in PEFT's form already")
    if not is_run(source):
        raise UserError(f"{source}: is no run of an adapter, which is what PEFT's form holds; use format hf")
    recipe = run_recipe(source)
    adapter = read_adapter(source, recipe.model, step, weights)
    model = interop.decoder_config(recipe.model, source)
    interop.save_peft(out, adapter.config, adapter.arrays, model, recipe.model.from_)
    written = _written_adapter(out, adapter) + _kept_elsewhere(source, adapter.config)
    if unstopped := _unstopped(source):
        written += f"{unstopped}; in Transformers, generate(..., eos_token_id={_stops(source)})"
    return written


def _export_gguf_lora(source: str, out: str, base: str | None, step: int | None, weights: Which | None) -> str:
    if Path(out).exists():
        raise UserError(f"{out}: exists; nothing is overwritten, choose another path")
    of_run = is_run(source)
    if not of_run and not interop.is_peft(source):
        raise UserError(f"{source}: is no adapter for llama.cpp: expected a run of one, or a directory in PEFT's form")
    if base is None and not of_run:
        raise UserError(f"{source}: its form does not hold its base; name one with base (--base)")
    opened = None if base is None else open_base(base)
    model = run_recipe(source).model if opened is None else opened.config
    adapter = read_adapter(source, model, step, weights)
    if opened is not None and base is not None:
        adapter.check_base(opened, base)
    interop.save_gguf_lora(out, adapter.config, adapter.arrays, interop.decoder_config(model, source))
    written = _written_adapter(out, adapter)
    if adapter.config.base in ("int8", "nf4"):
        written += f"\nnote: trained on the base in {adapter.config.base}, and llama.cpp adds it to the base as that is"
    if of_run and (unstopped := _unstopped(source)):
        written += f"{unstopped} ({_stops(source)}), and llama.cpp reads those in the base's file"
    return written


def _written_adapter(out: str, adapter: Adapter) -> str:
    count = sum(array.size for array in adapter.arrays.values())
    return f"{out}: {adapter.config.kind}, {count:,} parameters, float32, {4 * count / 1e6:.1f} MB"


def _stops(run: str) -> list[int]:
    return list(stop_ids(load_tokenizer(run)))


def _unstopped(run: str) -> str:
    """Return the start of a note where generation with the base alone goes on after what ends a turn here."""
    base = run_recipe(run).model.from_
    tokenizer = _tokenizer(base) if base is not None and not is_run(base) else None
    if tokenizer is None or set(_stops(run)) <= set(tokenizer.stop_ids or (tokenizer.eos_id,)):
        return ""
    return f"\nnote: {base} does not stop generation at all tokens that end a turn here"


def write_model(
    base: Weights,
    source: str,
    out: str,
    dtype: str | None,
    progress: Progress | None = None,
    *,
    origin: Weights | None = None,
) -> str:
    """Write weights as a Hugging Face directory, with the tokenizer and further files of `source`.

    Args:
        origin: what is at `source`, where the weights are no more those.
    """
    beside, base = _Beside(source, origin or base), without_mup(base)
    config = interop.decoder_config(base.config, source)
    dtype, extra = dtype or base.dtype, beside.extra()
    read, companions = reader_of(base), beside.write
    return interop.save_model(out, config, read, dtype=dtype, extra=extra, companions=companions, progress=progress)


def _write_gguf(base: Base, source: str, out: str, dtype: str | None) -> str:
    kind = (dtype or "float16").lower()
    if kind not in _QUANTIZATIONS:
        raise UserError(f"dtype {dtype!r}: expected one of GGUF's{did_you_mean(kind, _QUANTIZATIONS)}")
    if Path(out).exists():
        raise UserError(f"{out}: exists; nothing is overwritten, choose another path")
    weights = without_mup(base)
    config = interop.decoder_config(weights.config, source)
    huggingface = interop.config_to_huggingface(config, extra=_Beside(source, base).extra())
    tensors: Tensors
    if isinstance(base, interop.ModelSource):
        tensors = base.used()
    else:
        tensors = interop.ParameterTensors(config, huggingface["model_type"], reader_of(weights), FLOATS["float32"])
    with scratch_directory() as directory:
        tokenizer = _as_trained(load_tokenizer(source), source)
        replace(tokenizer, stop_ids=stop_ids(tokenizer)).save(directory)
        try:
            interop.save_gguf(out, huggingface, tensors, directory, quantization=_QUANTIZATIONS[kind])  # type: ignore[arg-type]
        except UserError as error:  # about copies of the tokenizer's files: name the files themselves
            own = Path(source) / "tokenizer" if is_run(source) else source
            raise UserError(str(error).replace(directory, str(own))) from error
    count = sum(info.size for info in tensors.infos.values())
    size = Path(out).stat().st_size / 1e6
    written = f"{out}: {huggingface['model_type']}, {count:,} parameters, {_QUANTIZATIONS[kind]}, {size:.1f} MB"
    return written + interop.window_note(config)


def _tokenizer(source: str) -> Tokenizer | None:
    """Load the tokenizer at a path; None where weights come without one."""
    try:
        return load_tokenizer(source)
    except UserError:
        if is_run(source):
            raise
        return None


def _as_trained(tokenizer: Tokenizer, source: str) -> Tokenizer:
    """Return a run's tokenizer, changed to start texts like the run's documents: with bos, unless they were chats."""
    alike = not is_run(source) or run_recipe(source).data.writes_turns or tokenizer.prefix_ids == [tokenizer.bos_id]
    return tokenizer if alike else tokenizer.starting_texts()


@dataclass(frozen=True)
class _Beside:
    """Files beside a model's weights: the tokenizer of `source`, and those of the model that it came from."""

    source: str
    base: Weights
    """Weights that are at `source`."""

    @cached_property
    def origin(self) -> interop.ModelSource | None:
        """Model on disk that config.json and further files come from; None where there is none."""
        base = self.base.base if isinstance(self.base, MergedBase) else self.base
        if isinstance(base, interop.ModelSource):
            return base
        try:
            start = run_recipe(self.source).model.from_
            return None if start is None or is_run(start) else interop.open_model(start)
        except UserError:  # it may be gone since the run began
            return None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return _tokenizer(self.source)

    @cached_property
    def shares_tokenizer(self) -> bool:
        """Flag: there is an origin, which has no other tokenizer than `source`."""
        if self.origin is None or self.tokenizer is None:
            return self.origin is not None
        original = _tokenizer(str(self.origin.path))
        return original is not None and original.fingerprint() == self.tokenizer.fingerprint()

    def extra(self) -> dict[str, object]:
        """Return keys of config.json: the origin's, and the tokens that begin and end a text."""
        extra = {} if self.origin is None else dict(self.origin.huggingface)
        if not self.shares_tokenizer:
            tokenizer = load_tokenizer(self.source)
            extra |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
        return extra

    def write(self, directory: Path, *, trained: bool = True) -> None:
        """Write the tokenizer into a directory, and the origin's other files where it is the origin's.

        generation_config.json of a `trained` model names all tokens at which generation stops here.
        """
        if self.origin is not None and self.shares_tokenizer:
            self.origin.copy_companions(directory)
        if (tokenizer := self.tokenizer) is not None:
            written = _as_trained(tokenizer, self.source)
            if not (directory / "tokenizer.json").exists() or written is not tokenizer:
                written.save(directory)
        file, names = directory / GENERATION, ("bos_token_id", "eos_token_id")
        tokens = read_json(file) if file.exists() else {name: self.extra().get(name) for name in names}
        if tokenizer is not None and trained:
            named = tokens.get("eos_token_id")
            stops = [*(named if isinstance(named, list) else [named]), *stop_ids(tokenizer)]
            stops = list(dict.fromkeys(id_ for id_ in stops if id_ is not None))
            tokens["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        elif file.exists():
            return
        file.write_text(json.dumps(tokens, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class InMemory:
    """The weights of a model as they are now."""

    config: FamilyConfig
    arrays: Mapping[str, jax.Array]

    @property
    def dtype(self) -> str:
        return str(self.arrays["embedding.table"].dtype)

    def read(self, name: str, like: jax.ShapeDtypeStruct, layer_order: Sequence[int] | None = None) -> jax.Array:
        array = self.arrays[name] if layer_order is None else self.arrays[name][jnp.asarray(layer_order)]
        return array.astype(like.dtype)


@dataclass(frozen=True)
class LoadedFrom:
    """A path that a model was loaded from: the `origin` of a loaded model."""

    path: str
    step: int | None

    def save(self, model: LanguageModel, directory: str, dtype: str | None) -> str:
        """Write `model` as a Hugging Face directory, and say what was written (see `LanguageModel.save`)."""
        if model.adapter_names:
            raise UserError(
                f"a model with the adapters {', '.join(model.adapter_names)} beside it has no form of its own: save it "
                "without them, or merge one (`trainfw merge`)"
            )
        of_adapter = is_run(self.path) and run_recipe(self.path).adapter is not None
        opened: Weights = merge(self.path, None, self.step) if of_adapter else open_base(self.path, self.step)
        check_tokenizer(self.path, opened.config)
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        arrays = {".".join(map(str, path)): variable.get_value() for path, variable in state}
        weights: Weights = InMemory(model.config, arrays)
        if isinstance(opened, MergedBase):
            held = {name: np.asarray(array) for name, array in arrays.items() if ".adapter." in name}
            weights = replace(opened, adapter=replace(opened.adapter, arrays=held))
        return write_model(weights, self.path, directory, dtype, origin=opened)


def _kept_elsewhere(run: str, adapter: AdapterConfig) -> str:
    """Return a note if the base was quantised while the adapter was trained, which PEFT's form does not record."""
    if adapter.base not in ("int8", "nf4"):
        return ""
    options = "load_in_4bit=True, bnb_4bit_quant_type='nf4'" if adapter.base == "nf4" else "load_in_8bit=True"
    return (
        f"\nnote: trained on the base in {adapter.base}: load it alike in Transformers, with quantization_config="
        f"BitsAndBytesConfig({options}), or let `trainfw merge {run} --out MODEL` make one model of both"
    )
