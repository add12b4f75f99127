"""Whatever the JSON of a checkpoint is changed to, it is restored as it was saved, or refused in words."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainfw import RunError, UserError
from trainfw.checkpoint import CheckpointConfig, Checkpoints, Identity, SavedParameters
from trainfw.checkpoint.manifest import find_damage

PARAMS = {"a": {"kernel": jnp.arange(12.0).reshape(3, 4)}, "b": jnp.ones(2)}
REST = {"step": jnp.int32(3), "opt_state": (PARAMS, None)}
META = {"data": {"next_row": 24, "order": "a"}, "recipe": {"name": "a"}, "cut": {"b": 1}, "guard": {"mean": [1.0, 2.0]}}
IDENTITY = Identity("0" * 32)
OF_ITEMS = ("_METADATA", "_sharding", "array_metadatas/process_0")
FILES = [f"{item}/{name}" for item in ("params", "rest") for name in OF_ITEMS]
FILES += ["manifest.json", "meta/metadata", "_CHECKPOINT_METADATA"]
ODD = st.sampled_from(
    [None, True, -1, 0, 7, 2**70, 1.5, "", "a", "/dev/zero", "../..", "\0", [], {}, [[]], {"a": None}, [1, 2, 3]]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    with contextlib.closing(Checkpoints(directory, CheckpointConfig(), identity=IDENTITY)) as checkpoints:
        checkpoints.save(3, PARAMS, REST, META)
    return directory


def places(tree, path=()):
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def edited(tree, path, value):
    """With `value` at a place; where that is ..., without it."""
    if not path:
        return None if value is ... else value
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return tree


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(FILES), consistent=st.booleans(), value=ODD | st.just(...))
def test_any_edit_is_seen_or_harmless(saved, tmp_path, data, name, consistent, value):
    directory = tmp_path / "checkpoints"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(saved, directory)
    file, manifest = directory / "3" / name, directory / "3" / "manifest.json"
    held = json.loads(file.read_text())
    file.write_text(json.dumps(edited(held, data.draw(st.sampled_from(list(places(held)))), value)))
    if consistent and file != manifest and name in (listed := json.loads(manifest.read_text()))["sha256"]:
        listed["sha256"][name] = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
        manifest.write_text(json.dumps(listed))
    for read in (restored, read_alone):
        with contextlib.suppress(RunError, UserError):
            for got, right in zip(*map(jax.tree.leaves, read(directory)), strict=True):
                np.testing.assert_array_equal(got, right)


def restored(directory):
    with contextlib.closing(Checkpoints(directory, CheckpointConfig(), identity=IDENTITY)) as checkpoints:
        step = checkpoints.newest_whole(lambda text: None)
        assert step == 3
        params, rest, meta = checkpoints.restore(step, PARAMS, REST)
        assert {"data", "recipe"} <= set(meta)
        return (params, rest), (PARAMS, REST)


def read_alone(directory):
    saved = SavedParameters(directory / "3", IDENTITY)
    like = jax.ShapeDtypeStruct((3, 4), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return saved.read("a.kernel", like), PARAMS["a"]["kernel"]


def test_without_edits_it_is_restored(saved):
    assert find_damage(saved / "3", identity=IDENTITY) is None
    for read in (restored, read_alone):
        for got, right in zip(*map(jax.tree.leaves, read(saved)), strict=True):
            np.testing.assert_array_equal(got, right)
