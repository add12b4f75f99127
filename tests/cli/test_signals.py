"""A signal while there is nothing to save ends the process at once, with its exit code."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# Busy outside of the interpreter, as a compiler is: no Python handler is heard.
BUSY = """
import ctypes
from trainfw.cli.signals import leaving_at_once
with leaving_at_once():
    print("busy", flush=True)
    ctypes.CDLL(None).sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_it_leaves_from_within_a_compiler(signum):
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signum)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + signum
    assert error.strip() == f"stopped by {signum.name}; nothing saved is lost: the same command goes on"
