"""What `train` takes beside a recipe: all of it is checked before anything is done."""

from __future__ import annotations

import re

import jax
import pytest

from trainfw import Callback, Logger, UserError, train
from trainfw.training import Reporter
from trainfw.training.arguments import Given

GIVEN = dict.fromkeys(("objective", "optimizer", "data", "devices", "run_dir", "approve")) | {
    **dict.fromkeys(("callbacks", "loggers", "accept"), ()),
    "resume": "auto",
    "reporter": Reporter(),
}


class Short:
    """All that docs/own.md asks of a logger."""

    def write(self, rows): ...
    def rewind(self, step): ...


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("resume", value, "'auto' or 'never' or 'must'") for value in (False, True, None, "nevr", "yes")),
        *(("callbacks", value, "a list of trainfw.Callback") for value in (Callback(), 3, [None], [Callback], "ab")),
        *(("loggers", value, "a list of objects with write(rows)") for value in (Logger(), ["x"], [Logger], {"a": 1})),
        *(("devices", value, "a list of devices") for value in (1, ["cpu"], "cpu", [None], [])),
        *(("accept", value, "a list of keys of the recipe") for value in (3, [3], None)),
        *(("run_dir", value, "the path of a directory") for value in (3, b"run", ["run"])),
        *(("reporter", value, "a trainfw.training.Reporter") for value in (3, Reporter, print)),
        *(("approve", value, "a function") for value in (3, "yes")),
    ],
)
def test_a_wrong_argument_is_refused_by_name_and_value(name, value, expected):
    with pytest.raises(UserError, match=rf"^{name} = {re.escape(repr(value)[:60])}.*expected {re.escape(expected)}"):
        Given(**GIVEN | {name: value})


def test_right_arguments_are_kept_as_lists_that_can_be_read_again():
    given = {
        "callbacks": (one for one in [Callback()]),
        "loggers": [Logger(), Short()],
        "devices": jax.devices()[:1],
        "accept": "optimizer.learning_rate",
    }
    kept = Given(**GIVEN | given)
    assert (len(kept.callbacks), len(kept.loggers), len(kept.devices)) == (1, 2, 1)
    assert kept.accept == ("optimizer.learning_rate",)


def test_nothing_is_read_or_written_before_the_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^resume = False: expected 'auto'"):
        train("no such recipe", callbacks=None, loggers=None, resume=False)
    assert not list(tmp_path.iterdir())
