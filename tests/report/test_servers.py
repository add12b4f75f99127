"""The page of a server's plan, and of a search."""

import re
import xml.etree.ElementTree as ET

import jax
import pytest

from tests.report.test_page import CHROMIUM, Nesting, console, figures, words
from trainfw.hardware import load_topology
from trainfw.planning import plan_server, search_servers
from trainfw.serving import Serving, build_absent

SVG = "{http://www.w3.org/2000/svg}"
ASKED = Serving("llama3.2-1b", {"tensor": 2}, length=512, chunk=64)


@pytest.fixture(scope="module")
def made():
    """(a plan, a search)."""
    topology = load_topology("inf2.8xlarge", count=1)
    devices = jax.devices()[: topology.cores]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        tokens = {"prompt": 200, "output": 100}

        def build(slots):
            return build_absent(Serving(ASKED.model, ASKED.layout, slots, ASKED.length, ASKED.chunk), topology)

        plan = plan_server(build, topology, model=ASKED.model, slots=[1, 4], **tokens)
        return plan, search_servers(ASKED, topology, [1, 4], **tokens)


def flat(value, key=""):
    if not isinstance(value, dict | list):
        return {key: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for name, inner in pairs for k, v in flat(inner, f"{key}.{name}" if key else str(name)).items()}


@pytest.mark.parametrize("which", [0, 1])
def test_figures_are_those_of_the_json(made, which):
    found = flat(made[which].to_json())
    shown = dict(figures(made[which].page()))
    for key, element in shown.items():
        assert element.attrib["value"] == str(found[key]), key
    parts = ("memory_parts_bytes_per_core.weights", "prefill_parts_seconds.layers", "decode_parts_seconds.weights")
    first = "servers" if which else "slots"
    for name in ("time_per_token_seconds", "dollars_per_million_tokens", "bound_by", *parts):
        assert sum(key.startswith(first) and key.endswith(name) for key in shown) >= 2, name


@pytest.mark.parametrize("which", [0, 1])
def test_the_page_loads_nothing(made, which):
    page, parser = made[which].page(), Nesting()
    parser.feed(page)
    parser.close()
    assert (parser.open, parser.loads) == ([], ["data:,"])
    assert not re.search(r"url\(|@import|<script|<iframe", page)
    for text in made[which].to_json()["assumptions"]:
        assert text in words(page)


def test_a_search_draws_its_fronts(made):
    plan, search = made
    assert not list(ET.fromstring(plan.page()).iter(f"{SVG}svg"))
    drawn = list(ET.fromstring(search.page()).iter(f"{SVG}svg"))
    assert len(drawn) == 2
    for svg, front in zip(drawn, search.fronts.values(), strict=True):
        assert len(list(svg.iter(f"{SVG}circle"))) == len(search.fitting)
        (line,) = svg.iter(f"{SVG}polyline")
        assert len(line.attrib["points"].split()) == len(front)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("which", [0, 1])
def test_a_browser_has_nothing_to_say(made, which, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(made[which].page())
    assert console(file, tmp_path) == []
