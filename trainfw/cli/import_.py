from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from trainfw.cli.options import Dtype, ModelPath, OutPath


def import_(source: ModelPath, out: OutPath, dtype: Dtype = None) -> None:
    """Check a model and write it as a Hugging Face directory. It has safetensors, config and tokenizer."""
    from trainfw import backends

    backends.prepare()

    from trainfw.cli.console import cleaning_up, make_reporter
    from trainfw.errors import UserError
    from trainfw.interop import copy_model, model_kind, open_model
    from trainfw.paths import resolve_path
    from trainfw.weights import check_tokenizer

    path = resolve_path(source)
    if model_kind(path) == "run":
        raise UserError(f"{path}: is a run; trainfw export writes its model")
    model = open_model(path)
    check_tokenizer(path, model.config)
    reporter = make_reporter()
    try:
        with cleaning_up():
            saved = copy_model(model, out, dtype=dtype, companions=tokenizer_of(path), progress=reporter.progress)
    finally:
        reporter.close()
    typer.echo(str(saved))


def tokenizer_of(path: Path) -> Callable[[Path], None] | None:
    """Return a writer of a GGUF file's tokenizer into a directory; None for a directory, whose files are copied."""
    if path.is_dir():
        return None
    from trainfw.data import load_tokenizer

    return load_tokenizer(path).save
