"""What a path that says `model: {from: PATH}` or `trainfw import PATH` stands for. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from trainfw.errors import UserError
from trainfw.interop.configs import config_from_huggingface
from trainfw.json_text import read_json
from trainfw.models import ModelConfig
from trainfw.paths import check_file, resolve_path

CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

ModelKind = Literal["huggingface", "gguf", "run"]


def model_kind(path: Path) -> ModelKind:
    """What is at a (resolved) path. Raises UserError, saying what was expected, where it is no model."""
    if path.is_dir():
        if os.path.lexists(path / CONFIG):
            return "huggingface"
        if (path / "recipe.yaml").exists():
            return "run"
        if (path / "adapter_config.json").exists():
            raise UserError(f"{path}: is a PEFT adapter, not a model; give the model that it adapts")
        raise UserError(f"{path}: is no model: it has no {CONFIG} (a Hugging Face model) and no recipe.yaml (a run)")
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file or directory; models are not downloaded")
    if path.suffix == ".safetensors" or path.name == CONFIG:
        raise UserError(f"{path}: is one file of a model; give its directory, {path.parent}")
    if path.suffix in PICKLES:
        raise pickle_error(path)
    check_file(path, named=True)
    if path.suffix != ".gguf":
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path}: is no model; expected a Hugging Face directory, a .gguf file or a run")
    return "gguf"


def read_huggingface(path: Path) -> dict[str, object]:
    """The config.json of a model: a Hugging Face directory's, or what a GGUF file's would be."""
    if model_kind(path) == "gguf":
        from trainfw.interop.gguf.config import gguf_config

        return gguf_config(path)
    return read_json(path / CONFIG, limit=2**24)


def read_model_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The shape of the model at a path (Hugging Face or GGUF), without reading weights and without JAX.

    Its mixture of experts, if any, is dispatched as Transformers does, `dropless`.
    """
    resolved = resolve_path(path)
    with blamed(resolved):
        return config_from_huggingface(read_huggingface(resolved))


class blamed:
    """Put a path before what a UserError says, where it does not say it already."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, UserError) and not str(error).startswith(str(self.path)):
            raise UserError(f"{self.path}: {error}") from None


def pickle_error(path: Path) -> UserError:
    """The refusal of a pickle checkpoint, with the way to convert it."""
    return UserError(
        f"{path}: is a pickle, which can run any code when it is loaded; only safetensors is read. Convert what you "
        "trust:\n"
        f"  model = transformers.AutoModelForCausalLM.from_pretrained({str(path.parent)!r}, dtype='auto')\n"
        f"  model.save_pretrained(NEW_DIR, safe_serialization=True)"
    )
