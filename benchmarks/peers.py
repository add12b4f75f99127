"""trainfw beside its peers: the same training work on this machine's CPU, taking turns in one run.

    python benchmarks/peers.py [--peers trainfw,transformers] [--steps N] [--rounds N] [--dtype both] [--save]

A Llama of 58M parameters, 4 rows of 512 random tokens a step, AdamW, gradients clipped. Each peer is a process of its
own that stays alive and does N steps when it is its turn, so that a machine whose speed varies varies for all:

  trainfw               the program of a recipe, with the settings that are best on a CPU
  transformers          Hugging Face Transformers, PyTorch eager: SDPA, fused AdamW
  transformers-compile  the same through torch.compile
  litgpt                LitGPT's own `pretrain`, which compiles
  maxtext               MaxText's own `train_loop`, as its defaults are: layers in a scan, full rematerialisation
  maxtext-tuned         with the best settings found on a CPU: unrolled, nothing rematerialised, logits in 4 parts; in
                        the table and in the check of memory, while "2 times MaxText" is of MaxText as it comes

`-bf16` at the end of a name: products in bfloat16, parameters in float32. LitGPT and MaxText come from PyPI, each into
an environment of its own under the cache directory, once (MaxText needs Python 3.12). All compile afresh.

Printed, for each: median and spread of a step, tokens/s, how many times faster trainfw is, seconds from the start of
the process to the end of its first step, peak memory (after a plus sign: of compile workers); what the model's matrix
products take by themselves; the losses of trainfw and Transformers from the same weights on the same batches; and
checks. Exit 1 where one is missed or cannot be made because a peer did not run, 2 for bad arguments. Up to 3 GB of
memory for each peer: ask for fewer with --peers where that is too much.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from side_by_side import environments, work
from side_by_side.driver import Say, Worker, take_turns
from side_by_side.environments import Environment, Unavailable
from side_by_side.report import (
    BF16,
    Results,
    as_json,
    checks,
    idle_line,
    loss_lines,
    product_lines,
    table,
)

from benchmarks.reporting import command, machine, writable
from trainfw.errors import did_you_mean
from trainfw.paths import cache_dir

HERE = Path(__file__).parent
WORKERS = HERE / "side_by_side" / "workers"
RESULTS = HERE / "results" / "peers.json"
PRODUCTS = "products of "
MEMORY = 3_200_000_000
"""Bytes that a peer takes, about; all stay until the end."""


@dataclass(frozen=True)
class Peer:
    worker: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: Sequence[str] = ()
    """Packages of this environment."""
    environment: str | None = None
    """Of `environments`, where it has one of its own."""


PEERS = {
    "trainfw": Peer("on_trainfw.py", {"train": {"scan_layers": False, "remat": "dots", "loss_chunk": 512}}),
    "transformers": Peer("on_transformers.py", {"compile": False}, ("torch", "transformers")),
    "transformers-compile": Peer("on_transformers.py", {"compile": True}, ("torch", "transformers")),
    "litgpt": Peer("on_litgpt.py", environment="litgpt"),
    "maxtext": Peer("on_maxtext.py", {"options": {}}, environment="maxtext"),
    "maxtext-tuned": Peer(
        "on_maxtext.py",
        {"options": {"scan_layers": False, "remat_policy": "none", "num_vocab_tiling": 4}},
        environment="maxtext",
    ),
}
NAMES = [f"{name}{suffix}" for suffix in ("", BF16) for name in PEERS]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", help=f"names with commas between; of {', '.join(PEERS)}, each with or without {BF16}"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each at its turn (5)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each (4)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "both"),
        help="of the peers named without a dtype; left out, float32, and trainfw in both",
    )
    parser.add_argument("--maxtext-python", type=Path, help="the Python of an environment that has MaxText")
    parser.add_argument("--litgpt-python", type=Path, help="the Python of an environment that has LitGPT")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for a start or a turn (1200)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all numbers")
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{RESULTS.name}")
    chosen = parser.parse_args(arguments)
    for name in ("steps", "rounds", "timeout"):
        if not 0 < getattr(chosen, name) < math.inf:
            parser.error(f"--{name} {getattr(chosen, name)}: expected a positive number")
    for name in ("maxtext_python", "litgpt_python"):
        if (given := getattr(chosen, name)) is not None and not given.is_file():
            parser.error(f"--{name.replace('_', '-')} {given}: no such file; expected a Python interpreter")
    named = PEERS if chosen.peers is None else [name.strip() for name in chosen.peers.split(",") if name.strip()]
    for name in named:
        if name not in NAMES:
            parser.error(f"--peers: unknown peer {name!r}{did_you_mean(name, NAMES)}")
    if not named:
        parser.error(f"--peers: names none; one of: {', '.join(PEERS)}")
    suffixes = {"bfloat16": (BF16,), "both": ("", BF16)}.get(chosen.dtype, ("",))
    names = [n if n.endswith(BF16) else f"{n}{suffix}" for suffix in suffixes for n in named]
    if chosen.peers is None and chosen.dtype is None:
        names.append(f"trainfw{BF16}")
    chosen.names = list(dict.fromkeys(names))
    return chosen


def make_say() -> Say:
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:4.0f} s] {text}", file=sys.stderr, flush=True)

    return say


def variables(directory: Path, own: bool) -> dict[str, str]:
    """The environment of a worker: the CPU, nothing of the network, caches that start empty."""
    found = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    found |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    found |= {"PYTHONDONTWRITEBYTECODE": "1", "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor")}
    found["JAX_COMPILATION_CACHE_DIR"] = str(directory / "compiled")
    if own:  # trainfw as it stands beside this file
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return found


class Stage:
    """Makes the workers: each with its Python, its file of what to do, its log."""

    def __init__(self, chosen: argparse.Namespace, directory: Path, say: Say):
        self.chosen, self.directory, self.say = chosen, directory, say
        self.root = cache_dir() / "peers"
        self.pythons: dict[str, Path | Unavailable] = {}

    def peer(self, name: str) -> Worker:
        """Raises Unavailable."""
        base, dtype = name.removesuffix(BF16), "bfloat16" if name.endswith(BF16) else "float32"
        peer = PEERS[base]
        return self.worker(name, peer.worker, dtype, peer.options, self._python(peer), peer.environment is None)

    def products(self, backend: str, suffix: str) -> Worker:
        dtype = "bfloat16" if suffix else "float32"
        name = f"{PRODUCTS}{backend}{suffix}"
        return self.worker(name, "products.py", dtype, {"backend": backend}, Path(sys.executable), True)

    def worker(self, name: str, script: str, dtype: str, options: Mapping[str, Any], python: Path, own: bool) -> Worker:
        file = work.write(self.directory, dtype, name.replace(" ", "-"), dict(options))
        log = self.root / "logs" / f"{name.replace(' ', '-')}.log"
        command = [str(python), str(WORKERS / script), str(file)]
        return Worker(name, command, variables(self.directory / file.stem, own), log, self.chosen.timeout)

    def _python(self, peer: Peer) -> Path:
        if peer.environment is None:
            for package in peer.needs:
                try:
                    version(package)
                except PackageNotFoundError:
                    raise Unavailable(f"{package} is not installed here: pip install {package}") from None
            return Path(sys.executable)
        if peer.environment not in self.pythons:
            given: Path | None = getattr(self.chosen, f"{peer.environment}_python")
            environment: Environment = getattr(environments, peer.environment)()
            try:
                # Not resolved: a virtual environment's Python is a link.
                found = given.absolute() if given else environments.ready(environment, self.root, self.say)
                self.pythons[peer.environment] = found
            except Unavailable as problem:
                self.pythons[peer.environment] = problem
        answer = self.pythons[peer.environment]
        if isinstance(answer, Unavailable):
            raise answer
        return answer


def write_weights(stage: Stage, say: Say) -> None:
    say("writing the batches and the weights to start from")
    work.write_batches(stage.directory)
    worker = stage.worker("write weights", "write_weights.py", "float32", {}, Path(sys.executable), True)
    ran = subprocess.run(worker.command, env=dict(worker.environment), capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"error: the weights could not be written: {environments.last_error(ran.stderr)}")


def measure(chosen: argparse.Namespace, say: Say) -> Results:
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        stage, problems, workers = Stage(chosen, Path(temporary), say), {}, []
        for name in chosen.names:
            try:
                workers.append(stage.peer(name))
            except Unavailable as problem:
                problems[name] = str(problem)
                say(f"{name}: FAILED: {problem}")
        write_weights(stage, say)
        steps = {worker.name: chosen.steps for worker in workers}
        backends = ("jax", "torch") if any(worker.name.startswith("transformers") for worker in workers) else ("jax",)
        for suffix in dict.fromkeys(BF16 if name.endswith(BF16) else "" for name in chosen.names):
            for backend in backends:
                workers.append(stage.products(backend, suffix))
                steps[workers[-1].name] = 1
        problems |= take_turns(workers, chosen.rounds, steps, say)
    records = {worker.name: worker.record for worker in workers if worker.name not in problems}
    products = {}
    for name in [name for name in records if name.startswith(PRODUCTS)]:
        backend, _, dtype = name.removeprefix(PRODUCTS).partition("-")
        products[backend, f"-{dtype}" if dtype else ""] = product_seconds(records.pop(name).more)
    return Results(work.TOKENS_PER_STEP, records, problems, products)


def product_seconds(sweeps: Sequence[Sequence[Mapping[str, Any]]]) -> float:
    """Seconds of a step's products: of each the median over the turns, as steps' times are medians."""
    return sum(statistics.median(product["seconds"] for product in same) * same[0]["count"] for same in zip(*sweeps))


def free_memory() -> int | None:
    """Bytes that the machine can still give, where it says."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def describe(arguments: Sequence[str]) -> dict[str, Any]:
    parameters, rows, length = work.num_parameters(), work.ROWS, work.LENGTH
    return {
        "command": command("peers", arguments),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "work": f"A Llama of {parameters:,} parameters, {rows} rows of {length} tokens a step, AdamW.",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    say = make_say()
    about = describe(sys.argv[1:] if arguments is None else arguments)
    print(f"{about['work']} {about['machine']['cores']} cores of {about['machine']['cpu']}.", flush=True)
    needed, free = len(chosen.names) * MEMORY, free_memory()
    if free is not None and free < needed:
        say(f"warning: up to {needed / 1e9:.0f} GB of memory are needed, {free / 1e9:.0f} GB are free; see --peers")
    return tell(measure(chosen, say), chosen, about)


def tell(results: Results, chosen: argparse.Namespace, about: Mapping[str, Any]) -> int:
    """Print and write what was found; the exit code."""
    made = checks(results, chosen.names)
    for lines in (table(results), [*product_lines(results), *idle_line(results)], loss_lines(results), made):
        print(*lines, sep="\n", flush=True)
        print()
    for file in filter(None, (chosen.json, RESULTS if chosen.save else None)):
        file.write_text(json.dumps(as_json(results, made, about), indent=1) + "\n")
    return int(any(check.missed for check in made))


if __name__ == "__main__":
    raise SystemExit(main())
