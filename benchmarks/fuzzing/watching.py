"""Cases run in a forked process, which is watched from outside: how long each takes, how much memory, how it ends."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import mmap
import os
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fuzzing import cases
from benchmarks.fuzzing.readers import READERS, Wrong
from trainfw.cli import _PATH_ERRORS, _warned
from trainfw.cli.terminal import say
from trainfw.data.chat import TemplateProblem
from trainfw.errors import RunError, UserError

SECONDS, IDLE_SECONDS, MOST_SECONDS = 10.0, 30.0, 300.0
"""Seconds that a case may take: of processor time; in all, where it uses hardly any (a busy machine is slow, and no
finding); in all."""
BYTES = 2 * 2**30
"""Bytes of memory that a case may add to what there was before the first; of address space, twice as many."""
LONGEST = 2000
"""Characters of a message."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_EVERY = 0.02


@dataclass(frozen=True)
class Finding:
    number: int
    place: str
    """Label that alike findings share: what happened, and trainfw's innermost line."""
    change: str
    detail: str


class Watched:
    """Cases of one kind, from `first` on, until `last` or a deadline (monotonic seconds)."""

    def __init__(self, corpus: Path, kind: str, seed: int, work: Path):
        self._corpus, self._kind, self._seed, self._work = corpus, kind, seed, work
        self._shared = mmap.mmap(-1, 64)
        self.refused = self.done = 0

    def run(self, first: int, last: int, deadline: float) -> Iterator[Finding]:
        """Each finding as it is made; `done` and `refused` count all cases."""
        number = first
        while number < last and time.monotonic() < deadline:
            out, into = os.pipe()
            self._shared[:] = struct.pack("q", number) + bytes(56)
            pid = os.fork()
            if not pid:
                os.close(out)
                self._serve(into, number, last, deadline)  # does not return
            os.close(into)
            os.set_blocking(out, False)
            try:
                ended = yield from self._watch(pid, out)
            finally:
                os.close(out)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # what it started, too
            number = self._number + 1
            if ended is not None:
                self.done += 1
                yield ended

    @property
    def _number(self) -> int:
        return struct.unpack_from("q", self._shared, 0)[0]

    # --- Inside ----------------------------------------------------------------------------------

    def _serve(self, into: int, number: int, last: int, deadline: float) -> None:
        try:
            os.setsid()
            silent = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(silent, descriptor)
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir(parents=True)
            os.chdir(self._work)
            faults = open(self._faults, "w")  # noqa: SIM115  for as long as the process is
            faulthandler.enable(faults)
            sys.unraisablehook = lambda _: None  # Orbax's coroutines, of which `trainfw train` says nothing either
            faulthandler.register(signal.SIGUSR1, faults)
            original = self._corpus / self._kind
            # What is undamaged is right; and what loads late is there before memory is measured.
            if problem := judge(self._kind, original, original)[1]:
                raise RuntimeError(problem)
            size, resident = (pages * resource.getpagesize() for pages in _memory(os.getpid()))
            resource.setrlimit(resource.RLIMIT_AS, (size + 2 * BYTES,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            struct.pack_into("q", self._shared, 24, resident + BYTES)
            with open(into, "w", encoding="utf-8") as out:
                while number < last and time.monotonic() < deadline:
                    struct.pack_into("q", self._shared, 0, number)
                    found = self._case(number)
                    struct.pack_into("d", self._shared, 8, 0.0)
                    out.write(json.dumps(found) + "\n")
                    out.flush()
                    number += 1
        except BaseException:
            Path(f"{self._faults}.bug").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)

    @property
    def _faults(self) -> Path:
        return self._work.with_suffix(".faults")

    def _case(self, number: int) -> list[Any]:
        """[number] where it is right, and [number, "refused"]; else [number, place, change, detail]."""
        change = cases.make(self._corpus, self._kind, self._seed, number, self._work / "case")
        struct.pack_into("q", self._shared, 32, 1)
        struct.pack_into("dd", self._shared, 8, time.monotonic(), time.process_time())
        place, detail = judge(self._kind, self._work / "case", self._corpus / self._kind)
        return [number, place, change, detail] if detail else [number, place] if place else [number]

    # --- Outside ---------------------------------------------------------------------------------

    def _watch(self, pid: int, out: int) -> Generator[Finding, None, Finding | None]:
        """Until the process has ended; how, where that is a finding itself."""
        reason, rest = "", b""
        started = time.monotonic()
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            *whole, rest = (rest + _read(out)).split(b"\n")
            for line in whole:
                number, *found = json.loads(line)
                self.done += 1
                self.refused += found == ["refused"]
                if len(found) == 3:
                    yield Finding(number, *found)
            if ended:
                break
            reason = reason or self._excess(pid, started)
            if reason:
                _dump_and_kill(pid)
            time.sleep(_EVERY)
        if os.WIFEXITED(status) and not os.WEXITSTATUS(status):
            return None
        bug = Path(f"{self._faults}.bug")
        if bug.exists():
            raise RuntimeError(f"the fuzzer itself failed at {self._kind} {self._number}:\n{bug.read_text()}")
        stack = self._faults.read_text(errors="replace") if self._faults.exists() else ""
        said = reason or f"died of {signal.Signals(status & 0x7F).name}" * bool(status & 0x7F) or "exited"
        return Finding(self._number, f"{said} at {_innermost(stack)}", "", stack[-4000:])

    def _excess(self, pid: int, started: float) -> str:
        _, begun, spent, most = struct.unpack_from("qddq", self._shared, 0)
        now = time.monotonic()
        if not begun:
            return "its start took too long" if not most and now - started > 120 else ""
        if now - begun > MOST_SECONDS or (now - begun > IDLE_SECONDS and _processor_seconds_of_group(pid) - spent < 1):
            return "a wait without end"
        if _processor_seconds(pid) - spent > SECONDS:
            return f"more than {SECONDS:.0f} s of the processor"
        return f"more than {BYTES / 2**30:.0f} GiB" if _memory(pid)[1] * resource.getpagesize() > most else ""


def _read(descriptor: int) -> bytes:
    """Read what is there now."""
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(descriptor, 2**16):
            parts.append(part)
    return b"".join(parts)


def _dump_and_kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)


def _memory(pid: int) -> tuple[int, int]:
    """Pages: of address space, and resident."""
    try:
        size, resident = Path(f"/proc/{pid}/statm").read_text().split()[:2]
    except OSError:
        return 0, 0
    return int(size), int(resident)


def _processor_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _processor_seconds_of_group(group: int) -> float:
    """With those that the process started."""
    members = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            members += [int(path.name)] * (os.getpgid(int(path.name)) == group)
    return sum(map(_processor_seconds, members))


# --- Judging -------------------------------------------------------------------------------------


def judge(kind: str, directory: Path, original: Path) -> tuple[str, str]:
    """("", "") for a result that is right, ("refused", "") in words, else (place, detail) of what is wrong."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _warnings():
            READERS[kind].read(directory, original)
    except (UserError, RunError, TemplateProblem) as error:
        with contextlib.redirect_stderr(said):
            say(f"error: {error}", err=True)
        problem = wording(said.getvalue(), str(error))
        return (f"{problem} at {_frame(error)}", said.getvalue()[:4000]) if problem else ("refused", "")
    except Wrong as error:
        return f"wrong: {re.sub('[0-9]+', 'N', str(error))}", _trace(error)
    except OSError as error:
        if error.errno in _PATH_ERRORS and error.filename:  # which the command line says as such
            return "refused", ""
        return f"{type(error).__name__} at {_frame(error)}", _trace(error)
    except BaseException as error:  # panics of Rust are no Exception
        return f"{type(error).__name__} at {_frame(error)}", _trace(error)
    problem = wording(said.getvalue(), "a warning or none")
    return (f"{problem}, in a warning", said.getvalue()[:4000]) if problem else ("", "")


def wording(printed: str, message: str) -> str:
    """Say what is wrong with what the terminal is given; empty where nothing is."""
    if not message.strip():
        return "an empty message"
    if found := _CONTROL.search(printed):
        return f"a message with the control character {found[0]!r}"
    return "a message of thousands of characters" if len(printed) > LONGEST else ""


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """Warnings as the command line shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _warned(lambda *_: None)
        yield


def _trace(error: BaseException) -> str:
    frames = "".join(traceback.format_tb(error.__traceback__)[-8:])
    return f"{frames}{type(error).__name__}: {str(error)[:1000]}"[-5000:]


def _frame(error: BaseException) -> str:
    """trainfw's innermost line; that of the reader, where it is none of trainfw's."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if "/trainfw/" in one.filename] or list(frames)
    last = ours[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno} {last.name}"


def _innermost(stack: str) -> str:
    """Return the same as `_frame`, from what faulthandler wrote."""
    frames = re.findall(r'File "(.*)", line (\d+) in (\S+)', stack.rpartition("Current thread")[2])
    ours = [one for one in frames if "/trainfw/" in one[0]] or frames
    return f"{'/'.join(Path(ours[0][0]).parts[-2:])}:{ours[0][1]} {ours[0][2]}" if ours else "an unknown place"


if sys.platform != "linux":
    sys.exit("benchmarks/fuzz.py reads /proc: it needs Linux")
