from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tests.helpers import tiny_recipe, write_recipe
from trainfw.hardware import load_topology
from trainfw.planning import plan
from trainfw.planning.predict.link_time import link_utilisation
from trainfw.report import plan_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "br"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    overrides = ["hardware={topology: h100-8, dollars_per_chip_hour: 2.0}", "train.compute_dtype=bfloat16"]
    overrides += ["parallel={fsdp: 4, tensor: 2}", "data.source=/data/<b> & 'c'.txt"]
    return plan(tiny_recipe(tmp_path_factory.mktemp("page"), *overrides))


@pytest.fixture(scope="module")
def page(made):
    return plan_page(made, [("a change of <this>", 0.5 * made.time.seconds), ("another", 0.1 * made.time.seconds)])


def figures(page: str) -> list[tuple[str, ET.Element]]:
    """(key in the JSON, element), some more than once."""
    return [(e.attrib["data-key"], e) for e in ET.fromstring(page).iter("data")]


def words(page: str) -> str:
    return " ".join(" ".join(ET.fromstring(page).itertext()).split())


class Nesting(HTMLParser):
    """Raises where a tag closes another than the last that was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_small_and_loads_nothing(page):
    parser = Nesting()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert parser.loads == ["data:,"]
    assert not re.search(r"url\(|@import|<script|<iframe", page)
    assert set(re.findall(r"https?://[^\s\"'<]*", page)) <= {"http://www.w3.org/2000/svg"} | set(
        re.findall(r"https?://[^\s\"'<]*", words(page))  # sources, named in words
    )
    assert "default-src 'none'" in page
    assert len(page.encode()) < 3e6


def test_figures_are_those_of_the_json(made, page):
    flat = {}

    def flatten(value, key):
        if isinstance(value, dict | list):
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                flatten(inner, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = value

    flatten(made.to_json(), "")
    shown = figures(page)
    for key, element in shown:
        if not key.startswith("links."):
            assert element.attrib["value"] == str(flat[key]), key
    numbers = ("step_time", "memory_bytes_per_core", "tokens_per_second", "mfu", "bound_by", "chip_hours", "dollars")
    wanted = {key for key in flat if key.startswith(numbers)}
    wanted |= {key for key in flat if re.fullmatch(r"collectives\.\d+\.(bytes|times|seconds)", key)}
    assert wanted <= {key for key, _ in shown}
    assert sum(key.endswith(".times") for key in wanted) == len(made.time.longest) > 0


def test_figures_read_as_what_they_are(made, page):
    """What is written agrees with the value beside it, to the digits that are written."""
    units = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "GiB": 2**30, "MB": 1e6, "kB": 1e3, "B": 1.0, "%": 0.01, "": 1.0}
    compared = 0
    for key, element in figures(page):
        if key == "bound_by" or (element.text or "").startswith("<"):
            continue
        found = re.fullmatch(r"\$?([\d.,e-]+) ?(s|ms|us|GiB|MB|kB|B|%|)", element.text or "")
        assert found, (key, element.text)
        number = found[1].replace(",", "")
        scale = units[found[2]]
        mantissa, _, exponent = number.partition("e")
        digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        assert float(number) * scale == pytest.approx(float(element.attrib["value"]), abs=0.51 * digit * scale), key
        compared += 1
    assert compared > 30


def test_memory_adds_up_and_fills_the_bar(made, page):
    table = next(table for table in ET.fromstring(page).iter("table") if "bytes" in "".join(table.itertext()))
    shown = list(table.iter("data"))
    *sizes, total = [int((e.text or "").replace(",", "")) for e in shown]
    assert shown[-1].attrib["data-key"] == "memory_bytes_per_core.total"
    assert len(sizes) == len(made.memory.categories)
    assert sum(sizes) == total == made.memory.total
    bar = next(e for e in ET.fromstring(page).iter("div") if "GiB" in e.get("aria-label", ""))
    widths = [float(re.search(r"width:([\d.]+)%", e.attrib["style"])[1]) for e in bar]
    assert sum(widths) == pytest.approx(100 * total / made.topology.hbm_size, abs=0.01)


def tracks(page: str) -> list[tuple[str, list[ET.Element]]]:
    """Lanes of the timeline: (name, blocks), in order."""
    found = [e for e in ET.fromstring(page).iter("div") if e.get("class") == "track"]
    return [(e.attrib["aria-label"], e.findall("i")) for e in found]


def width(block: ET.Element) -> float:
    return float(re.search(r"width:([\d.]+)%", block.attrib["style"])[1])


def test_the_timeline_is_as_long_as_the_step(made, page):
    (name, phases), *lanes = tracks(page)
    assert name == "phases"
    assert [block.get("class") for block in phases] == ["phase forward", "phase backward", "phase update"]
    assert sum(map(width, phases)) == pytest.approx(100, abs=0.01)
    assert [name for name, _ in lanes[:2]] == ["tensor engine", "memory"]
    first_turn = [name for name, _ in lanes].index("tensor engine", 1)
    solid = [block for _, blocks in lanes[:first_turn] for block in blocks if block.get("class") != "hidden"]
    assert 97 < sum(map(width, solid)) < 100.1  # what cannot be seen is left out
    assert any(block.get("class") == "hidden" for _, blocks in lanes for block in blocks)
    assert len(made.timeline.loops) == 2
    assert "One turn of the loop over layers" in words(page)


def test_microbatches_are_drawn_one_after_the_other(made):
    def accumulating(parts: int):
        train = made.recipe.train.model_copy(update={"accumulation_steps": parts})
        return replace(made, recipe=made.recipe.model_copy(update={"train": train}))

    (name, blocks), *_ = tracks(plan_page(accumulating(4)))
    assert name == "the step: 4 microbatches, and the update"
    assert [block.get("class") for block in blocks] == ["phase forward", "phase backward"] * 4 + ["phase update"]
    assert sum(map(width, blocks)) == pytest.approx(100, abs=0.02)
    page = plan_page(accumulating(400))
    assert "400 x (forward, backward)" in words(page)
    assert len(tracks(page)[0][1]) == 2


def test_links_are_as_busy_as_the_plan_says(made, page):
    busy = link_utilisation(made.analysis.transfers, made.placement, made.time.seconds)
    shown = {key[6:]: float(e.attrib["value"]) for key, e in figures(page) if key.startswith("links.")}
    assert shown == pytest.approx(busy)
    assert list(shown) == list(busy)


def test_what_a_reader_needs_is_there(made, page):
    text = words(page)
    assert "A prediction: nothing here was measured on this hardware." in text
    for assumed in made.time.assumptions:
        assert assumed in text
    assert "tiny on h100-8" in text
    assert "a change of <this>" in text
    assert "\u221250%" in text
    assert " ".join(made.recipe.to_yaml().split()) in text
    root = ET.fromstring(page)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}svg"))) == 1
    assert "prefers-color-scheme: dark" in page


def test_what_does_not_fit_is_said(made):
    small = load_topology("h100-8", parameters={"chip.hbm_size": "0.5 MB"})
    made = replace(made, topology=small, memory=replace(made.memory, capacity=500_000))
    assert made.memory.total > 500_000
    page = plan_page(made)
    assert "does not fit: of" in words(page)
    assert "GiB that a core has" in words(page)
    bar = next(e for e in ET.fromstring(page).iter("div") if "GiB" in e.get("aria-label", ""))
    assert sum(float(re.search(r"width:([\d.]+)%", e.attrib["style"])[1]) for e in bar) == pytest.approx(100, abs=0.01)
    assert "What would help most" not in page


def console(file, directory) -> list[str]:
    """What a browser says of a page while it draws it."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    picture = directory / "page.png"
    command = [CHROMIUM, *options, f"--user-data-dir={directory / 'profile'}", f"--screenshot={picture}"]
    ran = subprocess.run([*command, f"file://{file}"], check=True, capture_output=True, text=True, timeout=120)
    assert picture.stat().st_size > 10_000
    return [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian: apt-get install chromium)")
def test_a_browser_has_nothing_to_say(page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page)
    assert console(file, tmp_path) == []
    # What it would say, had the page a fault.
    file.write_text(page.replace("</main>", "<img src='https://localhost:1/x.png'/></main>"))
    assert any("x.png" in line for line in console(file, tmp_path))


@pytest.mark.long
def test_as_typed(tmp_path):
    recipe = write_recipe(tmp_path, hardware={"topology": "h100-8"})
    file = tmp_path / "plan.html"
    command = [sys.executable, "-m", "trainfw", "plan", str(recipe), "--json", "--html"]
    ran = subprocess.run([*command, str(file)], check=True, capture_output=True, text=True)
    seconds = json.loads(ran.stdout)["step_time_seconds"]
    assert f"wrote {file}" in ran.stderr
    shown = {e.attrib["value"] for key, e in figures(file.read_text()) if key == "step_time_seconds"}
    assert shown == {str(seconds)}
    for refused in (tmp_path, tmp_path / "none" / "plan.html"):
        ran = subprocess.run([*command, str(refused)], capture_output=True, text=True)
        assert ran.returncode == 2
        assert ran.stderr.startswith(f"error: --html {refused}: expected a file")
