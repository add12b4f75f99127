"""Mixtures and stages as recipes write them, and what is refused of them."""

from pathlib import Path

import pytest
import yaml

from trainfw import load_recipe
from trainfw.errors import UserError
from trainfw.optim import make_schedule
from trainfw.recipe import rates_of

RECIPE = """\
name: stages
model: {preset: tiny, vocab_size: 258}
data:
  mixture:
    code: {source: src, weight: 3}
    prose:
      source: docs
      text_field: body
  sequence_length: 32
train: {steps: 100, global_batch_size: 8}
optimizer: {learning_rate: 0.01, schedule: cosine, warmup_steps: 10, final_fraction: 0.1}
stages:
  - until: 50%
  - until: 80
    mixture: {code: {from: 3, to: 1}, prose: 1}
    data.sequence_length: 64
  - mixture: {prose: 1}
    train: {global_batch_size: 4}
    optimizer: {learning_rate: 0.004, schedule: linear, final_fraction: 0}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_stages_are_parts_of_the_run(file):
    recipe = load_recipe(file)
    found = [(s.first, s.end, s.weights, s.shape, s.rows) for s in recipe.in_stages()]
    assert found == [
        (0, 50, {"code": (3, 3), "prose": (1, 1)}, (8, 32, 1), 400),
        (50, 80, {"code": (3, 1), "prose": (1, 1)}, (8, 64, 1), 240),
        (80, 100, {"prose": (1, 1)}, (4, 32, 1), 80),
    ]
    assert str(recipe.in_stages()[1]) == "stage 2, to step 80: code 75.0% -> 50.0%, prose 25.0% -> 50.0%; " + (
        "rows of 64, 8 in a batch"
    )
    assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    [without] = load_recipe(file, ["stages=[]"]).in_stages()
    assert (without.first, without.end, without.weights) == (0, 100, {"code": (3, 3), "prose": (1, 1)})


def test_a_stage_with_a_rate_of_its_own_has_a_schedule_of_its_own(file):
    recipe = load_recipe(file)
    rate = make_schedule(recipe.optimizer, 100, rates=rates_of(recipe))
    whole = make_schedule(recipe.optimizer, 100)
    assert [float(rate(step)) for step in (0, 40, 79)] == [float(whole(step)) for step in (0, 40, 79)]
    assert float(rate(80)) == pytest.approx(0.004)
    assert float(rate(90)) == pytest.approx(0.002)
    middle = load_recipe(file, ["stages.0.optimizer.learning_rate=0.1", "stages.2.optimizer=null"])
    rate = make_schedule(middle.optimizer, 100, rates=rates_of(middle))
    assert float(rate(0)) == pytest.approx(0.1)
    assert float(rate(60)) == pytest.approx(float(whole(60)))


def test_one_element_of_a_list_is_overridden(file):
    recipe = load_recipe(file, ["stages.1.until=90", "data.mixture.code.weight=9"])
    assert [stage.end for stage in recipe.in_stages()] == [50, 90, 100]
    dotted = load_recipe(file, ["stages.1.data.sequence_length=128"])  # which the file writes with a dot
    assert dotted.in_stages()[1].shape == (8, 128, 1)
    assert recipe.in_stages()[0].weights["code"] == (9, 9)


def test_a_mixture_replaces_an_inherited_source_and_the_reverse(file, tmp_path):
    assert "source" not in load_recipe(file).model_dump()["data"]
    one = tmp_path / "one.yaml"
    one.write_text("extends: recipe.yaml\ndata: {source: elsewhere}\nstages: []\n")
    assert (load_recipe(one).data.mixture, load_recipe(one).data.source) == (None, "elsewhere")
    two = tmp_path / "two.yaml"
    two.write_text("extends: one.yaml\ndata: {mixture: {a: {source: b}}}\n")
    assert [*load_recipe(two).data.parts] == ["a"]
    assert load_recipe(file, ["data.source=elsewhere", "stages=[]"]).data.mixture is None


WRONG = [
    # what is written there, in the place of what; line and key of the error; part of what it says
    ("source: src", "source: src, sauces: 1", 5, "data.mixture.code.sauces", "mean 'data.mixture.code.source'?"),
    ("source: src, ", "", 5, "data.mixture.code.source", "is required"),
    ("weight: 3", "weight: -3", 5, "data.mixture.code.weight", "greater than or equal to 0"),
    ("weight: 3", "weight: '3'", 5, "data.mixture.code.weight", "valid number"),
    ("weight: 3", "weight: .inf", 5, "data.mixture.code.weight", "finite number"),
    ("weight: 3", "wieght: 3", 5, "data.mixture.code.wieght", "did you mean 'data.mixture.code.weight'?"),
    ("weight: 3", "proportion: 3", 5, "data.mixture.code.proportion", "one of: source, weight"),
    ("weight: 3", "repeats: 0", 5, "data.mixture.code.repeats", "greater than 0"),
    ("weight: 3", "epochs: 2", 5, "data.mixture.code.epochs", "unknown key"),
    ("weight: 3", "format: chatt", 5, "data.mixture.code.format", "did you mean 'chat'?"),
    ("weight: 3", "format: images", 5, "data.mixture.code.format", "is not mixed with other formats"),
    ("weight: 3", "loss_on: [user]", 5, "data.mixture.code.loss_on", "is for `format: chat`"),
    ("weight: 3", "tokenizer: {name: bytes}", 5, "data.mixture.code.tokenizer", "unknown key"),
    ("source: docs", "source: 7", 7, "data.mixture.prose.source", "valid string"),
    ("text_field: body", "too_long: truncate", 8, "data.mixture.prose.too_long", "text is cut into rows"),
    ("    code: {", "    9code: {", 4, "data.mixture", "'9code': expected a name of letters"),
    ("    code: {source: src, weight: 3}", "    code: src", 5, "data.mixture.code", "expected a section"),
    ("  sequence_length: 32", "  source: src\n  sequence_length: 32", 9, "data.source", "one of source and mixture"),
    ("until: 50%", "until: 50 %", 13, "stages.0.until", "such as '80%'"),
    ("until: 50%", "until: 0", 13, "stages.0.until", "expected a step from 1 on"),
    ("until: 50%", "until: 150%", 13, "stages.0.until", "expected a step, such as 8000"),
    ("until: 50%", "until: 80%", 14, "stages.1.until", "the stage before ends at step 80"),
    ("until: 80", "until: 101", 14, "stages.1.until", "the run ends at train.steps = 100"),
    ("until: 80\n    ", "", 14, "stages.1.until", "is required of all stages but the last"),
    ("  - mixture: {prose: 1}", "  - until: 90", 17, "stages.2.until", "the run ends at train.steps = 100"),
    ("until: 50%", "untill: 50%", 13, "stages.0.untill", "did you mean 'stages.0.until'?"),
    ("until: 50%", "lr: 0.1", 13, "stages.0.lr", "did you mean 'stages.0.optimizer.learning_rate'?"),
    ("mixture: {prose: 1}", "mixture: {pros: 1}", 17, "stages.2.mixture.pros", "did you mean 'prose'?"),
    ("mixture: {prose: 1}", "mixture: {prose: 0}", 17, "stages.2.mixture", "every weight is 0"),
    ("mixture: {prose: 1}", "mixture: {prose: x}", 17, "stages.2.mixture.prose", "valid number"),
    ("mixture: {prose: 1}", "mixture: [prose]", 17, "stages.2.mixture", "valid dictionary"),
    ("{from: 3, to: 1}", "{from: 3}", 15, "stages.1.mixture.code.to", "is required"),
    ("{from: 3, to: 1}", "{from: 3, to: -1}", 15, "stages.1.mixture.code.to", "greater than or equal to 0"),
    ("{from: 3, to: 1}", "{from: 0, to: 1}, prose: 0}  # {", 15, "stages.1.mixture", "is 0 at its beginning"),
    ("data.sequence_length: 64", "data.sequence_lenght: 64", 16, "stages.1.data.sequence_lenght", "did you mean"),
    ("data.sequence_length: 64", "data.sequence_length: 0", 16, "stages.1.data.sequence_length", "greater than 0"),
    ("data.sequence_length: 64", "data.seed: 1", 16, "stages.1.data.seed", "unknown key"),
    ("{global_batch_size: 4}", "{steps: 4}", 18, "stages.2.train.steps", "unknown key"),
    ("final_fraction: 0}", "decay_steps: 3}", 19, "stages.2.optimizer.decay_steps", "belongs to schedule wsd"),
    ("final_fraction: 0}", "warmup_steps: 50}", 19, "stages.2.optimizer.warmup_steps", "a stage of 20 steps"),
    ("optimizer: {learning_rate: 0.004", "optimizer: {name: lion", 19, "stages.2.optimizer.name", "unknown key"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "said"), WRONG, ids=[f"{key}-{new[:24]}" for _, new, _, key, _ in WRONG]
)
def test_what_is_malformed_is_refused_with_its_line_and_key(file, old, new, line, key, said):
    last = RECIPE.rindex(old)  # of `optimizer`, the stage's
    file.write_text(RECIPE[:last] + new + RECIPE[last + len(old) :])
    with pytest.raises(UserError) as refused:
        load_recipe(file)
    text = str(refused.value)
    assert text.startswith(f"{file}:{line}: {key}"), text
    assert said in text


def test_a_recipe_of_one_source_has_no_weights_to_change(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("extends: quickstart\nstages:\n- {mixture: {code: 1}}\n")
    with pytest.raises(UserError, match=rf"^{file}:3: stages\.0\.mixture: weighs sources of data.mixture"):
        load_recipe(file)
