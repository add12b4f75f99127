"""A process in which nothing moves says where, and leaves."""

from __future__ import annotations

import subprocess
import sys
import time

from trainfw.recipe import WatchdogConfig
from trainfw.training.phases import Phases

HANGS = """
import threading, time
from trainfw.recipe import WatchdogConfig
from trainfw.training.phases import Phases

def where_it_hangs():
    {hang}

with Phases(WatchdogConfig(step_seconds=0.5)) as phases:
    phases.step = 41
    with phases.during("step"):
        where_it_hangs()
"""


def test_seconds_are_of_their_phases():
    with Phases(WatchdogConfig()) as phases:
        with phases.during("step"):
            with phases.during("save"):
                deadline = time.monotonic() + 0.05
                while time.monotonic() < deadline:
                    pass
            phases.lost += 0.001
        found = phases.so_far()
    assert found["save"] >= 0.05
    assert found["lost"] == 0.001
    assert found["compile"] == 0


def test_the_time_for_which_the_process_was_stopped_is_given_back():
    phases = Phases(WatchdogConfig(start_seconds=60))
    now = phases._moved
    assert not phases._overdue(now + 9)
    assert not phases._overdue(now + 5000)  # stopped, and going on
    assert not phases._overdue(now + 5009)
    assert not any(phases._overdue(now + 5009 + second) for second in range(40))
    assert any(phases._overdue(now + 5049 + second) for second in range(20))


def test_it_prints_the_phase_the_step_and_the_stacks():
    script = HANGS.format(hang="threading.Event().wait()")
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 75
    assert "failed: nothing has moved for 0.5 s in phase 'step' (watchdog.step_seconds) after step 41;" in ran.stderr
    assert "in where_it_hangs" in ran.stderr


def test_what_moves_is_left_alone():
    script = HANGS.format(hang="[(time.sleep(0.2), phases.moved()) for _ in range(10)]")
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
