"""Stop runs at random moments, start them again, and compare them with the run that was never stopped.

    python benchmarks/chaos.py --runs 100 --terms 30 --seed 0

`--runs` are killed with SIGKILL: every third has two processes, of which one or both are killed. `--terms` get SIGTERM,
and must leave within `--grace` seconds, with exit code 143, a checkpoint of the last step that was logged, if any was.
Each is then started again. A run is lost when it does not go on, when a loss differs in one bit from the uninterrupted
run's, or when a step is missing. Exits 1 on any loss. The recipe is tiny and saves every third step, so that many of
the moments lie in a save.
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
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.reporting import positive

STEPS = 48
RECIPE = """
name: chaos
model: {preset: tiny, vocab_size: 258}
data: {source: [TEXT], sequence_length: 32, validation_fraction: 0.2, tokenizer: {name: bytes}}
train: {steps: 48, global_batch_size: 8, log_every: 1, validation_batches: 2, validate_every: 16}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 2}
checkpoint: {every: 3}
"""


@dataclass
class Chaos:
    directory: Path
    rng: random.Random
    grace: float
    straight: dict[int, dict[int, float]] = field(default_factory=dict)
    """Losses of the uninterrupted run, by number of processes."""
    seconds: dict[int, float] = field(default_factory=dict)
    """How long it took."""
    lost: int = 0

    def run_straight(self, processes: int) -> None:
        run = self.directory / f"straight-{processes}"
        for _ in range(2):  # the first fills the caches
            shutil.rmtree(run, ignore_errors=True)
            start = time.monotonic()
            if code := self.train(run, processes):
                sys.exit(f"the uninterrupted run ended with exit code {code}:\n{self.log.read_text()}")
            self.seconds[processes] = time.monotonic() - start
        self.straight[processes] = losses(run)
        print(f"uninterrupted, {name(processes)}: {len(losses(run))} steps in {self.seconds[processes]:.1f} s")

    def stop_and_go_on(self, number: int, processes: int, signum: signal.Signals) -> str:
        """Where the run was when it was stopped."""
        run = self.directory / f"{signum.name}-{number}"
        moment = self.rng.uniform(0, self.seconds[processes] * 1.05)
        where, problem = self.stop(run, processes, moment, signum)
        if not problem:
            code = self.train(run, processes)
            found, expected = losses(run), self.straight[processes]
            differ = [step for step in expected if found.get(step) != expected[step]]
            if code or found != expected:
                problem = f"exit code {code}; losses missing or different at {differ[:10]}\n"
                problem += self.log.read_text()[-3000:]
        said = f"LOST ({problem})\n  kept in {run}" if problem else "went on bit for bit"
        print(f"{signum.name} {number}, {name(processes)}, after {moment:.2f} s, {where}: {said}", flush=True)
        self.lost += bool(problem)
        if not problem:
            shutil.rmtree(run)
        return where

    def stop(self, run: Path, processes: int, moment: float, signum: signal.Signals) -> tuple[str, str]:
        """(where it was, what was wrong with how it left)"""
        with self.log.open("w") as log:
            launched = subprocess.Popen(self.command(run, processes), stdout=log, stderr=log, start_new_session=True)
        try:
            launched.wait(moment)
            return "at the end", f"exit code {launched.returncode}" if launched.returncode else ""
        except subprocess.TimeoutExpired:
            pass
        where = "while saving" if any("-tmp" in path.name for path in (run / "checkpoints").glob("*")) else ""
        where = where or ("between saves" if losses(run) else "before the first step")
        victims = [launched.pid] if processes == 1 else children(launched.pid)
        if processes == 2 and victims and self.rng.random() < 0.5:
            victims = [self.rng.choice(victims)]
        start = time.monotonic()
        for victim in victims or [launched.pid]:
            try:
                os.kill(victim, signum)
            except ProcessLookupError:
                continue
        try:
            launched.wait(self.grace if signum == signal.SIGTERM else 120)
        except subprocess.TimeoutExpired:
            os.killpg(launched.pid, signal.SIGKILL)
            return where, f"it did not leave within {time.monotonic() - start:.0f} s\n{self.log.read_text()[-3000:]}"
        if signum == signal.SIGTERM:
            problem = left_well(run, launched.returncode)
            return where, f"{problem}\n{self.log.read_text()[-3000:]}" if problem else ""
        return where, ""

    def train(self, run: Path, processes: int) -> int:
        with self.log.open("w") as log:
            return subprocess.run(self.command(run, processes), stdout=log, stderr=log).returncode

    def command(self, run: Path, processes: int) -> list[str]:
        trainfw, recipe = [sys.executable, "-m", "trainfw"], str(self.directory / "recipe.yaml")
        if processes == 1:
            return [*trainfw, "train", recipe, "--devices", "1", "--run-dir", str(run)]
        return [*trainfw, "launch", "local", recipe, "--processes", "2", "parallel.data=2", "--run-dir", str(run)]

    @property
    def log(self) -> Path:
        return self.directory / "last.log"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=positive, default=100, help="killed")
    parser.add_argument("--terms", type=positive, default=30, help="terminated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grace", type=float, default=30.0, help="seconds")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    # Time in the loop rather than in the compiler.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XDG_CACHE_HOME"] = str(directory / "cache")
    write_recipe(directory)
    chaos = Chaos(directory, random.Random(arguments.seed), arguments.grace)
    todo = [(number, signal.SIGKILL) for number in range(arguments.runs)]
    todo += [(number, signal.SIGTERM) for number in range(arguments.terms)]
    for processes in {2 if number % 3 == 2 else 1 for number, _ in todo}:
        chaos.run_straight(processes)
    where = Counter(chaos.stop_and_go_on(number, 2 if number % 3 == 2 else 1, signum) for number, signum in todo)
    print(f"stopped {', '.join(f'{place}: {count}' for place, count in sorted(where.items()))}")
    print(f"{len(todo) - chaos.lost} of {len(todo)} runs went on bit for bit")
    if not chaos.lost:
        shutil.rmtree(directory)
    return 1 if chaos.lost else 0


def left_well(run: Path, code: int) -> str:
    """What is wrong with how a run left after SIGTERM."""
    done = max(losses(run), default=0)
    saved = max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal()), default=0)
    if code == 0 and done == STEPS:
        return ""  # it was at its end
    if code not in (128 + signal.SIGTERM, -signal.SIGTERM):  # the latter before Python runs; the same to a shell
        return f"exit code {code}, not {128 + signal.SIGTERM}"
    return f"step {done} was done, and {saved} is saved" if saved < done - 1 else ""


def write_recipe(directory: Path) -> None:
    (directory / "text").mkdir()
    for number in range(30):
        words = " ".join(f"word{number * i % 7} = {i};" for i in range(20))
        (directory / "text" / f"{number}.txt").write_text(f"document {number}: {words}\n")
    (directory / "recipe.yaml").write_text(RECIPE.replace("TEXT", str(directory / "text" / "*.txt")))


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(text) for text in found.read_text().split()] if found.exists() else []


def losses(run: Path) -> dict[int, float]:
    file = run / "metrics.jsonl"
    found = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # torn
            continue
        if "loss" in row:
            found[row["step"]] = row["loss"]
    return found


def name(processes: int) -> str:
    return f"{processes} process{'es' * (processes > 1)}"


if __name__ == "__main__":
    sys.exit(main())
