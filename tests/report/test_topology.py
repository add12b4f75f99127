from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from trainfw.hardware import load_topology, topology_names
from trainfw.parallel import Layout, place
from trainfw.report import amount, describe_placement, describe_topology, doubtful_figures, draw_topology, topology_svg
from trainfw.report.text import COLOURS, spans

SVG = "{http://www.w3.org/2000/svg}"
EACH = [
    (name, lnc, count)
    for name in topology_names()
    for lnc in load_topology(name).chip.device_kinds
    for count in ((1, 3) if "network.bandwidth" in load_topology(name).figures else (1,))
]


def placed(name: str, **sizes: int):
    topology = load_topology(name)
    return place(topology, Layout(**sizes))


def plain(lines) -> list[str]:
    return [line.plain for line in lines]


def picture(*arguments) -> ET.Element:
    return ET.fromstring(topology_svg(*arguments))


def drawn(root: ET.Element, kind: str) -> list[ET.Element]:
    return [element for element in root.iter() if element.get("class") == kind]


@pytest.mark.parametrize(("name", "lnc", "count"), EACH)
def test_picture_has_every_chip_and_link_of_a_unit(name, lnc, count):
    topology = load_topology(name, lnc=lnc, count=count)
    root = picture(topology)
    titles = [element.text or "" for element in root.iter(f"{SVG}title")]
    assert len([title for title in titles if title.startswith("chip ")]) == topology.chips // count
    assert len(drawn(root, "link")) == len(list(topology.links()))
    assert len(drawn(root, "network")) == (count if count > 1 else 0)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert width == 1200
    for rect in root.iter(f"{SVG}rect"):
        x, y = float(rect.get("x", 0)), float(rect.get("y", 0))
        assert x >= 0
        assert y >= 0
        assert x + float(rect.attrib["width"]) <= width + 1
        assert y + float(rect.attrib["height"]) <= height + 1


def test_links_have_the_colour_of_the_axis_along_them():
    placement = placed("trn2-ultraserver", tensor=16, fsdp=16)
    root = picture(placement.topology, placement)
    colours = [element.get("stroke") for element in drawn(root, "link")]
    # Tensor along the 4 links of each of 16 rows; fsdp down the columns and around the nodes.
    assert colours.count(COLOURS["tensor"]) == 64
    assert colours.count(COLOURS["fsdp"]) == 128
    assert not drawn(root, "also")


def test_row_pairs_show_in_the_picture():
    placement = placed("trn2.48xlarge", tensor=32, fsdp=2)
    colours = [element.get("stroke") for element in drawn(picture(placement.topology, placement), "link")]
    # Rows 0 and 3 are a tensor group, and rows 1 and 2: half of the 16 links down the columns are fsdp's.
    assert colours.count(COLOURS["fsdp"]) == 8
    assert colours.count(COLOURS["tensor"]) == 24


def test_a_port_that_two_axes_share_is_dashed_with_both():
    placement = placed("h100-8", tensor=4, fsdp=2)
    root = picture(placement.topology, placement)
    assert {element.get("stroke") for element in drawn(root, "link")} == {COLOURS["tensor"]}
    assert [element.get("stroke") for element in drawn(root, "also")] == [COLOURS["fsdp"]] * 8


@pytest.mark.parametrize(("name", "lnc", "count"), EACH)
def test_text_fits_100_columns(name, lnc, count):
    topology = load_topology(name, lnc=lnc, count=count)
    lines = plain([*describe_topology(topology), *doubtful_figures(topology), *draw_topology(topology)])
    assert max(map(len, lines)) <= 100


def test_drawing_of_an_instance():
    placement = placed("trn2.48xlarge", tensor=4, fsdp=16)
    lines = plain(draw_topology(placement.topology, placement))
    assert lines[0] == "row (ring of 4, 256 GB/s a link) x column (ring of 4, 256 GB/s a link)"
    first = next(i for i, line in enumerate(lines) if "chip 0" in line)
    assert lines[first].split("┤")[1].startswith(" chip 0 ")
    assert lines[first].startswith("  ╌╌┤")  # The row wraps at both ends.
    assert lines[first].rstrip().endswith("├╌╌")
    assert lines[first + 1].split("│")[1::2] == [f" cores {4 * i}-{4 * i + 3}".ljust(13) for i in range(4)]
    assert lines[first + 3].split("│")[1::2] == [f" fsdp {i}".ljust(13) for i in range(4)]
    assert sum(f"chip {i} " in line for line in lines for i in range(16)) == 16


def test_drawing_of_an_ultraserver_is_a_ring_of_nodes_and_one_grid():
    lines = plain(draw_topology(load_topology("trn2-ultraserver")))
    assert lines[0] == "node (ring of 4, 128 GB/s a link)"
    assert all(f"node {i}" in lines[2] for i in range(4))
    assert any(line.endswith("inside node 0") for line in lines)


def test_colours_of_a_drawing_are_those_of_the_axes():
    placement = placed("trn2.48xlarge", tensor=16, fsdp=4)
    styles = {
        str(span.style)
        for line in draw_topology(placement.topology, placement)
        for span in line.spans
        if "───" in line.plain[span.start - 2 : span.end + 2]
    }
    assert COLOURS["tensor"] in styles
    assert COLOURS["fsdp"] not in styles


def test_table_of_axes():
    lines = plain(describe_placement(placed("trn2-ultraserver", tensor=32, fsdp=8)))
    assert lines[0] == "layout fsdp(8) * tensor(32)"
    assert " ".join(lines[3].split()) == "tensor 32 core + column + row.pair yes no 3 64 GB/s legal"
    lines = plain(describe_placement(placed("trn3-gen2-ultraserver", tensor=16, fsdp=36)))
    assert any("legal*" in line for line in lines)
    assert "  chip.2@2: 2 of chip, 2 apart" in lines
    assert "no document lists which groups" in lines[-1]


def test_both_values_where_documents_disagree():
    text = "\n".join(plain(doubtful_figures(load_topology("trn3-gen2-ultraserver"))))
    for value in ("4.9 TB/s", "but 4.7 TB/s", "256 GB/s", "but 2,048 GiB/s", "but 2.56 TB/s", "but 20:"):
        assert value in text
    text = "\n".join(plain(doubtful_figures(load_topology("trn1.32xlarge"))))
    for value in ("chip.peak_flops.bfloat16, chip.peak_flops.float16 = 190", "but 191 TFLOP/s", "but 820 GB/s"):
        assert value in text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (96 * 2**30, "B", "96 GiB"),
        (80e9, "B", "80 GB"),
        (1.5 * 2**40, "B", "1.5 TiB"),
        (25e9, "B/s", "25 GB/s"),
        (185.6e12, "B/s", "185.6 TB/s"),
        (705.6e15, "B/s", "705,600 TB/s"),
        (667e12, "FLOP/s", "667 TFLOP/s"),
        (42.688e15, "FLOP/s", "42.69 PFLOP/s"),
    ],
)
def test_amounts(value, unit, text):
    assert amount(value, unit) == text


def test_spans():
    assert spans([3, 1, 2, 0]) == "0-3"
    assert spans([0, 1, 5]) == "0-1,5"
    assert spans(range(0, 64, 8)) == "8 of them"
