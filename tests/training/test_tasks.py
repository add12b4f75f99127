"""Task metrics, and their evaluation before and after a run."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training.test_loop import Notes
from trainfw import UserError, load_recipe, train
from trainfw.data import TokenStore
from trainfw.training import METRICS, Comparison, RunDirectory, held_out_tasks, tiny_overrides


@pytest.mark.parametrize(
    ("metric", "output", "reference", "expected"),
    [
        # Lin 2004, section 3.1: "police killed the gunman" has "police the gunman" in common, "the gunman police kill"
        # only "the gunman".
        ("rouge_l", "Police kill the gunman.", "police killed the gunman", 3 / 4),
        ("rouge_l", "the gunman kill police", "police killed the gunman", 2 / 4),
        ("rouge_l", "police", "police killed the gunman", 2 * 1 * (1 / 4) / (1 + 1 / 4)),
        ("rouge_l", "", "police", 0),
        ("rouge_l", "...", "!", 0),
        ("chrf", "same text", "same  text ", 1),
        ("chrf", "abd", "abc", (2 / 3 + 1 / 2 + 0) / 3),  # precision is recall
        ("chrf", "ab", "abcd", 5 * (1 / 2) * (5 / 24) / (4 * (1 / 2) + 5 / 24)),  # P = (1+1+0+0)/4, R = (2/4+1/3)/4
        ("chrf", "", "abc", 0),
        ("exact_match", " A b.\n", "A b.", 1),
        ("exact_match", "a b.", "A b.", 0),
    ],
)
def test_metrics_by_hand(metric, output, reference, expected):
    assert METRICS[metric](output, reference) == pytest.approx(expected)


def test_prompt_and_reference_are_cut_at_the_mask():
    learnt = [[0, 0, 1, 1], [0, 1, 0, 0, 1], [0, 1]]
    lengths = [len(one) for one in learnt]
    store = TokenStore(
        np.arange(1, 12), np.cumsum([0, *lengths]), 1, "", np.array([x for one in learnt for x in one], bool)
    )
    tasks = [(task.prompt, task.reference) for task in held_out_tasks(store, 9)]
    assert tasks == [([1, 2], [3, 4]), ([5, 6, 7, 8], [9]), ([10], [11])]
    assert [task.prompt[0] for task in held_out_tasks(store, 2)] == [1, 10]


def test_a_comparison_says_how_sure_it_is():
    before, after = ([{"exact_match": x} for x in scores] for scores in ([0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]))
    assert str(Comparison("exact_match", before, after)) == (
        "exact_match on 4 held-out examples: 0.250 before training, 0.500 after "
        "(+0.250, standard error 0.479; better on 2, worse on 1)"
    )
    assert str(Comparison("exact_match", [], after)) == "exact_match on 4 held-out examples: 0.500"


RECIPE = """
name: capitals
model: {preset: tiny, vocab_size: 258, num_layers: 1}
data:
  source: SOURCE
  format: prompt_completion
  chat_template: false
  sequence_length: 32
  validation_fraction: 0.2
train: {steps: 80, global_batch_size: 4, log_every: 20}
evaluation: {metric: chrf, examples: 5, max_tokens: 8, batch_size: 4, samples: 2}
optimizer: {learning_rate: 1.0e-2, warmup_steps: 1}
checkpoint: {every: 40}
"""


def capitals(directory: Path, *overrides: str):
    rows = [{"prompt": f"{chr(97 + i % 26) * (1 + i // 26)}=", "completion": chr(65 + i % 26)} for i in range(78)]
    rows.append({"prompt": "x", "completion": ""})
    source = directory / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "recipe.yaml").write_text(RECIPE.replace("SOURCE", str(source)))
    return load_recipe(directory / "recipe.yaml", overrides)


def run(recipe, directory: Path):
    reporter = Notes()
    result = train(recipe, devices=jax.devices()[:1], run_dir=directory / "run", reporter=reporter)
    return result, reporter.notes


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluated")
    return directory, *run(capitals(directory), directory)


def test_a_run_evaluates_before_and_after(evaluated):
    directory, result, notes = evaluated
    text = "\n".join(notes)
    assert "1 row refused:\ndata:   1 row: 'completion' is empty (the first: pairs.jsonl:79)" in text
    assert "% of them learnt; rows of 32 are" in text
    assert f"evaluation: {result.evaluation}" in text
    assert text.count("\n  reference: ") == text.count("\n  before: ") == text.count("\n  after: ") == 2
    rows = list(RunDirectory(directory / "run").evaluations())
    assert [(row["step"], row["example"]) for row in rows] == [(step, i) for step in (0, 80) for i in range(5)]
    assert all(row["prompt"].endswith("=") and row["reference"] == row["prompt"][0].upper() for row in rows)
    scores = [row for row in RunDirectory(directory / "run").metrics() if "evaluation_chrf" in row]
    assert [row["step"] for row in scores] == [0, 80]
    assert scores[1]["evaluation_chrf"] == pytest.approx(result.evaluation.score)
    assert result.evaluation.score > result.evaluation.score_before + 0.3
    # Of the completions alone, a letter and the end each.
    assert result.validation.count == 2 * len(held_out(directory))


def held_out(directory: Path) -> list[str]:
    from trainfw.data.cache import is_held_out

    rows = map(json.loads, (directory / "pairs.jsonl").read_text().splitlines())
    return [row["prompt"] for row in rows if row["completion"] and is_held_out(row["prompt"], 0.2)]


@pytest.mark.long
def test_a_resumed_run_keeps_what_was_before(evaluated, monkeypatch):
    directory, first, _ = evaluated
    metrics = (directory / "run" / "metrics.jsonl").read_bytes()
    again, notes = run(capitals(directory), directory)
    assert again.evaluation == first.evaluation  # read, not written anew
    assert (directory / "run" / "metrics.jsonl").read_bytes() == metrics
    longer, notes = run(capitals(directory, "train.steps=84"), directory)
    assert longer.evaluation.before == first.evaluation.before
    assert {row["step"] for row in RunDirectory(directory / "run").evaluations()} == {0, 80, 84}
    other, notes = run(capitals(directory, "train.steps=84", "evaluation.max_tokens=4"), directory)
    assert other.evaluation.before == []
    assert not any("before training" in note for note in notes)


def test_text_has_no_task(tmp_path):
    recipe = capitals(tmp_path, "data.format=text", "data.chat_template=true")
    with pytest.raises(UserError, match=r"evaluation.metric = 'chrf': needs prompts and references: data.format chat"):
        run(recipe, tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_tiny_recipe_is_of_text(tmp_path):
    recipe = capitals(tmp_path)
    tiny = load_recipe(tmp_path / "recipe.yaml", tiny_overrides(recipe, 8))
    assert (tiny.data.format, tiny.evaluation) == ("text", None)
