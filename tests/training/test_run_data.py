"""What a run says of its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import Heard
from trainfw import load_recipe
from trainfw.errors import UserError
from trainfw.recipe import Recipe
from trainfw.training.run_data import name_data, read_data


def recipe_of(tmp_path: Path, **data: object) -> Recipe:
    file = tmp_path / "corpus.jsonl"
    texts = [f"{n:03} " * (5 + 10 * (n % 5)) for n in range(100)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"source": str(file), "sequence_length": 128, "validation_fraction": 0.1} | data
    return load_recipe({"model": {"preset": "tiny", "vocab_size": 258}, "data": options})


def notes(recipe: Recipe, tmp_path: Path) -> list[str]:
    heard = Heard()
    data = recipe.data.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    read_data(recipe.model_copy(update={"data": data}), None, heard, heard.progress)
    return heard.notes


def test_packing_is_told_when_a_run_starts(tmp_path: Path) -> None:
    assert not any("full" in note for note in notes(recipe_of(tmp_path), tmp_path))
    said = "\n".join(notes(recipe_of(tmp_path, packing="best_fit"), tmp_path))
    assert "data: rows of 128 are" in said
    assert "% full; packing: concatenate would tear" in said
    assert "leaves out" not in said
    said = "\n".join(notes(recipe_of(tmp_path, packing="best_fit", split="never"), tmp_path))
    assert "warning: data.split: never leaves out" in said


def test_a_stream_is_concatenated(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, packing="best_fit")
    with pytest.raises(UserError, match=r"data.packing = 'best_fit': a stream is concatenated"):
        name_data(recipe, lambda: iter([]))
