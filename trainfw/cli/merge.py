from __future__ import annotations

from typing import Annotated

import typer

from trainfw import backends, weights
from trainfw.cli.console import cleaning_up
from trainfw.cli.options import Dtype, OutPath, Step, Which


def merge(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="A run of an adapter, or one in PEFT's or diffusers' form.")
    ],
    out: OutPath,
    base: Annotated[str | None, typer.Option(help="The model it adapts (default: that of the run).")] = None,
    dtype: Dtype = None,
    step: Step = None,
    which: Which = None,
) -> None:
    """Write the model that an adapter makes of its base. It is in Hugging Face's form; of images, in diffusers'."""
    backends.prepare()
    with cleaning_up() as reporter:
        written = weights.merge_adapter(
            adapter, out, base=base, dtype=dtype, step=step, weights=which, progress=reporter.progress
        )
    typer.echo(written)
