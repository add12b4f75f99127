"""Drawings of losses."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfw.report import loss_chart, svg_of_chart
from trainfw.report.losses import loss_ticks

losses = st.floats(1e-3, 1e4)


@given(losses, losses)
def test_ticks_enclose_the_losses_and_differ(one, other):
    low, high = sorted((one, other))
    ticks = loss_ticks(low, high)
    assert 2 <= len(ticks) <= 10
    assert ticks[0][0] <= low * (1 + 1e-9)
    assert ticks[-1][0] >= high * (1 - 1e-9)
    assert len({text for _, text in ticks}) == len(ticks)


@pytest.mark.parametrize("logarithmic", [True, False])
def test_a_drawing_is_a_file_of_its_own(logarithmic):
    lines = {"<a & b>": [(1.0, 5.0), (2.0, 4.0)], "one": [(2.0, 4.5)]}
    placed = loss_chart("losses", lines, column=str, logarithmic=logarithmic, fits={"one": [(1.0, 4.9), (2.0, 4.4)]})
    drawn = svg_of_chart(placed)
    texts = [each.text for each in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"<a & b>", "one", "losses"} <= set(texts)
    assert "var(--page)" in drawn
