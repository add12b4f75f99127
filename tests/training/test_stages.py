"""Runs of mixtures, in stages."""

import json
from pathlib import Path

import jax
import pytest

from tests.helpers import Heard, losses, write_recipe
from tests.training.test_resume import stop_after, train_quietly
from trainfw import UserError, evaluate, load_recipe, train

STAGES = [
    {"until": 3},
    {"until": 6, "mixture": {"text": {"from": 2, "to": 1}, "code": 1}, "data": {"sequence_length": 64}},
    {"mixture": {"code": 1}, "optimizer": {"learning_rate": 1.0e-3, "schedule": "linear", "final_fraction": 0.0}},
]


def write_mixture(directory: Path, **changed: object) -> Path:
    code = directory / "code"
    code.mkdir(exist_ok=True)
    for number in range(20):
        (code / f"{number}.py").write_text("".join(f"x{i} = {number} * {i * i % 7}\n" for i in range(20)))
    write_recipe(directory)
    text = {"source": [str(directory / "text/*.txt")], "weight": 2}
    mixture = {"text": text, "code": {"source": str(directory / "code"), "weight": 1}}
    file = write_recipe(directory, **{"stages": STAGES, "checkpoint": {"every": 0, "keep_last": 3}} | changed)
    recipe = json.loads(json.dumps(load_recipe(file, ["stages=[]"]).model_dump()))
    data = {key: recipe["data"][key] for key in ("sequence_length", "validation_fraction")} | {"mixture": mixture}
    file.write_text(
        json.dumps(
            {**{k: v for k, v in recipe.items() if k != "data"}, "data": data}
            | {"stages": STAGES}
            | {key: value for key, value in changed.items() if key == "stages"}
        )
    )
    return file


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stages")
    heard = Heard()
    recipe = load_recipe(write_mixture(directory))
    train(recipe, devices=jax.devices()[:1], run_dir=directory / "run", reporter=heard)
    return recipe, directory / "run", heard.notes


def test_each_stage_has_its_rows_its_rate_and_a_checkpoint(straight):
    _, run, notes = straight
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "loss" in row}
    assert [steps[step]["tokens"] for step in range(1, 9)] == [256, 512, 768, 1280, 1792, 2304, 2560, 2816]
    assert steps[7]["learning_rate"] == pytest.approx(1e-3)
    assert steps[8]["learning_rate"] == pytest.approx(5e-4)
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()) == [3, 6, 8]
    said = "\n".join(notes)
    assert "data: stage 1, to step 3: text 66.7%, code 33.3%; rows of 32, 8 in a batch" in said
    assert said.count("compiled in") == 2  # rows of 32 once, though two stages have them


def test_validation_is_by_source_and_weighed_by_the_last_stage(straight):
    _, run, _ = straight
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "validation_loss" in row][-1]
    assert last["validation_loss"] == last["validation_loss/code"] != last["validation_loss/text"]
    validation, _ = evaluate(run)
    assert validation.loss == pytest.approx(last["validation_loss"], rel=1e-6)
    assert validation.parts["text"].loss == pytest.approx(last["validation_loss/text"], rel=1e-6)


@pytest.mark.parametrize("stops", [(2, 4), (3, 7)])
def test_resumed_across_a_border_is_bitwise_the_uninterrupted_run(straight, tmp_path, monkeypatch, stops):
    recipe, run, _ = straight
    for step in stops:
        stop_after(recipe, tmp_path / "run", step, monkeypatch)
    train_quietly(recipe, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(run)


def test_a_run_goes_on_with_other_stages_to_come_and_not_with_another_one_that_it_is_in(
    straight, tmp_path, monkeypatch
):
    recipe, run, _ = straight
    stop_after(recipe, tmp_path / "run", 4, monkeypatch)
    file = recipe._sources["stages"].rpartition(":")[0]
    moved = load_recipe(file, ["stages.0.until=2", "stages.1.until=3"])
    with pytest.raises(UserError, match=r"stages\.0\.until: 3 there, 2 here .* changes the losses; --accept stages"):
        train_quietly(moved, tmp_path / "run")
    with pytest.raises(UserError, match=r"was in its stage 1 at step 3, .* puts into stage 3"):
        train_quietly(moved, tmp_path / "run", accept=["stages"])
    later = load_recipe(file, ["stages.2.mixture={text: 1}"])
    train_quietly(later, tmp_path / "run", accept=["stages"])
    assert [losses(tmp_path / "run")[step] == losses(run)[step] for step in (6, 7)] == [True, False]


def test_a_source_is_not_seen_more_often_than_it_may_be(straight, tmp_path):
    recipe, _, _ = straight
    file = recipe._sources["stages"].rpartition(":")[0]
    few = load_recipe(file, ["data.mixture.code.repeats=0.1"])
    with pytest.raises(UserError, match=r"data\.mixture\.code\.repeats: 0\.1, and the run would see the source 0"):
        train_quietly(few, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_past_of_a_run_stays_as_it_was(straight, tmp_path, monkeypatch):
    recipe, _, _ = straight
    stop_after(recipe, tmp_path / "run", 4, monkeypatch)
    file = recipe._sources["stages"].rpartition(":")[0]
    for changed in ("stages.0.train={global_batch_size: 4}", "stages.0.mixture={code: 1}"):
        with pytest.raises(UserError, match=r"are not those that the run had"):
            train_quietly(load_recipe(file, [changed]), tmp_path / "run", accept=["stages"])


def test_a_source_may_come_in_with_a_later_stage(tmp_path, monkeypatch):
    stages = [{"until": 4, "mixture": {"text": 1}}, {"mixture": {"text": 1}}]
    file = write_mixture(tmp_path, stages=stages)
    stop_after(load_recipe(file, ["checkpoint.every=2"]), tmp_path / "run", 3, monkeypatch)
    both = load_recipe(file, ["checkpoint.every=2", "stages.1.mixture={text: 1, code: 1}"])
    result = train_quietly(both, tmp_path / "run", accept=["stages"])
    assert sorted(result.validation.parts) == ["code", "text"]
    other, _ = evaluate(tmp_path / "run", [f"data.source={tmp_path / 'code'}"])
    assert not other.parts


def test_examples_are_packed_and_validated_at_the_length_of_each_stage(tmp_path):
    rows = [{"prompt": f"Say {n}", "completion": "word " * (n % 12)} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(tmp_path / "rows.jsonl"), "format": "prompt_completion", "chat_template": False}
    stages = [{"until": 2}, {"data": {"sequence_length": 48}}]
    file = write_recipe(tmp_path, data={**data, "sequence_length": 96}, stages=stages, train={"steps": 3})
    heard = Heard()
    result = train(load_recipe(file), devices=jax.devices()[:1], run_dir=tmp_path / "run", reporter=heard)
    longer, shorter = (note for note in heard.notes if "refused" in note)  # of each length, the empty ones too
    assert longer != shorter
    validation, _ = evaluate(tmp_path / "run")
    assert (validation.count, validation.loss) == (result.validation.count, pytest.approx(result.validation.loss))
