"""Stop runs at random moments, start them again, and compare them with the run that was never stopped.

    python benchmarks/chaos.py --runs 100 --terms 30 --seed 0
    python benchmarks/chaos.py --runs 40 --terms 60 --processes 2 --load 2 --seed 3
    python benchmarks/chaos.py --recipe stages --runs 12 --terms 0

`--runs` are killed with SIGKILL, `--terms` get SIGTERM, and must leave within `--grace` seconds, with exit code 143, a
checkpoint of the last step that was logged, if any was. Of two processes one or both are stopped, or, by SIGTERM, the
launcher; every third run has two, or each has `--processes`. Each is then started again. A run is lost when it does not
go on, when a loss differs in one bit from the uninterrupted run's, or when a step is missing. Exits 1 on any loss. The
recipe is tiny and saves every third step.

`--recipe stages` is a mixture of two sources in three stages, of other weights, rows and batches. Each of its runs goes
on with another number of processes (1, 2 or 4) than it had: then every row that is read must be, bit for bit, the one
that the uninterrupted run of one process reads at that place, and the losses are the same but for rounding.

The moments are spread evenly over the phases of a run (`PHASES`), as long as these were in the uninterrupted one; that,
like all others, runs beside `--load` processes that are busy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

STEPS = 48
PHASES = ("starting", "connecting", "compiling", "stepping", "saving", "ending")
"""Before process 0 listens, before the first line of output, before the first step, ... and after the last one.

A moment of `saving` is one of `stepping`, put off until a save is being written.
"""
POLL_SECONDS = 0.02
RECIPE = """
name: chaos
model: {preset: tiny, vocab_size: 258}
data: {source: [TEXT], sequence_length: 32, validation_fraction: 0.2, tokenizer: {name: bytes}}
train: {steps: 48, global_batch_size: 8, log_every: 1, validation_batches: 2, validate_every: 16}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 2}
checkpoint: {every: 3}
"""


STAGES = """
name: chaos
model: {preset: tiny, vocab_size: 258}
data:
  mixture:
    words: {source: [TEXT], weight: 3}
    code: {source: [CODE], weight: 1}
  sequence_length: 32
  validation_fraction: 0.2
  tokenizer: {name: bytes}
train: {steps: 48, global_batch_size: 8, log_every: 1, validation_batches: 2, validate_every: 16}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 2}
checkpoint: {every: 3}
stages:
- {until: 16}
- {until: 32, mixture: {words: {from: 3, to: 1}, code: 1}, data: {sequence_length: 64}}
- {mixture: {code: 1, words: 0.21}, train: {global_batch_size: 4}, optimizer: {schedule: linear, final_fraction: 0}}
"""
# `trainfw`, but each row that is trained on is written down with its place in the run's order.
WATCHED = """
import hashlib, json, os, sys
from trainfw import backends
from trainfw.cli import main

connect = backends.connect

def connect_and_watch(*arguments):
    connect(*arguments)  # before anything touches a device
    from trainfw.data.pipeline import GrainBatches

    take = GrainBatches._take
    GrainBatches._take = lambda self: watched(self, take)

def watched(self, take):
    first, batch = self._next_row, take(self)
    share = len(batch["tokens"])
    with open(os.environ["ROWS"] + str(os.getpid()), "a") as file:
        for i in range(share):
            digest = hashlib.blake2b(b"".join(batch[name][i].tobytes() for name in sorted(batch)), digest_size=8)
            print(json.dumps([first + self._share.start * share + i, digest.hexdigest()]), file=file)
    return batch

backends.connect = connect_and_watch
main()
"""
LAUNCH = """
import sys
from pathlib import Path
from trainfw.launch import launch_local

sys.exit(launch_local(sys.argv[3:], int(sys.argv[1]), Path(sys.argv[2])))
"""


@dataclass
class Chaos:
    directory: Path
    rng: random.Random
    grace: float
    stages: bool = False
    straight: dict[int, dict[int, float]] = field(default_factory=dict)
    """Losses of the uninterrupted run, by number of processes."""
    phases: dict[int, dict[str, tuple[float, float]]] = field(default_factory=dict)
    """Beginnings and ends of that run's phases, in seconds."""
    lost: int = 0

    def run_straight(self, processes: int) -> None:
        run = self.directory / f"straight-{processes}"
        for _ in range(2):  # the first fills the caches
            shutil.rmtree(run, ignore_errors=True)
            self.phases[processes] = self.watch(run, processes)
        self.straight[processes] = losses(run)
        spent = ", ".join(f"{phase} {end - begin:.1f} s" for phase, (begin, end) in self.phases[processes].items())
        print(f"uninterrupted, {name(processes)}: {len(losses(run))} steps; {spent}", flush=True)

    def watch(self, run: Path, processes: int) -> dict[str, tuple[float, float]]:
        """Run to the end, and note when the phases began and ended."""
        began, seen = time.monotonic(), {"starting": 0.0}
        with self.log.open("w") as log:
            launched = subprocess.Popen(self.command(run, processes), stdout=log, stderr=log)
        output = run / "logs" / "rank-0.log" if processes > 1 else self.log
        while launched.poll() is None:
            done = len(losses(run))
            signs = {
                "connecting": processes > 1 and listening(children(launched.pid)[:1]),
                "compiling": output.exists() and b"\n" in output.read_bytes(),
                "stepping": done > 0,
                "ending": done == STEPS,
            }
            for phase in (phase for phase, sign in signs.items() if sign):
                seen.setdefault(phase, time.monotonic() - began)
            time.sleep(POLL_SECONDS)
        if launched.returncode:
            sys.exit(f"the uninterrupted run ended with exit code {launched.returncode}:\n{self.log.read_text()}")
        begins = [*(seen[phase] for phase in PHASES if phase in seen), time.monotonic() - began]
        found = dict(zip((phase for phase in PHASES if phase in seen), itertools.pairwise(begins)))
        found["saving"] = found["stepping"]
        return found

    def stop_and_go_on(self, number: int, processes: int, signum: signal.Signals) -> str:
        """Where the run was when it was stopped."""
        run = self.directory / f"{signum.name}-{number}"
        phases = list(self.phases[processes])
        phase = phases[number % len(phases)]
        moment = self.rng.uniform(*self.phases[processes][phase])
        where, problem = self.stop(run, processes, moment, signum, phase == "saving")
        if not problem:
            after = self.rng.choice([n for n in (1, 2, 4) if n != processes]) if self.stages else processes
            where += f", then {name(after)}" if self.stages else ""
            code = self.train(run, after)
            found, expected = losses(run), self.straight[processes]
            differ = self.differing(run, found, expected)
            if code or differ or found.keys() != expected.keys():
                problem = f"exit code {code}; losses missing or different at {differ[:10]}\n"
                problem += self.log.read_text()[-3000:]
        said = f"LOST ({problem})\n  kept in {run}" if problem else "went on bit for bit"
        print(f"{signum.name} {number}, {name(processes)}, after {moment:.2f} s, {where}: {said}", flush=True)
        self.lost += bool(problem)
        if not problem:
            shutil.rmtree(run)
        return where

    def differing(self, run: Path, found: dict[int, float], expected: dict[int, float]) -> list[int]:
        """Steps of other losses than expected, or places of other rows than one process reads."""
        if not self.stages:
            return [step for step in expected if found.get(step) != expected[step]]
        straight, mine = rows(self.directory / "straight-1.rows"), rows(run.with_suffix(".rows"))
        last = max(straight)
        return [place for place in range(last + 1) if mine.get(place) != straight[place]] + [
            step for step in expected if abs(found.get(step, 0.0) - expected[step]) > 1e-3 * expected[step]
        ]

    def stop(self, run: Path, processes: int, moment: float, signum: signal.Signals, in_save: bool) -> tuple[str, str]:
        """(where it was, what was wrong with how it left)"""
        with self.log.open("w") as log:
            launched = subprocess.Popen(self.command(run, processes), stdout=log, stderr=log, start_new_session=True)
        try:
            launched.wait(moment)
            return "at the end", f"exit code {launched.returncode}" if launched.returncode else ""
        except subprocess.TimeoutExpired:
            pass
        late = time.monotonic() + 5.0
        while in_save and not saving(run) and launched.poll() is None and time.monotonic() < late:
            time.sleep(POLL_SECONDS / 10)
        where = "while saving" if saving(run) else ""
        where = where or ("between saves" if losses(run) else "before the first step")
        ranks = children(launched.pid) if processes > 1 else []
        choices = [ranks, ranks[:1], ranks[1:], [launched.pid] * (processes == 1 or signum == signal.SIGTERM)]
        victims = self.rng.choice([choice for choice in choices if choice] or [[launched.pid]])
        start = time.monotonic()
        for victim in victims:
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
        trainfw, recipe = [sys.executable, "-P", "-m", "trainfw"], str(self.directory / "recipe.yaml")
        if self.stages:
            os.environ["ROWS"] = f"{run.with_suffix('.rows')}/"
            run.with_suffix(".rows").mkdir(exist_ok=True)
            watched = [sys.executable, str(self.directory / "watched.py"), "train", recipe]
            watched += ["--devices", "1", "--run-dir", str(run), f"parallel.data={processes}"]
            if processes == 1:
                return watched
            return [sys.executable, str(self.directory / "launch.py"), str(processes), str(run / "logs"), *watched]
        if processes == 1:
            return [*trainfw, "train", recipe, "--devices", "1", "--run-dir", str(run)]
        return [*trainfw, "launch", "local", recipe, "--processes", "2", "parallel.data=2", "--run-dir", str(run)]

    @property
    def log(self) -> Path:
        return self.directory / "last.log"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="killed")
    parser.add_argument("--terms", type=int, default=30, help="terminated")
    parser.add_argument("--processes", type=int, choices=(1, 2), help="of each run (default: 1, 1, 2, 1, ...)")
    parser.add_argument("--recipe", choices=("plain", "stages"), default="plain")
    parser.add_argument("--load", type=int, default=0, metavar="N", help="busy neighbours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grace", type=float, default=30.0, help="seconds")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    # Time in the loop rather than in the compiler.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XDG_CACHE_HOME"] = str(directory / "cache")
    stages = arguments.recipe == "stages"
    write_recipe(directory, STAGES if stages else RECIPE)
    chaos = Chaos(directory, random.Random(arguments.seed), arguments.grace, stages)
    todo = [(number, signal.SIGKILL) for number in range(arguments.runs)]
    todo += [(number, signal.SIGTERM) for number in range(arguments.terms)]
    three = (1, 2, 4) if stages else (1, 1, 2)
    count = [arguments.processes or three[number % 3] for number, _ in todo]
    with busy(arguments.load):
        for processes in sorted(set(count)):
            chaos.run_straight(processes)
        where = Counter(chaos.stop_and_go_on(n, processes, signum) for (n, signum), processes in zip(todo, count))
    print(f"stopped {', '.join(f'{place}: {count}' for place, count in sorted(where.items()))}")
    print(f"{len(todo) - chaos.lost} of {len(todo)} runs went on bit for bit")
    if not chaos.lost:
        shutil.rmtree(directory)
    return 1 if chaos.lost else 0


@contextmanager
def busy(neighbours: int) -> Iterator[None]:
    """Beside so many processes that compute; they end with us, however we end."""
    code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))"
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(neighbours)]
    try:
        yield
    finally:
        for neighbour in started:
            neighbour.kill()
            neighbour.wait()


def saving(run: Path) -> bool:
    return any("-tmp" in path.name for path in (run / "checkpoints").glob("*"))


def listening(ranks: list[int]) -> bool:
    """Tell whether process 0 waits for the others where it was told to."""
    try:
        environment = Path(f"/proc/{ranks[0]}/environ").read_text() if ranks else ""
        at = re.search(r"TRAINFW_COORDINATOR=[^\0]*:(\d+)", environment)
        table = Path("/proc/net/tcp6").read_text() + Path("/proc/net/tcp").read_text()
    except OSError:
        return False
    return at is not None and re.search(rf":{int(at[1]):04X} [0-9A-F]+:0000 0A ", table) is not None


def left_well(run: Path, code: int) -> str:
    """What is wrong with how a run left after SIGTERM."""
    done = max(losses(run), default=0)
    saved = max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal()), default=0)
    if code == 0 and done == STEPS:
        return ""  # it was at its end
    if code not in (128 + signal.SIGTERM, -signal.SIGTERM):  # the latter before Python runs; the same to a shell
        return f"exit code {code}, not {128 + signal.SIGTERM}"
    return f"step {done} was done, and {saved} is saved" if saved < done - 1 else ""


def rows(directory: Path) -> dict[int, str]:
    """Digest of every row that was read, by its place; a row that was read twice must be the same."""
    found: dict[int, str] = {}
    for file in directory.iterdir():
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else its process was killed as it wrote
                place, digest = json.loads(line)
                if found.setdefault(place, digest) != digest:
                    found[place] = "read twice, as two rows"
    return found


def write_recipe(directory: Path, recipe: str) -> None:
    for file, code in (("watched.py", WATCHED), ("launch.py", LAUNCH)):
        (directory / file).write_text(code)
    (directory / "code").mkdir()
    for number in range(20):
        lines = "".join(f"def f{i}(x):\n    return x * {number * i % 11}\n" for i in range(12))
        (directory / "code" / f"{number}.py").write_text(lines)
    (directory / "text").mkdir()
    for number in range(30):
        words = " ".join(f"word{number * i % 7} = {i};" for i in range(20))
        (directory / "text" / f"{number}.txt").write_text(f"document {number}: {words}\n")
    recipe = recipe.replace("TEXT", str(directory / "text" / "*.txt")).replace("CODE", str(directory / "code"))
    (directory / "recipe.yaml").write_text(recipe)


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
