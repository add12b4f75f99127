"""Several processes stop at the same turn, whenever the signal comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw import backends
from trainfw.errors import PeerError
from trainfw.signals import STOPS
from trainfw.training import stopping
from trainfw.training.stopping import Asked, Stop


class Store:
    """What `backends` says to other processes, between threads."""

    def __init__(self, count):
        self.count, self.changed = count, threading.Condition()
        self.announced, self.exchanged = {}, defaultdict(list)

    def announce(self, name, value):
        with self.changed:
            self.announced.setdefault(name, value)
            self.changed.notify_all()

    def exchange(self, name, value, timeout):
        with self.changed:
            self.exchanged[name].append(json.loads(json.dumps(value)))
            self.changed.notify_all()
            if not self.changed.wait_for(lambda: len(self.exchanged[name]) == self.count, timeout):
                raise PeerError("nobody")
            return self.exchanged[name]

    def heard(self, name, timeout):
        with self.changed:
            self.changed.wait_for(lambda: name in self.announced, timeout)
            return self.announced.get(name)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), count=st.integers(2, 4), ahead=st.integers(1, 3))
def test_all_stop_at_one_turn(data, count, ahead):
    """Processes take turns, none more than `ahead` before the slowest, as collectives hold them together."""
    store = Store(count)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("announce", "exchange", "heard"):
            patch.setattr(backends, name, getattr(store, name))
        patch.setattr(stopping, "_SESSIONS", iter([0] * count))
        stops = [Stop(count) for _ in range(count)]
        signals = data.draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, 20), min_size=1))
        scripts = data.draw(st.sets(st.sampled_from(sorted(signals))))
        turns, moved, ended = [0] * count, threading.Condition(), threading.Event()

        def run(process):
            while True:
                if signals.get(process) == turns[process] and process in scripts:
                    stops[process].request(Asked(f"process {process}"))
                elif signals.get(process) == turns[process]:
                    threading.Thread(target=stops[process].request, args=(15,)).start()
                if stops[process].turn():
                    return
                with moved:
                    turns[process] += 1
                    moved.notify_all()
                    assert moved.wait_for(lambda: turns[process] <= min(turns) + ahead, 20)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
        listeners = [threading.Thread(target=stop._listen, args=(ended,)) for stop in stops]
        for thread in (*threads, *listeners):
            thread.start()
        for thread in (*threads, *listeners):
            thread.join(20)
            assert not thread.is_alive()
        assert len(set(turns)) == 1
        assert len({stop.cause for stop in stops}) == 1
        assert stops[0].cause in {Asked(f"process {one}") if one in scripts else 15 for one in signals}


@pytest.mark.usefixtures("sighup_is_heard")
@pytest.mark.parametrize("signum", STOPS, ids=lambda signum: signum.name)
def test_one_process_stops_at_its_next_turn(signum):
    with stopping.stopping(1) as stop:
        assert not stop.turn()
        os.kill(os.getpid(), signum)
        for _ in range(2000):
            if stop.turn():
                break
            threading.Event().wait(0.001)
        assert stop.turn()
        assert stop.cause == signum


MANY = """
import os, signal
from trainfw.cli.signals import leaving_at_once
from trainfw.training import stopping
set_wakeup_fd, set_handler = signal.set_wakeup_fd, signal.signal
def again(function):
    def called(*arguments, **named):
        found = function(*arguments, **named)
        if more:
            more.pop()
            os.kill(os.getpid(), signal.SIGTERM)  # in between any two moves
        return found
    return called
more = []
with leaving_at_once():
    with stopping.stopping(1) as stop:
        signal.set_wakeup_fd, signal.signal = again(set_wakeup_fd), again(set_handler)
        more += range(20)
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGTERM)
        while not stop.turn():
            pass
        more.clear()
        print("saved", flush=True)
"""


def test_five_sigterms_save():
    ran = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "saved\n"), ran.stderr


def test_handlers_are_as_before_after_the_first_signal():
    before = signal.getsignal(signal.SIGINT)
    with stopping.stopping(1) as stop:
        assert signal.getsignal(signal.SIGINT) is not before
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
        while not stop.turn():  # the thread that hears is another
            threading.Event().wait(0.001)
        assert stop.cause == signal.SIGINT
    assert signal.set_wakeup_fd(-1) == -1
