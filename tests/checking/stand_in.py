"""A stand-in for neuronx-cc, which answers as AWS's documents and public logs quote it. It compiles nothing.

`install` puts it on PATH; STAND_IN says how it answers: to all functions, or as `train=refused,evaluate=passed`.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

VERSION = "2.28.7631.0+1a2b3c4d"


def install(directory: Path, answer: str) -> dict[str, str]:
    """Write an executable neuronx-cc into `directory`; the environment in which it is found and answers so."""
    directory.mkdir(exist_ok=True)
    program = directory / "neuronx-cc"
    program.write_text(f"#!{sys.executable}\n" + Path(__file__).read_text())
    program.chmod(0o755)
    pids = directory / "pids"
    path = f"{directory}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "STAND_IN": answer, "STAND_IN_PIDS": str(pids)}


def _main(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"NeuronX Compiler version {VERSION}\n\nPython version 3.11.7\nNumPy version 1.26.4")
        return 0
    (module,) = (Path(word) for word in arguments if word.endswith(".pb"))
    (neff,) = (word.partition("=")[2] for word in arguments if word.startswith("--output="))
    if arguments[0] != "compile" or "--framework=XLA" not in arguments or not module.is_file():
        print(f"[ERROR] [NCC_EARG002] Illegal argument(s): {arguments}", file=sys.stderr)
        return 70
    answer = os.environ["STAND_IN"]
    answer = dict(part.split("=") for part in answer.split(","))[module.stem] if "=" in answer else answer
    names = [name.decode() for name in re.findall(rb"\n[\x01-\x40](dot[\w.\-]*)", module.read_bytes())]
    return globals()[f"_{answer.replace(' ', '_')}"](neff, names)


def _passed(neff: str, _: list[str]) -> int:
    print("2026-11-29T04:00:00Z [WARNING] [NCC_WXYZ001] Something worth knowing\n.\nCompiler status PASS")
    Path(neff).write_bytes(b"NEFF")
    return 0


def _refused(_: str, names: list[str]) -> int:
    Path("log-neuron-cc.txt").write_text(
        "a long log\n[ERROR] [NCC_EVRF051] Data type F8E4M3FN is not supported on TRN1/TRN2\n"
    )
    print(
        "[ERROR] [NCC_EVRF051] Data type F8E4M3FN is not supported on TRN1/TRN2\n"
        f"%{names[0]} = f32[8,8]{{1,0}} dot(%x, %y), lhs_contracting_dims={{1}}\n\n"
        "2026-11-29T04:00:00Z [ERROR] [NCC_EVRF001] Operator frobnicate is not supported. Locate it in source\n"
        "[INTERNAL_ERROR] [NCC_IXCG856] MATCH_REPLACE8 Instruction expects at least 8 input elements per partition\n"
        "Compiler status ERROR",
        file=sys.stderr,
    )
    return 70


def _out_of_memory(_neff: str, _names: list[str]) -> int:
    print(
        "2026-10-04T08:26:13Z [F137] neuronx-cc was forcibly killed - This most commonly occurs due to insufficient "
        "system memory. Using a smaller data type, dimensions, batch size, or a larger instance type may help."
    )
    return 70


def _killed(_neff: str, _names: list[str]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def _hangs(_neff: str, _names: list[str]) -> int:
    child = os.fork()
    if child:
        written = Path(os.environ["STAND_IN_PIDS"])
        written.with_suffix(".new").write_text(f"{os.getpid()} {child} {os.getcwd()}")
        written.with_suffix(".new").rename(written)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a compile that takes no notice
    while True:
        time.sleep(60)


def _unknown(_neff: str, _names: list[str]) -> int:
    print("first\n" + "line of a log\n" * 9 + "penguin fell over: Check failed: unique_id_ < (2147483647)")
    return 1


def _nothing(_neff: str, _names: list[str]) -> int:
    print("Compiler status PASS")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
