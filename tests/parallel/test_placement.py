from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw import UserError
from trainfw.hardware import Topology, load_topology
from trainfw.parallel import AXES, Layout, Placement, group_problem, permute_problem, place

ULTRASERVER = load_topology("trn2-ultraserver")
POWERS = [2**n for n in range(9)]
LAYOUTS_OF_256 = [
    Layout(data=d, fsdp=f, context=c, tensor=256 // (d * f * c))
    for d in POWERS
    for f in POWERS
    for c in POWERS
    if d * f * c <= 256
]


def groups(placement: Placement, *axes: str) -> list[list[int]]:
    """The physical cores of every group over these axes together."""
    along = [AXES.index(axis) for axis in axes]
    size = math.prod(placement.order.shape[a] for a in along)
    return np.moveaxis(placement.order, along, range(-len(along), 0)).reshape(-1, size).tolist()


def placed_or_refused(topology: Topology, layout: Layout) -> tuple[Placement | None, str]:
    try:
        return place(topology, layout), ""
    except UserError as error:
        return None, str(error)


def parts(placement: Placement) -> dict[str, tuple[str, ...]]:
    return {axis.axis: axis.parts for axis in placement.axes}


@pytest.mark.parametrize("layout", LAYOUTS_OF_256, ids=str)
def test_every_layout_of_an_ultraserver_is_placed_legally_or_refused_with_the_nearest(layout):
    start = time.monotonic()
    placement, refusal = placed_or_refused(ULTRASERVER, layout)
    if placement is None:
        assert "Nearest: parallel." in refusal
    else:
        assert sorted(placement.order.ravel()) == list(range(256))
        for axis in placement.axes:
            assert axis.problem is None
            assert all(group_problem(ULTRASERVER, group) is None for group in groups(placement, axis.axis))
        # Tensor's traffic waits for nobody: inside a chip, then along a row, then over a pair of neighbouring rows.
        inside = {4: ("core",), 16: ("core", "column"), 32: ("core", "column", "row.pair")}
        if layout.tensor in inside:
            assert parts(placement)["tensor"] == inside[layout.tensor]
    assert time.monotonic() - start < 2


def test_the_usual_layouts_keep_the_plain_order():
    for layout in (Layout(fsdp=64, tensor=4), Layout(data=4, fsdp=16, tensor=4), Layout(fsdp=16, tensor=16)):
        assert place(ULTRASERVER, layout).order.ravel().tolist() == list(range(256))


def test_tensor_32_pairs_rows_that_are_neighbours():
    first, second = groups(place(load_topology("trn2.48xlarge"), Layout(fsdp=2, tensor=32)), "tensor")
    assert sorted(first) == [*range(16), *range(48, 64)]
    assert sorted(second) == list(range(16, 48))


def test_data_and_pipeline_cross_the_network_and_the_rest_stays_on_neuronlink():
    cluster = load_topology("trn2-ultraserver", count=4)
    placed = parts(place(cluster, Layout(data=4, fsdp=64, tensor=4)))
    assert placed == {"data": ("network",), "fsdp": ("column", "row", "node"), "tensor": ("core",)}
    placed = parts(place(cluster, Layout(pipeline=2, data=2, fsdp=64, tensor=4)))
    assert {part.partition(".")[0] for axis in ("pipeline", "data") for part in placed[axis]} == {"network"}
    placed = parts(place(cluster, Layout(fsdp=16, expert=4, tensor=16)))
    assert placed["tensor"] == ("core", "column")
    assert "network" not in placed["expert"]


def test_the_programs_own_traffic_decides():
    layout = Layout(fsdp=16, context=4, tensor=4)
    assert parts(place(ULTRASERVER, layout))["tensor"] == ("core",)
    heavy_context = place(ULTRASERVER, layout, {"context": 1e12, "tensor": 1.0, "fsdp": 1.0})
    assert parts(heavy_context)["context"] == ("core",)


def test_an_axis_of_permutes_follows_direct_links_and_its_report_says_so():
    placement = place(ULTRASERVER, Layout(fsdp=4, context=16, tensor=4))
    context = next(axis for axis in placement.axes if axis.axis == "context")
    assert context.ring
    assert context.permutes
    pairs = [pair for group in groups(placement, "context") for pair in zip(group, [*group[1:], group[0]])]
    assert permute_problem(ULTRASERVER, pairs) is None


def test_bandwidth_and_hops_are_of_the_slowest_link_and_the_farthest_chips():
    fsdp, tensor = place(ULTRASERVER, Layout(fsdp=64, tensor=4)).axes
    assert tensor.hops == 0
    assert tensor.bandwidth == ULTRASERVER.dim("core").bandwidth
    # Two links of 128 GB/s to the neighbouring instances, for the 4 cores of a chip.
    assert fsdp.bandwidth == 2 * 128e9 / 4
    assert fsdp.hops == 2 + 2 + 2
    data = place(load_topology("trn2.48xlarge", count=2), Layout(data=2, fsdp=16, tensor=4)).axes[0]
    assert data.bandwidth == 6.25e9  # 50 Gbit/s a core


def test_no_legal_order_names_the_axis_and_the_nearest_layout():
    with pytest.raises(UserError) as error:
        place(load_topology("trn2.48xlarge"), Layout(fsdp=16, context=2, tensor=2))
    assert "tensor = 2 cannot be legal beside the others" in str(error.value)
    assert "Nearest: parallel.context=1 parallel.tensor=4" in str(error.value)
    place(load_topology("trn2.48xlarge"), Layout(fsdp=16, tensor=4))


def test_another_number_of_devices_is_refused():
    with pytest.raises(UserError, match=r"fsdp\(8\) is 8 devices, but 1 x trn2.48xlarge has 64"):
        place(load_topology("trn2.48xlarge"), Layout(fsdp=8))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_layout_of_any_cluster_is_a_permutation_of_its_cores(data):
    name = data.draw(st.sampled_from(["trn2.48xlarge", "trn2-ultraserver", "trn1.32xlarge", "h100-8", "inf2.48xlarge"]))
    count = 1 if name == "inf2.48xlarge" else data.draw(st.sampled_from([1, 2, 3, 4]))
    topology = load_topology(name, count=count)
    sizes, left = dict.fromkeys(AXES, 1), topology.cores
    for axis in AXES[:-1]:
        sizes[axis] = data.draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]), label=axis)
        left //= sizes[axis]
    sizes["tensor"] = left
    layout = Layout(**sizes)
    placement, refusal = placed_or_refused(topology, layout)
    if placement is None:
        assert "cannot be legal" in refusal
        return
    assert sorted(placement.order.ravel().tolist()) == list(range(topology.cores))
    assert placement.order.shape == tuple(layout.sizes.values())
    assert all(axis.problem is None for axis in placement.axes)
    assert {axis.axis for axis in placement.axes} == {axis for axis in AXES if layout.sizes[axis] > 1}


def test_parameters_change_the_rates():
    slow = load_topology("trn2-ultraserver", parameters={"links.neuronlink-z.bandwidth": "64 GB/s"})
    fast, slower = (place(t, Layout(fsdp=64, tensor=4)) for t in (ULTRASERVER, slow))
    assert slower.seconds > fast.seconds
    assert dataclasses.asdict(slower.axes[0])["bandwidth"] == 2 * 64e9 / 4


def test_the_rows_of_a_host_are_one_share_of_the_batch():
    topology = load_topology("trn2-ultraserver")
    mixture = Layout(fsdp=4, expert=16, tensor=4)
    assert place(topology, Layout(fsdp=64, tensor=4)).hosts_read_shares
    assert place(topology, mixture, {"fsdp": 1.0, "expert": 1e12, "tensor": 1e11}).hosts_read_shares
    assert not place(topology, mixture, {"fsdp": 1e12, "expert": 1.0, "tensor": 1e11}).hosts_read_shares
