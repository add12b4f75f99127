import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.data.test_pretokens import tokenizer_of
from trainfw.data import encoding_processes
from trainfw.data.encoding import PieceEncoder
from trainfw.data.encoding_processes import encode_all
from trainfw.errors import RunError

BATCHES = [
    [f"number {i} of words, it's {i * i}\n" * 20 for i in range(start, start + 10)] for start in range(0, 300, 10)
]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(encoding_processes, "ALONE_BYTES", 0)


def test_processes_give_the_same_in_order():
    encoder = PieceEncoder(tokenizer_of("GPT-4, Llama 3"))
    alone = [encoder.encode(batch) for batch in BATCHES]
    together = list(encode_all(encoder, BATCHES, processes=2))
    assert [ids.tolist() for ids, _ in together] == [ids.tolist() for ids, _ in alone]
    assert [counts.tolist() for _, counts in together] == [counts.tolist() for _, counts in alone]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encoding")]


def test_a_process_that_ends_is_said(monkeypatch):
    started = []
    start = encoding_processes.start_child
    monkeypatch.setattr(encoding_processes, "start_child", lambda *a: started.append(found := start(*a)) or found)
    encoder = PieceEncoder(tokenizer_of("GPT-2"))
    with contextlib.closing(encode_all(encoder, BATCHES * 5, processes=2)) as results:
        next(results)
        for process, _ in started:
            process.kill()
        with pytest.raises(RunError, match=r"a process that tokenises has ended \(exit code -9\)"):
            list(results)
    assert all(process.poll() is not None for process, _ in started)


def test_errors_come_back():
    encoder = PieceEncoder(tokenizer_of("GPT-2"))
    with pytest.raises(RunError, match="TypeError"):
        list(encode_all(encoder, [["text"], [3]], processes=2))  # type: ignore[list-item]


PARENT = """
import itertools, os, sys
from trainfw.data import byte_tokenizer, encoding_processes
from trainfw.data.encoding import PieceEncoder
from tests.data.test_pretokens import tokenizer_of
started, start = [], encoding_processes.start_child
encoding_processes.start_child = lambda *a: started.append(found := start(*a)) or found
encoding_processes.ALONE_BYTES = 0
results = encoding_processes.encode_all(PieceEncoder(tokenizer_of("GPT-2")), itertools.repeat(["words " * 9]), 2)
next(results)
print(*(process.pid for process, _ in started), flush=True)
assert not {"jax", "flax"} & {*sys.modules}
for _ in results:
    pass
"""


def _runs(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="asks Linux's /proc")
def test_processes_end_with_one_that_is_killed():
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(word) for word in parent.stdout.readline().split()]
    assert len(children) == 2
    assert all(map(_runs, children))
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 20
    while any(map(_runs, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, children))
