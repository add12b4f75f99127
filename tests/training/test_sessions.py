"""Where the time of a run went."""

from __future__ import annotations

import time

import jax
import pytest

from tests.helpers import Heard, losses, tiny_recipe
from trainfw import train
from trainfw.training import RunDirectory, sessions
from trainfw.training.records import SessionRow, stream_rows
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


YEARS = 10 * 365 * 24 * 3600.0


@pytest.mark.parametrize("jump", [-YEARS, YEARS])
@pytest.mark.parametrize("started_anew", [False, True])
def test_a_clock_that_is_set_between_sessions_counts_no_years(tmp_path, monkeypatch, jump, started_anew):
    file = tmp_path / "sessions.jsonl"
    Sessions(file, 0).write(50, SECONDS)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + jump)
    if started_anew:
        monkeypatch.setattr(sessions, "_BOOT", file)
    found = Sessions(file, 50).goodput(60, SECONDS)
    assert 0 <= found.seconds["restart"] < 60
    assert found.unknown == started_anew
    assert str(found).endswith("; not counted: 1 restart, for the clock was set meanwhile") == started_anew


@pytest.mark.long
def test_a_clock_that_is_set_in_the_middle_of_a_run_harms_nothing(tmp_path, monkeypatch):
    clock, jumps = time.time, {3: YEARS, 5: -2 * YEARS}

    class Setting(Heard):
        def step(self, step: int, steps: int) -> None:
            if jump := jumps.get(step):
                monkeypatch.setattr(time, "time", lambda: clock() + jump)

    for name, reporter in {"straight": Heard(), "set": Setting()}.items():
        train(tiny_recipe(tmp_path), devices=jax.devices()[:1], run_dir=tmp_path / name, reporter=reporter)
    train(tiny_recipe(tmp_path, "train.steps=9"), devices=jax.devices()[:1], run_dir=tmp_path / "set", reporter=Heard())
    straight, other = losses(tmp_path / "straight"), losses(tmp_path / "set")
    other.pop(9)
    assert straight == other
    rows = RunDirectory(tmp_path / "set").metrics()
    assert all(0 <= row["goodput"] <= 1 and 0 < row["step_time_seconds"] < 300 for row in rows if "loss" in row)
    last = {row["session"]: row for row in stream_rows(tmp_path / "set" / "sessions.jsonl", SessionRow)}
    assert len(last) == 2
    assert last[0]["time"] - last[0]["started"] < 300
