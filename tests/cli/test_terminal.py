"""What commands print: folded and in colour on a terminal, as it is in a pipe."""

from __future__ import annotations

import io
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfw.cli import _parser, main, terminal
from trainfw.cli.console import make_reporter
from trainfw.cli.terminal import Clock, folded, for_terminal, say, show


@given(
    text=st.lists(st.tuples(st.text("ab1`.=", min_size=1, max_size=30), st.sampled_from([" ", "  ", "    "]))),
    lead=st.integers(0, 30),
    width=st.integers(20, 120),
)
def test_folding_loses_nothing_and_breaks_no_word(text, lead, width):
    line = " " * lead + "".join(word + gap for word, gap in text).rstrip()
    lines = list(folded(line, width))
    assert [word for part in lines for word in part.split()] == line.split()
    if "`" not in line:
        # A number and its unit count as one word.
        assert all(len(part) <= width or len(part.split()) <= 2 or len(part) - len(part.lstrip()) > 0 for part in lines)


FOLDS = {
    "words, and no number without its unit": (
        "error: model.from = base: a core needs 12.5 GiB of memory more than it has",
        ["error: model.from = base: a core needs", "    12.5 GiB of memory more than it has"],
    ),
    "a command stays whole": (
        "warning: pyarrow is missing here: `pip install pyarrow`",
        ["warning: pyarrow is missing here:", "    `pip install pyarrow`"],
    ),
    "a path is left to the terminal": (
        "error: /a/very/long/path/that/no/line/could/hold.yaml: no such file",
        ["error:", "    /a/very/long/path/that/no/line/could/hold.yaml:", "    no such file"],
    ),
    "fields go to the next line whole": (
        "step 10/20  loss 1.2345  grad norm 3.21  0.123 s  12,345 tok/s",
        ["step 10/20  loss 1.2345  grad norm 3.21", "    0.123 s  12,345 tok/s"],
    ),
    "a long field goes on below itself": (
        "quickstart  A small Llama learns Python from the text of its library",
        ["quickstart  A small Llama learns Python", "            from the text of its library"],
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds(name):
    line, expected = FOLDS[name]
    assert list(folded(line, 41)) == expected


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), (None, False)]
)
def test_errors_are_red_on_a_terminal_that_may_show_it(environ, colour, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trainfw", "topology", "trn2.48xlarg"])
    monkeypatch.setattr(sys, "stderr", io.StringIO() if environ is None else Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for key, value in (environ or {}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit, match="2"):
        main()
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert said.startswith("\x1b[31;1merror\x1b[0m: topology" if colour else "error: topology")
    assert (said.count("\n") > 1) == (environ is not None)  # one line in a pipe


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("DOES NOT FIT: a core needs 1.00 GiB more than it has.", "31;1"),
        ("fits: a core has 1.00 GiB to spare.", "32;1"),
        ("clean: 0 errors", "32;1"),
        ("refused: 2 errors", "31;1"),
        ("check: refused: 2 errors", "31;1"),
        ("warning: step 6: loss is nan; skipped", "33;1"),
        ("it fits: a sentence, no verdict", None),
    ],
)
def test_verdicts_have_colours(line, code):
    shown = for_terminal(line, 80, colour=True)
    assert (f"\x1b[{code}m" in shown) if code else shown == line
    assert for_terminal(line, 80, colour=False) == line


def test_what_the_encoding_lacks_does_not_end_a_command(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    say("naïve")
    assert stream.buffer.getvalue() == b"na?ve\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_file_of_others_does_not_rule_the_terminal(terminal, monkeypatch, capsys):
    """What is said of it is escaped, in a log too; what a model writes is its own in a pipe."""
    hostile = "b\x1b]0;title\x07\x1b[2J\x9b31m\r\x7f\u202ec"
    harmless = "b\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\x0d\\x7f\\u202ec"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    say(hostile)
    reporter = make_reporter()
    reporter.note(hostile)
    reporter.note(f"sample:\n{hostile}")
    reporter.close()
    said = capsys.readouterr().out
    assert said.count(harmless) == 3
    assert not [part for part in ("\x1b]0", "\x1b[2J", "\x9b", "\x07", "\u202e") if part in said]
    show(hostile + "\n")
    assert capsys.readouterr().out == (harmless if terminal else hostile) + "\n"


@pytest.mark.parametrize("live", [True, False])
def test_a_clock_goes_on_while_nothing_new_is_said(live, monkeypatch):
    stream = Terminal() if live else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(terminal, "LIVE_SECONDS", 0.01)
    monkeypatch.setattr(terminal, "QUIET_SECONDS", 0.01)
    with Clock() as clock:
        clock("compiling 1 of 2")
        deadline = time.monotonic() + 10
        while "still compiling 1 of 2" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        clock("compiling 2 of 2")
    text = stream.getvalue()
    assert text.index("s  compiling 1") < text.index("s  still compiling 1") < text.index("s  compiling 2")
    assert ("\r\x1b[K" in text) == live


def commands(command=None, path=()):
    command = command or _parser()
    yield path
    for name, found in getattr(command, "commands", {}).items():
        yield from commands(found, (*path, name))


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_speaks_of_no_python_types_and_fits(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainfw", *path, "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main()
    text = capsys.readouterr().out
    assert "list[" not in text
    assert max(map(len, text.splitlines())) <= 80
    listed = text.partition("Commands:")[2]
    assert "..." not in listed  # every summary is whole
