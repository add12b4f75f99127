"""Reading of what neuronx-cc printed, as findings and a verdict.

Forms that are read, each quoted by AWS's pages or by public logs: `[NCC_EVRF029] text`, with `[ERROR]`, `ERROR:`,
`[INTERNAL_ERROR]` or `error:` before it, the blamed instruction (`%sort.7 = ...`) in the next lines; `[F137] neuronx-cc
was forcibly killed`; older codes without `NCC_` (`[TEN404]`); and `ERROR: NCC_EVRF029: text`. Exit codes: 0, 70 for
errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from trainfw.checking.compiler import GIB_EACH, MEMORY, Run, last_lines
from trainfw.checking.report import finding_text
from trainfw.checking.rules import RULES, SEVERITIES, Rule
from trainfw.hlo import Instruction, Module, Place

Verdict = Literal["passed", "refused", "failed", "out of memory", "timed out", "not compiled"]

_CODE = re.compile(
    r"\[(?P<code>NCC_[A-Z]+\d+|F1\d\d|[A-Z]{3}\d{3})\]\s*"
    r"|(?:^|\b(?:ERROR|WARNING|error|warning)\]?:?\s+)(?P<bare>NCC_[A-Z]+\d+):\s*"
)
_WARNING = re.compile(r"\[WARN(?:ING)?\]|(?<![\w/.\-])(?:WARN(?:ING)?|[Ww]arning)(?:[:\s]|$)")
"""A level before a code, rather than a name in a path."""
_NEW = re.compile(
    r"\s*(?:\d{4}-\d\d-\d\d|\[?(?:ERROR|WARNING|INFO|INTERNAL_ERROR)\b|Traceback|Compiler status)"  # of another message
)
_REFUSED_OPERATOR = re.compile(r"[Oo]perat(?:or|ion) '?\"?([\w\-]+)'?\"? is not supported")
_NO_MEMORY = (
    MEMORY,
    "was forcibly killed",
    "std::bad_alloc",
    "Cannot allocate memory",
    "MemoryError",
    "insufficient system memory",
)
_MOST_LINES = 6
"""Lines of one message, at most."""
_ADVICE: Mapping[str, str] = {
    "compiler": "see AWS's page of the code (compiler/error-codes), or send the difference: --report-difference FILE",
    "compiler-failed": "run the command of `trainfw export-hlo` by hand, and read its log-neuron-cc.txt",
    "compiler-memory": f"a machine with more memory, or nothing beside it: a compile may take {GIB_EACH} GiB and more",
    "compiler-timeout": "a longer --compiler-timeout (cold compiles of 36 minutes are known), or fewer layers to try",
}


@dataclass(frozen=True)
class Message:
    """One coded message of the compiler's."""

    code: str
    text: str
    """Lines joined by line feeds."""
    error: bool
    """Rather than a warning."""


@dataclass(frozen=True)
class CompilerFinding:
    """Refusal of the compiler, or the reason why it said nothing of the program."""

    rule: str
    """The rule of `check` whose source names the code; else `compiler`, or `compiler-failed`, `-memory`, `-timeout`."""
    message: str
    program: str
    code: str = ""
    place: Place | None = None
    op_name: str = ""
    instruction: str = ""
    """The module's instruction that the message names."""
    version: str = ""

    @property
    def instead(self) -> str:
        return RULES[self.rule].instead if self.rule in RULES else _ADVICE[self.rule]

    def to_json(self) -> dict[str, object]:
        return {
            "rule": self.rule,
            "severity": "error",
            "code": self.code or None,
            "message": self.message,
            "file": self.place.file if self.place else None,
            "line": self.place.line if self.place else None,
            "op_name": self.op_name or None,
            "instruction": self.instruction or None,
            "program": self.program,
            "source": f"neuronx-cc {self.version}",
            "instead": self.instead,
        }

    def __str__(self) -> str:
        source = f"neuronx-cc {self.version}, of {self.program}"
        rule = RULES[self.rule].summary if self.rule in RULES else ""
        rows = {"rule": rule, "instead": self.instead, "source": source}
        return finding_text(self, "error", self.message.replace("\n", "\n    "), rows)


@dataclass(frozen=True)
class Outcome:
    """Verdict of the compiler on one function."""

    verdict: Verdict
    findings: tuple[CompilerFinding, ...]
    messages: tuple[Message, ...] = ()
    run: Run | None = None
    """Run of the compiler; None where there was no module to compile."""

    def __str__(self) -> str:
        codes = ", ".join(dict.fromkeys(finding.code for finding in self.findings if finding.code))
        after = f" after {self.run.seconds:,.0f} s" if self.run else ""
        errors = [m for m in self.messages if m.error and self.verdict == "passed"]
        printed = [f"    though it printed {m.code}: {m.text.partition(chr(10))[0]:.200}" for m in errors]
        return "\n".join([f"{self.verdict}{after}{f': {codes}' if codes else ''}", *printed])


def read_run(
    name: str, run: Run, module: Module, *, version: str, timeout: float, found: Iterable[str] = ()
) -> Outcome:
    """Read a run of the compiler on function `name`, whose module it was given.

    Args:
        timeout: seconds, the limit that it ran under.
        found: rules that `check` itself found broken in it: of several that name a code, those are meant first.
    """
    said = f"{run.output}\n{run.log}"
    messages = tuple(read_messages(said))
    if run.code == 0 and run.neff:
        return Outcome("passed", (), messages, run)

    def ended(verdict: Verdict, rule: str, text: str) -> Outcome:
        lines = "".join(f"\n| {line}" for line in last_lines(run))
        return Outcome(verdict, (CompilerFinding(rule, text + lines, name, version=version),), messages, run)

    if run.code is None:
        text = f"was still compiling after {timeout:,.0f} s, the limit, and was ended: no verdict on the program"
        return ended("timed out", "compiler-timeout", text)
    killed = run.code in (-9, 137)
    how = f"ended by signal {-run.code}" if run.code < 0 else f"ended with exit code {run.code}"
    # The driver reports what befell its own processes, as [F134], [F137] and [F139].
    errors = [message for message in messages if message.error and not message.code.startswith("F")]
    if killed or MEMORY in said or (not errors and any(words in said for words in _NO_MEMORY)):
        text = f"{how}, for want of host memory most likely: no verdict on the program"
        return ended("out of memory", "compiler-memory", text)
    if not errors:
        how = f"{how}, but wrote no NEFF" if run.code == 0 else f"{how}, and said nothing that is known"
        return ended("failed", "compiler-failed", f"{how}; its last lines:" if last_lines(run) else how)
    instructions = {i.name: i for c in module.computations.values() for i in c.instructions.values()}
    findings = [_finding(name, message, instructions, set(found), version) for message in errors]
    return Outcome("refused", tuple(findings), messages, run)


def read_messages(output: str) -> Iterator[Message]:
    """List the coded messages in order, each once: the compiler writes them to its log too."""
    seen: list[Message] = []
    lines = output.splitlines()
    for at, line in enumerate(lines):
        match = _CODE.search(line)
        if match is None:
            continue
        text = [line[match.end() :].strip()]
        for following in lines[at + 1 : at + _MOST_LINES]:
            if not following.strip() or _CODE.search(following) or _NEW.match(following):
                break
            text.append(following.strip())
        before = line[: match.start("code" if match["code"] else "bare")]
        message = Message(match["code"] or match["bare"], "\n".join(filter(None, text)), not _WARNING.search(before))
        if not any(message.code == other.code and other.text.startswith(message.text) for other in seen):
            seen.append(message)
            yield message


def rule_of(message: Message, found: Iterable[str] = ()) -> Rule | None:
    """Return the rule whose source names the message's code, those that are `found` first; None where none does.

    A code for operators of any kind (NCC_EVRF001) is the rule's only where the rule speaks of that operator.
    """
    named = [rule for rule in RULES.values() if re.search(rf"\b{message.code}\b", f"{rule.source} {rule.summary}")]
    if operator := _REFUSED_OPERATOR.search(message.text):
        named = [rule for rule in named if _plain(operator[1]) in _plain(f"{rule.id} {rule.summary}")]
    return min(named, key=lambda rule: (rule.id not in set(found), SEVERITIES.index(rule.severity)), default=None)


def _finding(
    name: str, message: Message, instructions: Mapping[str, Instruction], found: set[str], version: str
) -> CompilerFinding:
    rule = rule_of(message, found)
    # The instruction that the message writes out first, not its operands.
    named = [*re.findall(r"%([\w.\-]+)\s*=", message.text), *re.findall(r"[%\"']([\w.\-]+)", message.text)]
    blamed = next((instructions[name] for name in named if name in instructions), None)
    of_module = (blamed.place, blamed.op_name, blamed.name) if blamed else (None, "", "")
    text = f"{message.code}: {message.text}"
    return CompilerFinding(rule.id if rule else "compiler", text, name, message.code, *of_module, version)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
