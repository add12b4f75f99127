"""Writer of Hugging Face directories, a piece at a time; a directory appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainfw.errors import UserError
from trainfw.formats import DTYPES, FLOATS, INDEX, SINGLE, TensorInfo, Tensors, chunks
from trainfw.interop.configs import config_to_huggingface
from trainfw.interop.mapping import ParameterTensors
from trainfw.interop.source import ModelSource, Progress
from trainfw.models import ModelConfig
from trainfw.unfinished import writing

MAX_SHARD_SIZE = 2 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_model(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    read: Callable[[str], object],
    *,
    dtype: str = "float32",
    extra: Mapping[str, object] | None = None,
    companions: Callable[[Path], None] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> str:
    """Write our parameters as a Hugging Face directory: config.json, safetensors, and the files of `companions`.

    Returns a line about the model.

    Args:
        read: function that returns a whole parameter by its path (`layers.attention.query.kernel`), an array of NumPy
            or JAX with its layers in true order. Each is asked for once and freed before the next: the host holds one
            at a time.
        dtype: dtype of the tensors: float32, bfloat16, float16 or float64.
        extra: see `config_to_huggingface`: the config.json that the model came with, or keys such as `bos_token_id`.
        companions: function that writes further files (a tokenizer) into a directory.
        max_shard_size: bytes of a file; a larger tensor has a file of its own.

    The directory appears when everything is in it; after an error nothing has changed. Raises UserError where it exists
    and is not empty, or where no family has such a model.
    """
    huggingface = config_to_huggingface(config, extra=extra)
    tensors = ParameterTensors(config, huggingface["model_type"], read, _float(dtype))
    return _save(directory, huggingface, tensors, dtype, None, companions, max_shard_size, progress)


def copy_model(
    source: ModelSource,
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    companions: Callable[[Path], None] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> str:
    """Write the model of a source as a Hugging Face directory, with its tokenizer and its config.json; return a line.

    The tensors that the model uses are copied bit for bit, unless `dtype` is another than theirs. A few megabytes are
    in memory at a time. `companions` replaces `source.copy_companions`.
    """
    cast_to = None if dtype is None else _float(dtype)
    huggingface = config_to_huggingface(source.config, extra=source.huggingface)
    companions = companions or source.copy_companions
    dtype = dtype or source.dtype
    return _save(directory, huggingface, source.used(), dtype, cast_to, companions, max_shard_size, progress)


def _float(dtype: str) -> np.dtype:
    if dtype not in FLOATS:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(FLOATS)}")
    return FLOATS[dtype]


def _save(
    directory: str | os.PathLike[str],
    huggingface: dict[str, Any],
    tensors: Tensors,
    dtype: str,
    cast_to: np.dtype | None,
    companions: Callable[[Path], None] | None,
    max_shard_size: int,
    progress: Progress | None,
) -> str:
    infos = {name: TensorInfo(info.shape, cast_to or info.dtype) for name, info in tensors.infos.items()}
    shards, done, total = _shards(infos, max_shard_size), 0, sum(info.nbytes for info in infos.values())
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    # Transformers 4 reads torch_dtype.
    huggingface = {**huggingface, "dtype": dtype, "torch_dtype": dtype}
    with new_directory(directory, total) as temporary:
        (temporary / "config.json").write_text(json.dumps(huggingface, indent=2, sort_keys=True) + "\n", "utf-8")
        for file, names in zip(files, shards):
            with open(temporary / file, "wb") as stream:
                stream.write(safetensors_header({name: infos[name] for name in names}))
                for name in names:
                    for part in chunks(tensors, name, cast_to):
                        if not np.isfinite(part).all():
                            raise UserError(f"tensor {name} has values that are not finite: nothing is written")
                        stream.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
                        done += part.nbytes
                    if progress is not None:
                        progress("writing, MB", done // 2**20, total // 2**20)
        if count > 1:
            placed = {name: file for file, names in zip(files, shards) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        if companions is not None:
            companions(temporary)
    parameters = sum(info.size for info in infos.values())
    size = f"{total / 1e9:.2f} GB" if total >= 1e8 else f"{total / 1e6:.1f} MB"
    return f"{Path(directory)}: {huggingface['model_type']}, {parameters:,} parameters, {dtype}, {size}"


def _shards(infos: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    """Cut names into runs of `limit` bytes or fewer; in each, wider dtypes come first, which keeps values aligned."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return [sorted(shard, key=lambda name: -infos[name].dtype.itemsize) for shard in shards]


def safetensors_header(infos: Mapping[str, TensorInfo]) -> bytes:
    """Return the header of a file with these tensors in order, padded: values begin at a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in infos.items():
        end = offset + info.nbytes
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str], nbytes: int = 0) -> Iterator[Path]:
    """Make a temporary directory beside `path`, which is renamed to it at the end; see `writing`.

    Raises UserError where `path` exists (other than as an empty directory), cannot be written, or the disk has no room
    for `nbytes`.
    """
    target = Path(path)
    if str(path) in ("", "."):
        raise UserError(f"{path or 'the path'}: expected the path of a new directory")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target}: exists and is no directory; choose another path")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target}: exists and is not empty; nothing is overwritten, choose another path")
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(writing(target, directory=True))
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror}") from None
        free = shutil.disk_usage(temporary).free
        if free < nbytes:
            raise UserError(f"{target}: needs {-(-nbytes // 10**6):,} MB, and {free // 10**6:,} MB are free there")
        yield temporary
