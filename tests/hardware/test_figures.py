from __future__ import annotations

import pytest
from pydantic import ValidationError

from trainfw.hardware import load_topology
from trainfw.hardware.figures import Figure, parsed


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("96 GiB", 96 * 2**30),
        ("80 GB", 80e9),
        ("2.9 TB/s", 2.9e12),
        ("200 Gbit/s", 25e9),
        ("13,120 GiB/s", 13120 * 2**30),
        ("667 TFLOP/s", 667e12),
        ("20.8 PFLOP/s", 20.8e15),
        ("1.5 us", 1.5e-6),
        ("20 ms", 0.02),
        ("30 d", 30 * 86400),
        ("80 %", 0.8),
        ("2.32 $/h", 2.32),
        ("47.3%", 0.473),
        (" 16 ", 16),
        (16, 16),
        (8e9, 8e9),
        (1e16, 1e16),
        ("667e12", 667e12),
    ],
)
def test_quantities(text, number):
    assert parsed(text)[0] == pytest.approx(number, rel=1e-15)


@pytest.mark.parametrize(
    "text", ["", "GB/s", "1 GBs", "-1 GB", "1 2 GB", "1.GB/s", None, "nan", "many", "1e999", "1e-3"]
)
def test_what_is_not_a_quantity_is_refused(text):
    with pytest.raises(ValueError, match="expected a number and one of the units"):
        parsed(text)
    with pytest.raises(ValidationError):
        Figure(value=text, source="x")


# From the sources themselves, so that no file is compared with itself: units of one chip, one direction.
PUBLISHED = {
    "trn1.32xlarge": {"links.neuronlink.bandwidth": "96 GB/s", "network.bandwidth": "50 Gbit/s"},  # 384 / 4, 800 / 16
    "trn1n.32xlarge": {"links.neuronlink.bandwidth": "192 GB/s", "network.bandwidth": "100 Gbit/s"},  # 768 / 4
    "trn2.48xlarge": {
        "links.neuronlink.bandwidth": "256 GB/s",  # 1,024 / 4
        "network.bandwidth": "200 Gbit/s",
        "network.latency": "15 us",
        "host_memory": "2 TiB",
        "chip.peak_flops.bfloat16": "667 TFLOP/s",
        "chip.peak_flops.float8_e4m3": "1299 TFLOP/s",
        "chip.peak_flops.float32": "181 TFLOP/s",
        "chip.hbm_size": "96 GiB",
        "chip.hbm_bandwidth": "2.9 TB/s",
        "chip.core_overhead": "96 MB",
        "chip.collective_cores": "16",
    },
    "trn2-ultraserver": {"links.neuronlink-z.bandwidth": "128 GB/s", "host_memory": "8 TiB"},  # 256 / 2
    "trn3-gen2-ultraserver": {
        "links.server-switch.bandwidth": "256 GB/s",
        "links.rack-switch.bandwidth": "320 GB/s",
        "links.cross-rack.bandwidth": "128 GB/s",
        "network.bandwidth": "200 Gbit/s",
        "chip.peak_flops.bfloat16": "671 TFLOP/s",
        "chip.hbm_size": "144 GiB",
    },
    "inf2.xlarge": {"host_memory": "16 GiB", "chip.hbm_size": "32 GiB"},
    "inf2.8xlarge": {"host_memory": "128 GiB", "chip.hbm_size": "32 GiB", "price.hourly": "1.96786 $/h"},
    "inf2.24xlarge": {"host_memory": "384 GiB", "links.neuronlink.bandwidth": "96 GiB/s"},
    "c7g.16xlarge": {"host_memory": "128 GiB", "chip.hbm_bandwidth": "307.2 GB/s"},  # 8 x 38.4
    "c8g.24xlarge": {"host_memory": "192 GiB", "chip.hbm_bandwidth": "537.6 GB/s"},  # 12 x 44.8
    "inf2.48xlarge": {"links.neuronlink.bandwidth": "96 GiB/s", "chip.peak_flops.bfloat16": "190 TFLOP/s"},  # 192 / 2
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_are_the_published_ones(name):
    figures = load_topology(name).figures
    published = {key: parsed(value)[0] for key, value in PUBLISHED[name].items()}
    assert {key: figures[key].number for key in published} == published
