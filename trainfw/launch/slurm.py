from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfw.errors import TRY_AGAIN, RunError, UserError
from trainfw.launch.nodes import accepting, count_nodes
from trainfw.recipe import Recipe

SCRIPT = "launch.sbatch"
"""In the run's logs/."""

_TIME = re.compile(r"(?:\d+-\d+(?::\d+){0,2}|\d+(?::\d+){0,2})")
"""What sbatch(1) takes: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""


@dataclass(frozen=True)
class SlurmJob:
    """A job that trains a recipe, requeues itself when it was stopped for no fault of its own, and goes on."""

    recipe: str
    """As `trainfw train` takes it."""
    overrides: Sequence[str]
    run_dir: Path
    name: str
    nodes: int
    tasks_per_node: int = 1
    """Processes a node: one, but on nodes that several share."""
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    grace: int = 120
    """Seconds between SIGTERM and the time limit."""
    restarts: int = 100
    """How often it may requeue itself."""
    options: Sequence[str] = ()
    """Further options of sbatch, such as --exclude=trn-7."""
    devices: int | None = None
    """Simulate this many CPU devices in each process."""
    accept: Sequence[str] = ()
    """Keys of which the run is to go on with another value (`trainfw train --accept`)."""
    python: str = sys.executable

    def script(self) -> str:
        """The sbatch script."""
        logs = self.run_dir / "logs"
        sbatch = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node,
            "exclusive": "" if self.tasks_per_node == 1 else None,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "requeue": "",
            "open-mode": "append",  # a requeued job goes on in the same files
            "output": f"{_literal(logs)}/slurm-%j.log",
            "signal": f"TERM@{self.grace}",
        }
        lines = [_directive(key, value) for key, value in sbatch.items() if value is not None]
        command = [self.python, "-m", "trainfw", "train", self.recipe, *self.overrides, "--run-dir", str(self.run_dir)]
        if self.devices is not None:
            command += ["--devices", str(self.devices)]
        command += accepting(self.accept)
        directives = "\n".join(f"#SBATCH {line}" for line in [*lines, *self.options])
        return f"""#!/bin/bash
{directives}

# Written by `trainfw launch slurm`. One process on each node; each sets Neuron's, EFA's and JAX's environment itself
# (`trainfw env` shows which), and those of UltraServers number themselves by their hosts' places in the torus.
# SIGTERM (scancel, preemption, {self.grace} s before the time limit) goes to the processes, which save and exit with
# 143. sbatch itself writes into {logs}: it must exist.
set -uo pipefail
trap 'echo "$(date): SIGTERM; the processes save"; [[ -n ${{step:-}} ]] && kill -TERM "$step" 2>/dev/null' TERM
echo "$(date): job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${{SLURM_RESTART_COUNT:-0}} + 1))"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TRAINFW_PROCESS_COUNT=$SLURM_NTASKS
export TRAINFW_COORDINATOR=$head:${{TRAINFW_PORT:-$((41001 + SLURM_JOB_ID % 20000))}}

srun --kill-on-bad-exit=1 --output={shlex.quote(_literal(logs))}/rank-%t.log --open-mode=append \\
  {self._numbered()}{shlex.join(command)} &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do  # the trap ended that wait, not the step
  wait "$step"; code=$?
done

# 143: stopped by SIGTERM, and saved. {TRY_AGAIN}: another process died, or nothing moved. 134, 137, 139: aborted,
# killed, crashed.
case $code in
  {TRY_AGAIN} | 134 | 137 | 139 | 143)
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

    def _numbered(self) -> str:
        """Several processes on a node need other numbers than their node's."""
        if self.tasks_per_node == 1:
            return ""
        return """bash -c 'TRAINFW_PROCESS_INDEX=$SLURM_PROCID exec "$@"' - \\
  """


def _directive(key: str, value: object) -> str:
    text = str(value)
    return f"--{key}" + (f'="{text}"' if re.search(r"\s", text) else f"={text}" if text else "")


def _literal(path: Path) -> str:
    """For a file name pattern of Slurm's."""
    return str(path).replace("%", "%%")


def slurm_job(
    recipe: Recipe, path: str, overrides: Sequence[str], run_dir: Path, *, nodes: int | None, **options: Any
) -> SlurmJob:
    """A job for a recipe. Raises UserError for numbers and options that cannot be."""
    count = count_nodes(recipe, nodes)
    accepting(options.get("accept", ()))
    topology = recipe.hardware.load()
    neuron = topology is not None and topology.rules == "neuron"
    job = SlurmJob(path, overrides, run_dir, recipe.name, count, **options)
    if job.time is not None and not _TIME.fullmatch(job.time):
        raise UserError(f"--time {job.time}: expected what sbatch takes, such as 24:00:00 or 2-12")
    for option in job.options:
        if not option.startswith("-"):
            raise UserError(f"--sbatch {option}: expected an option of sbatch, such as --exclude=trn-7")
    if neuron and job.tasks_per_node > 1:
        raise UserError(f"--tasks-per-node {job.tasks_per_node}: an instance of Neuron takes one process")
    if any('"' in text for text in (str(job.run_dir), job.partition or "", job.account or "")):
        raise UserError("a name in the script's directives has a quotation mark")
    if any("\n" in text for text in (job.recipe, *job.overrides, *job.options, job.partition or "", job.account or "")):
        raise UserError("an argument has a line break")
    return job


def submit(job: SlurmJob) -> str:
    """Write the script into the run's logs/ and submit it; the job's number. Raises UserError without Slurm."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; --dry-run prints the script, to submit where Slurm is")
    script = job.run_dir / "logs" / SCRIPT
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(job.script(), encoding="utf-8")
    ran = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if ran.returncode:
        raise RunError(f"sbatch: {ran.stderr.strip() or ran.returncode}")
    return ran.stdout.strip().partition(";")[0]
