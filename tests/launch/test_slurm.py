"""The script that Slurm gets."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from trainfw import UserError, load_recipe
from trainfw.launch import slurm_job


def job(recipe="quickstart", overrides=(), run="runs/q", nodes=None, **options):
    return slurm_job(load_recipe(recipe, overrides), recipe, overrides, Path(run), nodes=nodes, **options)


def test_directives():
    script = job(nodes=4, time="2-12", partition="trn", options=["--exclude=trn-7"]).script()
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert directives == [
        "--job-name=quickstart",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--exclusive",
        "--time=2-12",
        "--partition=trn",
        "--requeue",
        "--open-mode=append",
        "--output=runs/q/logs/slurm-%j.log",
        "--signal=TERM@120",
        "--exclude=trn-7",
    ]


@pytest.mark.parametrize("recipe", ["quickstart", "llama3.1-405b-trn2-ultraservers"])
def test_it_is_bash(recipe):
    overrides = ["train.seed=3", 'data.source=["a b/*.txt", "it\'s.md"]']
    script = job(recipe, overrides).script()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    said = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command(script)}"], capture_output=True, text=True, check=True
    )
    words = said.stdout.splitlines()
    assert words[words.index("train") + 1 :][:3] == [recipe, *overrides]


def command(script):
    """The line that srun's processes run, as bash reads it."""
    return next(line for line in script.splitlines() if " train " in line).strip().removesuffix(" &")


def test_what_is_accepted_is_handed_on():
    assert command(job(accept=["optimizer.learning_rate", "train"]).script()).endswith(
        " --accept optimizer.learning_rate --accept train"
    )
    with pytest.raises(UserError, match=r"--accept adapter\.rank: cannot change in a run"):
        job(accept=["adapter.rank"])


def test_several_processes_a_node_are_numbered_by_task():
    assert "TRAINFW_PROCESS_INDEX=$SLURM_PROCID" in job(nodes=1, tasks_per_node=2).script()
    assert "TRAINFW_PROCESS_INDEX" not in job(nodes=2).script()


def test_a_node_for_each_instance():
    script = job("llama3.1-8b-trn2-ultraserver").script()
    assert "#SBATCH --nodes=4" in script
    assert "srun --kill-on-bad-exit=1" in script


def test_names_with_spaces_and_patterns():
    script = job(nodes=1, run="my runs/50%j", partition="a b").script()
    assert '#SBATCH --partition="a b"' in script
    assert '#SBATCH --output="my runs/50%%j/logs/slurm-%j.log"' in script
    assert "--output='my runs/50%%j/logs'/rank-%t.log" in script
    assert "--run-dir 'my runs/50%j'" in script


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "--nodes 0: expected at least 1"),
        ({"time": "tomorrow"}, "--time tomorrow: expected what sbatch takes"),
        ({"options": ["exclude=a"]}, "--sbatch exclude=a: expected an option"),
        ({"partition": "a\nb"}, "line break"),
        ({"partition": 'a"b'}, "quotation mark"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        job(**options)


def test_an_instance_takes_one_process():
    with pytest.raises(UserError, match="--tasks-per-node 4: an instance of Neuron takes one process"):
        job("llama3.1-8b-trn2-ultraserver", tasks_per_node=4)


def test_nodes_must_be_the_topologys():
    with pytest.raises(UserError, match=r"hardware.count = 1: 1 x trn2-ultraserver is 4 instances, not --nodes 3"):
        job("llama3.1-8b-trn2-ultraserver", nodes=3)
