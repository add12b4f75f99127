"""A mesh that is given, where the cores of its devices are known."""

from __future__ import annotations

import numpy as np
import pytest

from trainfw import UserError
from trainfw.hardware import load_topology
from trainfw.parallel import AXES, Layout, place, place_mesh
from trainfw.parallel.placement import seconds_per_byte


@pytest.mark.parametrize(
    ("hardware", "count", "layout"),
    [
        ("trn2.3xlarge", 1, Layout(fsdp=2, tensor=2)),
        ("trn2.48xlarge", 1, Layout(fsdp=4, tensor=16)),
        ("trn2.48xlarge", 1, Layout(fsdp=16, tensor=4)),
        ("trn2-ultraserver", 2, Layout(data=2, fsdp=16, tensor=16)),
        ("trn1.32xlarge", 1, Layout(fsdp=4, tensor=8)),
        ("h100-8", 2, Layout(data=2, tensor=8)),
    ],
)
def test_the_order_that_was_searched_covers_what_the_search_says(hardware, count, layout):
    found = place(load_topology(hardware, count=count), layout)
    mesh = place_mesh(found.topology, AXES, found.order)
    assert set(mesh.pieces) == set(found.pieces)
    for axis, pieces in found.pieces.items():
        assert seconds_per_byte(mesh.pieces[axis]) == pytest.approx(seconds_per_byte(pieces)), axis


def test_cores_that_are_no_box_are_refused():
    topology = load_topology("trn2.3xlarge")
    place_mesh(topology, ("x", "y"), np.array([[0, 3], [1, 2]]))
    with pytest.raises(UserError, match=r"mesh axis 'x': its devices stand for cores 0, 1, 3 of trn2\.3xlarge, which"):
        place_mesh(topology, ("x",), np.array([0, 1, 3]))
