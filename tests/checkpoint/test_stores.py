"""Checkpoints in S3, on a real server of its protocol."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request

import boto3
import jax
import pytest

from tests.helpers import Heard, losses, tiny_recipe, write_recipe
from trainfw import RunError, UserError, load_model
from trainfw.checkpoint import CheckpointConfig, SavedParameters, locate, steps_in
from trainfw.launch.local import _free_port
from trainfw.training import train

BUCKET = "checkpoints"


class Server:
    """Of this machine; what it stores is lost when it stops."""

    def __init__(self):
        self.port = _free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(self.endpoint, timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        self.client.create_bucket(Bucket=BUCKET)

    def stop(self):
        self.process.kill()
        self.process.wait()

    @property
    def client(self):
        return boto3.client("s3", endpoint_url=self.endpoint)

    def keys(self, prefix, bucket=BUCKET):
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]


@pytest.fixture(scope="session")
def server():
    server = Server()
    settings = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_MAX_ATTEMPTS": "2",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    server.start()
    yield server
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def prefix(request):
    """A place in the bucket for one test."""
    return "".join(c for c in request.node.name if c.isalnum())


def place(prefix):
    return f"checkpoint.directory=s3://{BUCKET}/{prefix}"


def run_here(recipe, run, **options):
    heard = Heard()
    train(recipe, devices=jax.devices()[:1], run_dir=run, reporter=heard, **options)
    return heard.notes


def test_a_run_goes_on_from_a_store(server, prefix, tmp_path):
    """In a new directory, as on another machine; bit for bit; and what it holds can be used."""
    overrides = ["checkpoint.every=4", "checkpoint.keep_last=1", "optimizer.schedule=constant"]
    straight = tmp_path / "straight"
    run_here(tiny_recipe(tmp_path, "train.steps=12", *overrides), straight)
    run_here(tiny_recipe(tmp_path, "train.steps=8", *overrides, place(prefix)), tmp_path / "first")
    assert not (tmp_path / "first" / "checkpoints").exists()
    assert {key.split("/")[1] for key in server.keys(prefix)} == {"8"}  # 4 was deleted
    recipe = tiny_recipe(tmp_path, "train.steps=12", *overrides, place(prefix))
    notes = run_here(recipe, tmp_path / "second", resume="must")
    assert any("at step 8" in note and note.startswith("resumed") for note in notes)
    both = losses(tmp_path / "first") | losses(tmp_path / "second")
    assert both == losses(straight)

    model, _ = load_model(tmp_path / "second")
    same, _ = load_model(straight)
    tokens = jax.numpy.arange(8)[None]
    assert (model(tokens) == same(tokens)).all()

    with pytest.raises(UserError, match=r"was trained with another recipe:\n  optimizer\.learning_rate"):
        run_here(tiny_recipe(tmp_path, "optimizer.learning_rate=0.5", place(prefix)), tmp_path / "third")
    with pytest.raises(UserError, match="already holds checkpoints up to step 12, which resume='never'"):
        run_here(recipe, tmp_path / "third", resume="never")


@pytest.mark.long
def test_a_copy_from_a_store_is_a_checkpoint(server, tmp_path):
    """In a bucket and a place that are called as the words of errors are."""
    recipe = tiny_recipe(tmp_path, "train.steps=4", "checkpoint.directory=s3://a-bucket/bucket")
    server.client.create_bucket(Bucket="a-bucket")
    run_here(recipe, tmp_path / "run")
    for key in server.keys("bucket/", "a-bucket"):
        file = tmp_path / "run" / "checkpoints" / key.removeprefix("bucket/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(read(server, key, "a-bucket"))
    copied = tiny_recipe(tmp_path, "train.steps=8")
    notes = run_here(copied, tmp_path / "run")
    assert any(note.startswith("resumed") and "at step 4" in note for note in notes)
    assert list(losses(tmp_path / "run")) == list(range(1, 9))
    with pytest.raises(UserError, match=r"its checkpoints, up to step 8, are in .*checkpoints, not in s3://a-bucket/b"):
        run_here(recipe, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "8" / "manifest.json").write_text('{"tag": {"missing": [1, ""]}}')
    with pytest.raises(RunError, match="8: is damaged: missing is missing"):
        SavedParameters(tmp_path / "run" / "checkpoints" / "8")


@pytest.mark.long
def test_two_processes_write_one_checkpoint(server, prefix, tmp_path):
    path = write_recipe(tmp_path, train={"steps": 8}, checkpoint={"every": 4})
    command = [sys.executable, "-m", "trainfw", "launch", "local", str(path), "parallel.fsdp=2", place(prefix)]
    done = subprocess.run([*command, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    directory = locate(tmp_path / "run", CheckpointConfig(directory=f"s3://{BUCKET}/{prefix}"))
    assert steps_in(directory) == [4, 8]
    there = {key.split("/")[3] for key in server.keys(f"{prefix}/8/params/ocdbt")}
    assert any("ocdbt.process_1" in key for key in server.keys(f"{prefix}/8/params")), there
    done = subprocess.run(
        [*command, "train.steps=12", "--run-dir", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(losses(tmp_path / "run")) == list(range(1, 13))


@pytest.mark.long
def test_what_a_kill_leaves_is_no_checkpoint(server, prefix, tmp_path):
    """Killed while objects of a checkpoint are there, but not all."""
    path = write_recipe(tmp_path, train={"steps": 20}, checkpoint={"every": 2})
    run = tmp_path / "run"
    command = [sys.executable, "-m", "trainfw", "train", str(path), place(prefix), "--devices", "1"]
    training = subprocess.Popen([*command, "--run-dir", str(run)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (torn := unfinished(server, prefix)):
        assert time.monotonic() < deadline
        assert training.poll() is None
    training.send_signal(signal.SIGKILL)
    training.wait()
    directory = locate(run, CheckpointConfig(directory=f"s3://{BUCKET}/{prefix}"))
    torn = unfinished(server, prefix)  # or it was finished in between
    assert not torn & {str(step) for step in steps_in(directory)}
    assert subprocess.run([*command, "--run-dir", str(run)], capture_output=True).returncode == 0
    straight = [*command[:5], "--devices", "1", "--run-dir", str(tmp_path / "straight")]
    assert subprocess.run(straight, capture_output=True).returncode == 0
    assert losses(run) == losses(tmp_path / "straight")
    assert not unfinished(server, prefix)


def unfinished(server, prefix):
    keys = [key.split("/")[1:] for key in server.keys(prefix)]
    return {key[0] for key in keys} - {key[0] for key in keys if key[1:] == ["commit_success.txt"]}


@pytest.mark.long
@pytest.mark.parametrize(
    "change",
    ["missing", "other bytes", "shorter"],
)
def test_a_damaged_object_is_seen(server, prefix, tmp_path, change):
    recipe = tiny_recipe(tmp_path, "train.steps=8", "checkpoint.every=4", place(prefix))
    run_here(recipe, tmp_path / "run")
    before = losses(tmp_path / "run")
    key = max(server.keys(f"{prefix}/8/params/ocdbt"), key=lambda key: len(read(server, key)))
    if change == "missing":
        server.client.delete_object(Bucket=BUCKET, Key=key)
    else:
        body = read(server, key)
        body = body[:-1] if change == "shorter" else bytes([body[0] ^ 1]) + body[1:]
        server.client.put_object(Bucket=BUCKET, Key=key, Body=body)
    directory = locate(tmp_path / "run", recipe.checkpoint)
    with pytest.raises(RunError, match=r"s3://checkpoints/.*/8: is damaged: params/ocdbt"):
        SavedParameters(directory / "8")
    again = tmp_path / ("run" if change == "missing" else "new")  # where nothing else knows the recipe
    notes = run_here(recipe, again)
    assert any("the checkpoint of step 8 is damaged: params/ocdbt" in note for note in notes)
    assert losses(again) == {step: loss for step, loss in before.items() if again.name == "run" or step > 4}
    assert steps_in(directory) == [4, 8]
    assert server.keys(f"{prefix}-damaged/8/")


def read(server, key, bucket=BUCKET):
    return server.client.get_object(Bucket=bucket, Key=key)["Body"].read()


@pytest.mark.long
def test_a_store_that_does_not_answer_fails_the_save_and_not_the_run(server, prefix, tmp_path):
    class Stopping(Heard):
        def row(self, row, steps):
            if row["step"] == 3:
                server.stop()
            if row["step"] == 9:
                server.start()

    recipe = tiny_recipe(tmp_path, "train.steps=12", "checkpoint={every: 2, max_failures: 10}", place(prefix))
    heard = Stopping()
    train(recipe, devices=jax.devices()[:1], run_dir=tmp_path / "run", reporter=heard)
    assert any("cannot be saved" in note and "the run goes on" in note for note in heard.notes)
    assert steps_in(locate(tmp_path / "run", recipe.checkpoint))[-1] == 12


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("s4://bucket/a", "checkpoint.directory: expected a path, or a store by s3:// or gs://"),
        ("s3://bucket", "expected a path, or a bucket and a place in it, such as s3://bucket/llama"),
        ("s3:///a", "expected a path, or a bucket and a place in it"),
        ("''", "expected a path, or a bucket"),
        ("elsewhere", "expected an absolute path"),
        ("s3:/bucket/a", "expected an absolute path"),
    ],
)
def test_places_that_cannot_be(where, message, tmp_path):
    with pytest.raises(UserError) as error:
        tiny_recipe(tmp_path, f"checkpoint.directory={where}")
    assert message in str(error.value)


def test_stores_that_do_not_answer(server, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="s3://no-such-bucket/a: The specified bucket does not exist"):
        steps_in(locate(tmp_path, CheckpointConfig(directory="s3://no-such-bucket/a")))
    alone = [sys.executable, "-m", "trainfw", "train", str(write_recipe(tmp_path)), place("a"), "--devices", "1"]
    environ = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{_free_port()}", "AWS_MAX_ATTEMPTS": "1"}
    done = subprocess.run([*alone, "--run-dir", str(tmp_path / "run")], env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert "s3://checkpoints/a: cannot be listed: Could not connect to the endpoint URL" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_store_whose_library_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match='gs://bucket/a: needs the package gcsfs: pip install "gcsfs>='):
        locate(tmp_path, CheckpointConfig(directory="gs://bucket/a"))


@pytest.mark.long
def test_another_directory(tmp_path):
    recipe = tiny_recipe(tmp_path, "train.steps=4", f"checkpoint.directory={tmp_path / 'elsewhere'}")
    run_here(recipe, tmp_path / "run")
    assert steps_in(tmp_path / "elsewhere") == [4]
    assert not (tmp_path / "run" / "checkpoints").exists()
    load_model(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="/file: is a file; checkpoints need a directory"):
        run_here(tiny_recipe(tmp_path, f"checkpoint.directory={tmp_path / 'file'}"), tmp_path / "other")
