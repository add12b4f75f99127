from __future__ import annotations

import pytest

from trainfw.hardware import load_topology
from trainfw.parallel import group_problem, permute_problem

TRN2 = load_topology("trn2.48xlarge")
TRN1 = load_topology("trn1.32xlarge")
TWO = load_topology("trn2.48xlarge", count=2)
ULTRASERVER = load_topology("trn2-ultraserver")

LEGAL = {
    "one core": [5],
    "half a chip": [6, 7],
    "a chip": [4, 5, 6, 7],
    "two chips": range(8, 16),
    "a row": range(16, 32),
    "an instance": range(64),
    "rows 0 and 3": [*range(16), *range(48, 64)],
    "rows 1 and 2": range(16, 48),
    "one core of every chip": range(0, 64, 4),
    "a column": range(3, 64, 16),
    "along a row": range(0, 16, 4),
    "every eighth": range(7, 64, 8),
    "across row pairs": [5, 21],
}
ILLEGAL = {
    "half a chip, not aligned": ([1, 2], "not aligned"),
    "two cores of a chip that are no half": ([0, 3], "not contiguous"),
    "three cores": ([0, 1, 2], "3 cores"),
    "a chip and a half": (range(6), "6 cores"),
    "not aligned": (range(2, 6), "not aligned"),
    "a row, not aligned": (range(8, 24), "not aligned"),
    "the upper half": (range(32), "cores 0-15, 48-63"),
    "across rows that are no neighbours": ([5, 37], "2 cores"),
    "a column of chips": ([c + r for r in range(0, 64, 16) for c in range(4)], "not contiguous"),
    "two columns": ([*range(0, 64, 16), *range(4, 64, 16)], "not contiguous"),
}


@pytest.mark.parametrize("name", LEGAL)
def test_documented_shapes_are_legal(name):
    assert group_problem(TRN2, list(LEGAL[name])) is None
    # On both instances alike, too.
    assert group_problem(TWO, [core + i for i in (0, 64) for core in LEGAL[name]]) is None


@pytest.mark.parametrize("name", ILLEGAL)
def test_others_are_not_and_the_reason_is_given(name):
    cores, why = ILLEGAL[name]
    assert why in (group_problem(TRN2, list(cores)) or "")


def test_instances_must_take_part_alike():
    assert "not the same local cores" in (group_problem(TWO, [*range(4), *range(68, 72)]) or "")


def test_lnc_1_has_its_own_shapes():
    lnc1 = load_topology("trn2.48xlarge", lnc=1)
    for size in (2, 4, 8, 16, 32, 128):
        assert group_problem(lnc1, list(range(size))) is None
        assert group_problem(lnc1, list(range(size, 2 * size))) is None or size > 16
    for size in (2, 4, 8, 16):
        assert "not aligned" in (group_problem(lnc1, list(range(size // 2, size + size // 2))) or "")
    assert "cores 0-31, 96-127" in (group_problem(lnc1, list(range(64))) or "")
    assert group_problem(lnc1, [*range(32), *range(96, 128)]) is None


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32])
def test_sizes_that_the_runtime_takes_on_trainium1(size):
    for start in range(0, 32, size):
        assert group_problem(TRN1, list(range(start, start + size))) is None
    assert group_problem(load_topology("trn1.32xlarge", count=2), list(range(64))) is None


@pytest.mark.parametrize("cores", [range(3), range(6), range(8, 24), range(24), range(1, 3)])
def test_others_on_trainium1(cores):
    assert group_problem(TRN1, list(cores)) is not None


def test_elsewhere_anything_goes():
    assert group_problem(load_topology("h100-8"), [0, 3, 5]) is None


def ring(cores: list[int]) -> list[tuple[int, int]]:
    return list(zip(cores, [*cores[1:], cores[0]]))


@pytest.mark.parametrize(
    "pairs",
    [
        ring([0, 1, 2, 3]),
        ring([0, 4, 8, 12]),
        ring([0, 16, 32, 48]),
        ring([0, 16]) + ring([1, 17]),
        ring(list(range(16))),
        [],
    ],
)
def test_rings_over_direct_links(pairs):
    assert permute_problem(TRN2, pairs) is None


@pytest.mark.parametrize(
    ("pairs", "rule", "why"),
    [
        ([(0, 1), (1, 2)], "circular", "only send or only receive"),
        ([(0, 1), (0, 2)], "circular", "core"),
        (ring([0, 1]) + ring([4, 5, 6]), "circular", "different lengths: 2, 3"),
        ([(0, 0)], "circular", "each core sends to itself"),
        (ring([0, 8]), "neighbours", "core 0 sends to core 8, which is 2 hops away"),
        (ring([0, 20]), "neighbours", "2 hops"),
    ],
)
def test_other_permutes_are_refused(pairs, rule, why):
    found = permute_problem(TRN2, pairs)
    assert found is not None
    assert found[0] == rule
    assert why in found[1]


def test_the_z_ring_and_the_network_are_direct():
    assert permute_problem(ULTRASERVER, ring([0, 64, 128, 192])) is None
    assert permute_problem(ULTRASERVER, ring([0, 128])) is not None
    assert permute_problem(TWO, ring([0, 64])) is None
    assert permute_problem(TWO, ring([0, 68])) is not None
