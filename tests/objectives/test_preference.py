"""Losses of pairs beside TRL's: the same loss, metrics and gradients, of pairs packed into rows."""

import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import jax
import numpy as np
import pytest
import torch
import transformers
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from tests.helpers import quicker
from trainfw import UserError, build_program, load_recipe
from trainfw.data import byte_tokenizer

LENGTH, ROWS = 48, 2
LENGTHS = [((21, 9), (17, 5)), ((13, 4), (13, 6)), ((25, 20), (30, 12)), ((12, 3), (11, 8))]
"""Of each pair, for the chosen and the rejected: tokens, and how many of them at the end are learnt."""
PACKED = [[0, 1], [2, 3]]
"""Pairs of each row."""


def random_pairs():
    rng = np.random.default_rng(0)
    return [[rng.integers(0, 256, tokens).astype(np.int32) for tokens, _ in pair] for pair in LENGTHS]


def packed(pairs):
    """The batch of a program: (rows, 2, LENGTH)."""
    names = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    batch = {name: np.zeros((ROWS, 2, LENGTH), np.float32 if name == "loss_mask" else np.int32) for name in names}
    for row, numbers in enumerate(PACKED):
        for side in (0, 1):
            place = 0
            for segment, number in enumerate(numbers, start=1):
                ids, learnt = pairs[number][side], LENGTHS[number][side][1]
                part = slice(place, place + len(ids) - 1)
                batch["tokens"][row, side, part], batch["targets"][row, side, part] = ids[:-1], ids[1:]
                batch["segment_ids"][row, side, part] = segment
                batch["positions"][row, side, part] = np.arange(len(ids) - 1)
                batch["loss_mask"][row, side, part.stop - learnt : part.stop] = 1
                place = part.stop
    return batch


def padded(pairs):
    """The same for TRL: every chosen sequence, then every rejected one."""
    sides = [(pair[side], LENGTHS[i][side][1]) for side in (0, 1) for i, pair in enumerate(pairs)]
    width = max(len(ids) for ids, _ in sides)
    inputs = {name: torch.zeros(len(sides), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    inputs["completion_mask"] = torch.zeros(len(sides), width, dtype=torch.long)
    for i, (ids, learnt) in enumerate(sides):
        inputs["input_ids"][i, : len(ids)] = torch.from_numpy(ids).long()
        inputs["attention_mask"][i, : len(ids)] = 1
        inputs["completion_mask"][i, len(ids) - learnt : len(ids)] = 1
    return inputs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a random Llama, the reference, and of one that has learnt something else since."""
    directory = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config)
    for name in ("reference", "learner"):
        model.save_pretrained(directory / name)
        byte_tokenizer().save(directory / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return directory


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)


def recipe_of(path, *overrides):
    tree = {
        "model": {"from": str(path)},
        "data": {"format": "preferences", "sequence_length": LENGTH, "pairs_per_row": 3},
        "train": {"global_batch_size": ROWS, "loss_chunk": 32},
        "parallel": {"fsdp": 1},
    }
    return load_recipe(tree, overrides)


def of_trl(kind, models, directory):
    """(loss, learner with its gradients) of TRL's trainers."""
    model, inputs = load(models / "learner"), padded(random_pairs())
    if kind in ("dpo", "ipo"):
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(models / "learner" / "tokenizer.json"))
        tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(257)
        settings = DPOConfig(
            output_dir=str(directory),
            use_cpu=True,
            bf16=False,
            report_to=[],
            loss_type=kind.replace("dpo", "sigmoid"),
        )
        rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
        trainer = DPOTrainer(
            model, load(models / "reference"), args=settings, train_dataset=rows, processing_class=tokenizer
        )
        loss = trainer._compute_loss(trainer.model, inputs, False)
    else:
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        chosen, rejected = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True).chunk(2)
        accelerator = SimpleNamespace(device="cpu")
        if kind == "simpo":
            like = SimpleNamespace(
                beta=2.0, simpo_gamma=0.5, loss_type="simpo", label_smoothing=0.0, alpha=0.0, accelerator=accelerator
            )
            loss = CPOTrainer.cpo_loss(like, chosen, rejected)[0].mean()
        else:
            like = SimpleNamespace(beta=0.1, accelerator=accelerator)
            loss = (-chosen - ORPOTrainer.odds_ratio_loss(like, chosen, rejected)[0]).mean()
    loss.backward()
    return float(loss.detach()), model


@pytest.mark.parametrize("kind", quicker(["dpo", "ipo", "simpo", "orpo"], ["dpo", "orpo"]))
def test_loss_and_gradients_are_those_of_trl(models, tmp_path, kind):
    loss, model = of_trl(kind, models, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(tmp_path / "gradients")
    byte_tokenizer().save(tmp_path / "gradients")

    margin = ["objective.margin=0.5"] if kind == "simpo" else []
    programs = [
        build_program(recipe_of(path, f"objective.name={kind}", *margin), jax.devices()[:1])
        for path in (models / "learner", models / "reference", tmp_path / "gradients")
    ]
    learner, reference, expected = (program.init() for program in programs)
    grads, metrics = programs[0].gradients(
        learner.params, reference.frozen, programs[0].shard_batch(packed(random_pairs()))
    )
    assert metrics["loss"].value() == pytest.approx(loss, rel=1e-5)
    assert float(metrics["loss"].count) == len(LENGTHS)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected.params), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_metrics_are_those_of_trl(models, tmp_path):
    names = ("learner", "reference")
    program, other = (build_program(recipe_of(models / n, "objective.name=dpo"), jax.devices()[:1]) for n in names)
    batch = program.shard_batch(packed(random_pairs()))
    metrics = program.eval_step(program.init().params, other.init().frozen, batch)
    inputs = padded(random_pairs())
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    with torch.no_grad():
        ours, theirs = (
            ORPOTrainer.get_batch_logps(load(models / name)(inputs["input_ids"]).logits, labels) for name in names
        )
    chosen, rejected = (ours - theirs).chunk(2)
    assert metrics["reward_margin"].value() == pytest.approx(0.1 * float((chosen - rejected).mean()), rel=1e-4)
    assert metrics["preference_accuracy"].value() == float((chosen > rejected).float().mean())
    assert metrics["kl"].value() == pytest.approx(float((ours - theirs).mean()), rel=1e-4)


def test_at_the_start_nothing_is_preferred(models):
    program = build_program(recipe_of(models / "learner", "objective.name=dpo"), jax.devices()[:1])
    state = program.init()
    metrics = program.eval_step(state.params, state.frozen, program.shard_batch(packed(random_pairs())))
    assert metrics["loss"].value() == pytest.approx(np.log(2), rel=1e-6)
    assert metrics["reward_margin"].value() == metrics["kl"].value() == 0
    assert metrics["preference_accuracy"].value() == 0.5


def test_what_does_not_fit_is_said(models):
    path = models / "learner"
    with pytest.raises(UserError, match=r"unknown objective.*did you mean 'dpo'"):
        recipe_of(path, "objective.name=dppo")
    with pytest.raises(UserError, match="next_token learns no pairs"):
        recipe_of(path)
    with pytest.raises(UserError, match="margin is for simpo"):
        recipe_of(path, "objective.name=dpo", "objective.margin=1.0")
    with pytest.raises(UserError, match=r"dpo learns from pairs: set data.format: preferences"):
        load_recipe({"model": {"from": str(path)}, "data": {"sequence_length": 8}, "objective": {"name": "dpo"}})
