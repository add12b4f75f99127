"""Kill runs with SIGKILL at random moments, start them again, and compare them with the run that was never killed.

    python benchmarks/chaos.py --runs 100 --seed 0

Every third run has two processes, of which one is killed, or both. A run is lost when it does not go on, when a loss
differs in one bit from the uninterrupted run's, or when a step is missing. Exits 1 on any loss. The recipe is tiny and
saves every third step, so that many of the moments lie in a save.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

RECIPE = """
name: chaos
model: {preset: tiny, vocab_size: 258}
data: {source: [TEXT], sequence_length: 32, validation_fraction: 0.2, tokenizer: {name: bytes}}
train: {steps: 120, global_batch_size: 8, log_every: 1, validation_batches: 2, validate_every: 40}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 2}
checkpoint: {every: 3}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XDG_CACHE_HOME"] = str(directory / "cache")
    recipe = write_recipe(directory)
    straight, seconds = {}, {}
    for processes in (1, 2):
        run = directory / f"straight-{processes}"
        train(recipe, run, processes)  # fills the caches
        shutil.rmtree(run)
        start = time.monotonic()
        if train(recipe, run, processes):
            print((directory / "last.log").read_text())
            return 1
        seconds[processes] = time.monotonic() - start
        straight[processes] = losses(run)
        print(f"{processes} process{'es' * (processes > 1)}: {len(straight[processes])} steps in {seconds[processes]:.1f} s")
    lost, at = 0, Counter[str]()
    for number in range(arguments.runs):
        processes = 2 if number % 3 == 2 else 1
        run = directory / f"run-{number}"
        moment = rng.uniform(0, seconds[processes] * 1.05)
        where = kill(recipe, run, processes, moment, rng)
        at[where] += 1
        code = train(recipe, run, processes)
        found = losses(run)
        ok = code == 0 and found == straight[processes]
        lost += not ok
        print(f"run {number}: killed after {moment:.2f} s, {where}: {'whole' if ok else f'LOST (exit code {code})'}")
        if not ok:
            print((directory / "last.log").read_text()[-2000:])
            different = [step for step, loss in straight[processes].items() if found.get(step) != loss]
            print(f"  kept in {run}; losses that are missing or differ: {different[:10]}")
        else:
            shutil.rmtree(run)
    print(f"killed {', '.join(f'{where}: {count}' for where, count in sorted(at.items()))}")
    print(f"{arguments.runs - lost} of {arguments.runs} runs went on bit for bit")
    return 1 if lost else 0


def write_recipe(directory: Path) -> Path:
    text = directory / "text"
    text.mkdir()
    for number in range(30):
        words = " ".join(f"word{number * i % 7} = {i};" for i in range(20))
        (text / f"{number}.txt").write_text(f"document {number}: {words}\n")
    path = directory / "recipe.yaml"
    path.write_text(RECIPE.replace("TEXT", str(text / "*.txt")))
    return path


def command(recipe: Path, run: Path, processes: int) -> list[str]:
    train = [sys.executable, "-m", "trainfw"]
    if processes == 1:
        return [*train, "train", str(recipe), "--devices", "1", "--run-dir", str(run)]
    return [*train, "launch", "local", str(recipe), "--processes", "2", "parallel.data=2", "--run-dir", str(run)]


def train(recipe: Path, run: Path, processes: int) -> int:
    with (recipe.parent / "last.log").open("w") as log:
        return subprocess.run(command(recipe, run, processes), stdout=log, stderr=log).returncode


def kill(recipe: Path, run: Path, processes: int, moment: float, rng: random.Random) -> str:
    """Kill a run `moment` seconds after its start; where it was then."""
    launched = subprocess.Popen(
        command(recipe, run, processes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        launched.wait(moment)
        return "after the end"
    except subprocess.TimeoutExpired:
        pass
    saving = any(".orbax-checkpoint-tmp" in path.name for path in (run / "checkpoints").glob("*"))
    steps = len(losses(run))
    victims = [launched.pid] if processes == 1 else children(launched.pid)
    if processes == 2 and rng.random() < 0.5:
        victims = [rng.choice(victims)] if victims else []
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
    launched.wait(60)  # a launcher ends the other
    return "while saving" if saving else "between saves" if steps else "before the first step"


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(text) for text in found.read_text().split()] if found.exists() else []


def losses(run: Path) -> dict[int, float]:
    file = run / "metrics.jsonl"
    found = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "loss" in row:
            found[row["step"]] = row["loss"]
    return found


if __name__ == "__main__":
    sys.exit(main())
