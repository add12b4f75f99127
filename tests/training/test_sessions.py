"""Where the time of a run went."""

from __future__ import annotations

import pytest

from trainfw.training.sessions import Sessions, goodput

SECONDS = {"start": 4.0, "compile": 6.0, "step": 80.0, "validation": 5.0, "save": 5.0, "lost": 0.0}


def row(first, step, started, time, **seconds):
    return {"from": first, "step": step, "started": started, "time": time} | {
        f"{name}_seconds": value for name, value in (SECONDS | seconds).items()
    }


def test_one_session():
    found = goodput([row(0, 100, 0, 100)])
    assert found.fraction == 0.8
    assert str(found) == (
        "goodput 80.0% of 1 min 40 s: start 4.0 s, compile 6.0 s, step 1 min 20 s, validation 5.0 s, save 5.0 s"
    )


def test_steps_done_again_are_lost_and_the_gap_is_a_restart():
    found = goodput([row(0, 100, 0, 100), row(75, 200, 110, 210)])
    assert found.seconds["lost"] == 20.0
    assert found.seconds["step"] == 140.0
    assert found.seconds["restart"] == 10.0
    assert found.fraction == pytest.approx(140 / 210)


def test_a_session_that_goes_back_behind_the_one_before():
    # The second started at 90, but its checkpoint and the one before were damaged: the third starts at 50.
    found = goodput([row(0, 100, 0, 100), row(90, 110, 100, 200), row(50, 150, 200, 300)])
    assert found.seconds["lost"] == 80 * 0.5 + 80
    assert found.seconds["step"] == 240 - 120


def test_sessions_are_read_back_and_torn_lines_are_left_out(tmp_path):
    file = tmp_path / "sessions.jsonl"
    first = Sessions(file, 0)
    first.write(0, SECONDS)
    first.write(50, SECONDS)
    with file.open("a") as torn:
        torn.write('{"session": 0, "from"')
    second = Sessions(file, 40)
    found = second.goodput(60, SECONDS)
    assert found.sessions == 2
    assert found.seconds["lost"] == pytest.approx(80 * 10 / 50)
