from __future__ import annotations

import collections
import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import tiny_recipe
from trainfw.errors import UserError
from trainfw.hardware import Topology, load_topology, peak_flops, topology_names
from trainfw.hardware.topology import _files

NAMES = topology_names()
EACH = [(name, lnc) for name in NAMES for lnc in load_topology(name).chip.device_kinds]

# `neuron-ls` of trn1.32xlarge and of trn2.48xlarge: CONNECTED DEVICES of devices 0 to 15.
TORUS = [
    [12, 3, 4, 1], [13, 0, 5, 2], [14, 1, 6, 3], [15, 2, 7, 0],
    [0, 7, 8, 5], [1, 4, 9, 6], [2, 5, 10, 7], [3, 6, 11, 4],
    [4, 11, 12, 9], [5, 8, 13, 10], [6, 9, 14, 11], [7, 10, 15, 8],
    [8, 15, 0, 13], [9, 12, 1, 14], [10, 13, 2, 15], [11, 14, 3, 12],
]  # fmt: skip

# Totals that the source rounds, by how much at most. All others are exact.
ROUNDED = {
    ("trn2.48xlarge", "float32"): 0.05e15,  # one decimal of a PFLOP/s
    ("trn2.48xlarge", "float8_e4m3"): 0.05e15,
    ("trn2-ultraserver", "float32"): 0.05e15,
    ("trn2-ultraserver", "float8_e4m3"): 4 * 0.05e15,  # four times the rounded figure of an instance
}


def computed(topology: Topology, what: str) -> float:
    if what in ("chips", "cores"):
        return float(getattr(topology, what))
    if what == "physical_cores":
        return topology.chips * topology.chip.cores
    per_core = getattr(topology, what, None) or topology.peak_flops(what)
    assert per_core is not None
    return per_core * topology.cores


@pytest.mark.parametrize("name", NAMES)
def test_totals_are_those_of_the_source(name):
    topology, totals = load_topology(name), _files(name)[0].totals
    assert totals
    for what, figure in totals.items():
        if what in ("chips", "physical_cores", "cores"):
            assert computed(topology, what) == figure.number, what
        else:
            slack = ROUNDED.get((name, what), 0.0)
            assert computed(topology, what) == pytest.approx(figure.number, rel=1e-12, abs=slack), what


def test_every_large_topology_has_totals_of_cores_memory_and_compute():
    for name in set(NAMES) - {"cpu", "h100-8", "trn2.3xlarge", "c7g.16xlarge", "c8g.24xlarge"}:
        assert {"chips", "cores", "hbm_size", "hbm_bandwidth", "float32"} <= set(_files(name)[0].totals), name


@pytest.mark.parametrize(("name", "lnc"), EACH)
def test_every_figure_parses_and_names_its_source(name, lnc):
    topology = load_topology(name, lnc=lnc)
    assert topology.sources
    for key, figure in {**topology.figures, **_files(name)[0].totals}.items():
        assert figure.number > 0, key
        for claim in (figure, *figure.also):
            assert claim.source, key


@pytest.mark.parametrize(("name", "lnc"), EACH)
def test_groups_that_documents_list_cover_the_instance_once(name, lnc):
    topology = load_topology(name, lnc=lnc)
    for split_of, splits in topology.splits.items():
        for split in splits:
            assert sorted(itertools.chain(*split.order)) == list(range(topology.dim(split_of).size))
        assert len({part for split in splits for part in split.parts}) == 2 * len(splits)
    for group in topology.groups or ():
        covered: dict[str, int] = collections.defaultdict(lambda: 1)
        for part in itertools.chain(*group.cover):
            dim, _, piece = part.partition(".")
            split = topology.split(dim, piece) if piece else None
            outer = split is not None and piece == split.parts[0]
            covered[dim] *= (
                topology.dim(dim).size if split is None else len(split.order) if outer else len(split.order[0])
            )
            assert split is None or piece in split.parts
        assert covered == {dim.name: dim.size for dim in topology.dims if dim.inside_instance}


def neighbours(topology: Topology, chip: int) -> set[int]:
    return {other for other in range(topology.chips) if topology.chip_distance(chip, other) == 1}


@pytest.mark.parametrize("name", ["trn1.32xlarge", "trn1n.32xlarge", "trn2.48xlarge"])
def test_torus_of_16_as_neuron_ls_lists_it(name):
    topology = load_topology(name)
    assert [neighbours(topology, chip) for chip in range(16)] == [set(chips) for chips in TORUS]
    assert len(list(topology.links())) == 32


def test_inferentia_is_a_ring():
    topology = load_topology("inf2.48xlarge")
    assert [neighbours(topology, chip) for chip in range(12)] == [{(i - 1) % 12, (i + 1) % 12} for i in range(12)]
    assert len(list(topology.links())) == 12
    assert not list(load_topology("inf2.xlarge").links())


def test_half_of_it_is_a_chain():
    topology = load_topology("inf2.24xlarge")
    assert [neighbours(topology, chip) for chip in range(6)] == [{i - 1, i + 1} & set(range(6)) for i in range(6)]
    assert len(list(topology.links())) == 5


def test_a_price_is_of_one_unit_alone():
    """What a topology extends has its own price; and where no dated source gives one, there is none."""
    assert load_topology("trn1.32xlarge").dollars_per_hour == 21.5
    assert load_topology("trn1n.32xlarge").dollars_per_hour == 24.78
    assert load_topology("trn1.32xlarge", count=4).dollars_per_hour == 86
    assert load_topology("inf2.xlarge", parameters={"price.hourly": "1.5 $/h"}).dollars_per_hour == 1.5
    for name in ("trn2.48xlarge", "trn2-ultraserver", "c8g.24xlarge", "cpu"):
        assert load_topology(name).dollars_per_hour is None, name
        assert load_topology(name).price is None, name
    for name in NAMES:
        if (price := load_topology(name).price) is not None:
            assert re.fullmatch(r"20\d\d-\d\d-\d\d", price.date), name
            assert "us-east-1" in price.terms, name


def test_a_cpu_alone_has_no_peak():
    """JAX calls every CPU `cpu`: whose peak holds, nobody knows."""
    assert peak_flops("cpu", "float32") is None
    assert peak_flops("NC_v2", "bfloat16") == 95e12  # of Inferentia2 and of Trainium1


def test_ultraserver_is_four_tori_joined_in_rings():
    topology = load_topology("trn2-ultraserver")
    for chip in range(64):
        node, device = divmod(chip, 16)
        around = [((node - 1) % 4) * 16 + device, ((node + 1) % 4) * 16 + device]
        assert neighbours(topology, chip) == {node * 16 + other for other in TORUS[device]} | set(around)
    links = list(topology.links())
    assert len(links) == 192
    assert sum(link.dim == "node" for link in links) == 64
    assert {link.bandwidth for link in links if link.dim == "node"} == {128e9}
    assert {link.bandwidth for link in links if link.dim != "node"} == {256e9}


def test_trainium3_joins_equal_places_across_racks():
    gen1, gen2 = load_topology("trn3-gen1-ultraserver"), load_topology("trn3-gen2-ultraserver")

    def across(topology: Topology) -> set[tuple[int, int | str]]:
        per_server = topology.cores_per_instance // topology.cores_per_chip
        found = [link for link in topology.links() if link.dim == "rack"]
        assert all(isinstance(link.b, int) and (link.b - link.a) % per_server == 0 for link in found)
        return {(link.a // per_server, int(link.b) // per_server) for link in found}

    assert across(gen1) == {(0, 2), (1, 3)}
    assert across(gen2) == {(i, i + 18) for i in range(18)}
    # Every chip has a port into the switch of its server and one into that of its rack.
    for topology in (gen1, gen2):
        ports = collections.Counter(link.a for link in topology.links() if isinstance(link.b, str))
        assert set(ports.values()) == {2}
        assert len(ports) == topology.chips


def test_core_links_agree_with_the_links_between_chips():
    topology, core_links = load_topology("trn2.48xlarge"), _files("trn2.48xlarge")[0].core_links
    assert sorted(itertools.chain(*core_links)) == list(range(64))
    joined = collections.Counter(frozenset(core // 4 for core in pair) for pair in core_links)
    assert joined == collections.Counter(frozenset((link.a, link.b)) for link in topology.links())


def reach(topology: Topology, start: int) -> dict[int, int]:
    """Hops from a chip to every other by breadth-first search over the links; through a switch is one hop."""
    ends: dict[int | str, list[int | str]] = collections.defaultdict(list)
    for link in topology.links():
        ends[link.a].append(link.b)
        ends[link.b].append(link.a)

    def next_to(chip: int) -> set[int]:
        beyond = [ends[end] if isinstance(end, str) else [end] for end in ends[chip]]
        return {int(other) for other in itertools.chain(*beyond)} - {chip}

    hops, edge = {start: 0}, {start}
    while edge:
        edge = {other for chip in edge for other in next_to(chip)} - set(hops)
        hops |= dict.fromkeys(edge, max(hops.values()) + 1)
    return hops


@pytest.mark.parametrize("name", NAMES)
def test_distance_is_the_shortest_way_over_links(name):
    topology = load_topology(name)
    starts = range(topology.chips) if topology.chips <= 64 else (0, 17, 71, 72, 143)
    for start in starts:
        hops = reach(topology, start)
        assert hops == {chip: topology.chip_distance(start, chip) for chip in range(topology.chips)}


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_core_is_its_coordinates(data):
    name, lnc = data.draw(st.sampled_from(EACH))
    joined = "network.bandwidth" in load_topology(name).figures
    topology = load_topology(name, lnc=lnc, count=data.draw(st.integers(1, 5 if joined else 1)))
    core = data.draw(st.integers(0, topology.cores - 1))
    place = topology.coordinates(core)
    assert list(place) == [dim.name for dim in reversed(topology.dims)]
    back = 0
    for dim in topology.dims:
        assert 0 <= place[dim.name] < dim.size
        back = back * dim.size + place[dim.name]
    assert back == core


@pytest.mark.parametrize(("name", "lnc"), EACH)
def test_coordinates_are_distinct(name, lnc):
    topology = load_topology(name, lnc=lnc)
    assert len({tuple(topology.coordinates(core).values()) for core in range(topology.cores)}) == topology.cores
    assert topology.cores == math.prod(dim.size for dim in topology.dims)
    assert topology.cores_per_instance * topology.instances == topology.cores


def test_a_count_of_units_adds_a_network_around_them():
    topology = load_topology("trn2.48xlarge", count=4)
    assert (topology.cores, topology.instances, topology.chips) == (256, 4, 64)
    assert topology.dims[0].name == "network"
    assert topology.dims[0].bandwidth == 25e9
    assert topology.chip_distance(0, 16) == 1
    assert topology.chip_distance(0, 17) == 2
    assert load_topology("cpu", count=8).cores == 8


def test_logical_cores():
    two, one = load_topology("trn2.48xlarge"), load_topology("trn2.48xlarge", lnc=1)
    assert (two.lnc, two.cores, one.cores) == (2, 64, 128)
    assert two.hbm_size == 24 * 2**30 == 2 * one.hbm_size
    assert two.core_overhead == 192e6 == 2 * one.core_overhead
    assert (two.device_kinds, one.device_kinds) == (("NC_v3d",), ("NC_v3",))
    # The cores of a chip share what moves between them.
    assert two.dim("core").bandwidth * 4 == one.dim("core").bandwidth * 8 == 2.9e12
    assert [split.parts for split in one.splits["core"]] == [("half", "quad"), ("fourth", "pair")]
    assert [split.parts for split in two.splits["core"]] == [("half", "pair")]
    assert load_topology("trn3-gen2-ultraserver").device_kinds == ("NC_v4d",)


def test_known_peaks_and_no_guesses():
    assert peak_flops("NC_v3d", "bfloat16") == 667e12 / 4
    assert peak_flops("NC_v3", "bfloat16") == 667e12 / 8
    assert peak_flops("NC_v2", "bfloat16") == 95e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak_flops("NC_v3d", "int8") is None
    assert peak_flops("cpu", "bfloat16") is None
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") is None


def test_parameters_replace_figures():
    halved = load_topology("trn2.48xlarge", parameters={"links.neuronlink.bandwidth": "128 GB/s"})
    assert halved.dim("row").bandwidth == 128e9 == load_topology("trn2.48xlarge").dim("row").bandwidth / 2
    assert halved.figures["links.neuronlink.bandwidth"].source == "the recipe"
    assert load_topology("trn2.48xlarge", parameters={"chip.hbm_size": "8 GB"}).hbm_size == 2e9
    share = load_topology("trn2.48xlarge", parameters={"chip.matmul_efficiency": "80 %"})
    assert share.figures["chip.matmul_efficiency"].number == 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "trn2.48xlarg"}, "topology 'trn2.48xlarg': unknown; did you mean 'trn2.48xlarge'?"),
        ({"name": "inf2.48xlarge", "count": 2}, "2 x inf2.48xlarge: no network joins them; expected count = 1"),
        ({"name": "trn2.3xlarge", "count": 2}, "no network joins them"),
        ({"name": "trn2.48xlarge", "count": 0}, "count = 0: expected 1 to 1,048,576"),
        ({"name": "trn2.48xlarge", "count": 10**8}, "count = 100000000: expected 1 to 1,048,576"),
        ({"name": "trn1.32xlarge", "lnc": 2}, "lnc = 2: trn1.32xlarge has LNC 1 only"),
        ({"name": "trn2.48xlarge", "lnc": 8}, "lnc = 8: trn2.48xlarge has LNC 2 or 1 only"),
        (
            {"name": "trn2.48xlarge", "parameters": {"links.neuronlink.bandwith": "1 GB/s"}},
            "parameters.links.neuronlink.bandwith: trn2.48xlarge has no such figure; did you mean "
            "'links.neuronlink.bandwidth'?",
        ),
        (
            {"name": "trn2.48xlarge", "parameters": {"chip.hbm_size": "96 gigabytes"}},
            "parameters.chip.hbm_size = '96 gigabytes': expected a number and one of the units",
        ),
        (
            {"name": "trn2.48xlarge", "parameters": {"links.neuronlink.bandwidth": "0 GB/s"}},
            "parameters.links.neuronlink.bandwidth = '0 GB/s': expected more than 0",
        ),
    ],
)
def test_what_does_not_exist_is_refused(arguments, message):
    with pytest.raises(UserError) as error:
        load_topology(**arguments)
    assert message in str(error.value)


def test_a_file_of_ones_own_is_a_topology_too(tmp_path):
    path = tmp_path / "mine.yaml"
    peaks = "{float32: {value: 0.1 TFLOP/s, source: me}}"
    chip = f"{{description: mine, cores: 1, device_kinds: {{1: [cpu]}}, peak_flops: {peaks}}}"
    path.write_text(f"description: mine\nextends: cpu\nchip: {chip}\n")
    topology = load_topology(str(path), count=4)
    assert topology.cores == 4
    assert topology.peak_flops("float32") == 0.1e12
    path.write_text("description: mine\n")
    with pytest.raises(UserError, match=r"mine.yaml': chip: is required"):
        load_topology(str(path))
    with pytest.raises(UserError, match="no such file"):
        load_topology(str(tmp_path / "other.yaml"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("chip.hbm_bandwidth", "3 h", r"bytes/s \(GB/s, .*\), such as 2.9 TB/s"),
        ("chip.hbm_bandwidth", 3, r"bytes/s \(GB/s, .*\), such as 2.9 TB/s"),
        ("chip.hbm_size", 8e9, r"bytes \(B, .*\), such as 96 GiB"),
        ("chip.peak_flops.bfloat16", "1 TB/s", r"FLOP/s \(TFLOP/s, PFLOP/s\), such as 667 TFLOP/s"),
        ("reliability.instance_mtbf", "3 GB", r"seconds \(us, .*\), such as 6334 h"),
        ("chip.collective_cores", "3 GB", r"a plain number, such as 16"),
        ("chip.matmul_efficiency", "0.3 s", r"a plain number, such as 0\.\d+"),
        ("chip.matmul_efficiency", 5, "a share, more than 0 and at most 1"),
        ("chip.matmul_efficiency", "0 %", "a share, more than 0 and at most 1"),
    ],
)
def test_a_figure_is_replaced_by_one_of_its_dimension(key, value, expected):
    problem = rf"^parameters\.{re.escape(key)} = '{re.escape(str(value))}': expected {expected}$"
    with pytest.raises(UserError, match=problem):
        load_topology("trn2.48xlarge", parameters={key: value})


def test_a_replacement_is_held_to_its_dimension_in_a_recipe(tmp_path):
    problem = r"hardware\.parameters: parameters\.links\.nvlink\.efficiency = '1\.2': expected a share"
    with pytest.raises(UserError, match=problem):
        tiny_recipe(tmp_path, "hardware={topology: h100-8, parameters: {links.nvlink.efficiency: 1.2}}")


CHIP = "chip: {description: mine, cores: 1, device_kinds: {1: [cpu]}, peak_flops: {}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("chip: cpu\ndims: []\nlinks: {}\nsources: []\n", "description: is required"),
        ("description: mine\nextends: [\n", "mine.yaml:3: not valid YAML: "),
        ("description: mine\nextends: cpu\n\tchip: cpu\n", "mine.yaml:3: not valid YAML: "),
        ("", "expected keys such as description"),
        ("just words", "expected keys such as description"),
        ("description: mine\nextends: trn2.48xlarg\n", "extends = 'trn2.48xlarg': unknown; did you mean 'trn2.48xl"),
        ("description: mine\nextends: cpu\nchips: 3\n", "chips: unknown key"),
        ("description: mine\nextends: cpu\nchip: {cores: 1}\n", "chip.description: is required"),
        (
            f"description: mine\nextends: cpu\n{CHIP}, hbm_size: {{value: 8 GB/s, source: me}}}}\n",
            r"chip.hbm_size.value: '8 GB/s': expected bytes (B, MB, GB, TB, MiB, GiB, TiB)",
        ),
        (
            f"description: mine\nextends: cpu\n{CHIP}, matmul_efficiency: {{value: 1.5, source: me}}}}\n",
            "chip.matmul_efficiency.value: 1.5: expected a share, more than 0 and at most 1",
        ),
        (
            f"description: mine\nextends: cpu\n{CHIP}, matmul_efficiency: {{value: 0.5, source: me}}, "
            "matmul_efficiency_range: {low: 0.6, high: 0.7, source: me}}\n",
            "chip.matmul_efficiency_range: 0.6 to 0.7: expected a range around chip.matmul_efficiency = 0.5",
        ),
        (
            "description: mine\nextends: h100-8\ndims: [{name: gpu, size: 8, kind: switch, link: nvlnk}]\n",
            "dims.0.link: 'nvlnk': not among links; did you mean 'nvlink'?",
        ),
        (
            f"description: mine\nextends: cpu\n{CHIP.replace('cores: 1', 'cores: 2')}}}\n",
            "chip.on_chip: is required, between the 2 cores of a chip",
        ),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path, text, problem):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_topology(str(path))
    assert str(error.value).startswith(f"topology {str(path)!r}: {problem}")
    assert "\n" not in str(error.value)
