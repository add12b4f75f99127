"""Models at paths, as in `model: {from: PATH}` or `trainfw import PATH`. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from trainfw.errors import UserError
from trainfw.interop.configs import config_from_huggingface
from trainfw.json_text import read_json
from trainfw.models import FamilyConfig
from trainfw.paths import check_file, resolve_path

CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

ModelKind = Literal["huggingface", "gguf", "run", "diffusers"]
AUTOENCODER = "AutoencoderKL"
"""Class of diffusers that an autoencoder's config.json names."""
PARTS = {"dit": "transformer", "autoencoder": "vae"}
"""Directories of a diffusers pipeline, by the family of the model that each holds."""


def model_kind(path: Path) -> ModelKind:
    """Return the kind of model at a (resolved) path. Raises UserError, with what was expected, where there is none."""
    if path.is_dir():
        if os.path.lexists(path / CONFIG):
            return "diffusers" if "_class_name" in read_json(path / CONFIG, limit=2**24) else "huggingface"
        if (path / "recipe.yaml").exists():
            return "run"
        if (path / "adapter_config.json").exists():
            raise UserError(f"{path}: is a PEFT adapter, not a model; give the model that it adapts")
        if (part := part_of(path, None)) != path:
            raise UserError(f"{path}: is a pipeline of diffusers; give the directory of one of its models, {part}")
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
    """Read the config.json of a Hugging Face directory, or make that of a GGUF file."""
    if model_kind(path) == "gguf":
        from trainfw.interop.gguf.config import gguf_config

        return gguf_config(path)
    return read_json(path / CONFIG, limit=2**24)


def part_of(path: Path, family: str | None) -> Path:
    """Return the directory, in a diffusers pipeline at a path, of the model of a family; any other path as it is."""
    if not path.is_dir() or any(os.path.lexists(path / name) for name in (CONFIG, "recipe.yaml")):
        return path
    wanted = PARTS.values() if family is None else [PARTS[family]] if family in PARTS else []
    return next((path / name for name in wanted if os.path.lexists(path / name / CONFIG)), path)


def read_model_config(path: str | os.PathLike[str]) -> FamilyConfig:
    """Read the shape of the model at a path (Hugging Face, GGUF or diffusers), without weights and without JAX.

    Its mixture of experts, if any, has the dispatch of Transformers, `dropless`.
    """
    resolved = resolve_path(path)
    with blamed(resolved):
        if model_kind(resolved) != "diffusers":
            return config_from_huggingface(read_huggingface(resolved))
        from trainfw.interop.diffusers.autoencoder_config import autoencoder_from_diffusers
        from trainfw.interop.diffusers.transformer_config import transformer_from_diffusers

        config = read_json(resolved / CONFIG)
        read = autoencoder_from_diffusers if config["_class_name"] == AUTOENCODER else transformer_from_diffusers
        return read(config)


@contextlib.contextmanager
def blamed(path: Path) -> Iterator[None]:
    """Put a path before the text of a UserError, unless it begins with it."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {error}") from None


def pickle_error(path: Path) -> UserError:
    """Return the refusal of a pickle checkpoint, with the way to convert it."""
    return UserError(
        f"{path}: is a pickle, which can run any code when it is loaded; only safetensors is read. Convert what you "
        "trust:\n"
        f"  model = transformers.AutoModelForCausalLM.from_pretrained({str(path.parent)!r}, dtype='auto')\n"
        f"  model.save_pretrained(NEW_DIR, safe_serialization=True)"
    )
