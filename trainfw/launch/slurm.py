from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainfw.backends import for_topology
from trainfw.errors import TRY_AGAIN, RunError, UserError
from trainfw.launch.nodes import accepting, as_argument, check_name, count_nodes
from trainfw.recipe import Recipe
from trainfw.signals import STOPS
from trainfw.training import check_place

SCRIPT = "launch.sbatch"
"""Name of the script in the run's logs/."""

_AGAIN = sorted({TRY_AGAIN, 134, 137, 139, *(128 + signum for signum in STOPS if signum != signal.SIGINT)})
"""Exit codes of processes that are to be started again."""

_TIME = re.compile(r"(?:\d+-\d+(?::\d+){0,2}|\d+(?::\d+){0,2})", re.ASCII)
"""Times of sbatch(1): minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""


@dataclass
class SlurmJob:
    """A job that trains a recipe, requeues itself when it was stopped for no fault of its own, and goes on.

    Raises UserError for numbers and options that cannot be.
    """

    recipe: Recipe
    path: str
    """Recipe as `trainfw train` takes it."""
    overrides: Sequence[str]
    run_dir: Path
    nodes: int | None = None
    """Number of nodes; None: the topology's instances."""
    tasks_per_node: int = 1
    """Processes a node: one, but on nodes that several share."""
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    grace: int = 120
    """Seconds between SIGTERM and the time limit."""
    restarts: int = 100
    """Number of times that it may requeue itself."""
    options: Sequence[str] = ()
    """Further options of sbatch, such as --exclude=trn-7."""
    devices: int | None = None
    """Simulate this many CPU devices in each process."""
    accept: Sequence[str] = ()
    """Keys of which the run is to go on with another value (`trainfw train --accept`)."""
    python: str = sys.executable

    def __post_init__(self) -> None:
        self.nodes = count_nodes(self.recipe, self.nodes)
        accepting(self.accept)
        texts = [("RECIPE", self.path), ("--run-dir", str(self.run_dir)), ("--partition", self.partition)]
        texts += [("--account", self.account), ("--time", self.time), *(("--sbatch", text) for text in self.options)]
        for given, name in texts:
            check_name(given, name)
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise UserError(f"--time {self.time}: expected what sbatch takes, such as 24:00:00 or 2-12")
        if self.tasks_per_node > 1 and for_topology(self.recipe.hardware.load()).one_process_an_instance:
            raise UserError(f"--tasks-per-node {self.tasks_per_node}: an instance of Neuron takes one process")
        if "\\" in str(self.run_dir):
            raise UserError(f"--run-dir {str(self.run_dir)!r}: Slurm's file names take no backslash")
        check_place(self.run_dir, self.recipe)  # each process would refuse it, perhaps hours later
        for text in self.overrides:
            if found := re.search(r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", text):
                raise UserError(f"{text.partition('=')[0]}: holds U+{ord(found[0]):04X}, which a script may not have")
        for text in self.options:
            _option(text)

    def script(self) -> str:
        """Write the sbatch script."""
        # Several processes on a node need other numbers than their node's.
        numbered = "bash -c 'TRAINFW_PROCESS_INDEX=$SLURM_PROCID exec \"$@\"' - \\\n  " * (self.tasks_per_node > 1)
        output, logs = f"{_pattern(self.run_dir / 'logs')}/slurm-%j.log", shlex.quote(_pattern(self.run_dir / "logs"))
        return self._script(self.directives(output), "", logs, numbered + shlex.join(self.command()))

    def directives(self, output: str, **others: object) -> list[str]:
        """List the options of sbatch; `output` is the file of what the script itself says."""
        sbatch = {
            "job-name": self.recipe.name,
            **others,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node,
            "exclusive": True if self.tasks_per_node == 1 else None,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "requeue": True,
            "open-mode": "append",  # a requeued job goes on in the same files
            "output": output,
            "signal": f"TERM@{self.grace}",
        }
        lines = [_directive(f"--{key}", value) for key, value in sbatch.items() if value is not None]
        return lines + [_option(text) for text in self.options]

    def command(self) -> list[str]:
        """List the words of the command that each process runs."""
        command = [self.python, "-P", "-m", "trainfw", "train", as_argument(self.path), *self.overrides]
        command += ["--run-dir", str(self.run_dir)]
        command += [] if self.devices is None else ["--devices", str(self.devices)]
        return command + accepting(self.accept)

    def _script(self, directives: Sequence[str], before: str, logs: str, command: str) -> str:
        lines = "\n".join(f"#SBATCH {line}" for line in directives)
        return f"""#!/bin/bash
{lines}

# Written by `trainfw launch slurm`. One process on each node; each sets Neuron's, EFA's and JAX's environment itself
# (`trainfw env` shows which), and those of UltraServers number themselves by their hosts' places in the torus.
# SIGTERM (scancel, preemption, {self.grace} s before the time limit) goes to the processes, which save and exit with
# 143. sbatch itself writes into the run's logs/, which must exist.
set -uo pipefail
{before}trap 'echo "$(date): SIGTERM; the processes save"; [[ -n ${{step:-}} ]] && kill -TERM "$step" 2>/dev/null' TERM
echo "$(date): job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${{SLURM_RESTART_COUNT:-0}} + 1))"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TRAINFW_PROCESS_COUNT=$SLURM_NTASKS
export TRAINFW_COORDINATOR=$head:${{TRAINFW_PORT:-$((41001 + SLURM_JOB_ID % 20000))}}

srun --kill-on-bad-exit=1 --output={logs}/rank-%t.log --open-mode=append \\
  {command} &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do  # the trap ended that wait, not the step
  wait "$step"; code=$?
done

# {TRY_AGAIN}: another process died, or nothing moved. 134, 137, 139: aborted, killed, crashed. The others: stopped by
# SIGTERM or another signal, but for SIGINT, and saved.
case $code in
  {" | ".join(map(str, _AGAIN))})
    if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) != RUNNING ]]; then
      echo "$(date): exit code $code; cancelled"
    elif ((${{SLURM_RESTART_COUNT:-0}} < {self.restarts})); then
      echo "$(date): exit code $code; requeued"
      trap - TERM  # by which Slurm ends this script now
      scontrol requeue "$SLURM_JOB_ID"
      sleep 60
    else
      echo "$(date): exit code $code after {self.restarts} restarts; giving up"
    fi ;;
  *) echo "$(date): exit code $code" ;;
esac
exit $code
"""


@dataclass
class SlurmArray:
    """Jobs that differ in their recipes and directories alone, as the tasks of one array.

    Raises UserError where they cannot be one.
    """

    jobs: Sequence[SlurmJob]
    directory: Path
    """Directory whose logs/ hold the script, and what it says."""
    at_once: int | None = None
    """Tasks that run at a time at most."""

    def __post_init__(self) -> None:
        if self.at_once is not None and self.at_once < 1:
            raise UserError(f"--at-once {self.at_once}: expected at least 1")
        if any(
            (job.nodes, job.tasks_per_node) != (self.jobs[0].nodes, self.jobs[0].tasks_per_node) for job in self.jobs
        ):
            raise UserError("the runs take different numbers of nodes, and the tasks of an array have the same")

    def script(self) -> str:
        """Write the sbatch script: that of the first job, with each task's own command and logs."""
        first, last = self.jobs[0], len(self.jobs) - 1
        most = "" if self.at_once is None else f"%{self.at_once}"
        cases = "".join(
            f"  {number}) logs={shlex.quote(_pattern(job.run_dir / 'logs'))}; run=({shlex.join(job.command())}) ;;\n"
            for number, job in enumerate(self.jobs)
        )
        output = f"{_pattern(self.directory / 'logs')}/slurm-%A_%a.log"
        before = f"case $SLURM_ARRAY_TASK_ID in\n{cases}esac\n"
        return first._script(first.directives(output, array=f"0-{last}{most}"), before, '"$logs"', '"${run[@]}"')

    @property
    def run_dir(self) -> Path:
        return self.directory


def _directive(option: str, value: object) -> str:
    """Quote an option for sbatch's lines: words end at white space, `#` begins a comment, a backslash escapes."""
    if value is True:
        return option
    text = str(value)
    if not re.fullmatch(r"[\w./:=,@%+-]+", text, re.ASCII):
        text = '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
    return f"{option}={text}" if option.startswith("--") else f"{option} {text}"


def _option(text: str) -> str:
    """Write one of `options` as a directive. Raises UserError for what is none."""
    found = re.fullmatch(r"(--[a-z][a-z0-9-]*)(?:[= ](.*))?|(-[A-Za-z])(.*)", text)
    if found is None:
        raise UserError(f"--sbatch {text!r:.80}: expected an option of sbatch, such as --exclude=trn-7")
    long, of_long, short, of_short = found.groups()
    value = of_long if long else of_short or None
    return _directive(long or short, True if value is None else value.strip())


def _pattern(path: Path) -> str:
    """Escape a path where Slurm expects a file name pattern."""
    return str(path).replace("%", "%%")


def submit(job: SlurmJob | SlurmArray) -> str:
    """Write the script into the run's logs/ and submit it; the job's number. Raises UserError without Slurm."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; --dry-run prints the script, to submit where Slurm is")
    script = job.run_dir / "logs" / SCRIPT
    script.parent.mkdir(parents=True, exist_ok=True)
    for each in job.jobs if isinstance(job, SlurmArray) else ():
        (each.run_dir / "logs").mkdir(parents=True, exist_ok=True)
    script.write_text(job.script(), encoding="utf-8")
    ran = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if ran.returncode:
        raise RunError(f"sbatch: {ran.stderr.strip() or ran.returncode}")
    return ran.stdout.strip().partition(";")[0]
