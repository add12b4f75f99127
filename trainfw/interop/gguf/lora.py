"""Writer of adapters as GGUF files, which llama.cpp reads beside the file of their base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trainfw.adapters import AdapterConfig, config_targets
from trainfw.errors import UserError
from trainfw.formats import StoredTensor
from trainfw.interop.configs import config_to_huggingface
from trainfw.interop.gguf.tensor_names import to_pairs
from trainfw.interop.gguf.writer import lay_out, stored_tensor, write_file
from trainfw.interop.mapping import ParameterTensors, parameters
from trainfw.models import ModelConfig


def save_gguf_lora(
    file: Path | str, config: AdapterConfig, arrays: Mapping[str, np.ndarray], model: ModelConfig
) -> None:
    """Write an adapter as llama.cpp's `convert_lora_to_gguf.py` does, in F32.

    llama.cpp scales each update by the file's one alpha over the rank of its tensors: it is that of the config's own
    rank and alpha, and where others make another scale, B has the rest of it.

    Args:
        arrays: our arrays by name.
        model: config of the base, whose GGUF file has the same tensor names and orders of rows.

    The file gets its name only when it is complete. Raises UserError for an adapter or a base that llama.cpp would run
    as another one, and for values that are not finite.
    """
    sizes = config_targets(config, model)
    merge = "merge it into the base (`trainfw merge`), and export that as gguf"
    if config.kind == "dora":
        raise UserError(f"kind = 'dora': llama.cpp's adapters have no magnitudes; {merge}")
    if model.tie_embeddings and "embedding" in sizes:
        raise UserError(f"embedding: llama.cpp takes the adapter of a tied table for the head's too; {merge}")
    huggingface = config_to_huggingface(model)
    family = huggingface["model_type"]
    shapes = ParameterTensors(model, family, lambda path: None, np.dtype(np.float32))  # no value is read
    base = lay_out(Path(file), huggingface, shapes, "F32")
    alpha = _alpha(config, config.rank, config.alpha)
    owners = {
        tensor: (name, place[:1])
        for path, parameter in parameters(model, family).items()
        if (name := path.rpartition(".")[0]) in sizes and path.endswith((".kernel", ".table"))
        for place, tensor in parameter.names()
    }
    tensors = []
    for write in base.writes:
        if (owner := owners.get(write.sources[0])) is not None:
            name, layer = owner
            factor = np.float32(_alpha(config, *sizes[name]) / alpha)
            a, b = (arrays[f"{name}.adapter.{part}"][layer].astype(np.float32) for part in ("lora_a", "lora_b"))
            # Rows of a table's A are taken by token, and so are not turned.
            a, b = a if name == "embedding" else a.swapaxes(-1, -2), factor * b.swapaxes(-1, -2)
            b = b if write.heads is None else to_pairs(b, write.heads)
            tensors += [_tensor(f"{write.stored.name}.lora_a", a), _tensor(f"{write.stored.name}.lora_b", b)]
    metadata = {"general.type": "adapter", "general.file_type": 0, "adapter.type": "lora", "adapter.lora.alpha": alpha}
    write_file(Path(file), base.architecture, metadata, tensors)


def _alpha(config: AdapterConfig, rank: int, alpha: float) -> float:
    """Return the alpha that gives the scale of this rank and alpha, if divided by the rank."""
    return config.scale(rank, alpha) * rank


def _tensor(name: str, values: np.ndarray) -> tuple[StoredTensor, list[np.ndarray]]:
    return stored_tensor(name, values.shape, "F32"), [np.ascontiguousarray(values)]
