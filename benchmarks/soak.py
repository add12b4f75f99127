"""Train for a while with a save every few steps: python benchmarks/soak.py --minutes 20

Prints each minute how many saves were made, the process's memory (without pages of files) and its open files. After a
warm-up (a quarter of the time, in which memory that glibc keeps is touched for the first time) memory may grow by less
than 5 MB per 1,000 saves, by a straight line through its lowest values, and at rest no more than two more files may be
open. In the end the run is stopped by SIGTERM, and has to leave as one that was. Exits 1 where it grows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import add_arguments, at_most, finish, say, table

EVERY = 3
"""Steps from save to save."""
MOST_MB, MOST_FILES = 5.0, 2
RECIPE: dict[str, Any] = {
    "name": "soak",
    "model": {"preset": "tiny", "vocab_size": 258},
    "data": {"sequence_length": 32, "validation_fraction": 0.2, "tokenizer": {"name": "bytes"}},
    "train": {"steps": 10**7, "global_batch_size": 8, "log_every": 1, "validate_every": 1000, "validation_batches": 2},
    "optimizer": {"schedule": "constant"},
    "checkpoint": {"every": EVERY, "keep_last": 2},
}
SAMPLE_SECONDS = 0.25
WINDOWS = 20
"""Parts of the time after the warm-up, of each of which the lowest memory counts."""


@dataclass(frozen=True)
class Sample:
    seconds: float
    saves: int
    megabytes: float
    files: int


def watch(process: subprocess.Popen[bytes], run: Path, seconds: float) -> Iterator[Sample]:
    """Samples of a run from its first save on."""
    started = None
    while started is None or time.monotonic() - started < seconds:
        if process.poll() is not None:
            return
        saves = newest(run) // EVERY
        if saves and started is None:
            started = time.monotonic()
        if started is not None:
            yield Sample(time.monotonic() - started, saves, resident_mb(process.pid), open_files(process.pid))
        time.sleep(SAMPLE_SECONDS)


def newest(run: Path) -> int:
    try:
        return max((int(name) for name in os.listdir(run / "checkpoints") if name.isdecimal()), default=0)
    except FileNotFoundError:
        return 0


def resident_mb(pid: int) -> float:
    """Memory of its own: pages of files (libraries, mostly) come and go as the kernel likes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def growth(samples: Sequence[Sample]) -> tuple[float, int]:
    """(MB per 1,000 saves, more files open at the same time) over the samples."""
    span = samples[-1].seconds - samples[0].seconds
    windows: dict[int, list[Sample]] = {}
    for sample in samples:
        windows.setdefault(int((sample.seconds - samples[0].seconds) / (span + 1e-9) * WINDOWS), []).append(sample)
    lowest = [min(window, key=lambda sample: sample.megabytes) for window in windows.values()]
    line = statistics.linear_regression([s.saves / 1000 for s in lowest], [s.megabytes for s in lowest])
    # At rest between saves: while one goes on, how many are open is chance.
    rest = [min(sample.files for sample in window) for window in windows.values()]
    return line.slope, int(statistics.median_high(rest[-5:]) - statistics.median_low(rest[:5]))


def start(directory: Path) -> subprocess.Popen[bytes]:
    (directory / "text").mkdir()
    for number in range(30):
        words = " ".join(f"word{number * i % 7} = {i};" for i in range(20))
        (directory / "text" / f"{number}.txt").write_text(f"document {number}: {words}\n")
    data = RECIPE["data"] | {"source": [str(directory / "text" / "*.txt")]}
    (directory / "recipe.yaml").write_text(json.dumps(RECIPE | {"data": data}))
    environ = os.environ | {
        "XDG_CACHE_HOME": str(directory / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    words = ["trainfw", "train", str(directory / "recipe.yaml"), "--devices", "1", "--run-dir", str(directory / "run")]
    with (directory / "log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", *words], stdout=log, stderr=log, env=environ, cwd=directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    add_arguments(parser)
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    process = start(directory)
    samples: list[Sample] = []
    rows: list[tuple[int, int, float, int]] = []
    try:
        for sample in watch(process, directory / "run", 60 * arguments.minutes):
            samples.append(sample)
            if sample.seconds >= 60 * (len(rows) + 1):
                minute = len(rows) + 1
                rows.append((minute, sample.saves, sample.megabytes, sample.files))
                say(f"minute {minute}: {sample.saves:,} saves, {sample.megabytes:.0f} MB, {sample.files} open files")
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
    if code != 128 + signal.SIGTERM:
        sys.exit(f"the run left with exit code {code}; its log is in {directory / 'log'}")
    warm_up = 15 * arguments.minutes
    megabytes, files = growth([sample for sample in samples if sample.seconds >= warm_up])
    checks = [
        at_most("MB of memory per 1,000 saves", megabytes, MOST_MB),
        at_most("more open files at the end", files, MOST_FILES),
    ]
    tables = [table("A run that saves every three steps", ["minute", "saves", "MB", "open files"], rows)]
    shutil.rmtree(directory)
    return finish("soak", tables, checks, arguments)


if __name__ == "__main__":
    sys.exit(main())
