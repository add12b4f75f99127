"""Malformed and impossible input: exit 2, one readable message, no traceback, nothing written."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import trainfw.cli
import trainfw.errors
from tests.helpers import write_recipe
from trainfw.cli import main


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["trainfw", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


# (a line put into the recipe, or None; arguments; what the message must say)
OVERRIDES = {
    "unknown key": ("train.stepz=5", "command line: train.stepz = 5: unknown key; did you mean 'train.steps'?"),
    "unknown section": ("trian.steps=5", "command line: trian.steps = 5: unknown key; did you mean 'train.steps'?"),
    "key of another section": ("train.learning_rate=1", "did you mean 'optimizer.learning_rate'?"),
    "word for a number": ("train.steps=many", "train.steps = 'many': expected a valid integer"),
    "float for an integer": ("train.steps=1.5", "train.steps = 1.5: expected a valid integer"),
    "quoted number": ("train.steps='5'", "train.steps = '5': expected a valid integer"),
    "boolean for a number": ("train.steps=true", "train.steps = True: expected a valid integer"),
    "zero steps": ("train.steps=0", "train.steps = 0: expected greater than or equal to 1"),
    "negative batch": ("train.global_batch_size=-8", "train.global_batch_size = -8: expected greater"),
    "null where required": ("train.steps=null", "train.steps = null: expected a valid integer"),
    "no equals sign": ("train.steps", "expected key=value, such as train.steps=50"),
    "nothing before the equals sign": ("=5", "expected key=value"),
    "section for a value": ("train.steps.more=5", "train.steps = {'more': 5}: expected a valid integer"),
    "value for a section": ("train=5", "train = 5: expected a section, `train: {key: value}`"),
    "word for a section": ("model=tiny", "model = 'tiny': expected a section, `model: {preset: tiny}`"),
    "word for one of two types": ("model.qk_norm=yes", "model.qk_norm = 'yes': expected a valid boolean; did you mean"),
    "broken YAML value": ("name=[a", "not valid YAML"),
    "unknown preset": ("model.preset=llama3.1-8", "did you mean 'llama3.1-8b'?"),
    "unknown optimizer": ("optimizer.name=adam", "expected one of adamw, lion, adafactor, muon; did you mean 'adamw'?"),
    "unknown schedule": ("optimizer.schedule=cosin", "did you mean 'cosine'?"),
    "unknown dtype": ("train.compute_dtype=bf16", "expected one of float32, bfloat16"),
    "what may be left out": ("train.matmul_dtype=fp9", "train.matmul_dtype = 'fp9': expected one of fp8, null"),
    "unknown remat": ("train.remat=ful", "did you mean 'full'?"),
    "learning rate of zero": ("optimizer.learning_rate=0", "expected greater than 0"),
    "decay_steps without wsd": ("optimizer.decay_steps=5", "decay_steps belongs to schedule wsd"),
    "adam rate without muon": ("optimizer.adam_learning_rate=0.1", "adam_learning_rate belongs to muon"),
    "decay pattern that matches nothing": (
        "optimizer.weight_decay_exclude=[lyers.*]",
        "command line: optimizer.weight_decay_exclude: 'lyers.*' matches none",
    ),
    "accumulation does not divide": ("train.accumulation_steps=3", "does not divide train.global_batch_size = 8"),
    "heads do not divide": ("model.num_kv_heads=3", "model.num_kv_heads"),
    "odd head_dim": ("model.head_dim=15", "model.head_dim"),
    "two axes to fill": ("parallel.tensor=-1", "only one axis may be -1, but fsdp and tensor are"),
    "axis of zero": ("parallel.data=0", "expected a positive size, or -1 to fill"),
    "unknown axis": ("parallel.fdsp=2", "did you mean 'parallel.fsdp'?"),
    "layout larger than the devices": ("parallel.fsdp=16", "fsdp(16) * expert(1) * context(1) * tensor(1) = 16, but"),
    "layout that does not divide": ("parallel.data=3", "the fixed axes multiply to 3, which does not divide 8 devices"),
    "batch does not divide": ("train.global_batch_size=12", "does not divide over data(1) * fsdp(8)"),
    "heads over tensor": (
        "parallel.tensor=8",
        "command line (parallel.tensor): model.num_heads = 4: does not divide over parallel.tensor = 8; the nearest "
        "size that does: 4",
    ),
    "layers over stages": (
        "parallel={pipeline: 4, fsdp: 2}",
        "model.num_layers = 2: does not divide over pipeline(4); the nearest numbers of stages that do: 2",
    ),
    "microbatches over stages": (
        "parallel={pipeline: 2, fsdp: 4, pipeline_microbatches: 3}",
        "parallel.pipeline_microbatches = 3: expected a multiple of parallel.pipeline = 2",
    ),
    "interleave without stages": ("parallel.interleave=2", "needs a pipeline of more than one stage"),
    "experts of a dense model": ("parallel.expert=2", "spreads experts, and the model has none (model.moe); use fsdp"),
    "experts over devices": (
        ["model.moe={num_experts: 6, experts_per_token: 2, normalize_weights: true}", "parallel.expert=4"],
        "model.moe.num_experts = 6: does not divide over parallel.expert = 4; the nearest sizes that do: 2, 3",
    ),
    "sequence over context": (
        ["data.sequence_length=36", "parallel.context=8"],
        "data.sequence_length = 36: does not divide over 2 * context(8); the nearest lengths that do: 32 or 48",
    ),
    "rule for an unknown dim": (
        "parallel.rules={embd: [fsdp]}",
        "parallel.rules: embd: unknown dim name; did you mean",
    ),
    "rule over an unknown axis": ("parallel.rules={embed: [fsd]}", "unknown axis 'fsd'; did you mean 'fsdp'?"),
    "unknown topology": ("hardware.topology=trn2.48xl", "did you mean 'trn2.48xlarge'?"),
    "topology of another size": (
        "hardware.topology=trn2.48xlarge",
        "simulate them with --devices 64 (trainfw.simulate)",
    ),
    "count without a topology": ("hardware.count=2", "needs hardware.topology"),
    "vocabulary smaller than the tokenizer's": ("model.vocab_size=100", "expected 258 or more"),
    "no such source": ("data.source=nowhere/*.txt", "command line: data.source 'nowhere/*.txt' matches no file"),
    "evaluation of text": ("evaluation={}", "command line: evaluation.metric = 'rouge_l': needs prompts"),
    "split that leaves nothing": ("data.validation_fraction=1.5", "expected less than 1"),
    "tokenizer without its file": ("data.tokenizer.name=file", "`name: file` needs path"),
    "no such tokenizer": (
        "data.tokenizer={name: file, path: nowhere.json}",
        "command line: data.tokenizer.path: no tokenizer at nowhere.json",
    ),
    "not a number": ("optimizer.learning_rate=.nan", "learning_rate = nan: expected"),
    "infinite": ("optimizer.learning_rate=.inf", "learning_rate = inf: expected a finite number"),
    "a tag that lies": ("train.steps=!!bool maybe", "not valid YAML"),
    "nested too deeply": ("train.steps=" + "[" * 3000, "train.steps: is nested too deeply: more than 64 levels"),
    "seed beyond 32 bits": ("train.seed=18446744073709551616", "expected less than or equal to"),
    "head too large to index": ("model.head_dim=100000000000000", "expected less than or equal to"),
    "vast": (
        "train.log_every=1" + "0" * 30,
        "train.log_every: expected at most 4,294,967,296, not a number of 31 digits",
    ),
    "cache in no directory": ("data.cache_dir=/proc/1", "data.cache_dir = '/proc/1': cannot be written: No such file"),
    "more than the machine has": (
        ["data.sequence_length=16777216", "train.global_batch_size=1048576"],
        "train.global_batch_size = 1048576: rows of 16,777,216 tokens take at least",
    ),
    "NUL": ('data.cache_dir="a\\0"', "holds a NUL character"),
    "empty part of a key": ("train..steps=5", "expected key=value"),
    "empty source": ("data.source=", "data.source = null: expected"),
    "source too long": ("data.source=" + "x" * 5000, "longer than file systems take"),
    "axis named twice": ("parallel.rules={embed: [fsdp, fsdp]}", "names axis 'fsdp' twice"),
    "dim over a taken axis": (
        "parallel={tensor: 2, rules: {embed: [tensor]}}",
        "are both sharded over mesh axis 'tensor'",
    ),
    "dim that stays split": ("parallel.rules={mlp: [fsdp]}", "this dim is always split over tensor"),
    "decay longer than the run": (
        "optimizer={schedule: wsd, decay_steps: 99}",
        "command line: optimizer.decay_steps = 99 is longer than the 8 steps",
    ),
    "name with a slash": ("name=a/b", "name = 'a/b': expected"),
}

FILES = {
    "empty": ("", "is empty"),
    "a list": ("- a\n- b\n", "expected `key: value` lines"),
    "broken YAML": ("model: {preset: tiny\ntrain: x\n", "not valid YAML"),
    "a tab": ("model:\n\tpreset: tiny\n", "recipe.yaml:2: not valid YAML"),
    "a key with dots": ("train.steps: 5\nmodel: {preset: tiny}\n", "write it as a section, train: {steps: ...}"),
    "a mapping that contains itself": ("model: &m {preset: tiny, x: *m}\n", "contains itself"),
    "a preset of another type": ("model: {preset: 7}\ndata: {sequence_length: 8}\n", "model.preset = 7: expected"),
    "a key written twice": ("name: a\nmodel: {preset: tiny}\nname: b\n", "name: is written twice"),
    "no model": ("name: a\ndata: {sequence_length: 8}\n", "model: is required"),
    "line numbers": (
        "model: {preset: tiny}\ndata: {sequence_length: 8}\ntrain:\n  step: 5\n",
        "recipe.yaml:4: train.step = 5: unknown key; did you mean 'train.steps'?",
    ),
    "extends nothing": (
        "extends: recipe2.yaml\n",
        "extends = 'recipe2.yaml': no such file; did you mean 'recipe.yaml'",
    ),
    "extends itself": ("extends: recipe.yaml\n", "comes back to itself: recipe.yaml -> recipe.yaml"),
    "extends a number": ("extends: 5\n", "expected the path of another recipe"),
}


def check(capsys, code: int, message: str, tmp_path) -> None:
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 3
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", OVERRIDES)
def test_bad_overrides(name, tmp_path, monkeypatch, capsys):
    override, message = OVERRIDES[name]
    overrides = [override] if isinstance(override, str) else override
    code = run(monkeypatch, "train", str(write_recipe(tmp_path)), *overrides, "--run-dir", str(tmp_path / "run"))
    check(capsys, code, message, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_bad_files(name, tmp_path, monkeypatch, capsys):
    text, message = FILES[name]
    (tmp_path / "recipe.yaml").write_text(text)
    code = run(monkeypatch, "train", str(tmp_path / "recipe.yaml"), "--run-dir", str(tmp_path / "run"))
    check(capsys, code, message, tmp_path)


ARGUMENTS = {
    "no such recipe": (["train", "quickstrat"], "no such recipe; did you mean 'quickstart'?"),
    "resume word": (["train", "quickstart", "--resume", "yes"], "expected auto, never or must"),
    "no devices": (["train", "quickstart", "--devices", "0"], "expected a positive number"),
    "devices after jax": (["train", "quickstart", "--devices", "3"], "jax is already running with 8"),
    "resume must, nothing there": (["train", "quickstart", "--resume", "must"], "no checkpoint to resume from"),
    "run in a store": (
        ["train", "quickstart", "--run-dir", "s3://a/b"],
        "s3:/a/b: 's3:' names a store, and a run is a",
    ),
    "eval of no run": (["eval", "nowhere"], "is not a run directory"),
    "eval of a recipe": (["eval", "quickstart"], "has not been trained here: trainfw train quickstart"),
    "export of a recipe": (
        ["export", "quickstart", "--out", "x"],
        "quickstart: is a recipe, where a run or a model is",
    ),
    "merge of a recipe": (["merge", "quickstart", "--out", "x"], "has not been trained here: trainfw train quickstart"),
    "generate from a recipe": (["generate", "quickstart", "--prompt", "x"], "has not been trained here: trainfw train"),
    "from a recipe": (["train", "quickstart", "model.from=quickstart"], "model.from: quickstart: is a recipe, where"),
    "accept of no key": (["train", "quickstart", "--accept", "lr"], "did you mean 'optimizer.learning_rate'?"),
    "accept of a shape": (["launch", "local", "quickstart", "--accept", "adapter.rank"], "cannot change in a run"),
    "a key as an option": (["train", "quickstart", "--steps", "50"], "take no dashes: train.steps=50\n"),
    "a section as an option": (
        ["train", "quickstart", "--hardware", "trn2.3xlarge"],
        "hardware is a section of a recipe, whose keys take no dashes, such as hardware.topology=trn2.3xlarge\n",
    ),
    "hardware to plan for": (["plan", "quickstart", "--hardware", "trn2.3x"], "did you mean 'trn2.3xlarge'?"),
    "a count to plan for": (["plan", "quickstart", "--count", "2"], "needs hardware.topology"),
    "a whole key as an option": (["plan", "quickstart", "--train.steps", "50"], "take no dashes: train.steps=50\n"),
    "a key with its value": (
        ["train", "q", "--optimizer.learning_rate=1e-3"],
        "dashes: optimizer.learning_rate=1e-3\n",
    ),
    "another trainer's option": (["check", "quickstart", "--lr", "1"], "dashes: optimizer.learning_rate=1\n"),
    "an option of other units": (["train", "quickstart", "--epochs", "3"], "train.steps=VALUE (a run is as many steps"),
    "a short option": (["train", "quickstart", "-n", "5"], "or a key as KEY=VALUE, such as train.steps=50"),
    "keys as options to launch": (["launch", "local", "q", "--steps=5"], "take no dashes: train.steps=5\n"),
    "generate from no run": (["generate", "nowhere", "--prompt", "x"], "no such file or directory"),
    "recipe of no name": (["train", ""], "the path is empty"),
    "recipe too long": (["train", "x" * 5000], "ame too long"),
    "devices beyond count": (["train", "quickstart", "--devices", "99999999999999"], "2048 at most"),
    "unknown command": (["trian"], "No such command"),
    "unknown option": (["train", "quickstart", "--device", "2"], "No such option: --device; did you mean --devices?"),
    "tokenizer of nothing": (["tokenizer", "train", "nowhere.txt", "--out", "t"], "nowhere.txt"),
    "tokenizer too small": (["tokenizer", "train", "python-stdlib", "--out", "t", "--vocab-size", "9"], "9"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments(name, tmp_path, monkeypatch, capsys):
    arguments, message = ARGUMENTS[name]
    monkeypatch.chdir(tmp_path)
    code = run(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_working_directory_that_is_gone_is_named(tmp_path):
    gone = tmp_path / "gone"
    code = "import os, sys; os.rmdir(os.getcwd()); from trainfw.cli import command; command()"
    gone.mkdir()
    ran = subprocess.run([sys.executable, "-c", code, "train", "quickstart"], cwd=gone, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (2, "error: the working directory is gone; change to one that is there\n")


def test_a_run_is_found_by_its_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").touch()
    (tmp_path / "recipe.yaml").write_text("extends: quickstart\nname: mine\n")
    monkeypatch.chdir(tmp_path)
    for given in ("mine", "recipe.yaml"):
        assert run(monkeypatch, "generate", given, "--prompt", "x") == 2
        assert "did you mean 'runs/mine'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    ["data.source=nowhere", "data.tokenizer={name: file, path: nowhere}", "evaluation={}", "adapter={from: nowhere}"],
)
def test_what_is_not_there_is_said_before_jax_is(override, tmp_path):
    code = f"""
import sys
from trainfw.cli import main
sys.argv = ["trainfw", "train", "quickstart", {override!r}]
try:
    main()
except SystemExit as end:
    assert end.code == 2
assert "jax" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.startswith(f"error: command line: {re.split('[.=]', override)[0]}.")


def test_a_warning_of_ours_is_said_in_words(capsys):
    """Not as Python shows it, with the line of code."""
    others: list[str] = []
    show = trainfw.cli._warned(lambda message, *_: others.append(message))
    show("this is odd", UserWarning, trainfw.errors.__file__, 1)
    show("theirs", UserWarning, pytest.__file__, 1)
    assert (capsys.readouterr().err, others) == ("warning: this is odd\n", ["theirs"])


@pytest.mark.parametrize("command", [("doctor",), ("train", "quickstart")], ids=lambda command: command[0])
def test_a_platform_that_jax_does_not_have(command, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpux")
    ran = subprocess.run([sys.executable, "-m", "trainfw", *command], capture_output=True, text=True, cwd=tmp_path)
    said = "JAX_PLATFORMS = 'cpux': jax has no such platform here; did you mean 'cpu'?; it has cpu; without"
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: {said}")
    assert ran.stderr.count("\n") == 1
    if command == ("doctor",):
        assert f"backend            none: {said}" in ran.stdout
        assert "neuron plugin" in ran.stdout
