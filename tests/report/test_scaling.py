"""The section of a page that draws scaling."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from tests.helpers import tiny_recipe
from trainfw.planning import plan, scale_out
from trainfw.report import plan_page, scaling_section

pytestmark = pytest.mark.long

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scaling")
    file = directory / "two.yaml"
    dims = "[{name: gpu, size: 2, kind: switch, link: nvlink}]"
    file.write_text(f"description: two\nextends: h100-8\nchip: h100\ndims: {dims}\nsources: [me]\n")
    overrides = [f"hardware={{topology: {file}, dollars_per_chip_hour: 2.0}}", "train.global_batch_size=4"]
    overrides.append("train.compute_dtype=bfloat16")
    return scale_out(tiny_recipe(directory, *overrides), (1, 2, 4))


@pytest.fixture(scope="module")
def section(made):
    return ET.fromstring(f"<main>{scaling_section(made)}</main>")


def test_figures_are_those_of_the_json(made, section):
    document = made.to_json()
    shown = list(section.iter("data"))
    assert len(shown) > 30
    for element in shown:
        value = document
        for part in element.attrib["data-key"].split("."):
            value = value[int(part)] if part.isdigit() else value[part]
        assert element.attrib["value"] == str(value)


def test_curves_have_a_point_for_every_count(section):
    throughput, goodput = section.iter(f"{SVG}svg")
    named = [title.text for title in throughput.iter(f"{SVG}title")]
    assert sum("weak:" in text for text in named) == 3
    assert sum("ideal:" in text for text in named) == 2
    assert sum("strong:" in text for text in named) == 2  # 4 rows over 2 and 4 devices, not over 8
    assert len(list(goodput.iter(f"{SVG}circle"))) == 9
    for element in section.iter(f"{SVG}circle"):
        assert 0 < float(element.attrib["cx"]) < 560
        assert 0 < float(element.attrib["cy"]) < 320


def test_reasons_and_sources_are_told(section):
    text = " ".join("".join(section.itertext()).split())
    assert "does not divide over data(4)" in text
    assert "arXiv:2407.21783" in text


def test_it_goes_into_the_page(made):
    page = plan_page(plan(made.recipe), (), scaling_section(made))
    assert ET.fromstring(page) is not None
    assert page.index("Scaling, and what failures leave of it") < page.index("What was assumed</h2>")
    assert not re.search(r"url\(|@import|<script|<iframe", page)
