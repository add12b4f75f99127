"""What processes say to each other, and that nobody waits for ever."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from trainfw import UserError, backends
from trainfw.backends import Wiring
from trainfw.backends.distributed import check_port
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


def test_two_processes():
    port = str(_free_port())
    both = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(index), port], stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in both)
    assert first[:4] == second == [[10, 11], [20, 21], "first", None]
    assert first[4].startswith("PeerError: process 1 of 2 said nothing of 'alone' within ")


CONNECT = """
import sys
from trainfw import backends
from trainfw.backends import Wiring
index, port, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
backends.connect(Wiring(index, 2, "localhost", "a test", port), seconds)
"""


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (0, "not all others came to localhost:{port}"),
        (1, "nobody answered at localhost:{port}, where process 0 is to be (Connection refused),"),
    ],
)
def test_who_is_missing_is_said(index, why):
    port = _free_port()
    command = [sys.executable, "-c", CONNECT, str(index), str(port), "2"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = f"failed: process {index} of 2 (a test): {why.format(port=port)} within 2 s\n"
    assert (ran.returncode, ran.stderr) == (75, said)


def test_a_taken_port_is_named():
    wiring = Wiring(0, 2, "localhost", "a test", 0)
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"localhost:{port}, where the 2 .* is taken .*TRAINFW_COORDINATOR=localh"):
            backends.connect(replace(wiring, coordinator_port=port))
    check_port(wiring, port)
