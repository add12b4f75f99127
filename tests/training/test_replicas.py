"""Replicas that differ in a bit are found."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from trainfw import RunError
from trainfw.training.faults import compare_replicas


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def array(mesh, spec, change=None):
    """Zeros on eight devices, of which one may have another bit."""
    sharding = NamedSharding(mesh, spec)
    parts = []
    for device, index in sharding.addressable_devices_indices_map((8, 4)).items():
        part = np.zeros((8, 4), np.float32)[index]
        if device.id == change:
            part = part.copy()
            part.view(np.int32)[0, 1] ^= 1  # too small for any sum to show
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays((8, 4), sharding, parts)


def test_equal_replicas(mesh):
    params = {"layers": {"a": array(mesh, P("fsdp")), "b": array(mesh, P())}, "c": array(mesh, P("data", "fsdp"))}
    compare_replicas(params, "equal")


def test_what_has_no_replica_cannot_differ(mesh):
    compare_replicas({"a": array(mesh, P("data", "fsdp"), change=3)}, "alone")


@pytest.mark.parametrize(
    ("spec", "named"), [(P(), r"layers\.a on \S*5 is not what 7"), (P("fsdp"), r"layers\.a\[4:8, 0:\] on \S*5 is not")]
)
def test_one_bit_is_found_and_named(mesh, spec, named):
    with pytest.raises(RunError, match=named):
        compare_replicas({"layers": {"a": array(mesh, spec, change=5)}}, "odd")


def test_bfloat16_and_scalars(mesh):
    one = jax.device_put(jnp.bfloat16(3), NamedSharding(mesh, P()))
    compare_replicas({"a": one}, "scalar")
