"""The `trainfw` command: parsing, printing and exit codes only; one file a command.

Exit codes: 0 done, 1 failed while running, 2 bad input, 75 failed for want of another process or of progress (the
same command goes on), 128 + n stopped by signal n (after saving).
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from trainfw.cli import (
    check,
    data,
    doctor,
    env,
    evaluate,
    export,
    export_hlo,
    generate,
    import_,
    launch,
    merge,
    plan,
    recipe,
    serve,
    sweep,
    tokenizer,
    topology,
    train,
)
from trainfw.cli.options import RecipeCommand
from trainfw.cli.terminal import say
from trainfw.errors import TRY_AGAIN, PeerError, RunError, UserError
from trainfw.signals import end_without_traceback
from trainfw.streams import flush_standard, open_standard

app = typer.Typer(
    name="trainfw",
    help="Train LLMs in JAX on Trainium-style meshes. Start with: trainfw train quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        typer.echo(importlib.metadata.version("trainfw"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command("train", cls=RecipeCommand)(train.train)
app.command("sweep", cls=RecipeCommand)(sweep.sweep)
app.command("eval", cls=RecipeCommand)(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("import")(import_.import_)
app.command("export")(export.export)
app.command("merge")(merge.merge)
app.command("check", cls=RecipeCommand)(check.check)
app.command("export-hlo", cls=RecipeCommand)(export_hlo.export_hlo)
app.command("plan", cls=RecipeCommand)(plan.plan)
app.command("doctor")(doctor.doctor)
app.command("env", cls=RecipeCommand)(env.env)
app.command("topology")(topology.topology)
app.add_typer(data.app, name="data")
app.add_typer(launch.app, name="launch")
app.add_typer(recipe.app, name="recipe")
app.add_typer(tokenizer.app, name="tokenizer")


def _parser() -> Any:
    """Make the commands, whose help names an argument without Python's type for it: KEY=VALUE is no `<list[str]>`."""
    found = typer.main.get_command(app)
    groups: list[Any] = [found]
    for command in groups:
        groups += getattr(command, "commands", {}).values()
        for argument in (p for p in command.params if p.param_type_name == "argument"):
            argument.display_type_rich = lambda ctx: None
    return found


# What the system says of a path that the user gave; anything else it says is a failure of the run.
_PATH_ERRORS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL),
}


_END_SECONDS = 90.0
"""Seconds that a command that succeeded may take to end: the processes of a run wait a minute for each other."""


def command() -> None:
    # Imports and tracing make millions of objects that stay: a start is shorter if Python looks among them for cycles
    # less often than after every 700.
    gc.set_threshold(50_000, 20, 20)
    open_standard()
    try:
        main()
    except SystemExit as end:
        problem = flush_standard()
        if problem is not None and not end.code:
            end.code = 1
            if problem.errno != errno.EPIPE:  # nobody reads any more, by intention
                say(f"failed: stdout: {problem.strerror}", err=True)
        _leave_behind(end.code if isinstance(end.code, int) else bool(end.code))
        raise
    finally:
        flush_standard()


def _leave_behind(code: int) -> None:
    """Do not wait for what other threads are still at: compiling what nobody will run, or, after a save that failed,
    waiting for others of Orbax's threads, which takes them ten minutes. After a success they have `_END_SECONDS`.
    """
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if code and (_one_of_many() or not all(thread.daemon for thread in others)):
        _exit_now(code)
    timer = threading.Timer(_END_SECONDS, os._exit, (code,))
    timer.daemon = True
    timer.start()


def main() -> None:
    before = signal.getsignal(signal.SIGINT)
    end_without_traceback()  # the training loop takes the signal over while there is something to save
    warnings.showwarning, others = _warned(warnings.showwarning), warnings.showwarning
    try:
        _parser()()
    except UserError as error:
        _exit(f"error: {error}", 2)
    except PeerError as error:
        _exit(f"failed: {error}", TRY_AGAIN)
    except RunError as error:
        _exit(f"failed: {error}", 1)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        if error.errno == errno.ENOENT and not error.filename and not _stands_somewhere():
            what = "the working directory is gone; change to one that is there"
        if error.errno in _PATH_ERRORS:
            _exit(f"error: {what}", 2)
        _exit(f"failed: {what}", 1)
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "JaxRuntimeError":
            if not _one_of_many():
                raise  # a mistake of ours: show where
            traceback.print_exc()
            _exit("failed", 1)
        text = (str(error).splitlines() or ["out of memory"])[0]
        if _one_of_many():
            _exit(f"failed: {text} (another process may have ended; start them all again)", TRY_AGAIN)
        _exit(f"failed: {text}", 1)
    finally:
        signal.signal(signal.SIGINT, before)
        warnings.showwarning = others


def _stands_somewhere() -> bool:
    """Tell whether the working directory is there still."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _warned(others: Callable[..., None]) -> Callable[..., None]:
    """Return what shows a warning: one of ours in words, without the line of code that gave it."""
    ours = os.path.dirname(os.path.dirname(__file__)) + os.sep

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: object, **named: object) -> None:
        if filename.startswith(ours):
            say(f"warning: {message}", err=True)
        else:
            others(message, category, filename, *rest, **named)

    return show


def _exit(message: str, code: int) -> None:
    say(message, err=True)
    if _one_of_many():
        _exit_now(code)  # else jax waits for the other processes, which wait for this one
    raise SystemExit(code)


def _exit_now(code: int) -> NoReturn:
    flush_standard()
    if _one_of_many():
        from trainfw import backends

        backends.leave_in_order()
    os._exit(code)


def _one_of_many() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
