"""Printing of commands: plain text into a pipe; on a terminal folded at words, with verdicts in colour."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import IO, TextIO

from trainfw.utf8 import printable

_RED, _YELLOW, _GREEN = "31;1", "33;1", "32;1"
_COLOURS = {
    **dict.fromkeys(("error", "failed", "refused"), _RED),
    "warning": _YELLOW,
    **dict.fromkeys(("clean", "fits"), _GREEN),
}
_VERDICT = re.compile(
    r"(?:(?<=^)|(?<=^check: ))(?:error|failed|refused|warning|clean|fits)(?=:)|(?i:does not fit)", re.MULTILINE
)

LIVE_SECONDS, QUIET_SECONDS = 1.0, 30.0
"""Seconds between moves of a `Clock` on a terminal, and in a pipe."""

_STAYS = re.compile(r"`[^`]*`|(?<![\w.=])\d[\d.,]* (?=[A-Za-z]+(?:/s)?(?![\w/.]))")
"""Text that no line break may cut: a command, or a number and its unit."""
_SHORT = 32
"""Characters of a field that goes to the next line as a whole."""


def say(text: object = "", *, err: bool = False) -> None:
    """Print lines: into a pipe as they are, on a terminal folded at words (`folded`) and with verdicts in colour.

    Control characters, which may come from a file of others, are escaped in both (`printable`).
    """
    stream = sys.stderr if err else sys.stdout
    shown = printable(str(text))
    if stream.isatty():
        shown = for_terminal(shown, width_of(stream), colour=in_colour(stream))
    _print(shown + "\n", stream)


def show(text: str) -> None:
    """Print what a model wrote, with no line feed after it: into a pipe as it is, on a terminal `printable`."""
    _print(printable(text) if sys.stdout.isatty() else text, sys.stdout)


def _print(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream, end="", flush=True)


def for_terminal(text: str, width: int, *, colour: bool) -> str:
    """Fold and colour `text` for a terminal that is `width` columns wide."""
    shown = "\n".join(part for line in text.split("\n") for part in folded(line, width))
    if not colour:
        return shown
    return _VERDICT.sub(lambda verdict: f"\x1b[{_COLOURS.get(verdict[0], _RED)}m{verdict[0]}\x1b[0m", shown)


def in_colour(stream: IO[str]) -> bool:
    """Tell whether a stream is a terminal that shows colours, and nobody asked for none (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width_of(stream: IO[str]) -> int:
    """Count the columns of a terminal; `$COLUMNS` where it is set."""
    if os.environ.get("COLUMNS", "").isdigit():
        return shutil.get_terminal_size().columns
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def folded(line: str, width: int) -> Iterator[str]:
    """Fold a line into lines of at most `width`, between fields (two spaces or more), and inside long ones at words.

    What follows is set below the field that goes on, or indented. A word longer than a line, such as a path, is left
    to the terminal: so it is copied whole.
    """
    if len(line) <= width:
        yield line
        return
    out = line[: len(line) - len(line.lstrip())]
    indent = out + "    "
    for field, gap in re.findall(r"(\S.*?)(\s{2,}|\s*$)", line):
        if len(out) + len(field) <= width:
            out += field + gap
            continue
        if out.strip() and (len(field) <= _SHORT or len(out) > 0.6 * width):
            yield out.rstrip()
            out = indent
        tied = _STAYS.sub(lambda match: match[0].replace(" ", "\0"), field)
        below = " " * len(out) if out.strip() else indent
        *whole, last = textwrap.wrap(
            tied, width, initial_indent=out, subsequent_indent=below, break_long_words=False, break_on_hyphens=False
        )
        yield from (text.replace("\0", " ") for text in whole)
        out = last.replace("\0", " ") + gap
    yield out.rstrip()


class Clock:
    """Says on stderr what a long command is at, each line with the seconds since it began.

    While nothing new is said the seconds go on, in place on a terminal, as a line now and then in a pipe.
    """

    def __init__(self) -> None:
        self._started, self._said, self._at = time.monotonic(), 0.0, ""
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._live = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._run, name="clock", daemon=True)

    def __enter__(self) -> Clock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._clear()

    def __call__(self, text: str) -> None:
        with self._lock:
            self._clear()
            say(f"{self._seconds():5.1f} s  {text}", err=True)
            self._said, self._at = time.monotonic(), text.strip()

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _clear(self) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _run(self) -> None:
        every = LIVE_SECONDS if self._live else QUIET_SECONDS
        while not self._ended.wait(LIVE_SECONDS):
            with self._lock:
                if not self._at or time.monotonic() - self._said < every:
                    continue
                line = f"{self._seconds():5.1f} s  still {self._at}"
                if self._live:
                    sys.stderr.write("\r\x1b[K" + line[: width_of(sys.stderr) - 1])
                    sys.stderr.flush()
                else:
                    say(line, err=True)
                    self._said = time.monotonic()
