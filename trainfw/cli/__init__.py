"""The `trainfw` command: parsing, printing and exit codes only; one file a command.

Exit codes: 0 done, 1 failed while running, 2 bad input, 128 + n stopped by signal n (after saving).
"""

from __future__ import annotations

import sys

import typer

from trainfw.cli import doctor, evaluate, generate, recipe, tokenizer, train
from trainfw.errors import RunError, UserError

app = typer.Typer(
    name="trainfw",
    help="Train LLMs in JAX on Trainium-style meshes. Start with: trainfw train quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("doctor")(doctor.doctor)
app.add_typer(recipe.app, name="recipe")
app.add_typer(tokenizer.app, name="tokenizer")


def main() -> None:
    try:
        app()
    except UserError as error:
        _exit(f"error: {error}", 2)
    except RunError as error:
        _exit(f"failed: {error}", 1)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except BrokenPipeError:
        # Whoever read our output (head, less) has gone; that is no failure of ours.
        sys.stderr.close()
        raise SystemExit(0) from None


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code)
