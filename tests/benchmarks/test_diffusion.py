"""What `benchmarks/diffusion.py` makes of arguments and of numbers, and what it hands to both sides. No peer is run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LOSSES = [1.0, 0.9, 0.8]


@pytest.fixture(scope="module")
def diffusion():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import diffusion
    finally:
        sys.path.remove(str(BENCHMARKS))
    return diffusion


def judged(diffusion, *, seconds=1.0, memory=10**9, losses=LOSSES, picture=0.0, **others):
    """(checks that are missed, the table's rows), with trainfw as said beside diffusers of 1.6 s and 1 GB."""
    from side_by_side.driver import Record

    records = {}
    for does in diffusion.DOES.values():
        of = losses if does == "learns" else [None] * 3
        theirs = LOSSES if does == "learns" else [None] * 3
        ours = Record(seconds=[seconds] * 3, losses=of, more=[1.0, 3.0, 5.0], memory=memory)
        records[does] = {
            "trainfw": ours,
            "diffusers": Record(seconds=[1.6] * 3, losses=theirs, more=[1.0, 3.0], memory=10**9),
        }
    pictures = {"trainfw": np.full((1, 2, 2, 3), 1 + picture, np.float32), "diffusers": np.ones((1, 2, 2, 3))}
    given = {"problems": {}, "left_out": {}} | others
    results = diffusion.Results(records=records, pictures=pictures, **given)
    tables, checks = diffusion.judge(results, diffusion.parse([]), 7)
    assert all(len(row) == len(tables[0]["columns"]) for row in tables[0]["rows"])
    return [check["name"] for check in checks if not check["ok"]], tables[0]["rows"]


def test_all_is_well(diffusion):
    missed, rows = judged(diffusion, left_out={"diffusers-compile": "there is no C++ compiler here"})
    assert missed == []
    assert rows[0][:4] == ["trainfw", "learns", 1.0, 32.0]
    assert rows[0][7:9] == [2.0, 1.0]
    assert rows[1][8] == 1.6
    assert rows[-1][1] == "did not run: there is no C++ compiler here"


@pytest.mark.parametrize(
    ("given", "missed"),
    [
        ({"seconds": 1.2}, "trainfw learns: times as fast as diffusers"),
        ({"memory": 2 * 10**9}, "trainfw draws: peak memory over that of diffusers"),
        ({"losses": [1.0001, 0.9, 0.8]}, "the first loss, apart from that of diffusers"),
        ({"losses": [1.0, 0.9, 0.81]}, "losses of 3 steps, apart from those of diffusers"),
        ({"losses": [1.0, 0.9, float("nan")]}, "losses of 3 steps, apart from those of diffusers"),
        ({"picture": 0.01}, "pictures, apart from those of diffusers"),
        ({"problems": {"diffusers-compile-draw": "it fell"}}, "processes that did not run to their end"),
    ],
)
def test_what_is_missed(diffusion, given, missed):
    assert missed in judged(diffusion, **given)[0]


@pytest.mark.parametrize("arguments", [["--peers", "difusers"], ["--batch", "0"], ["--train", "remat"]])
def test_bad_arguments_exit_2(diffusion, arguments):
    with pytest.raises(SystemExit) as stop:
        diffusion.main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("model", ["dit", "pixart"])
def test_inputs_are_a_model_and_batches_that_both_read(diffusion, tmp_path, model):
    from trainfw.interop import open_transformer

    sizes = ["--image-size", "4", "--patch-size", "2", "--hidden-size", "32", "--layers", "2", "--batch", "3"]
    chosen = diffusion.parse(["--model", model, *sizes])
    count = diffusion.write_inputs(chosen, tmp_path)
    source = open_transformer(tmp_path / "weights")
    assert sum(source.array(path).size for path in source.parameters) == count
    arrays = np.load(tmp_path / "batches.npz")
    assert arrays["image"].shape == (diffusion.BATCHES, 3, 4, 4, 3)
    assert {"noise", "time", "weight", "keep"} < set(arrays.files)
