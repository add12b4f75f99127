from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from types import FrameType
from typing import Any

from trainfw import backends
from trainfw.errors import PeerError
from trainfw.signals import heeded

_AGREE_SECONDS = 60.0
_SAVE_SECONDS = 3600.0
_SESSIONS = itertools.count()


@dataclass(frozen=True)
class Asked:
    """A stop that a script asked for."""

    reason: str
    """Name of who asked, and the reason."""
    failed: bool = False


Cause = int | Asked
"""The number of a signal, or what was asked."""


class Stop:
    """Agreement on when to stop after the first signal to any process: at the same turn in all of them.

    A turn is a program that all processes run together. The process that a signal reached announces it; each then
    says how many turns it has taken and takes no more, until all have said so; all stop at the largest of these
    numbers. So nobody waits in a collective for one that has left, and nothing is asked of the devices.
    """

    def __init__(self, processes: int):
        self.cause: Cause | None = None
        self._processes = processes
        self._lock = threading.Condition()
        self._turns = 0
        self._key = f"stop/{next(_SESSIONS)}"
        self._held: int | None = None
        self._stop_at: int | None = None
        self._disagreed: PeerError | None = None

    def meet(self, what: str, value: Any = None, timeout: float = _SAVE_SECONDS) -> list[Any]:
        """Wait for all processes to have come to `what`: one that leaves otherwise has left none in a collective.

        Returns every process's `value`.

        Raises PeerError where one has not within `timeout` seconds, or was stopped.
        """
        return backends.exchange(f"{self._key}/{what}", value, timeout)

    def turn(self) -> bool:
        """Tell whether to stop now; else this process goes on to its next turn."""
        with self._lock:
            if self._held is not None and self._stop_at is None and self._turns >= self._held:
                self._lock.wait_for(lambda: self._stop_at is not None or self._disagreed, _AGREE_SECONDS + 1)
                if self._stop_at is None:
                    raise PeerError("the processes did not agree on when to stop") from self._disagreed
            if self._stop_at is not None and self._turns >= self._stop_at:
                return True
            self._turns += 1
            return False

    def request(self, cause: Cause) -> None:
        """A signal came, to this process or to another, or a script asks for it."""
        with self._lock:
            if self.cause is not None:
                return
            self.cause = cause
            self._held = self._turns
            if self._processes == 1:
                self._stop_at = self._turns
                return
        backends.announce(self._key, _as_data(cause))
        try:
            said = backends.exchange(f"{self._key}/turns", [self._held, _as_data(cause)], _AGREE_SECONDS)
        except PeerError as error:
            said, self._disagreed = [], error  # `turn` says it
        with self._lock:
            if said:  # one cause for all; a signal, which leaves less time, before what a script asks
                self.cause = min((_from_data(cause) for _, cause in said), key=lambda one: isinstance(one, Asked))
            self._stop_at = max((turns for turns, _ in said), default=None)
            self._lock.notify_all()

    def _listen(self, ended: threading.Event) -> None:
        while not ended.is_set() and self.cause is None:
            cause = backends.heard(self._key, 1.0)
            if cause is not None and not ended.is_set():
                self.request(_from_data(cause))


def _as_data(cause: Cause) -> Any:
    return cause if isinstance(cause, int) else astuple(cause)


def _from_data(data: Any) -> Cause:
    return data if isinstance(data, int) else Asked(*data)


@contextlib.contextmanager
def stopping(processes: int) -> Iterator[Stop]:
    """A `Stop` that hears signals, also while a compiler or the device holds the main thread.

    After the first, SIGINT acts as if nobody caught it; the others, of which schedulers send several, change nothing
    until the block ends. All processes enter the block together: one that a signal stops before has left nobody in it.
    Where this is not the main thread, only other processes are heard.

    Raises PeerError where another process does not come.
    """
    stop, ended = Stop(processes), threading.Event()
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_signals_to(stop.request))
        if processes > 1:
            stop.meet("begin")
            listener = threading.Thread(target=stop._listen, args=(ended,), name="stop", daemon=True)
            listener.start()
            stack.callback(listener.join)
        stack.callback(ended.set)
        yield stop


@contextlib.contextmanager
def _signals_to(receive: Callable[[int], None]) -> Iterator[None]:
    """Calls `receive`, in a thread, with the first signal; from then on who handled SIGINT before does again."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous: dict[int, Any] = {signum: signal.getsignal(signum) for signum in heeded()}
    handlers_before_us = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def handle(_signum: int, _frame: FrameType | None) -> None:
        # One after the other, and never by way of who handled them before: another may come in between.
        for signum, handler in previous.items():
            signal.signal(signum, handler if signum == signal.SIGINT else signal.SIG_IGN)

    def read() -> None:
        received = False
        while byte := os.read(reading, 1):
            if byte[0] not in previous:
                continue
            if not received:
                received = True
                threading.Thread(target=receive, args=(byte[0],), name="stopping", daemon=True).start()
            elif byte[0] == signal.SIGINT and handlers_before_us >= 0:
                os.write(handlers_before_us, byte)  # whose it is now

    for signum in previous:
        signal.signal(signum, handle)
    thread = threading.Thread(target=read, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(handlers_before_us)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        os.close(writing)
        thread.join()
        os.close(reading)
