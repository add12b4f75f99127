"""What is called saved can be opened."""

from __future__ import annotations

import contextlib
import os

import jax.numpy as jnp
import pytest

from tests.helpers import Heard, tiny_recipe
from trainfw import RunError, UserError, train
from trainfw.checkpoint import CheckpointConfig, Checkpoints, check_name
from trainfw.checkpoint.manager import find_absent, shapes_of

PARAMS = {"a": {"kernel": jnp.arange(12.0).reshape(3, 4)}, "b": jnp.zeros((), jnp.bfloat16)}
REST = {"step": jnp.int32(3), "opt_state": (PARAMS, None, {}, ()), "rng": jnp.arange(2, dtype=jnp.uint32)}
NONE_FORGIVEN = CheckpointConfig(max_failures=0)


def save(directory, config=NONE_FORGIVEN):
    with contextlib.closing(Checkpoints(directory, config)) as checkpoints:
        checkpoints.save(3, PARAMS, REST, {})


def test_what_was_saved_is_found(tmp_path):
    save(tmp_path)
    for item, tree in {"params": PARAMS, "rest": REST}.items():
        assert find_absent(tmp_path / "3" / item, shapes_of(tree)) is None
    assert set(shapes_of(PARAMS)) == {"a.kernel", "b"}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({**PARAMS, "c": PARAMS["b"]}, "c is not among what was written"),
        ({**PARAMS, "b": jnp.float32(0)}, "b was written as bfloat16 [], not float32 []"),
        ({**PARAMS, "a": {"kernel": jnp.zeros((4, 4))}}, "a.kernel was written as <f4 [3, 4], not float32 [4, 4]"),
    ],
)
def test_what_was_not_is_said(tmp_path, tree, said):
    save(tmp_path)
    assert find_absent(tmp_path / "3" / "params", shapes_of(tree)) == said


@pytest.mark.parametrize("name", ["a[1]", "a\\b"])
def test_a_library_that_loses_arrays_fails_the_save(tmp_path, name):
    """Orbax takes the directory's own name for a pattern, and merges nothing."""
    with pytest.raises(RunError, match=r"step 3 cannot be saved: params: a\.kernel is not among what was written"):
        save(tmp_path / name)
    assert not list((tmp_path / name).glob("*3*"))


@pytest.mark.parametrize("name", ["a[1]", "a\\b", "a*", "a?b", "a\nb", "a\x1bb"])
@pytest.mark.parametrize("where", ["run", "cwd", "checkpoint.directory"])
def test_names_that_lose_a_run_are_refused_before_it_begins(tmp_path, monkeypatch, name, where):
    recipe = tiny_recipe(tmp_path)
    place = tmp_path / name
    place.mkdir()
    if where == "cwd":
        monkeypatch.chdir(place)
    if where == "checkpoint.directory":
        directory = recipe.checkpoint.model_copy(update={"directory": str(place)})
        recipe = recipe.model_copy(update={"checkpoint": directory})
    run = {"run": place, "cwd": "run", "checkpoint.directory": tmp_path / "run"}[where]
    with pytest.raises(
        UserError, match=r"checkpoints cannot be kept under a name with '.*' in it.*another run_dir \(--run-dir\)"
    ):
        train(recipe, run_dir=run, reporter=Heard())
    assert not list(place.iterdir())
    assert not os.path.exists(tmp_path / "run")


@pytest.mark.parametrize("name", ["a b", "a]", "é", "a'\"$(b)", "s3:", "%41", "{a}", "~"])
def test_other_names_are_taken(tmp_path, name):
    check_name(tmp_path / name)
    save(tmp_path / name)
    with contextlib.closing(Checkpoints(tmp_path / name, NONE_FORGIVEN, read_only=True)) as checkpoints:
        assert (checkpoints.restore(3, PARAMS, REST)[0]["a"]["kernel"] == PARAMS["a"]["kernel"]).all()


def test_a_pipe_that_orbax_would_wait_on_is_moved_away(tmp_path):
    """Whatever step it is of: Orbax reads this file of all."""

    def opened():
        return contextlib.closing(Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep_last=3)))

    def save(checkpoints, step):
        checkpoints.save(step, {"a": jnp.arange(8.0)}, {"step": jnp.int32(step)}, {})
        checkpoints.wait()

    with opened() as checkpoints:
        for step in (1, 2):
            save(checkpoints, step)
    file = tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
    file.unlink()
    os.mkfifo(file)
    said = []
    with opened() as checkpoints:
        assert checkpoints.newest_whole(said.append) == 2
        save(checkpoints, 3)
        assert checkpoints.steps() == [2, 3]
    assert "checkpoints/1 is no checkpoint; moved to" in said[0]
