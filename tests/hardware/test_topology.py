from __future__ import annotations

import pytest

from trainfw.hardware import load_topology, peak_flops, topology_names


@pytest.mark.parametrize("name", topology_names())
def test_every_topology_loads_and_names_its_sources(name):
    topology = load_topology(name)
    assert topology.devices > 0
    assert topology.sources
    assert topology.device_kinds


def test_known_peaks_and_no_guesses():
    assert peak_flops("NC_v3d", "bfloat16") == 667e12 / 4
    assert peak_flops("NC_v3d", "float32") is None
    assert peak_flops("cpu", "bfloat16") is None
