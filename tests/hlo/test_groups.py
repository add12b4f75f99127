from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfw.hlo.communication import axes_of
from trainfw.hlo.groups import parse_groups

LISTED = {
    "{{0,1},{2,3}}": [[0, 1], [2, 3]],
    "{{0,2},{1}}": [[0, 2], [1]],
    "{}": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "[2,4]<=[8]": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "[4,2]<=[2,4]T(1,0)": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "mesh['axis_0'=2,'axis_1'=4] {'axis_0'}": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "mesh['a'=2,'b'=4] {'a','b'}": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "mesh['a'=2,'b'=4] {'b','a'}": [[0, 4, 1, 5, 2, 6, 3, 7]],
    "mesh['a'=8] {'a':(1)2}": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "mesh['a'=8] {'a':(2)2}": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "mesh['a'=8] {'a':(4)2}": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "mesh['a'=8] {'a':(1)2,'a':(4)2}": [[0, 1, 4, 5], [2, 3, 6, 7]],
    "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}": [[3, 2], [1, 0]],
}


@pytest.mark.parametrize("text", LISTED)
def test_every_form(text):
    assert [list(group) for group in parse_groups(text, 8)] == LISTED[text]


@st.composite
def shapes(draw) -> tuple[list[int], list[int]]:
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
    return shape, draw(st.permutations(range(len(shape))))


@given(shapes(), st.data())
def test_iotas_as_numpy_has_them(case, data):
    shape, order = case
    total = math.prod(shape)
    size = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    expected = np.arange(total).reshape(shape).transpose(order).reshape(-1, size)
    text = f"[{total // size},{size}]<=[{','.join(map(str, shape))}]T({','.join(map(str, order))})"
    assert np.array_equal(parse_groups(text, total), expected)


@given(shapes(), st.data())
def test_axes_of_meshes_as_numpy_has_them(case, data):
    shape, _ = case
    names = [f"axis_{i}" for i in range(len(shape))]
    chosen = sorted(data.draw(st.sets(st.sampled_from(range(len(shape))), min_size=1)))
    outer = [i for i in range(len(shape)) if i not in chosen]
    size = math.prod(shape[i] for i in chosen)
    expected = np.arange(math.prod(shape)).reshape(shape).transpose(outer + chosen).reshape(-1, size)
    axes = ",".join(f"'{name}'={n}" for name, n in zip(names, shape, strict=True))
    groups = parse_groups(f"mesh[{axes}] {{{','.join(repr(names[i]) for i in chosen)}}}", math.prod(shape))
    assert np.array_equal(groups, expected)
    # Axes of size 1 have no say; the order of groups and inside them does not matter.
    shuffled = [tuple(reversed(group)) for group in reversed(groups)]
    spanned = tuple(names[i] for i in chosen if shape[i] > 1)
    assert axes_of(dict(zip(names, shape, strict=True)), shuffled) == spanned


def test_groups_that_are_no_whole_axes():
    assert axes_of({"a": 2, "b": 4}, [(0, 1), (2, 3), (4, 5), (6, 7)]) is None
    assert axes_of({"a": 2, "b": 4}, [(0, 1, 2, 3), (4, 5, 6), (7,)]) is None


def test_an_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="no form of HLO"):
        parse_groups("[what]", 8)
