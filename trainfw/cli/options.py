"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from trainfw.errors import UserError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override keys of the recipe, such as train.steps=50."),
]
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a bundled recipe by name.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")]
ModelPath = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A Hugging Face directory, a .gguf file, or package:NAME (a Python package)."),
]
AnyModel = Annotated[
    str,
    typer.Argument(metavar="RUN_OR_MODEL", help="A run, a Hugging Face directory, a .gguf file, or package:NAME."),
]
OutPath = Annotated[str, typer.Option("--out", help="What to write; nothing that exists is overwritten.")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16 (default: as it is).", show_default=False),
]
Devices = Annotated[
    int | None, typer.Option("--devices", help="Simulate this many devices on the CPU.", show_default=False)
]
Resume = Annotated[str, typer.Option(metavar="auto|never|must", help="Resume where the run directory left off.")]
RunDir = Annotated[str | None, typer.Option(help="Where the run is kept (default: runs/<name>).", show_default=False)]
Accept = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Go on with another value of this key (or section), which changes the losses. Give it for each.",
        show_default=False,
    ),
]
Step = Annotated[
    int | None, typer.Option("--step", help="The checkpoint of this step (default: the latest).", show_default=False)
]


def check_resume(resume: str) -> None:
    """Raise UserError for what `--resume` does not take."""
    if resume not in ("auto", "never", "must"):
        raise UserError(f"--resume {resume}: expected auto, never or must")
