from __future__ import annotations

import jax
import pytest
from flax import nnx

from tests.helpers import losses, tiny_recipe
from trainfw import RunError, UserError, build_program, evaluate, load_model, load_recipe, train
from trainfw.data import TrainIterator, byte_tokenizer, pipeline
from trainfw.training import Reporter, RunDirectory
from trainfw.training.session import Session


class Notes(Reporter):
    def __init__(self):
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    recipe = tiny_recipe(
        directory,
        *("train.validate_every=3", "train.sample_prompt=word", "train.validation_batches=null"),
        "model.max_position=31",
    )
    reporter = Notes()
    result = train(recipe, devices=jax.devices()[:1], run_dir=directory / "run", reporter=reporter)
    return recipe, result, reporter.notes


def test_metrics_have_the_promised_keys(finished):
    _, result, _ = finished
    rows = list(RunDirectory(result.run_dir).metrics())
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    for row in steps:
        assert set(row) == {
            "step",
            "loss",
            "step_time_seconds",
            "tokens_per_second",
            "mfu",
            "grad_norm",
            "learning_rate",
            "tokens",
            "goodput",
            "skipped_steps",
            "rollbacks",
        }
        assert row["mfu"] is None  # no published peak of a CPU
        assert row["tokens_per_second"] == pytest.approx(8 * 32 / row["step_time_seconds"])
    assert [row["tokens"] for row in steps] == [256 * step for step in range(1, 9)]
    validations = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in validations] == [0, 3, 6, 8]
    assert validations[-1]["validation_bits_per_byte"] == result.validation.bits_per_byte


def test_a_special_token_past_the_embedding_is_refused_where_the_data_has_it(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_special_tokens(["<image>"])
    tokenizer.save(tmp_path / "t")
    file = f"data.tokenizer={{name: file, path: {tmp_path / 't'}}}"
    recipe = tiny_recipe(tmp_path, file, "train.steps=1")
    assert train(recipe, devices=jax.devices()[:1], run_dir=tmp_path / "run").step == 1
    recipe = tiny_recipe(tmp_path, file, "train.steps=1", "model.vocab_size=257")  # which eos is not among
    with pytest.raises(UserError, match=r"model.vocab_size = 257: is smaller than .*; expected 259 or more"):
        train(recipe, devices=jax.devices()[:1], run_dir=tmp_path / "other")


def test_rows_longer_than_the_model_was_made_for_are_said(finished):
    assert "warning: data.sequence_length = 32 is more than the model's max_position = 31" in finished[2]


def test_the_run_directory_is_self_contained(finished):
    recipe, result, _ = finished
    run = result.run_dir
    assert load_recipe(run) == recipe
    assert {p.name for p in run.iterdir()} >= {
        "recipe.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "tokenizer",
    }
    assert list((run / "tensorboard").glob("events*"))
    model, tokenizer = load_model(run)
    logits_BSV = model(jax.numpy.array([[tokenizer.bos_id, *tokenizer.encode("word")]]))
    assert logits_BSV.shape == (1, 5, recipe.model.vocab_size)


def test_what_it_told(finished):
    _, result, notes = finished
    text = "\n".join(notes)
    assert "no MFU: no published dense peak of 'cpu'" in text
    assert text.count("compiled in") == 1
    assert text.index("compiled in") < text.index("validation at step 0")
    assert "gzip" not in text  # of so little text it is mostly its own header
    assert f"sample:\nword{result.sample}" in text


def test_one_cpu_device_reports_a_step_before_the_next_is_fed(tmp_path, monkeypatch):
    order = []

    class Steps(Notes):
        def step(self, step, steps):
            order.append(f"{step} done")

    class Fed(TrainIterator):
        def __next__(self):
            order.append("fed")
            return super().__next__()

    monkeypatch.setattr(pipeline, "TrainIterator", Fed)
    train(tiny_recipe(tmp_path, "train.steps=3"), devices=jax.devices()[:1], run_dir=tmp_path / "run", reporter=Steps())
    assert order == ["fed", "1 done", "fed", "2 done", "fed", "3 done"]


def test_bits_per_byte_of_the_byte_tokenizer_are_bits_per_token(finished):
    """One token a byte, and one to end each document."""
    _, result, _ = finished
    validation, data = evaluate(result.run_dir, [], reporter=Notes())
    assert validation.count == data.validation.num_bytes + data.validation.num_documents
    bits = validation.loss * validation.count / 0.6931471805599453
    assert validation.bits_per_byte == pytest.approx(bits / data.validation.num_bytes)


def test_a_part_of_the_held_out_tokens_is_not_compared_with_gzip(tmp_path):
    reporter = Notes()
    recipe = tiny_recipe(tmp_path, "train.validation_batches=1", "train.steps=1")
    result = train(recipe, devices=jax.devices()[:1], run_dir=tmp_path / "run", reporter=reporter)
    assert not result.validation.complete
    assert not any("gzip" in note for note in reporter.notes)


def test_other_data_is_evaluated_with_the_runs_tokenizer_on_any_devices(finished, tmp_path):
    _, result, _ = finished
    tiny_recipe(tmp_path)
    (tmp_path / "text" / "more.txt").write_text("more words " * 50)
    overrides = [f"data.source={tmp_path}/text/*.txt", "data.validation_fraction=0.5"]
    validation, _ = evaluate(result.run_dir, overrides, reporter=Notes())
    assert validation.count > result.validation.count
    with pytest.raises(UserError, match=r"optimizer\.name: does not change an evaluation"):
        evaluate(result.run_dir, ["optimizer.name=lion"])


def test_training_learns(finished):
    _, result, _ = finished
    rows = list(RunDirectory(result.run_dir).metrics())
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"] - 0.5


def test_a_loss_that_is_not_finite_fails_and_saves_nothing_bad(tmp_path):
    recipe = tiny_recipe(tmp_path, "optimizer.learning_rate=1e30", "checkpoint={every: 1, keep_last: 1}")
    with pytest.raises(RunError, match=r"step \d: .* is (nan|inf)") as error:
        train(recipe, devices=jax.devices()[:1], run_dir=tmp_path / "run", reporter=Notes())
    saved = RunDirectory(tmp_path / "run").steps()
    assert (f"step {saved[-1]} is the last one saved" if saved else "nothing was saved") in str(error.value)
    if saved:
        model, _ = load_model(tmp_path / "run")
        assert all(jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(model)))


def test_what_cannot_work_leaves_a_run_as_it_was(tmp_path):
    recipe = tiny_recipe(tmp_path, "train.steps=4")
    train(recipe, devices=jax.devices()[:2], run_dir=tmp_path / "run", reporter=Notes())
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"step": 99, "loss": 1.0}\n')
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for override in [
        "parallel.rules={mlp: [fsdp]}",
        "parallel.fsdp=3",
        "optimizer.name=lion",
        "model.vocab_size=8",
    ]:
        bad = tiny_recipe(tmp_path, "train.steps=8", override)
        with pytest.raises(UserError):
            train(bad, devices=jax.devices()[:2], run_dir=tmp_path / "run", reporter=Notes())
    assert files == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    recipe = tiny_recipe(tmp_path)
    with RunDirectory(tmp_path / "run").lock(), pytest.raises(UserError, match="another process is training here"):
        train(recipe, devices=jax.devices()[:1], run_dir=tmp_path / "run", reporter=Notes())


def test_two_processes_do_not_keep_checkpoints_in_one_directory(tmp_path):
    recipe = tiny_recipe(tmp_path, f"checkpoint.directory={tmp_path / 'ck'}")
    with (
        RunDirectory(tmp_path / "a", recipe.checkpoint).lock(),
        pytest.raises(UserError, match=r"ck: another process that trains keeps its checkpoints here; choose another"),
    ):
        train(recipe, devices=jax.devices()[:1], run_dir=tmp_path / "b", reporter=Notes())
    with RunDirectory(tmp_path / "b", recipe.checkpoint).lock():
        pass


def test_mfu_is_model_flops_over_the_peak(tmp_path, monkeypatch):
    from trainfw.training import session

    monkeypatch.setattr(session, "peak_flops", lambda kind, dtype: 1e12)
    recipe = tiny_recipe(tmp_path, "train.validation_batches=0")
    reporter = Notes()
    result = train(recipe, devices=jax.devices()[:2], run_dir=tmp_path / "run", reporter=reporter)
    program = build_program(recipe, jax.devices()[:2])
    for row in RunDirectory(result.run_dir).metrics():
        assert row["mfu"] == pytest.approx(program.flops_per_step / row["step_time_seconds"] / 2e12)
    assert sum("MFU is model FLOPs" in note for note in reporter.notes) == 1


def test_a_run_without_donation_has_the_same_losses_and_one_state_at_a_time(tmp_path, monkeypatch):
    states = []
    step = Session._step

    def seen(self, state, batch):
        states.append(state.params)
        return step(self, state, batch)

    monkeypatch.setattr(Session, "_step", seen)
    found = []
    for donate in ("true", "false"):
        recipe = tiny_recipe(tmp_path, "train.steps=3", f"backend.donate={donate}")
        train(recipe, devices=jax.devices()[:2], run_dir=tmp_path / donate)
        found.append(losses(tmp_path / donate))
        assert all(leaf.is_deleted() for params in states for leaf in jax.tree.leaves(params))
    assert found[0] == found[1]
