"""neuronx-cc as a check: each function's HLO is compiled by it, wherever it is on PATH. It needs no Neuron hardware.

None of this has been tried with the real compiler: its command line is that of AWS's reference, and what it prints is
read as AWS's documents and public logs quote it.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainfw import backends
from trainfw.errors import UserError, first_line
from trainfw.hlo import Exported, export
from trainfw.unfinished import removed_by_signal, scratch_directory

if TYPE_CHECKING:
    from trainfw.program import Program

COMPILER = "neuronx-cc"
INSTALL = "python -m pip install 'neuronx-cc==2.*' --extra-index-url=https://pip.repos.neuron.amazonaws.com"
GIB_EACH = 14
"""GiB of host memory that a compile may take, as third parties measured; larger ones have taken more."""
MEMORY = "[F137]"
"""Code that neuronx-cc prints where one of its own processes was killed, and exits 70."""
_POLL_SECONDS = 0.05
_VERSION_SECONDS = 60.0
_MOST_OUTPUT, _HEAD = 2**20, 2**16
"""Bytes of output that are read, from the end, and of longer ones from the beginning."""
_MOST_LETTERS = 400
"""Letters of a line that are shown."""


@dataclass(frozen=True)
class Run:
    """One run of the compiler: how it ended, and what it printed."""

    code: int | None
    """Exit code, negative for a signal; None where the time limit ended it."""
    seconds: float
    neff: bool
    """True where it wrote a NEFF that is not empty."""
    output: str
    """Text of stdout and stderr; where it is long, its beginning and its end."""
    log: str = ""
    """Text of its log-neuron-cc.txt, likewise."""


@dataclass
class _Job:
    name: str
    process: subprocess.Popen[bytes]
    directory: Path
    started: float = field(default_factory=time.monotonic)


def find_compiler() -> str:
    """Find neuronx-cc on PATH. Raises UserError, with how to get it."""
    found = shutil.which(COMPILER)
    if found is None:
        raise UserError(
            f"no {COMPILER} on PATH; it runs on any x86-64 Linux machine, without Neuron hardware: {INSTALL}"
        )
    return os.path.abspath(found)  # a relative entry of PATH counts from here, and it runs elsewhere


def compiler_version(compiler: str) -> str:
    """Ask the compiler for its version; `unknown` where it does not say."""
    with scratch_directory() as directory, _Jobs() as jobs:
        job = jobs.start("version", [compiler, "--version"], Path(directory))
        run = jobs.finish(job, _VERSION_SECONDS, Path(directory))
    found = re.search(r"[Vv]ersion:?\s+(\d+(?:\.\d+)+[\w.+]*)", run.output)
    return found[1] if found and run.code == 0 else "unknown"


def command_of(name: str, flags: Sequence[str], compiler: str = COMPILER) -> list[str]:
    """Give the command that compiles `name`.pb, in the directory where it is, to `name`.neff."""
    framework = [] if any(flag.startswith("--framework") for flag in flags) else ["--framework=XLA"]
    return [compiler, "compile", *framework, f"{name}.pb", f"--output={name}.neff", *flags]


def export_steps(program: Program, progress: Callable[[str], None] = lambda _: None) -> dict[str, Exported | str]:
    """Export each step of a `trainfw.Program` as the plugin would hand it over, or say why there is no module.

    Lowered for Neuron and partitioned by this machine's XLA: the plugin's own may differ. Kernels of Neuron's are not
    in it, where the devices are simulated.
    """
    import jax

    modules: dict[str, Exported | str] = {}
    for name, function in program.functions.items():
        progress(f"exporting {name}")
        try:
            lowered = function.trace().lower(lowering_platforms=("neuron",))
            modules[name] = export(lowered, backends.current().compiler_options)
        except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
            modules[name] = first_line(error)
    return modules


def compiles_at_once(count: int, free: int) -> int:
    """Count how many of `count` compiles run at once: as many as free host memory has room for, and one at least."""
    return max(1, min(count, free // (GIB_EACH * 2**30)))


def run_compiler(
    compiler: str,
    modules: Mapping[str, bytes],
    flags: Sequence[str],
    *,
    timeout: float,
    at_once: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Run]:
    """Compile serialized modules, `at_once` at a time, each for `timeout` seconds at most.

    When this returns, raises or ends at a signal (see `trainfw.unfinished`), no process of a compiler's group is left.
    """
    runs: dict[str, Run] = {}
    waiting, running = list(modules), list[_Job]()
    with scratch_directory() as scratch, _Jobs() as jobs:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                directory = Path(scratch, name)
                directory.mkdir()
                (directory / f"{name}.pb").write_bytes(modules[name])
                progress(f"neuronx-cc: {name} ({len(modules[name]) / 2**20:.1f} MiB of HLO)")
                running.append(jobs.start(name, command_of(name, flags, compiler), directory))
            for job in list(running):
                left = job.started + timeout - time.monotonic()
                if jobs.ended(job) or left <= 0:
                    runs[job.name] = jobs.finish(job, 0.0 if left <= 0 else math.inf, job.directory)
                    running.remove(job)
                    shutil.rmtree(job.directory, ignore_errors=True)  # of gigabytes, where it keeps its work
            time.sleep(_POLL_SECONDS)
    return {name: runs[name] for name in modules}


class _Jobs:
    """Processes, each in a group of its own, which is killed whole when its process has ended, or this has."""

    def __init__(self) -> None:
        self._lock, self._closed, self._left = threading.Lock(), False, list[_Job]()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Jobs:
        self._stack.enter_context(removed_by_signal(self.end))
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._stack.close()

    def start(self, name: str, command: Sequence[str], directory: Path) -> _Job:
        """Start a process. Raises UserError for a file that is no program."""
        with self._lock, (directory / "output.txt").open("wb") as output:
            if self._closed:  # by a signal, in another thread
                raise UserError("stopped")
            try:
                process = subprocess.Popen(
                    command,
                    cwd=directory,  # it leaves its log and its work where it runs
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(f"{command[0]}: cannot be run: {error.strerror}") from error
            job = _Job(name, process, directory)
            self._left.append(job)
        return job

    def ended(self, job: _Job) -> bool:
        # Not reaped yet: its number, which is the group's, stays taken until the group has been killed.
        return os.waitid(os.P_PID, job.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def finish(self, job: _Job, timeout: float, directory: Path) -> Run:
        """Wait for its end, kill the rest of its group, and read what it left."""
        deadline = time.monotonic() + timeout
        while not (ended := self.ended(job)) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        with self._lock:
            _kill(job)
            self._left.remove(job)
        neff = directory / f"{job.name}.neff"
        return Run(
            job.process.returncode if ended else None,
            time.monotonic() - job.started,
            neff.is_file() and neff.stat().st_size > 0,
            _ends(directory / "output.txt"),
            _ends(directory / "log-neuron-cc.txt"),
        )

    def end(self) -> None:
        with self._lock:
            self._closed = True
            for job in self._left:
                _kill(job)
            self._left.clear()


def _kill(job: _Job) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(job.process.pid, signal.SIGKILL)  # a compile takes no notice of SIGTERM for minutes
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that a file system holds
        job.process.wait(10.0)


def _ends(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            head, left_out = b"", file.stat().st_size - _MOST_OUTPUT
            if left_out > 0:
                head = stream.read(_HEAD) + b"\n"
                stream.seek(max(_HEAD, left_out))
            return (head + stream.read()).decode("utf-8", "replace")
    except OSError:
        return ""


def last_lines(run: Run, most: int = 5) -> list[str]:
    """Return the last lines printed that say something; of the log, where nothing was printed."""
    for text in (run.output, run.log):
        if lines := [line.rstrip() for line in text.splitlines() if line.strip(" .\t")]:
            return [line[:_MOST_LETTERS] + "..." * (len(line) > _MOST_LETTERS) for line in lines[-most:]]
    return []
