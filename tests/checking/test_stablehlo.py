"""Operations that JAX itself does not write, or not in every form."""

from __future__ import annotations

import jax
import pytest
from jaxlib.mlir import ir

from trainfw.checking.stablehlo import read_stablehlo

SORT = """
func.func public @main(%x: tensor<16xf32>) -> tensor<16xf32> {{
  %sorted = "stablehlo.sort"(%x) <{{dimension = 0 : i64, is_stable = true}}> ({{
  ^bb0(%a: tensor<f32>, %b: tensor<f32>):
    %first = stablehlo.compare {direction}, %a, %b : (tensor<f32>, tensor<f32>) -> tensor<i1>
    stablehlo.return %first : tensor<i1>
  }}) : (tensor<16xf32>) -> tensor<16xf32>
  return %sorted : tensor<16xf32>
}}
"""


def rules(text: str) -> list[str]:
    with jax.jit(lambda: 1).lower().compiler_ir("stablehlo").context, ir.Location.unknown():
        return [finding.rule for finding in read_stablehlo(ir.Module.parse(text))]


@pytest.mark.parametrize("direction", ["LT", "LE", "GT", "GE"])
def test_comparators_that_neuron_takes(direction):
    assert rules(SORT.format(direction=direction)) == ["sort"]


@pytest.mark.parametrize("direction", ["EQ", "NE"])
def test_comparators_that_it_does_not(direction):
    assert rules(SORT.format(direction=direction)) == ["sort", "sort-comparator"]


@pytest.mark.parametrize(
    ("made", "rule"),
    [
        ("stablehlo.add %two, %two", []),
        ("stablehlo.subtract %two, %four", []),
        ("stablehlo.multiply %two, %two", []),
        ("stablehlo.minimum %two, %four", []),
        ("stablehlo.maximum %two, %four", []),
        ("stablehlo.clamp %two, %four, %two", []),
        ("stablehlo.divide %four, %two", ["control-while"]),  # rounds towards zero, unlike Python's: not folded
        ("stablehlo.add %n, %two", ["control-while"]),
    ],
)
def test_bounds_of_loops(made, rule):
    text = f"""
func.func public @main(%n: tensor<i32>) -> tensor<i32> {{
  %two = stablehlo.constant dense<2> : tensor<i32>
  %four = stablehlo.constant dense<4> : tensor<i32>
  %bound = {made} : tensor<i32>
  %end:1 = stablehlo.while(%i = %two) : tensor<i32>
    cond {{
      %more = stablehlo.compare LT, %i, %bound : (tensor<i32>, tensor<i32>) -> tensor<i1>
      stablehlo.return %more : tensor<i1>
    }} do {{
      %next = stablehlo.add %i, %two : tensor<i32>
      stablehlo.return %next : tensor<i32>
    }}
  return %end#0 : tensor<i32>
}}
"""
    assert rules(text) == rule
