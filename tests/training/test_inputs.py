"""Sizes that cannot be meant are refused before memory is touched."""

from __future__ import annotations

import re
import time
from typing import Any, get_args

import pytest

from tests.helpers import tiny_recipe
from trainfw import UserError, build_program, load_recipe
from trainfw.recipe import keys
from trainfw.training.inputs import check_inputs, check_memory


def _kinds(annotation: Any) -> set[Any]:
    return {annotation}.union(*(_kinds(kind) for kind in get_args(annotation)))


NUMBERS = [key for key, annotation in keys().items() if {int, float} & _kinds(annotation) and "traffic" not in key]


def test_no_number_of_a_recipe_may_be_vast():
    """Of every key that takes a number."""
    assert len(NUMBERS) > 70
    recipe = {"model": {"preset": "tiny"}, "data": {"sequence_length": 8}}
    load_recipe(recipe)  # imports
    for key in NUMBERS:
        for value in ("1" + "0" * 31, "9" * 400, "1e308", "1e-320", "-.inf", ".nan"):
            start = time.thread_time()
            with pytest.raises(UserError, match=rf"overrides.*{re.escape(key.rpartition('.')[0])}") as error:
                load_recipe(recipe, [f"{key}={value}"])
            assert time.thread_time() - start < 2, key
            assert len(str(error.value)) < 700, key


def test_what_the_machine_cannot_hold_is_refused_before_it_is_asked_for(tmp_path):
    program = build_program(tiny_recipe(tmp_path))
    check_memory(program)
    with pytest.raises(UserError, match=r"model.hidden_size = .* parameters and their optimizer take at least"):
        check_memory(program, total=2**18)
    long = build_program(tiny_recipe(tmp_path, f"data.sequence_length={2**24}", f"train.global_batch_size={2**20}"))
    with pytest.raises(UserError, match=r"train.global_batch_size = 1048576: rows of 16,777,216 tokens take at least"):
        check_memory(long)


@pytest.mark.parametrize("place", ["/proc/1", "/proc/1/a", "{file}", "{file}/a"])
def test_a_cache_that_cannot_be_written_is_named_at_once(place, tmp_path):
    (tmp_path / "file").write_text("")
    place = place.format(file=tmp_path / "file")
    with pytest.raises(UserError, match=r"data.cache_dir = '/.*: cannot be written: N"):
        check_inputs(tiny_recipe(tmp_path, f"data.cache_dir={place}"))
    check_inputs(tiny_recipe(tmp_path, f"data.cache_dir={tmp_path}/new/place"))
    assert not (tmp_path / "new").exists()
