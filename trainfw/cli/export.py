from __future__ import annotations

from typing import Annotated, get_args

import typer

from trainfw import backends, weights
from trainfw.cli.console import cleaning_up
from trainfw.cli.options import AnyModel, Format, OutPath, Step, Which
from trainfw.errors import UserError


def export(
    source: AnyModel,
    out: OutPath,
    format: Format = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16; in GGUF q8_0 too (default: as it is, in GGUF float16)."),
    ] = None,
    step: Step = None,
    which: Which = None,
    base: Annotated[
        str | None, typer.Option(help="With gguf-lora: the model it adapts (default: that of the run).")
    ] = None,
) -> None:
    """Write a model or adapter in a format of other libraries. Of a run, any model, or (gguf-lora) a PEFT adapter."""
    backends.prepare()
    if format is not None and format not in get_args(weights.Format):
        raise UserError(f"--format {format}: expected one of {', '.join(get_args(weights.Format))}")
    with cleaning_up() as reporter:
        written = weights.export_model(
            source, out, format=format, dtype=dtype, step=step, weights=which, base=base, progress=reporter.progress
        )
    typer.echo(written)
