from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfw import UserError
from trainfw.parallel import AXES, Layout, ParallelConfig


def test_one_axis_fills():
    assert Layout.resolve(ParallelConfig(tensor=2), 8).fsdp == 4
    assert Layout.resolve(ParallelConfig(data=-1, fsdp=2), 8).data == 4


def test_the_product_is_spelled_out():
    with pytest.raises(UserError) as error:
        Layout.resolve(ParallelConfig(data=2, fsdp=4, tensor=4), 8, simulate=True)
    assert "pipeline(1) * data(2) * fsdp(4) * expert(1) * context(1) * tensor(4) = 32, but there are 8" in str(
        error.value
    )
    assert "--devices 32" in str(error.value)


@given(
    sizes=st.fixed_dictionaries({axis: st.integers(1, 4) for axis in AXES}),
    fill=st.sampled_from([None, *AXES]),
    devices=st.integers(1, 300),
)
def test_a_layout_has_exactly_the_devices_or_there_is_none(sizes, fill, devices):
    if fill:
        sizes[fill] = -1
    try:
        layout = Layout.resolve(ParallelConfig(**sizes), devices)
    except UserError:
        fixed = math.prod(s for s in sizes.values() if s > 0)
        assert devices % fixed if fill else fixed != devices
    else:
        assert math.prod(layout.sizes.values()) == devices
        assert all(layout.sizes[axis] == size for axis, size in sizes.items() if size > 0)
