"""Arguments that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from trainfw import recipe as recipes
from trainfw.errors import UserError, nearest

if TYPE_CHECKING:
    from trainfw.training import Resume as _Resume
    from trainfw.weights import Format as _Format
    from trainfw.weights import Which as _Which
else:  # any text: those who read it say what is wrong with it
    _Resume = _Format = _Which = str

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Override keys of the recipe, such as train.steps=50.")
]
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a bundled recipe by name.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")]
ModelPath = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A Hugging Face directory, a .gguf file, or package:NAME (a Python package)."),
]
AnyModel = Annotated[
    str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, a Hugging Face directory, a .gguf file, or package:NAME.")
]
OutPath = Annotated[
    str, typer.Option("--out", help="The file or directory to write; nothing that exists is overwritten.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16 (default: as it is).")]
Devices = Annotated[int | None, typer.Option("--devices", help="Simulate this many devices on the CPU.")]
Format = Annotated[
    _Format | None,
    typer.Option(
        help="hf (a Hugging Face directory), gguf (a file), peft (an adapter), gguf-lora (an adapter, as a file for "
        "llama.cpp), diffusers (of images; default: by the model, hf or diffusers)."
    ),
]
Nodes = Annotated[int | None, typer.Option(help="Default: the topology's instances.")]
Hardware = Annotated[str | None, typer.Option("--hardware", help="The topology it is for (default: the recipe's).")]
Count = Annotated[int | None, typer.Option("--count", help="Number of it (default: the recipe's; 1 with --hardware).")]
Resume = Annotated[_Resume, typer.Option(metavar="auto|never|must", help="Resume where the run directory left off.")]
RunDir = Annotated[str | None, typer.Option(help="Directory of the run (default: runs/<name>).")]
Accept = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Go on with another value of this key (or section), which changes the losses. Give it for each.",
    ),
]
Stage = Annotated[
    int | None,
    typer.Option("--stage", metavar="N", help="The stage of the recipe (default: the one with the largest step)."),
]
Step = Annotated[int | None, typer.Option("--step", help="The checkpoint of this step (default: the latest).")]
Which = Annotated[
    _Which | None, typer.Option("--weights", help="With optimizer.ema: ema (the average, the default) or raw.")
]


class RecipeCommand(TyperCommand):
    """A command that takes keys of a recipe, and answers those given as options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # Typer brings its own Click, or not
            if type(error).__name__ != "NoSuchOption":
                raise
            options = [name for parameter in self.params for name in parameter.opts if name.startswith("--")]
            raise UserError(_no_such_option(error.option_name, given, options)) from None  # type: ignore[attr-defined]


def _no_such_option(option: str, arguments: Sequence[str], options: Sequence[str]) -> str:
    asked, known = option.lstrip("-"), recipes.keys()
    key = asked if asked in known else recipes.our_key(asked)
    if key is None and (close := nearest(option, options)) is not None:
        return f"No such option: {option}; did you mean {close}?"
    if key is None and "mean" not in recipes.nearest_key(asked):
        return f"No such option: {option}; expected {', '.join(options)}, or a key as KEY=VALUE, such as train.steps=50"
    key = key or recipes.nearest_key(asked).split("'")[1]
    words = [word for word in arguments if word.partition("=")[0] == option]
    value = words[0].partition("=")[2] if words else ""
    following = arguments[arguments.index(option) + 1 :] if option in arguments else []
    if not value and following and not following[0].startswith("--") and "=" not in following[0]:
        value = following[0]
    key, _, note = key.partition(" ")
    if first := next((name for name in known if name.startswith(f"{key}.")), None):
        said = f"{key} is a section of a recipe, whose keys take no dashes, such as {first}={value or 'VALUE'}"
        return f"No such option: {option}; {said}"
    # Beside a note, a value would be of another kind than ours.
    said = f"{key}=VALUE {note}" if note else f"{key}={value or 'VALUE'}"
    return f"No such option: {option}; keys of a recipe take no dashes: {said}"


def load(recipe: str, overrides: Sequence[str] | None) -> recipes.Recipe:
    return recipes.load_recipe(recipe, overrides or (), written=recipes.COMMAND_LINE)


def load_for(
    recipe: str, overrides: Sequence[str] | None, hardware: str | None, count: int | None, stage: int | None = None
) -> recipes.Recipe:
    """Load a recipe for its own hardware, or for what the command line names; of one with stages, one of them."""
    chosen = list(overrides or ())
    if hardware is not None:
        chosen += [f"hardware.topology={hardware}", f"hardware.count={1 if count is None else count}"]
    elif count is not None:
        chosen.append(f"hardware.count={count}")
    loaded = load(recipe, chosen)
    planned = recipes.stage_to_plan(loaded, stage)
    if planned is not loaded and stage is None:
        which = next(one for one in loaded.in_stages() if one.alone == planned)
        typer.echo(f"{which} (the largest step; --stage N takes another of {len(loaded.stages)})", err=True)
    return planned


def check_page(option: str, file: Path | None) -> None:
    """Raise UserError where a file that an option names could not be written at the end."""
    if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        raise UserError(f"{option} {file}: expected a file in a directory that exists and can be written to")


def check_resume(resume: str) -> None:
    """Raise UserError for what `--resume` does not take."""
    if resume not in ("auto", "never", "must"):
        raise UserError(f"--resume {resume}: expected auto, never or must")


Serve = Annotated[bool, typer.Option("--serve", help="Serve a model, rather than run a recipe.")]
ServeLayout = Annotated[
    str | None,
    typer.Option("--layout", metavar="AXIS=N,...", help="With --serve: sizes of tensor, expert, fsdp and data."),
]
ServeSlots = Annotated[
    str | None,
    typer.Option("--slots", metavar="N", help="With --serve: requests at once of each copy (8; of a search 1,8,32)."),
]
ServeLength = Annotated[
    int | None, typer.Option("--length", min=2, help="With --serve: tokens that a slot holds (4096).")
]
ServeWeights = Annotated[
    str | None, typer.Option("--weights", help="With --serve: bfloat16 (default), float32, int8 or nf4.")
]
ServeCache = Annotated[str | None, typer.Option("--cache", help="With --serve: bfloat16 (default), float32 or int8.")]


def check_choice(option: str, value: str | None, *choices: str) -> None:
    """Raise UserError where an option's value is none of its choices."""
    if value is not None and value not in choices:
        raise UserError(f"{option} {value}: expected {', '.join(choices[:-1])} or {choices[-1]}")


def adapters_by_name(given: Sequence[str]) -> dict[str, str]:
    """Return the paths of `--adapter NAME=PATH` by name."""
    adapters: dict[str, str] = {}
    for text in given:
        called, equals, path = text.partition("=")
        if not equals or not path or not re.fullmatch(r"[A-Za-z0-9._-]+", called):
            raise UserError(f"--adapter {text!r}: expected NAME=PATH, such as summarize=runs/smollm2-summarize")
        if called in adapters or called == "base":
            raise UserError(
                f"--adapter {text!r}: {called!r} is {'taken' if called in adapters else 'the model itself'}"
            )
        adapters[called] = path
    return adapters
