"""neuronx-cc as a check, with a stand-in for it (stand_in.py): the real compiler has not been tried."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.checking import stand_in
from trainfw import load_recipe
from trainfw.checking import RULES, Comparison, Finding, Report, find_compiler
from trainfw.checking.compiler import (
    GIB_EACH,
    Run,
    _ends,
    command_of,
    compiler_version,
    compiles_at_once,
    last_lines,
    run_compiler,
)
from trainfw.checking.compiler_output import Message, Outcome, read_messages, read_run, rule_of
from trainfw.checking.differences import scrubbed
from trainfw.errors import UserError
from trainfw.hlo import Exported, export

FLAGS = ["--target=trn2", "--lnc=2", "--model-type=transformer", "-O1"]


def product(x: Any, y: Any) -> Any:
    return jnp.sort(x @ y)


@pytest.fixture(scope="module")
def exported() -> Exported:
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    return export(jax.jit(product).lower(x, x))


def compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported, answer: str, timeout: float = 60.0
) -> Outcome:
    for name, value in stand_in.install(tmp_path / "bin", answer).items():
        monkeypatch.setenv(name, value)
    run = run_compiler(find_compiler(), {"step": exported.proto}, FLAGS, timeout=timeout)["step"]
    return read_run("step", run, exported.module, version="2.28", timeout=timeout)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(pids: list[str]) -> bool:
    """Whether all end within seconds: what was killed has to be given the processor once more."""
    late = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < late:
        pass
    return not any(map(alive, pids))


def test_what_passes(tmp_path, monkeypatch, exported):
    outcome = compiled(tmp_path, monkeypatch, exported, "passed")
    assert (outcome.verdict, outcome.findings) == ("passed", ())
    assert [(m.code, m.error) for m in outcome.messages] == [("NCC_WXYZ001", False)]
    assert compiler_version(find_compiler()) == stand_in.VERSION


def test_errors_that_a_pass_printed_are_shown(exported):
    text = "[ERROR] [NCC_EVRF029] Operation sort is not supported on trn2"
    outcome = read_run("step", Run(0, 1.0, True, text, ""), exported.module, version="2.28", timeout=10.0)
    assert outcome.verdict == "passed"
    assert str(outcome).endswith("though it printed NCC_EVRF029: Operation sort is not supported on trn2")


def test_codes_without_a_neff_are_a_refusal(exported):
    text = "[ERROR] [NCC_EVRF001] Operator topk is not supported"
    outcome = read_run("step", Run(0, 1.0, False, text, ""), exported.module, version="2.28", timeout=10.0)
    assert (outcome.verdict, [finding.rule for finding in outcome.findings]) == ("refused", ["topk"])


def test_a_signal_without_a_word(exported):
    outcome = read_run("step", Run(-11, 1.0, False, "", ""), exported.module, version="2.28", timeout=10.0)
    assert outcome.findings[0].message == "ended by signal 11, and said nothing that is known"


def test_long_output_is_cut_and_its_beginning_read(tmp_path):
    printed = tmp_path / "printed"
    printed.write_bytes(b"[ERROR] [NCC_EVRF001] Operator x is not supported\n" + 3 * 2**20 * b"x" + b"\nthe end\n")
    output = _ends(printed)
    assert [message.code for message in read_messages(output)] == ["NCC_EVRF001"]
    shown = last_lines(Run(70, 1.0, False, output, ""))
    assert shown[-1] == "the end"
    assert max(map(len, shown)) < 500


def test_three_codes(tmp_path, monkeypatch, exported):
    outcome = compiled(tmp_path, monkeypatch, exported, "refused")
    assert outcome.verdict == "refused"
    assert [finding.code for finding in outcome.findings] == ["NCC_EVRF051", "NCC_EVRF001", "NCC_IXCG856"]
    known, operator, internal = outcome.findings
    assert known.rule == "dtype-f8e4m3fn"
    assert known.instead == RULES["dtype-f8e4m3fn"].instead
    assert known.instruction in exported.text
    assert known.place is not None
    assert known.place.file == __file__
    # NCC_EVRF001 is of any operator: a rule on another one is not meant.
    assert (operator.rule, internal.rule) == ("compiler", "compiler")
    assert "Operator frobnicate" in operator.message
    assert internal.place is None


ENDS = {
    "out of memory": ("out of memory", "compiler-memory", "ended with exit code 70, for want of host memory"),
    "killed": ("out of memory", "compiler-memory", "ended by signal 9, for want of host memory"),
    "unknown": ("failed", "compiler-failed", "| penguin fell over: Check failed: unique_id_ < (2147483647)"),
    "nothing": ("failed", "compiler-failed", "ended with exit code 0, but wrote no NEFF"),
}


@pytest.mark.parametrize("answer", ENDS)
def test_no_verdict_is_never_a_pass(answer, tmp_path, monkeypatch, exported):
    verdict, rule, text = ENDS[answer]
    outcome = compiled(tmp_path, monkeypatch, exported, answer)
    (finding,) = outcome.findings
    assert (outcome.verdict, finding.rule) == (verdict, rule)
    assert text in finding.message
    assert str(finding).startswith(f"error: {rule}: step as a whole\n")


@pytest.mark.parametrize("words", ["[F137] neuronx-cc was forcibly killed", "std::bad_alloc"])
def test_memory_that_only_the_log_speaks_of(words, exported):
    run = Run(70, 1.0, False, "Compiler status ERROR", words)
    outcome = read_run("step", run, exported.module, version="2.28", timeout=10.0)
    assert (outcome.verdict, outcome.findings[0].rule) == ("out of memory", "compiler-memory")


def test_a_compiler_on_a_relative_entry_of_path(tmp_path, monkeypatch):
    stand_in.install(tmp_path / "bin", "passed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"bin{os.pathsep}{os.environ['PATH']}")
    assert find_compiler() == str(tmp_path / "bin" / "neuronx-cc")
    assert compiler_version(find_compiler()) == stand_in.VERSION


def test_a_hang_ends_at_the_limit_with_all_its_processes(tmp_path, monkeypatch, exported):
    outcome = compiled(tmp_path, monkeypatch, exported, "hangs", timeout=3.0)
    assert outcome.verdict == "timed out"
    assert "still compiling after 3 s, the limit" in outcome.findings[0].message
    *pids, directory = (tmp_path / "bin" / "pids").read_text().split(" ", 2)
    assert ended(pids)
    assert not Path(directory).exists()


SIGNALLED = """
import sys
from trainfw.checking.compiler import find_compiler, run_compiler
from trainfw.cli.signals import leaving_at_once
with leaving_at_once("the compiler is ended"):
    run_compiler(find_compiler(), {"step": b"module"}, [], timeout=3600.0)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(signum, tmp_path):
    environment = os.environ | stand_in.install(tmp_path / "bin", "hangs")
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED], env=environment, stderr=subprocess.PIPE, text=True)
    pids = Path(environment["STAND_IN_PIDS"])
    while not pids.exists() and process.poll() is None:
        pass
    process.send_signal(signum)
    assert "the compiler is ended" in process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signum
    *started, directory = pids.read_text().split(" ", 2)
    assert ended(started)
    assert not Path(directory).exists()


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="any x86-64 Linux machine, without Neuron hardware: python -m pip install"):
        find_compiler()
    (tmp_path / "neuronx-cc").write_text("no program")
    (tmp_path / "neuronx-cc").chmod(0o755)
    with pytest.raises(UserError, match="cannot be run"):
        compiler_version(find_compiler())


def test_the_command():
    assert command_of("train", FLAGS) == [
        *("neuronx-cc", "compile", "--framework=XLA", "train.pb", "--output=train.neff"),
        *FLAGS,
    ]
    assert command_of("f", ["--framework=XLA"]).count("--framework=XLA") == 1


@pytest.mark.parametrize(("free", "at_once"), [(0, 1), (13, 1), (14, 1), (27, 1), (28, 2), (500, 2)])
def test_as_many_at_once_as_memory_has_room_for(free, at_once):
    assert GIB_EACH == 14
    assert compiles_at_once(2, free * 2**30) == at_once


MESSAGES = {
    "[ERROR] [NCC_EVRF029] Operation sort is not supported\n  %sort.0 = u32[256]{0} sort(%r)\n\nmore": [
        Message("NCC_EVRF029", "Operation sort is not supported\n%sort.0 = u32[256]{0} sort(%r)", True)
    ],
    'loc(fused<772>["f"]): error: [NCC_EVRF029] Operation sort is not supported': [
        Message("NCC_EVRF029", "Operation sort is not supported", True)
    ],
    "2024-02-21T22:24:14Z [TEN404] Internal tensorizer error\n2024-02-21T22:24:14Z next": [
        Message("TEN404", "Internal tensorizer error", True)
    ],
    "ERROR: [NCC_EOOM001] too large\nERROR: [NCC_EOOM001] too large": [Message("NCC_EOOM001", "too large", True)],
    "/home/warn/x WARNING.py: [ERROR] [NCC_EVRF001] no": [Message("NCC_EVRF001", "no", True)],
    "x.py:3: warning: [NCC_EVRF001] no": [Message("NCC_EVRF001", "no", False)],
    "ERROR: NCC_EVRF029: Operation sort": [Message("NCC_EVRF029", "Operation sort", True)],
    "WARNING: NCC_EVRF029: Operation sort": [Message("NCC_EVRF029", "Operation sort", False)],
    "NCC_EVRF029: Operation sort": [Message("NCC_EVRF029", "Operation sort", True)],
    "see also NCC_EVRF029: it is like this": [],
    "nothing [here] with [ERROR] a code": [],
}


@pytest.mark.parametrize("text", MESSAGES)
def test_messages(text):
    assert list(read_messages(text)) == MESSAGES[text]


def test_of_several_rules_the_one_that_check_found():
    message = Message("NCC_EOOM001", "Maximum peak HBM usage of 32.00GB exceeds HBM limit", True)
    named = [rule.id for rule in RULES.values() if "NCC_EOOM001" in rule.source]
    assert len(named) > 1
    for rule in named:
        found = rule_of(message, [rule])
        assert found is not None
        assert found.id == rule


@pytest.mark.parametrize(
    ("code", "text", "rule"),
    [
        ("NCC_EVRF024", "The output tensor size limit of 4GB was exceeded.", "buffer-size"),
        ("NCC_EVRF036", "QuantizeMX custom call has invalid backend_config JSON.", "custom-call-mx-form"),
        ("NCC_EVRF043", "ScaledMatmul custom call must have exactly 4 operands.", "custom-call-mx-form"),
        ("NCC_EVRF045", "ScaledMatmul custom call output type is unsupported.", "custom-call-mx-form"),
        ("NCC_EVRF046", "ScaledMatmul custom call LHS tensor must have rank >= 2.", "custom-call-mx-form"),
        ("NCC_EVRF047", "ScaledMatmul custom call RHS tensor must have rank >= 2.", "custom-call-mx-form"),
        ("NCC_EVRF057", "QuantizeMX custom call must return a tuple with exactly 2 outputs.", "custom-call-mx-form"),
        ("NCC_EVRF058", "QuantizeMX custom call input dimension must be divisible by 4.", "custom-call-mx-form"),
    ],
)
def test_the_rule_of_a_code(code, text, rule):
    found = rule_of(Message(code, text, True))
    assert found is not None
    assert found.id == rule


def test_rules_write_every_code_out():
    for rule in RULES.values():
        assert not re.search(r"NCC_\w+(?: to|, \d)", f"{rule.source} {rule.summary}"), rule.id


# --- Differences ----------------------------------------------------------------------------------


def report(*rules: str) -> Report:
    findings = tuple(Finding(rule, "as /home/me/x.py has it", program="step", programs=("step",)) for rule in rules)
    return Report("trn2.3xlarge", 4, "2.32", findings)


def kinds(*rules: str, outcome: Outcome, exported: Exported) -> list[tuple[str, str, str]]:
    found = Comparison("", [], report(*rules), {"step": exported}, {"step": outcome})
    return [(difference.rule, difference.check, difference.compiler) for difference in found.differences]


def test_differences(tmp_path, monkeypatch, exported):
    passed = compiled(tmp_path, monkeypatch, exported, "passed")
    assert kinds(outcome=passed, exported=exported) == []
    # A rule that names no code of the compiler's speaks of the runtime or of results.
    assert kinds("dtype-f8e4m3fn", "gather-fill", outcome=passed, exported=exported) == [
        ("dtype-f8e4m3fn", "error", "passed it")
    ]
    refused = compiled(tmp_path, monkeypatch, exported, "refused")
    others = [("compiler", "nothing", "refused it")] * 2
    assert kinds("dtype-f8e4m3fn", outcome=refused, exported=exported) == others
    assert kinds(outcome=refused, exported=exported) == [("dtype-f8e4m3fn", "nothing", "refused it"), *others]
    unknown = compiled(tmp_path, monkeypatch, exported, "unknown")
    assert kinds(outcome=unknown, exported=exported) == [("compiler-failed", "nothing", "failed")]
    assert kinds("control-cond", outcome=unknown, exported=exported) == []
    killed = compiled(tmp_path, monkeypatch, exported, "killed")
    assert kinds(outcome=killed, exported=exported) == []


def test_the_report_of_differences(tmp_path, monkeypatch, exported):
    refused = compiled(tmp_path, monkeypatch, exported, "refused")
    recipe = load_recipe("quickstart", ["hardware.topology=trn2.3xlarge"])
    compared = Comparison("2.28", ["--dump=/home/me/dump"], report(), {"step": exported}, {"step": refused})
    written = compared.difference_report(recipe)
    text = json.dumps(written)
    assert "/home" not in text
    assert str(tmp_path) not in text
    assert os.path.dirname(__file__) not in text
    assert written["flags"] == ["--dump=<path>/dump"]
    assert written["recipe"]["hardware.topology"] == "trn2.3xlarge"
    assert written["recipe"]["model.num_layers"] == recipe.model.num_layers
    assert not [
        key for key in written["recipe"] if key.startswith("data.") and "sequence" not in key and "mask" not in key
    ]
    first, *_ = written["differences"]
    assert (first["rule"], first["code"], first["check"]) == ("dtype-f8e4m3fn", "NCC_EVRF051", "nothing")
    (line,) = first["hlo"]
    assert " dot(" in line
    assert "metadata" not in line
    said = written["functions"]["step"]
    assert said["check"] == {"verdict": "clean", "findings": []}
    assert said["compiler"]["exit_code"] == 70
    assert [m["code"] for m in said["compiler"]["messages"]] == ["NCC_EVRF051", "NCC_EVRF001", "NCC_IXCG856"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("at /home/me/a.py:3", "at <path>/a.py:3"),
        ("on ip-10-0-0-1.ec2.internal, SDK 2.33", "on <host>, SDK 2.33"),
        ("--dump=/tmp/x/", "--dump=<path>/x"),
        ("~/secret/b.txt", "<path>/b.txt"),
        ("/mnt/data(1)/alice/x", "<path>/x"),
        ("loc(x)/home/alice/y.py", "<path>/y.py"),
        (".../home/alice/y.py, more", "<path>/y.py, more"),
        ("../alice/x.py", "<path>/x.py"),
        ("alice/deep/x.py:3", "<path>/x.py:3"),
        ("/home/alice/#1/x.py", "<path>/x.py"),
        ("//fsx//alice/x", "<path>/x"),
        ("/data/[a]/{b}/<c>/x", "<path>/x"),
        ('"/home/al smith/b/x.py"', '"<path>/al <path>/x.py"'),
        ("jit(f)/while/body", "jit(f)/while/body"),
        ('op_name="jit(<lambda>)/vmap()/gather"', 'op_name="jit(<lambda>)/vmap()/gather"'),
        ("(s32[], /*index=5*/f32[2]{0}) tuple(%a)", "(s32[], /*index=5*/f32[2]{0}) tuple(%a)"),
        ("not supported on TRN1/TRN2.", "not supported on TRN1/TRN2."),
        ("3 MiB/s", "3 MiB/s"),
    ],
)
def test_paths_are_not_sent(text, left):
    assert scrubbed(text) == left
