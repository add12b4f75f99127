from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfw import UserError
from trainfw.parallel import AXES, Layout, ParallelConfig, nearest_divisors


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


@pytest.mark.parametrize(
    ("layout", "rows", "accumulation", "problem"),
    [
        (Layout(data=16, fsdp=32), 8192, 16, ""),
        (
            Layout(data=16, fsdp=32),
            512,
            16,
            "does not divide over data(16) * fsdp(32) * accumulation_steps(16) = 8,192; train.accumulation_steps=1 "
            "makes it divide; the nearest that do: 8,192",
        ),
        (
            Layout(fsdp=8),
            24,
            2,
            "does not divide over data(1) * fsdp(8) * accumulation_steps(2) = 16; train.accumulation_steps=1 "
            "makes it divide; the nearest that do: 16 or 32",
        ),
        (
            Layout(fsdp=8),
            12,
            1,
            "does not divide over data(1) * fsdp(8) * accumulation_steps(1) = 8; the nearest that do: 8 or 16",
        ),
    ],
)
def test_a_batch_that_does_not_divide_and_what_would(layout, rows, accumulation, problem):
    assert layout.batch_problem(rows, accumulation) == problem


@given(size=st.integers(1, 10_000), parts=st.integers(1, 5_000))
def test_nearest_divisors_divide(size, parts):
    found = [int(word) for word in nearest_divisors(size, parts).rpartition(": ")[2].split(", ")]
    assert found
    assert all(size % n == 0 and n <= parts for n in found)


def test_nearest_divisors():
    assert nearest_divisors(576, 256) == "; the nearest sizes that do: 64, 192"
    assert nearest_divisors(8, 16) == "; the nearest size that does: 8"
