from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator

from trainfw.signals import heeded
from trainfw.unfinished import remove_unfinished

_LISTEN_SECONDS = 0.25
_TELL_SECONDS = 10.0
"""Seconds for the others to hear that this process leaves; each looks four times a second, but on a busy machine."""


class Leaving:
    """A process's exit at a signal. Of processes that have met (`meet`), the others leave where one does."""

    def __init__(self, then: str) -> None:
        self._then = then
        self._met = False
        self._leaves = False
        self._ended = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="leaving of others", daemon=True)

    def meet(self) -> None:
        """Connect the processes of the run: from now on each hears when another leaves."""
        self._met = True
        self._listener.start()

    def end(self) -> None:
        if self._leaves:  # whatever this thread failed at meanwhile: the one that leaves says why
            threading.Event().wait(2 * _TELL_SECONDS)
        self._ended.set()
        if self._met:
            self._listener.join()

    def leave(self, signum: int) -> None:
        self._leaves = True
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        name = signal.Signals(signum).name
        text = f"{show_cursor}\nstopped by {name}; {self._then}\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        remove_unfinished()
        if self._met:
            from trainfw import backends

            # In a thread: a coordinator that has gone, or hangs, does not answer.
            teller = threading.Thread(target=backends.announce_leaving, args=(signum, _TELL_SECONDS), daemon=True)
            teller.start()
            teller.join(_TELL_SECONDS)
        os._exit(128 + signum)

    def _listen(self) -> None:
        from trainfw import backends

        while not self._ended.wait(_LISTEN_SECONDS):
            signum = backends.left_by()
            if signum is not None:
                os.kill(os.getpid(), signum)  # whoever handles it here knows what there is to save
                return


@contextlib.contextmanager
def leaving_at_once(then: str = "nothing saved is lost: the same command goes on") -> Iterator[Leaving]:
    """Let the signals that stop a run end the process at once, with exit code 128 + n, while there is nothing to save.

    `then`, what it means to who reads it, is said.
    Also while a compiler, or half an import, holds the main thread, where no Python handler would be heard. The
    training loop takes the signals over while it has something to save, and hands them back when that is done.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {signum: signal.getsignal(signum) for signum in heeded()}
    leaving = Leaving(then)

    def read() -> None:
        while byte := os.read(reading, 1):
            if byte[0] in before:
                leaving.leave(byte[0])

    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or 2)  # `kill -USR1`: where are we?
    faulthandler.enable(file=sys.__stderr__ or 2)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for signum in before:
        signal.signal(signum, lambda *_: None)  # a handler, or nothing is written to the pipe
    thread = threading.Thread(target=read, name="leaving", daemon=True)
    thread.start()
    try:
        yield leaving
    finally:
        leaving.end()
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(previous)
        os.close(writing)
        thread.join()
        os.close(reading)
