"""A signal while there is nothing to save ends the process at once, with its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from trainfw.launch.local import _free_port
from trainfw.signals import STOPS

# Busy outside of the interpreter, as a compiler is: no Python handler is heard.
BUSY = """
import ctypes
from trainfw.cli.signals import leaving_at_once
with leaving_at_once():
    print("busy", flush=True)
    ctypes.CDLL(None).sleep(60)
"""


@pytest.mark.usefixtures("sighup_is_heard")
@pytest.mark.parametrize("signum", STOPS, ids=lambda signum: signum.name)
def test_it_leaves_from_within_a_compiler(signum):
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signum)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + signum
    assert error.strip() == f"stopped by {signum.name}; nothing saved is lost: the same command goes on"


# What Python imports at its start when it finds it: the signal comes when one module or another is asked for.
AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("module", ["lazy_loader", "trainfw.cli", "typer", "yaml"])
def test_sigint_while_the_command_is_imported_shows_no_traceback(module, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(AT_IMPORT.format(module=module))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    command = [sys.executable, "-m", "trainfw", "recipe", "show", "quickstart"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "\ninterrupted\n")


TWO = """
import os, sys, threading
from trainfw import backends
from trainfw.backends import Wiring
from trainfw.cli.signals import leaving_at_once
from trainfw.errors import TRY_AGAIN, PeerError
from trainfw.training.stopping import stopping
index, port, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with leaving_at_once() as leaving:
    backends.connect(Wiring(index, 2, "localhost", "a test", port))
    leaving.meet()
    print("met", flush=True)
    if index and where == "reads":
        threading.Event().wait()  # for ever
    elif index and where == "comes to steps":
        try:
            with stopping(2):
                os._exit(1)  # it went on without the other
        except PeerError as error:
            assert str(error) == "another process was stopped by SIGTERM"
            os._exit(TRY_AGAIN)  # as the command does
    threading.Event().wait()
"""


@pytest.mark.parametrize(("where", "ends"), [("reads", 143), ("comes to steps", 75)])
def test_where_one_is_stopped_before_its_first_step_the_other_leaves(where, ends):
    port = str(_free_port())
    both = [
        subprocess.Popen([sys.executable, "-c", TWO, str(index), port, where], stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    assert [process.stdout.readline() for process in both] == ["met\n"] * 2
    both[0].send_signal(signal.SIGTERM)
    assert [process.wait(20) for process in both] == [143, ends]
