"""The signals that stop a run, or another command."""

import os
import signal
import sys

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2, signal.SIGXCPU)
"""Each ends a command with exit code 128 + n; training saves first."""


def heeded() -> tuple[signal.Signals, ...]:
    """Return `STOPS`, without SIGHUP where `nohup` had it ignored."""
    return tuple(s for s in STOPS if s != signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN)


def stop_code(returncode: int) -> int | None:
    """Return the exit code, as a shell has it, of a process that such a signal ended; None where none did.

    Args:
        returncode: as `subprocess` gives it.
    """
    code = 128 - returncode if returncode < 0 else returncode
    return code if code in {128 + signum for signum in STOPS} else None


def is_command() -> bool:
    """Tell whether this process is the `trainfw` command, or `python -m trainfw`."""
    name = next((word for word in sys.orig_argv[1:] if not word.startswith("-")), "")
    return os.path.basename(name) == "trainfw"


def end_without_traceback() -> None:
    """Let SIGINT end the process at once from now on.

    Raising KeyboardInterrupt inside a compiler or a half-done import ends in crashes.
    """
    signal.signal(signal.SIGINT, _interrupted)


def _interrupted(_signum: int, _frame: object) -> None:
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    try:
        os.write(2, f"{show_cursor}\ninterrupted\n".encode())
        if (unfinished := sys.modules.get("trainfw.unfinished")) is not None:  # else nothing is being written
            unfinished.remove_unfinished()
    finally:  # whether or not anybody reads
        os._exit(128 + signal.SIGINT)
