"""Writer of GGUF files for llama.cpp, from a Hugging Face config, tensors and tokenizer."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from trainfw.errors import UserError, did_you_mean, one_of
from trainfw.formats import Header, StoredTensor, Tensors, gguf_library, tokenizer_metadata
from trainfw.interop.configs import config_from_huggingface
from trainfw.interop.gguf import tensor_names
from trainfw.interop.gguf.config import TOKEN_ROLES, config_of
from trainfw.models import ModelConfig
from trainfw.unfinished import writing

Quantization = Literal["F32", "F16", "BF16", "Q8_0"]
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""Values of `general.file_type`, which only name the kind of file."""
_WITHOUT_EFFECT = ("preset", "max_position", "init_std")
"""Fields of ModelConfig that do not change what a model computes."""
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Write:
    """One tensor of the file, and the checkpoint's tensors that it is made of."""

    stored: StoredTensor
    row: tensor_names.Row
    sources: tuple[str, ...]
    """Names in the checkpoint: several experts, or one tensor."""
    heads: int | None = None


def save_gguf(
    file: Path | str,
    huggingface: Mapping[str, Any],
    tensors: Tensors,
    tokenizer_dir: Path | str,
    *,
    quantization: Quantization = "F16",
) -> None:
    """Write a GGUF file that llama.cpp runs.

    Args:
        huggingface: the model's config.json.
        tensors: the model's tensors; each is read once, a few MB at a time, those of one kind layer after layer.
        tokenizer_dir: directory of its tokenizer.json and tokenizer_config.json.
        quantization: number format of the matrices. Vectors and routers are F32, and with Q8_0 a matrix whose rows are
            no multiple of 32 is F16.

    The file gets its name only when it is complete; after an error nothing is left. Raises UserError for a model or a
    tokenizer that llama.cpp would run as another one, for tensors that are missing or of another shape, and for values
    beyond the range of F16; OSError, with the path, where the disk is full.
    """
    file, tokenizer_dir = Path(file), Path(tokenizer_dir)
    if quantization not in get_args(Quantization):
        raise UserError(f"quantization = {quantization!r}{did_you_mean(quantization, get_args(Quantization))}")
    laid_out = lay_out(file, huggingface, tensors, quantization)
    metadata = laid_out.metadata | {"general.file_type": _FILE_TYPES[quantization]}
    metadata |= tokenizer_metadata(tokenizer_dir, laid_out.config.vocab_size)
    for role, ggml_role in TOKEN_ROLES.items():
        if type(id_ := huggingface.get(f"{role}_token_id")) is int:
            metadata.setdefault(f"tokenizer.ggml.{ggml_role}_token_id", id_)
    written: list[tuple[StoredTensor, Iterable[np.ndarray]]]
    written = [(write.stored, _values(write, tensors)) for write in laid_out.writes]
    if laid_out.divisors is not None:
        written.append((_divisors_stored(laid_out.divisors), [laid_out.divisors]))
    write_file(file, laid_out.architecture, metadata, written)


@dataclass(frozen=True)
class LaidOut:
    """A model as a GGUF file holds it, but for its tokenizer."""

    architecture: str
    config: ModelConfig
    metadata: dict[str, object]
    writes: list[Write]
    divisors: np.ndarray | None
    """Values of `tensor_names.ROPE_FREQS`; None for models that have no such tensor."""


def lay_out(file: Path, huggingface: Mapping[str, object], tensors: Tensors, quantization: str) -> LaidOut:
    """Lay out a model's file (see `save_gguf`) without reading a tensor.

    Raises UserError for a model that llama.cpp would run as another one, and for tensors that are missing or of another
    shape.
    """
    families = {family: name for name, each in tensor_names.ARCHITECTURES.items() for family in each.families}
    family = str(huggingface.get("model_type", ""))
    if family not in families:
        raise UserError(f"model_type {family!r} has no GGUF architecture here{one_of(family, families)}")
    name = families[family]
    config = config_from_huggingface(huggingface)
    if config.num_kv_heads != config.num_heads and not tensor_names.ARCHITECTURES[name].grouped_heads:
        raise UserError(
            f"llama.cpp cannot run this model: in architecture {name}, {config.num_heads} query heads need as many key "
            f"heads, not {config.num_kv_heads}"
        )
    divisors = _divisors(config)
    writes = _writes(tensor_names.rows_of(name, family), config, tensors, quantization)
    title = str(huggingface.get("_name_or_path") or file.stem)
    if family == "mistral" and "mistral" not in title.lower():
        title = f"mistral {title}"  # it has Llama's architecture in llama.cpp: only this name tells them apart
    metadata = _metadata(name, family, config) | {"general.name": title}
    # llama.cpp would run the model that the file is read back as.
    stored = {write.stored.name: write.stored for write in writes}
    if divisors is not None:
        stored[tensor_names.ROPE_FREQS] = _divisors_stored(divisors)
    header = Header(file, {**metadata, "general.architecture": name}, stored)
    _check_same(name, config, config_from_huggingface(config_of(header, divisors)))
    return LaidOut(name, config, metadata, writes, divisors)


def write_file(
    file: Path,
    architecture: str,
    metadata: Mapping[str, object],
    tensors: Sequence[tuple[StoredTensor, Iterable[np.ndarray]]],
) -> None:
    """Write a GGUF file, which gets its name only when it is complete.

    Args:
        tensors: each, and its values in order, in parts of whole rows, f32.

    Raises UserError for values that are not finite or beyond the range of the tensor's format.
    """
    gguf = gguf_library()
    with writing(file) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        for key, value in metadata.items():
            # llama.cpp reads whole numbers as UINT32, and the library would write INT32.
            kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
            if value != []:  # which the format does not have
                writer.add_key_value(key, value, kind)
        for stored, _ in tensors:
            kind = gguf.GGMLQuantizationType[stored.type]
            writer.add_tensor_info(stored.name, stored.shape, np.dtype(np.float32), stored.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        alignment = writer.data_alignment
        writer.close()
        with partial.open("ab") as out:
            out.seek(0, os.SEEK_END)
            _pad(out, alignment)
            for stored, parts in tensors:
                for values in parts:
                    out.write(_encode(values, stored))
                _pad(out, alignment)


def _metadata(name: str, model_type: str, config: ModelConfig) -> dict[str, object]:
    values: dict[str, Any] = {}
    for key in tensor_names.keys_of(name, model_type):
        if (value := operator.attrgetter(key.field)(config)) is not None:
            values[key.gguf] = key.kind(value)
    if name == "llama" and config.sliding_window is not None:
        # llama.cpp attends to all tokens in this architecture: within the window that is the same.
        values["attention.sliding_window"] = config.sliding_window
        values["context_length"] = min(config.max_position, config.sliding_window)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_scaling.factor)}
    heads = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    values |= {"attention.head_count_kv": config.num_kv_heads, **dict.fromkeys(heads, config.head_dim)}
    values["vocab_size"] = config.vocab_size
    return {
        "general.type": "model",
        **{f"{name}.{key}": value for key, value in values.items()},
        "general.quantization_version": 2,
    }


def _divisors(config: ModelConfig) -> np.ndarray | None:
    """Return the rope_freqs tensor of llama3's scaling; None for other models."""
    rope = config.rope_scaling
    if rope is None or rope.kind != "llama3":
        return None
    fields: Any = (rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position)
    return tensor_names.llama3_divisors(config.head_dim, config.rope_theta, *fields)


def _divisors_stored(divisors: np.ndarray) -> StoredTensor:
    return stored_tensor(tensor_names.ROPE_FREQS, divisors.shape, "F32")


def _writes(rows: Sequence[tensor_names.Row], config: ModelConfig, tensors: Tensors, quantization: str) -> list[Write]:
    """List the file's tensors in order. Raises UserError where the checkpoint has other names or shapes."""
    heads: dict[str | None, int | None] = {"query": config.num_heads, "key": config.num_kv_heads, None: None}
    num_experts = 0 if config.moe is None else config.moe.num_experts
    used: set[str] = set()
    writes = []
    for row in rows:
        if row.huggingface == "lm_head.weight" and config.tie_embeddings:
            used.add(row.huggingface)  # a second copy of the table, in some checkpoints
            continue
        for layer in range(config.num_layers if "{layer}" in row.gguf else 1):
            experts = range(num_experts if "{expert}" in row.huggingface else 1)
            sources = tuple(row.huggingface.format(layer=layer, expert=expert) for expert in experts)
            if missing := [source for source in sources if source not in tensors.infos]:
                raise UserError(f"checkpoint: no tensor {missing[0]}")
            shapes = {tensors.infos[source].shape for source in sources}
            shape = next(iter(shapes))
            num_heads = heads[row.heads]
            if len(shapes) > 1 or (num_heads is not None and shape[0] != num_heads * config.head_dim):
                raise UserError(f"checkpoint: tensor {sources[0]} has shape {shape}, which the config does not say")
            whole = (len(sources), *shape) if "{expert}" in row.huggingface else shape
            vector = len(whole) == 1 or "ffn_gate_inp" in row.gguf
            kind = "F32" if vector else "F16" if quantization == "Q8_0" and whole[-1] % 32 else quantization
            stored = stored_tensor(row.gguf.format(layer=layer), whole, kind)
            writes.append(Write(stored, row, sources, num_heads))
            used.update(sources)
    if extra := {name for name in set(tensors.infos) - used if not name.endswith("rotary_emb.inv_freq")}:
        raise UserError(f"checkpoint: a GGUF file has no place for tensor {sorted(extra)[0]}")
    return writes


def stored_tensor(name: str, shape: tuple[int, ...], kind: str) -> StoredTensor:
    gguf = gguf_library()
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return StoredTensor(name, shape, kind, 0, math.prod(shape) // block * nbytes)


def _check_same(name: str, config: ModelConfig, read: ModelConfig) -> None:
    """Raise UserError where a model is read back as another one."""
    back = read.model_dump()
    for key, value in config.model_dump().items():
        numbers = isinstance(value, float | int) and isinstance(back[key], float | int)
        same = math.isclose(back[key], value, rel_tol=1e-6) if numbers else back[key] == value
        if key not in _WITHOUT_EFFECT and not same:
            different = f"{key} is {back[key]}, not {value}"
            raise UserError(f"llama.cpp cannot run this model: in architecture {name}, {different}")


def _values(write: Write, tensors: Tensors) -> Iterator[np.ndarray]:
    """Yield the values of one tensor of the file in order, as f32 rows, a chunk at a time."""
    for source in write.sources:
        info = tensors.infos[source]
        if len(info.shape) == 1:
            values = tensors.read(source).astype(np.float32)
            yield values + np.float32(1) if write.row.plus_one else values
            continue
        group = 1 if write.heads is None else info.shape[0] // write.heads
        step = max(CHUNK_BYTES // (4 * info.shape[1] * group), 1) * group
        for start in range(0, info.shape[0], step):
            stop = min(start + step, info.shape[0])
            values = tensors.read(source, (slice(start, stop),)).astype(np.float32)
            yield values if write.heads is None else tensor_names.to_pairs(values, (stop - start) // group)


def _encode(values: np.ndarray, stored: StoredTensor) -> bytes:
    from gguf import GGMLQuantizationType, quants

    if not np.isfinite(values).all():
        raise UserError(f"tensor {stored.name} has values that are not finite")
    if stored.type in ("F16", "Q8_0"):
        # Q8_0's scales are F16, and 127 times smaller.
        limit = 65504.0 * (127 if stored.type == "Q8_0" else 1)
        if (worst := float(np.abs(values).max(initial=0))) > limit:
            raise UserError(f"tensor {stored.name} has a value of {worst:g}, beyond {stored.type}: use BF16 or F32")
    return quants.quantize(values, GGMLQuantizationType[stored.type]).tobytes()


def _pad(out: BinaryIO, alignment: int) -> None:
    out.write(bytes(-out.tell() % alignment))


def window_note(config: ModelConfig) -> str:
    """Say what becomes of a model all of whose layers have a window, which llama.cpp has none for; empty for others."""
    window = config.sliding_window
    if window is None or "global" in config.layer_kinds or window >= config.max_position:
        return ""
    return f"\nnote: llama.cpp attends to all tokens, and the model to the last {window}: the same up to there"
