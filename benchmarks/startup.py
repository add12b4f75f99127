"""From the command to the first finished step: python benchmarks/startup.py [--repeats N] [--json FILE] [--save]

`trainfw train` of a Llama of 58 million parameters (d 512, 8 layers, vocabulary 32,000; 4 rows of 512 tokens) as
peers.py trains it, on 10 MB of text with a tokenizer.json, validating on a batch before the first step: cold, with no
cache of any kind, and warm, a new run after it. Each in a process of its own; the median of the repeats counts. Seconds
are the wall clock's, from before Python starts. The functions are compiled while data and state are made ready:
"compile" is what is waited for the training step, and validation may wait for its own.

Exits 1 where the cold start takes over 15 s, or the warm one over 9 s, or where their first losses differ.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import Check, Table, add_arguments, at_most, finish, positive, say, table

MOST_SECONDS = {"cold": 15.0, "warm": 9.0}
PHASES = ("imports", "build", "data", "compile", "init", "validation", "first step", "rest")
RECIPE = """
name: startup
model: {preset: tiny, vocab_size: 32000, hidden_size: 512, intermediate_size: 1376, num_layers: 8, num_heads: 8,
        num_kv_heads: 8, head_dim: 64, tie_embeddings: false}
data: {source: corpus.jsonl, tokenizer: {name: file, path: tokenizer}, sequence_length: 512}
train: {global_batch_size: 4, scan_layers: false, remat: dots, loss_chunk: 512, validation_batches: 1, log_every: 1}
optimizer: {name: adamw, clip_norm: 1.0}
"""


def prepare(directory: Path) -> None:
    """Corpus, tokenizer and recipe."""
    from trainfw.data import DataConfig, open_source, train_bpe

    source = open_source(DataConfig(sequence_length=512))
    texts = [document.text for document in source.documents()][:600]
    train_bpe(texts, 32000).save(directory / "tokenizer")
    (directory / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (directory / "recipe.yaml").write_text(RECIPE)


def start(directory: Path, run: str) -> dict[str, Any]:
    """{phase: seconds, "total": seconds, "loss": of the first step} of one process."""
    kept = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    environment = kept | {"XDG_CACHE_HOME": str(directory / "cache"), "STARTED": repr(time.time())}
    command = [sys.executable, __file__, "--child", "train", "recipe.yaml", "--run-dir", run]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}the run failed")
    if done.stderr:
        say(f"the command wrote to stderr:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def child(arguments: list[str]) -> None:
    """The command itself, its phases timed, up to the end of the first step."""
    started = float(os.environ["STARTED"])
    seconds = dict.fromkeys(PHASES, 0.0)

    def timed(owner: Any, name: str, phase: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[phase] += time.monotonic() - start

        setattr(owner, name, run)

    from trainfw import backends

    connect = backends.connect

    def connected(*given: Any) -> None:
        connect(*given)
        import jax

        from trainfw.training import loop
        from trainfw.training.compiling import Compiling
        from trainfw.training.outcome import Outcome
        from trainfw.training.session import Session

        seconds["imports"] = time.time() - started
        timed(loop, "build_program", "build")
        timed(loop, "read_data", "data")
        timed(loop, "_state_at", "init")
        timed(Outcome, "validate", "validation")
        timed(Compiling, "train_step", "compile")
        steps = Session._forward

        def forward(session: Any, train_step: Any, *rest: Any) -> Any:
            entered = time.monotonic()

            def step(*given: Any) -> None:
                _, metrics = train_step(*given)
                loss = metrics["loss"].value()
                total = time.time() - started
                seconds["first step"] = time.monotonic() - entered
                seconds["rest"] = total - sum(seconds.values())
                print(json.dumps({**seconds, "total": total, "loss": loss}), flush=True)
                os._exit(0)

            with jax.transfer_guard("allow"):
                return steps(session, step, *rest)

        Session._forward = forward  # type: ignore[method-assign]

    backends.connect = connected  # type: ignore[attr-defined]
    sys.argv = ["trainfw", *arguments]
    from trainfw.cli import command

    command()


def judge(found: dict[str, list[dict[str, Any]]]) -> tuple[list[Table], list[Check]]:
    """The result, of the starts by kind."""
    middle = {
        kind: {name: statistics.median(one[name] for one in starts) for name in (*PHASES, "total")}
        for kind, starts in found.items()
    }
    rows = [[name, *(middle[kind][name] for kind in found)] for name in (*PHASES, "total")]
    losses = {one["loss"] for starts in found.values() for one in starts}
    checks = [
        at_most(f"seconds to the first step, {kind}", middle[kind]["total"], MOST_SECONDS[kind]) for kind in found
    ]
    return [table("Seconds by phase", ["phase", *found], rows)], [
        *checks,
        at_most("different first losses, of all starts, beyond one", len(losses) - 1, 0),
    ]


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=3)
    add_arguments(parser)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for turn in range(arguments.repeats):
        with tempfile.TemporaryDirectory(prefix="trainfw-startup-") as place:
            prepare(Path(place))
            for kind, starts in found.items():
                starts.append(start(Path(place), kind))
                say(f"{kind} {turn + 1}: {', '.join(f'{k} {v:.2f}' for k, v in starts[-1].items())}")
    return finish("startup", *judge(found), arguments)


if __name__ == "__main__":
    raise SystemExit(main())
