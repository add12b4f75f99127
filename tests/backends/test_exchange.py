"""What processes say to each other, and that nobody waits for ever."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from trainfw import backends
from trainfw.launch.local import _free_port

SCRIPT = """
import json, sys
from trainfw import backends
from trainfw.backends import Wiring
index = int(sys.argv[1])
backends.connect(Wiring(index, 2, "localhost", "a test", int(sys.argv[2])))
found = [backends.exchange("number", 10 + index), backends.exchange("number", 20 + index)]
if index == 1:
    backends.announce("word", "first")
    backends.announce("word", "second")
found.append(backends.heard("word", 30.0))
found.append(backends.heard("silence", 0.1))
backends.exchange("done", None)
if index == 0:
    try:
        backends.exchange("alone", None, 0.5)
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
print(json.dumps(found), flush=True)
"""


def test_alone():
    assert backends.exchange("x", {"a": 1}) == [{"a": 1}]
    backends.announce("y", 1)
    assert backends.heard("y", 0.01) is None


@pytest.mark.slow
def test_two_processes():
    port = str(_free_port())
    both = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(index), port], stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in both)
    assert first[:4] == second == [[10, 11], [20, 21], "first", None]
    assert first[4].startswith("PeerError: process 1 of 2 said nothing of 'alone' within ")
