"""Which keys may change while a run goes on."""

from __future__ import annotations

import re

import jax
import pytest

from tests.helpers import tiny_recipe
from trainfw import UserError, build_program
from trainfw.objectives.config import _OF_ONE as OF_IMAGES
from trainfw.parallel import Layout
from trainfw.recipe import keys
from trainfw.training.resuming import EFFECTS, changes, check_accept, cut_changes, cut_of, effect_of


def test_every_key_has_an_effect():
    sections = {key.rpartition(".")[0] for key in keys()}
    assert not set(keys()) - set(EFFECTS) - sections, "say in `_KEYS` what another value does to a run that goes on"
    assert not set(EFFECTS) - set(keys())
    assert effect_of("parallel.rules.embed") == "same"
    assert effect_of("hardware.parameters.links.neuronlink.bandwidth") == "same"


MOE = "model.moe={num_experts: 4, experts_per_token: 2, shared_intermediate_size: 16}"
LORA = "adapter={rank: 4}"
# Another value of every key whose change can be accepted.
ACCEPTED = {
    "moe": (
        [MOE, "optimizer={schedule: wsd, decay_steps: 3, ema: 0.9}", "model.sliding_window=8"],
        """model.norm_eps=1e-3 model.rope_theta=7 model.rope_scaling={kind: linear, factor: 2} model.sliding_window=4
        model.layer_pattern=[global, sliding] model.attention_softcap=3 model.final_softcap=3 model.query_scale=1
        model.rope_local_theta=3 model.moe.experts_per_token=1 model.moe.normalize_weights=false
        model.moe.dispatch=dropless model.moe.capacity_factor=2 model.moe.balance_loss=1 model.moe.z_loss=1
        data.mask_documents=false optimizer.learning_rate=1 optimizer.schedule=linear optimizer.warmup_steps=1
        optimizer.decay_steps=null optimizer.final_fraction=1 optimizer.b1=0 optimizer.b2=0 optimizer.epsilon=1
        optimizer.weight_decay=0 optimizer.weight_decay_exclude=[] optimizer.clip_norm=9 optimizer.ema=0.8
        train.global_batch_size=16
        train.compute_dtype=bfloat16 train.z_loss=1 hardware.compiler_flags=[-O1]""",
    ),
    "muon": (["optimizer.name=muon"], "optimizer.adam_learning_rate=1 train.matmul_dtype=fp8"),
    "llama3": (
        [
            "model.rope_scaling={kind: llama3, factor: 2, low_freq_factor: 1, high_freq_factor: 4, "
            "original_max_position: 8}"
        ],
        """model.rope_scaling.factor=3 model.rope_scaling.low_freq_factor=2 model.rope_scaling.high_freq_factor=5
        model.rope_scaling.original_max_position=9""",
    ),
    "pairs": (
        ["data.format=preferences", "objective.name=dpo"],
        "objective.name=simpo objective.beta=1 objective.margin=1",
    ),
    "linear": (["model.rope_scaling={kind: linear, factor: 2}"], "model.rope_scaling=null"),
    "lora": (
        [LORA],
        "adapter.alpha=1 adapter.dropout=0.5 adapter.base=nf4 adapter.block=32 adapter.exclude=[embedding]",
    ),
}


@pytest.mark.long
def test_what_can_be_accepted_fits_what_was_saved(tmp_path):
    seen = set()
    for name, (base, text) in ACCEPTED.items():
        overrides = re.split(r"\s+(?=[a-z0-9_.]+=)", text.strip())
        before, now = tiny_recipe(tmp_path, *base), tiny_recipe(tmp_path, *base, *overrides)
        found = changes(before, now)
        assert {change.key for change in found} == {override.partition("=")[0] for override in overrides}
        assert all(change.refusal([change.key]) == "" != change.refusal([]) for change in found)
        seen |= {change.key for change in found}
        if name in ("llama3", "linear"):  # no state holds rotary frequencies
            continue
        held = [build_program(recipe, jax.devices()[:1]).abstract_state for recipe in (before, now)]
        saved = [[(state.params, state.opt_state, state.rng, state.step)] for state in held]
        assert jax.tree.structure(saved[0]) == jax.tree.structure(saved[1])
        assert jax.tree.leaves(jax.tree.map(lambda a, b: a.shape == b.shape, *saved)).count(False) == 0
    of_images = {f"objective.{key}" for key in OF_IMAGES}  # of losses: no state holds any of it
    assert seen | {"model.rope_scaling.kind", "objective.options"} | of_images == {
        key for key, effect in EFFECTS.items() if effect == "numbers"
    }


REFUSED = {
    "shapes": (
        ["model.hidden_size=32", "model.head_dim=16"],
        "model.hidden_size: 64 there, 32 here (overrides): cannot",
    ),
    "an adapter": ([LORA], "adapter: None there, {'rank': 4} here (overrides): cannot change in a run"),
    "order": (["data.seed=7"], "data.seed: 0 there, 7 here (overrides): cannot change in a run: the tokens or"),
    "start": (["train.seed=7"], "it is read at the start alone"),
    "no clipping": (["optimizer.clip_norm=null"], "what its checkpoints hold would not fit"),
    "an average": (["optimizer.ema=0.9"], "what its checkpoints hold would not fit"),
    "numbers": (["optimizer.b1=0.5"], "changes the losses; --accept optimizer.b1 goes on with it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_change_is_refused_with_why(name, tmp_path):
    overrides, message = REFUSED[name]
    accept = [] if name == "numbers" else ["model", "adapter", "data", "train", "optimizer"]
    found = changes(tiny_recipe(tmp_path), tiny_recipe(tmp_path, *overrides))
    assert message in "\n".join(change.refusal(accept) for change in found)


def test_what_changes_no_number_needs_no_accepting(tmp_path):
    free = [
        "name=other",
        "train.accumulation_steps=2",
        "train.loss_chunk=7",
        "train.remat=full",
        "data.source=elsewhere",
    ]
    free += [
        "train.scan_layers=false",
        "parallel={data: 2, rules: {embed: []}}",
        "faults.non_finite=skip",
        "train.steps=9",
    ]
    found = changes(tiny_recipe(tmp_path), tiny_recipe(tmp_path, *free))
    assert len(found) >= len(free)
    assert not any(change.refusal([]) for change in found)


@pytest.mark.parametrize(
    ("key", "message"),
    {
        "optimizer.lr": "unknown key; did you mean 'optimizer.learning_rate'?",
        "optimizer.b1=0.5": "expected a key alone: optimizer.b1, beside optimizer.b1=0.5",
        "adapter.rank": "cannot change in a run: what its checkpoints hold would not fit",
        "data.shuffle": "cannot change in a run: the tokens or their order",
        "data.source": "may change as long as what it leads to is the same",
        "data.tokenizer": "may change as long as what it leads to is the same",
    }.items(),
)
def test_what_is_no_key_to_accept(key, message):
    check_accept(["optimizer", "adapter", "optimizer.learning_rate", "train.remat", "watchdog"])
    with pytest.raises(UserError, match=re.escape(f"accept: {key}: {message}")):
        check_accept([key])


def test_where_numbers_depend_on_how_batches_are_cut(tmp_path):
    for overrides, matters in {
        (): False,
        (MOE,): True,
        (MOE, "model.moe.dispatch=dropless"): False,
        (LORA,): False,
        (LORA, "adapter.dropout=0.1"): True,
    }.items():
        recipe = tiny_recipe(tmp_path, *overrides)
        before, now = cut_of(recipe, Layout(data=2)), cut_of(recipe, Layout(fsdp=4))
        assert cut_changes(recipe, before, before, []) == {}
        if not matters:
            assert cut_changes(recipe, before, now, []) == {}
            continue
        with pytest.raises(UserError, match=r"parallel\.data: 2 there, 1 here\n.*\n.*--accept parallel\.data --acc"):
            cut_changes(recipe, before, now, [])
        assert cut_changes(recipe, before, now, ["parallel"]) == {"parallel.data": (2, 1), "parallel.fsdp": (1, 4)}
