"""Change files that strangers or bad luck may change, and read them: python benchmarks/fuzz.py --seconds N --seed S

Small valid inputs are made by trainfw's own exporters: safetensors, GGUF, config.json, tokenizer.json, adapters in
PEFT's form, chat templates, recipes with overrides, and the metadata of a run with checkpoints. Each case changes what
one file says (other types and sizes, keys gone or twice, values that no one expects) or its bytes, and uses it as
trainfw's commands do, in a watched process.

A case is right where there is a result (which is checked where that is cheap: shapes, values that were saved, what is
written and read again), or a refusal in words of fewer than 2,000 characters, none of them a control character.
Anything else is a finding: another exception, a process that dies, 10 seconds of the processor, 30 seconds of waiting,
2 GiB of memory. Findings of one kind at one line of trainfw are one; the first of each is kept with its seed.

    --kind KIND ...  of these kinds alone      --case N  one case again, kept in --out

Exits 1 where there is a finding.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import positive, say

if TYPE_CHECKING:
    from benchmarks.fuzzing.watching import Finding

KINDS = ("safetensors", "gguf", "config", "tokenizer", "adapter", "template", "recipe", "checkpoint")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=positive, help="in all; each kind gets the same share")
    parser.add_argument("--inputs", type=positive, help="of each kind; 2,000 where no --seconds are given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--case", type=int, help="this case of each kind alone")
    parser.add_argument("--out", type=Path, help="where findings are kept; a new directory by default")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="fuzz-found-"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not outlive a fork
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as directory:
        os.environ["XDG_CACHE_HOME"] = f"{directory}/cache"
        return fuzz(arguments, Path(directory), out.absolute())


def fuzz(arguments: argparse.Namespace, directory: Path, out: Path) -> int:
    say("making the inputs")
    made = [sys.executable, "-m", "benchmarks.fuzzing.corpus", str(directory / "corpus")]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(made, cwd=directory, env=environ, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"the inputs cannot be made:\n{ran.stderr[-5000:]}")
    share = arguments.seconds / len(arguments.kind) if arguments.seconds else float("inf")
    found = sum(_fuzz_kind(kind, arguments, directory, out, share) for kind in arguments.kind)
    print(f"{found} finding{'s' * (found != 1)}{f', kept in {out}' * bool(found)}", flush=True)
    return 1 if found else 0


def _fuzz_kind(kind: str, arguments: argparse.Namespace, directory: Path, out: Path, seconds: float) -> int:
    from benchmarks.fuzzing.watching import Watched  # imports what is read, once for all kinds

    watched = Watched(directory / "corpus", kind, arguments.seed, directory / "work" / kind)
    most = arguments.inputs or (2**63 - 1 if arguments.seconds else 2000)
    first, last = (0, most) if arguments.case is None else (arguments.case, arguments.case + 1)
    started = said = time.monotonic()
    counts: Counter[str] = Counter()
    firsts: dict[str, Finding] = {}
    for finding in watched.run(first, last, started + seconds):
        counts[finding.place] += 1
        if counts[finding.place] == 1:
            firsts[finding.place] = finding
            _keep(finding, directory / "corpus", kind, arguments.seed, out)
        if time.monotonic() - said > 30:
            said = time.monotonic()
            say(f"{kind}: {watched.done:,} inputs, {len(counts)} findings so far")
    took = time.monotonic() - started
    print(
        f"{kind}: {watched.done:,} inputs in {took:.0f} s ({watched.done / took:.0f} a second), "
        f"{watched.refused:,} refused in words, {len(counts)} findings",
        flush=True,
    )
    for place, count in counts.most_common():
        again = f"--kind {kind} --seed {arguments.seed} --case {firsts[place].number}"
        print(f"  {count:5}  {place}  ({again})", flush=True)
    return len(counts)


def _keep(finding: Finding, corpus: Path, kind: str, seed: int, out: Path) -> None:
    from benchmarks.fuzzing import cases

    place = out / f"{kind}-{seed}-{finding.number}"
    change = cases.make(corpus, kind, seed, finding.number, place / "case")
    (place / "finding.txt").write_text(f"{finding.place}\n{change}\n\n{finding.detail}\n", errors="replace")


if __name__ == "__main__":
    sys.exit(main())
