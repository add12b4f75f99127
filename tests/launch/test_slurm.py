"""The script that Slurm gets."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw import UserError, load_recipe
from trainfw.launch import SlurmJob


def job(recipe="quickstart", overrides=(), run="runs/q", nodes=None, **options):
    return SlurmJob(load_recipe(recipe, overrides), recipe, overrides, Path(run), nodes=nodes, **options)


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
    with pytest.raises(UserError, match=r"accept: adapter\.rank: cannot change in a run"):
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
        ({"time": "1\n#x"}, r"--time '1\\n#x': holds the character U\+000A"),
        ({"options": ["exclude=a"]}, "--sbatch 'exclude=a': expected an option"),
        ({"options": ["--comment=a\nrm"]}, r"--sbatch '--comment=a\\nrm': holds the character U\+000A"),
        ({"partition": "a\nb"}, r"--partition 'a\\nb': holds the character U\+000A"),
        ({"account": "a\x85b"}, r"--account 'a\\x85b': holds the character U\+0085"),
        ({"run": "runs/a\n#SBATCH --account=x"}, "--run-dir .*U\\+000A"),
        ({"run": "runs/a\\b"}, "--run-dir .*no backslash"),
        ({"run": "runs/a[1]"}, r"runs/a\[1\].*: checkpoints cannot be kept under a name with '\['"),
        ({"run": "s3://b/a"}, "'s3:' names a store, and a run is a directory"),
        ({"overrides": ["checkpoint.directory=/a*"]}, r"checkpoint.directory.*checkpoints cannot be kept .* '\*'"),
        ({"overrides": ["train.sample_prompt=a\rb"]}, r"train.sample_prompt: holds U\+000D"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        job(**options)


PRINTABLE = [*"ab1 \"'\\$`#;&|<>(){}[]*?~!%^=,:-é", "$(id)", "${HOME}", "%j", "../", "--"]
CONTROLS = [*"\t\n\r\0\x7f\x85\u2028", "\udcff"]
HOSTILE = st.one_of(
    *[
        st.lists(st.sampled_from(letters), max_size=9).map("".join)
        for letters in [PRINTABLE] * 12 + [PRINTABLE + CONTROLS]
    ]
)
QUICKSTART = load_recipe("quickstart")
CONF = """ClusterName=t
SlurmctldHost=localhost
SlurmctldPort=1
MessageTimeout=2
AuthType=auth/none
CredType=cred/none
NodeName=localhost
PartitionName=t Nodes=ALL
"""


def sbatch_words(line):
    """As sbatch reads a line's words (schedmd/slurm src/sbatch/opt.c `_get_argument`)."""
    words, word, quote, escaped = [], None, "", False
    for letter in line:
        if escaped:
            word, escaped = (word or "") + letter, False
        elif letter == "\\":
            escaped = True
        elif quote:
            word, quote = (word, "") if letter == quote else (word + letter, quote)
        elif letter in "\"'":
            word, quote = word or "", letter
        elif letter == "#":
            break
        elif letter.isspace():
            words, word = words + ([] if word is None else [word]), None
        else:
            word = (word or "") + letter
    assert not quote
    return words + ([] if word is None else [word])


@functools.cache
def fakes(directory):
    """Programs that stand for Slurm's and for Python; this one says its arguments."""
    programs = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": "echo head",
        "squeue": "echo RUNNING",
        "py thon": "printf '%s\\0' \"$@\" > said",
    }
    for name, text in programs.items():
        (directory / name).write_text(f"#!/bin/bash\n{text}\n")
        (directory / name).chmod(0o755)
    return directory


FIELDS = dict.fromkeys(("run", "partition", "account", "comment", "path", "override"), HOSTILE)


@settings(max_examples=60, deadline=None)
@given(given=st.fixed_dictionaries(FIELDS), tasks=st.integers(1, 2))
def test_whatever_is_given_reaches_the_script_as_it_is_or_is_refused(given, tasks, tmp_path_factory):
    directory = fakes(tmp_path_factory.getbasetemp())
    path, overrides, run = given["path"], [f"train.sample_prompt={given['override']}"], Path(f"/r{given['run']}")
    options = {name: given[name] for name in ("partition", "account")} | {"options": [f"--comment={given['comment']}"]}
    python = str(directory / "py thon")
    try:
        made = SlurmJob(QUICKSTART, path, overrides, run, nodes=1, python=python, tasks_per_node=tasks, **options)
    except UserError:
        assert set("".join(given.values())) & {*CONTROLS, "\\"} or set(given["run"]) & set("*?[")
        return
    script = made.script()
    lines = script.split("\n\n")[0].splitlines()[1:]
    words = dict(word.partition("=")[::2] for line in lines for word in sbatch_words(line.removeprefix("#SBATCH")))
    assert len(words) == len(lines)
    expected = {"--partition": given["partition"], "--account": given["account"], "--comment": given["comment"].strip()}
    assert {name: words[name] for name in expected} == expected
    assert words["--output"].replace("%%", "%") == f"{run}/logs/slurm-%j.log"
    environ = {"PATH": f"{directory}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a"}
    environ |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    done = subprocess.run(["bash"], input=script, text=True, cwd=directory, env=environ, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    said = (directory / "said").read_text().split("\0")[:-1]
    path = f"./{path}" if path.startswith("-") else path
    assert said == ["-P", "-m", "trainfw", "train", path, *overrides, "--run-dir", str(run)]


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs Debian's slurm-wlm")
def test_sbatch_itself_reads_the_same(tmp_path):
    """Which says what it has read before it finds no cluster."""
    value = "a b\"#'$x\\y`z`"
    (tmp_path / "slurm.conf").write_text(CONF)
    (tmp_path / "script").write_text(
        job(run="/r \"'#%j", partition=value, options=[f"--comment={value}", "-C gpu"]).script()
    )
    said = subprocess.run(
        ["sbatch", "-vv", str(tmp_path / "script")],
        env=os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")},
        capture_output=True,
        text=True,
    ).stderr
    read = dict(re.findall(r"^sbatch: ([a-z-]+) +: (.*)$", said, re.MULTILINE))
    assert (read["partition"], read["comment"], read["constraint"]) == (value, value, "gpu")
    assert read["output"] == "/r \"'#%%j/logs/slurm-%j.log"


def test_an_instance_takes_one_process():
    with pytest.raises(UserError, match="--tasks-per-node 4: an instance of Neuron takes one process"):
        job("llama3.1-8b-trn2-ultraserver", tasks_per_node=4)


def test_nodes_must_be_the_topologys():
    with pytest.raises(UserError, match=r"hardware.count = 1: 1 x trn2-ultraserver is 4 instances, not --nodes 3"):
        job("llama3.1-8b-trn2-ultraserver", nodes=3)
