from __future__ import annotations

import typer

from trainfw import backends, data, interop, weights
from trainfw.cli.console import cleaning_up
from trainfw.cli.options import Dtype, ModelPath, OutPath
from trainfw.errors import UserError
from trainfw.paths import resolve_path


def import_(source: ModelPath, out: OutPath, dtype: Dtype = None) -> None:
    """Check a model and write it as a Hugging Face directory. It has safetensors, config and tokenizer."""
    backends.prepare()
    path = resolve_path(source)
    if interop.model_kind(path) == "run":
        raise UserError(f"{path}: is a run; trainfw export writes its model")
    model = interop.open_model(path)
    weights.check_tokenizer(path, model.config)
    with cleaning_up() as reporter:
        # The tokenizer of a GGUF file is written anew; of a directory, its files are copied.
        companions = None if path.is_dir() else data.load_tokenizer(path).save
        saved = interop.copy_model(model, out, dtype=dtype, companions=companions, progress=reporter.progress)
    typer.echo(str(saved))
