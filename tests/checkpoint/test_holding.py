"""Checkpoints read beside a run that deletes them."""

from __future__ import annotations

import contextlib
import fcntl
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainfw.checkpoint import CheckpointConfig, Checkpoints, SavedParameters, Vanished, steps_in, taking_the_next

SHAPE = (100,)
LIKE = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0]))


def save(checkpoints, step):
    params = {name: jnp.full(SHAPE, float(step)) for name in "ab"}
    checkpoints.save(step, params, {"step": jnp.int32(step)}, {})


@contextlib.contextmanager
def writing(directory):
    """A thread that saves on and on, and keeps the last one alone."""
    stop = threading.Event()
    checkpoints = Checkpoints(directory, CheckpointConfig(keep_last=1, max_failures=0))
    save(checkpoints, 1)
    checkpoints.wait()

    def write():
        step = 1
        while not stop.is_set():
            save(checkpoints, step := step + 1)
        checkpoints.close()

    thread = threading.Thread(target=write)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.parametrize("locks", [True, False])
def test_every_reader_gets_one_whole_checkpoint(tmp_path, monkeypatch, locks):
    """Where there are locks, at once; elsewhere, as in a store, the next one."""
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda *a: (_ for _ in ()).throw(OSError(95, "not supported")))
    whole = Checkpoints(tmp_path, CheckpointConfig(), read_only=True)

    def together():
        restored = whole.restore_params(max(whole.steps()), {"a": LIKE, "b": LIKE})
        return restored["a"], restored["b"]

    def one_by_one():
        saved = SavedParameters(tmp_path / str(steps_in(tmp_path)[-1]))
        return saved.read("a", LIKE), saved.read("b", LIKE)

    with writing(tmp_path), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(15):
            for read in (together, one_by_one):
                a, b = map(np.asarray, taking_the_next(read))
                assert (a == b).all()
    said = {str(warning.message).partition(": ")[2] for warning in warned if "deleted" in str(warning.message)}
    assert not said if locks else all("was deleted while it was read (its run" in text for text in said)
    assert len(steps_in(tmp_path)) == 1


def test_what_is_held_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=1))
    save(checkpoints, 1)
    checkpoints.wait()
    saved = SavedParameters(tmp_path / "1")
    for step in (2, 3):
        save(checkpoints, step)
    checkpoints.wait()
    np.testing.assert_array_equal(saved.read("a", LIKE), np.full(SHAPE, 1.0))
    del saved
    save(checkpoints, 4)
    checkpoints.close()
    assert steps_in(tmp_path) == [4]
    with pytest.raises(Vanished, match=r"1: was deleted while it was read .*checkpoint\.keep_last"):
        SavedParameters(tmp_path / "1")


def test_what_is_asked_for_by_its_step_has_no_next_one(tmp_path):
    def read():
        raise Vanished("gone")

    with pytest.raises(Vanished):
        taking_the_next(read, 3)
    with pytest.raises(Vanished), pytest.warns(UserWarning, match="gone; reading the next one"):
        taking_the_next(read)
