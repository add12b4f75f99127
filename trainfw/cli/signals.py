from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator

from trainfw.unfinished import remove_unfinished


@contextlib.contextmanager
def leaving_at_once(then: str = "nothing saved is lost: the same command goes on") -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end the process at once, with exit code 128 + n, while there is nothing to save.

    Also while a compiler, or half an import, holds the main thread, where no Python handler would be heard. The
    training loop takes the signals over while it has something to save, and hands them back at the first.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signals.append(signal.SIGHUP)
    before = {signum: signal.getsignal(signum) for signum in signals}

    def read() -> None:
        while byte := os.read(reading, 1):
            if byte[0] in before:
                show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
                name = signal.Signals(byte[0]).name
                text = f"{show_cursor}\nstopped by {name}; {then}\n"
                with contextlib.suppress(OSError):
                    os.write(2, text.encode())
                remove_unfinished()
                os._exit(128 + byte[0])

    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or 2)  # `kill -USR1`: where are we?
    faulthandler.enable(file=sys.__stderr__ or 2)
    for signum in signals:
        signal.signal(signum, lambda *_: None)  # a handler, or nothing is written to the pipe
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=read, name="leaving", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(writing)
        thread.join()
        os.close(reading)
