"""A run with a script's own objective, optimizer, data, callbacks and loggers."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.helpers import Heard, losses, quicker, tiny_recipe, write_recipe
from tests.own.pieces import Doubled, rows, scaled_signs
from tests.own.test_pieces import Kept
from trainfw import Callback, RunError, UserError, load_model, load_recipe, train

ROWS = [row["text"] for row in rows()]
RECIPES = Path(__file__).parents[2] / "recipes"


class StopsAt(Callback):
    """Stops at a step, or fails there; keeps what it heard."""

    def __init__(self, at, error=None):
        self.at, self.error, self.heard = at, error, []

    def step(self, step, metrics):
        self.heard.append(("step", step, metrics["loss"].value()))
        if step == self.at and self.error is not None:
            raise self.error
        return "enough" if step == self.at else None

    def validation(self, step, validation, state):
        self.heard.append(("validation", step, validation.loss))

    def save(self, step, path):
        self.heard.append(("save", step, path.name))

    def end(self, step, state):
        self.heard.append(("end", step, int(state.step)))


DOUBLED = Doubled()


def run(directory, *overrides, objective=DOUBLED, data=ROWS, scale=1.0, **more):
    optimizer = functools.partial(scaled_signs, scale=scale)
    recipe = tiny_recipe(directory.parent, "train.steps=6", "optimizer.learning_rate=1e-3", *overrides)
    pieces = {"objective": objective, "optimizer": optimizer, "data": data}
    return train(recipe, run_dir=directory, devices=jax.devices()[:1], **pieces, **more)


def test_a_run_stopped_by_a_callback_goes_on_as_one_never_stopped(tmp_path):
    whole, part, kept, stops = tmp_path / "whole", tmp_path / "part", Kept(), StopsAt(3)
    run(whole)
    result = run(part, callbacks=[stops], loggers=[kept])
    assert (result.step, result.stopped) == (3, "StopsAt at step 3: enough")
    assert [event[:2] for event in stops.heard if event[0] != "step"] == [
        ("validation", 0),
        ("save", 3),
        ("validation", 3),
        ("end", 3),
    ]
    assert {row["step"]: row["loss"] for row in kept.rows if "loss" in row} == losses(part)
    recorded = load_recipe(part)
    assert recorded.objective.name == "tests.own.pieces:Doubled"
    assert recorded.optimizer.options == {"scale": 1.0}
    assert recorded.data.source == "in-memory:list"
    for other, said in (
        ({"objective": Doubled(3.0)}, r"objective.options.factor: 2.0 there, 3.0 here"),
        ({"objective": None}, r"objective.name: 'tests.own.pieces:Doubled' there, 'next_token' here"),
        ({"scale": 2.0}, r"optimizer.options.scale: 1.0 there, 2.0 here"),
        ({"data": ROWS[1:]}, r"the data has changed"),
    ):
        with pytest.raises(UserError, match=said):
            run(part, **other)
    assert run(part).stopped is None
    assert losses(part) == losses(whole)
    model, _ = load_model(part)
    assert model.config == load_recipe(part).model


class Never(Callback):
    def validation(self, step, validation, state):
        return "not worth it"


def test_a_run_stopped_before_its_first_step_says_that_nothing_is_saved(tmp_path):
    heard = Heard()
    assert run(tmp_path / "run", callbacks=[Never()], reporter=heard).step == 0
    assert heard.notes[-1] == "stopped by Never at step 0: not worth it; no step is done, and nothing is saved"


def test_a_callback_that_fails_ends_the_run_with_its_last_step_saved(tmp_path):
    with pytest.raises(RunError, match=r"callback StopsAt at step 2: step: KeyError: 'x'; what was saved is kept"):
        run(tmp_path / "run", callbacks=[StopsAt(2, KeyError("x"))])
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def broken():
    yield from ROWS[:40]
    raise ValueError("no more")


class Unheard(Kept):
    def __init__(self, key):
        super().__init__()
        self.key = key

    def write(self, rows):
        super().write(rows)
        if any(row["step"] >= 3 and self.key in row for row in rows):
            raise RuntimeError("HTTP 503")


@pytest.mark.parametrize("what", ["a stream that ends", "a stream that fails", "a logger", "a logger at the end"])
def test_what_was_learnt_is_saved_when_a_scripts_own_code_fails(tmp_path, what):
    endless = ("train.steps=500", "train.validation_batches=0", "checkpoint.every=1000")
    overrides, more, said = {
        "a stream that ends": (endless, {"data": lambda: iter(ROWS[:40])}, "the data has ended after 40 documents"),
        "a stream that fails": (endless, {"data": broken}, "ValueError: no more; what was saved is kept"),
        "a logger": ((), {"loggers": [Unheard("loss")]}, "HTTP 503"),
        "a logger at the end": ((), {"loggers": [Unheard("validation_loss")]}, "HTTP 503"),
    }[what]
    with pytest.raises(RunError, match=said):
        run(tmp_path / "run", *overrides, **more)
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert max(losses(tmp_path / "run")) == saved > 0


PAST = [[300, number] * 20 for number in range(60)]


@pytest.mark.parametrize("data", [PAST, lambda: iter(PAST)], ids=["rows", "stream"])
def test_tokens_past_the_embedding_are_refused(tmp_path, data):
    overrides = ("train.validation_batches=0",) if callable(data) else ()
    with pytest.raises(UserError, match=r"has token 300; expected ids below model.vocab_size = 258"):
        run(tmp_path / "run", *overrides, data=data)


def test_a_run_on_a_stream_reads_it_again_and_goes_on(tmp_path):
    settings = ("train.validation_batches=0",)
    run(tmp_path / "whole", *settings, data=lambda: iter(ROWS))
    run(tmp_path / "part", *settings, data=lambda: iter(ROWS), callbacks=[StopsAt(3)])
    heard = Heard()
    run(tmp_path / "part", *settings, data=iter(ROWS), reporter=heard)
    assert any("documents again, to go on after them" in note for note in heard.notes)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    with pytest.raises(UserError, match=r"train.validation_batches = 2: of a stream nothing is held out"):
        run(tmp_path / "other", data=iter(ROWS))


@pytest.mark.parametrize("name", quicker(["own_model", "own_loss", "own_data", "own_optimizer"], ["own_model"]))
def test_the_scripts_run(tmp_path, name):
    command = [sys.executable, str(RECIPES / f"{name}.py"), str(write_recipe(tmp_path)), f"name={name}"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert f"done: step 8, saved in runs/{name}" in output
    assert f"{name}:" in (tmp_path / "runs" / name / "recipe.yaml").read_text() or name == "own_data"
    assert (tmp_path / "losses.csv").is_file() == (name == "own_data")
