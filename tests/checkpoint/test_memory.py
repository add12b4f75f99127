from __future__ import annotations

import contextlib
import gc

import jax.numpy as jnp

from trainfw.checkpoint import CheckpointConfig, Checkpoints


def test_a_save_leaves_nothing_in_memory(tmp_path):
    """TensorStore's JSON is never freed: 48 lists a save."""
    params = {"a": jnp.arange(8.0)}
    with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig(keep_last=1))) as checkpoints:

        def lists_after(steps):
            for step in steps:
                checkpoints.save(step, params, {"step": jnp.int32(step)}, {})
                checkpoints.wait()
            gc.collect()
            return sum(type(thing) is list for thing in gc.get_objects())

        before = lists_after(range(1, 5))
        assert lists_after(range(5, 13)) - before < 80
