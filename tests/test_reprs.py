"""What a notebook shows of the large objects: a few lines, or a page in a frame."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import pytest

import trainfw
from tests.helpers import tiny_recipe
from trainfw import load_recipe
from trainfw.data import byte_tokenizer
from trainfw.planning import scale_out, search_layouts, survey

CHIP = ("hardware.topology=trn2.3xlarge", "train.compute_dtype=bfloat16")


def page(shown: str) -> ET.Element:
    """The page in a frame."""
    (source,) = re.findall(r'^<iframe srcdoc=("[^"]*"|\'[^\']*\') ', shown)
    return ET.fromstring(html.unescape(source[1:-1]).replace("&nbsp;", " "))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return trainfw.plan(tiny_recipe(tmp_path_factory.mktemp("plan"), *CHIP))


def test_large_objects_are_short(plan, tmp_path):
    recipe = tiny_recipe(tmp_path, *CHIP)
    program = trainfw.build_program(recipe, jax.devices()[:4])
    found = survey(recipe)
    shown = {
        "Recipe": recipe,
        "Program": program,
        "TrainState": program.abstract_state,
        "Plan": plan,
        "Analysis": plan.analysis,
        "MemoryTable": plan.memory,
        "StepTime": plan.time,
        "Timeline": plan.timeline,
        "Placement": plan.placement,
        "Topology": plan.topology,
        "Survey": found,
        "Found": search_layouts(found, most=0, limit=0),
        "Scaling": scale_out(recipe, [1]),
        "Report": trainfw.check(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32)),
        "Tokenizer": byte_tokenizer(),
    }
    for name, value in shown.items():
        assert name in repr(value)
        assert len(repr(value)) < 250, name
        assert "\n" not in repr(value), name
    assert repr(plan).startswith("<Plan: tiny on trn2.3xlarge, fsdp(4): ")
    assert repr(recipe) == "<Recipe: tiny, tiny, 8 steps of 256 tokens>"
    assert repr(program.abstract_state).startswith(f"<TrainState: {program.num_parameters:,} parameters in ")


def test_a_recipe_is_printed_as_its_file(tmp_path):
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "printed.yaml").write_text(f"{recipe}")
    assert load_recipe(tmp_path / "printed.yaml") == recipe


def test_a_notebook_shows_the_page_of_a_plan(plan):
    title = page(plan._repr_html_()).find("head/title")
    assert title.text == "tiny on trn2.3xlarge: the plan"


def test_a_notebook_shows_the_findings_of_a_check():
    def largest(x_N):
        return jnp.argmax(x_N)

    report = trainfw.check(largest, jax.ShapeDtypeStruct((8,), jnp.float32))
    shown = page(report._repr_html_())
    assert report.verdict in "".join(shown.find(".//p[@class='prediction']").itertext())
    rows = [[cell.text for cell in row] for row in shown.iter("tr")]
    assert [row[:2] for row in rows[1:]] == [[f.severity, f.rule] for f in report.findings]
