from __future__ import annotations

from typing import Annotated

import typer

from trainfw.cli.options import Dtype, OutPath

FORMATS = ("hf", "gguf", "peft")


def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, a Hugging Face directory, a .gguf file, package:NAME.")
    ],
    out: OutPath,
    format: Annotated[str, typer.Option(help="hf (a Hugging Face directory), gguf or peft (an adapter).")] = "hf",
    dtype: Dtype = None,
) -> None:
    """Write a run's model, or any model, in a format of other libraries."""
    from trainfw import backends
    from trainfw.errors import UserError

    if format not in FORMATS:
        raise UserError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    backends.prepare()

    from trainfw.cli.console import cleaning_up, make_reporter
    from trainfw.cli.import_ import tokenizer_of
    from trainfw.interop import copy_model, model_kind, open_model, resolve_path

    path = resolve_path(source)
    if (kind := model_kind(path)) == "run" or format != "hf":
        raise UserError(f"{path}: cannot be written as {format} yet: it is a {kind}")
    model = open_model(path)
    reporter = make_reporter()
    try:
        with cleaning_up():
            saved = copy_model(model, out, dtype=dtype, companions=tokenizer_of(path), progress=reporter.progress)
    finally:
        reporter.close()
    typer.echo(str(saved))
