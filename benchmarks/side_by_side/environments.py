"""Python environments of peers whose dependencies are not ours, made once under the user's cache directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

Say = Callable[[str], None]


class Unavailable(Exception):
    """Why a peer cannot be run."""


@dataclass(frozen=True)
class Environment:
    name: str
    requirements: tuple[str, ...]
    python: str | None = None
    """`3.12`: the version it must have; None: this one's."""


def maxtext() -> Environment:
    # Without an extra, MaxText's wheel asks for nothing at all; there is none for a CPU, on which that of TPUs works.
    return Environment("maxtext", ("maxtext[tpu]==0.2.5",), "3.12")


def litgpt() -> Environment:
    try:
        torch = f"torch=={version('torch').partition('+')[0]}"  # the very one that Transformers runs on
    except PackageNotFoundError:
        torch = "torch"
    return Environment("litgpt", ("litgpt==0.5.13", torch))


def ready(environment: Environment, root: Path, say: Say) -> Path:
    """The environment's Python, made and filled unless that was done before. Raises Unavailable."""
    directory = root / environment.name
    python = directory / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done, wanted = directory / "installed.json", {"requirements": list(environment.requirements)}
    if done.is_file() and json.loads(done.read_text()) == wanted and _version(python) is not None:
        return python
    base = sys.executable if environment.python is None else find_python(environment.python)
    if base is None:
        raise Unavailable(
            f"{environment.name} needs Python {environment.python}, of which none was found; install one, or name an "
            f"environment that has {environment.name} with --{environment.name}-python"
        )
    shutil.rmtree(directory, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    log = root / f"{environment.name}-install.log"
    say(f"{environment.name}: installing {' '.join(environment.requirements)} into {directory} (once; minutes)")
    install = [str(python), "-m", "pip", "install", "--progress-bar", "off", *environment.requirements]
    with log.open("w") as out:
        for command in ([str(base), "-m", "venv", str(directory)], install):
            started = time.monotonic()
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            try:
                while process.poll() is None:
                    try:
                        process.wait(15)
                    except subprocess.TimeoutExpired:
                        say(f"{environment.name}: installing, {time.monotonic() - started:.0f} s: {_last(log)[:80]}")
            finally:
                process.kill()
            if process.returncode:
                raise Unavailable(f"{environment.name} did not install: {last_error(log.read_text())} (all: {log})")
    done.write_text(json.dumps(wanted))
    return python


def find_python(wanted: str) -> str | None:
    """A Python of that version, as `3.12`, that runs."""
    for candidate in _candidates(wanted):
        if _version(candidate) == wanted:
            return str(candidate)
    return None


def _candidates(wanted: str) -> Iterator[str | Path]:
    yield sys.executable
    yield from filter(None, map(shutil.which, (f"python{wanted}", "python3", "python")))
    for place in ("~/.pyenv/versions", "~/.local/share/uv/python", "/opt/homebrew/opt", "/usr/local/opt"):
        yield from sorted(Path(place).expanduser().glob(f"*{wanted}*/bin/python{wanted}"))
    if (uv := shutil.which("uv")) is not None:
        found = subprocess.run([uv, "python", "find", wanted], capture_output=True, text=True)
        yield from found.stdout.split("\n")[:1]


def _version(python: str | Path) -> str | None:
    """None where it does not run: a shim of pyenv's, say, for a version that is not selected."""
    try:
        told = subprocess.run(
            [str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() if told.returncode == 0 else None


def last_error(log: str) -> str:
    """The line of a log that says most about why it ends: the last that names an error, or the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.partition(":")[0].lower()]
    return (errors or [line for line in lines if not line.startswith(("WARNING", "warning"))] or ["no output"])[-1]


def _last(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip() and not line.startswith("WARNING")]
    return lines[-1].strip() if lines else ""
