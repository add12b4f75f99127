"""Rules for keys of a recipe that change while its run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainfw.errors import UserError
from trainfw.parallel import Layout
from trainfw.recipe import Recipe, keys, nearest_key

Effect = Literal["same", "compared", "longer", "numbers", "state", "order", "start"]
"""Effect of another value of a key on a run that goes on.

`same`: beyond rounding nothing to its numbers: where, how and for how long it runs, and what it reports. `compared`:
nothing, as long as what it leads to is the same, which is compared itself (tokens, the weights of a base). `longer`:
another end. `numbers`: other losses, which the user may accept. The others cannot change, for the reasons in `_WHY`.
"""

_KEYS: dict[Effect, str] = {
    "same": """
        name model.preset model.max_position
        data.cache_dir data.prefetch data.stream.cache_bytes data.stream.wait_seconds
        train.accumulation_steps train.remat train.scan_layers train.loss_chunk train.log_every train.validate_every
        train.validation_batches train.sample_prompt train.sample_tokens train.sample_images
        evaluation evaluation.metric evaluation.examples evaluation.max_tokens evaluation.batch_size evaluation.samples
        checkpoint.directory checkpoint.every checkpoint.keep_last checkpoint.keep_every checkpoint.max_failures
        faults.non_finite faults.spike faults.spike_sigma faults.most faults.replicas_every
        watchdog.start_seconds watchdog.compile_seconds watchdog.step_seconds watchdog.save_seconds
        parallel.pipeline parallel.pipeline_microbatches parallel.interleave parallel.data parallel.fsdp
        parallel.fsdp_shards parallel.prefetch parallel.expert parallel.context parallel.context_attention
        parallel.tensor parallel.rules parallel.traffic
        hardware.topology hardware.count hardware.lnc hardware.parameters hardware.dollars_per_chip_hour hardware.sdk
        hardware.fsdp_overlap hardware.fused_attention
        backend.donate
    """,
    "compared": """
        model.from
        data.source data.mixture data.text_field data.messages_field data.prompt_field data.completion_field
        data.chosen_field data.rejected_field data.image_field data.caption_field data.label_field
        data.tokenizer.name data.tokenizer.path data.tokenizer.vocab_size
    """,
    "longer": "train.steps",
    "numbers": """
        model.norm_eps model.rope_theta model.rope_local_theta model.rope_scaling model.rope_scaling.kind
        model.rope_scaling.factor model.rope_scaling.low_freq_factor model.rope_scaling.high_freq_factor
        model.rope_scaling.original_max_position model.sliding_window model.layer_pattern model.attention_softcap
        model.final_softcap model.query_scale model.moe.experts_per_token model.moe.normalize_weights
        model.moe.dispatch model.moe.capacity_factor model.moe.balance_loss model.moe.z_loss
        adapter.alpha adapter.dropout adapter.base adapter.block adapter.exclude
        data.mask_documents
        objective.name objective.beta objective.margin objective.options objective.times objective.logit_mean
        objective.logit_std objective.shift objective.prediction objective.betas objective.beta_start objective.beta_end
        objective.min_snr_gamma objective.drop_condition objective.error objective.kl_weight
        optimizer.learning_rate optimizer.adam_learning_rate optimizer.schedule optimizer.warmup_steps
        optimizer.decay_steps optimizer.final_fraction optimizer.b1 optimizer.b2 optimizer.epsilon
        optimizer.weight_decay optimizer.weight_decay_exclude optimizer.clip_norm optimizer.ema
        stages train.global_batch_size train.compute_dtype train.matmul_dtype train.z_loss
        hardware.compiler_flags
    """,
    "state": """
        model model.family
        model.vocab_size model.hidden_size model.intermediate_size model.num_layers model.num_heads model.num_kv_heads
        model.head_dim model.tie_embeddings model.activation model.qkv_bias model.qk_norm model.zero_centered_norm
        model.post_norms model.scale_embeddings model.mup
        model.mup_base_width model.mup_base_head_dim model.moe model.moe.num_experts model.moe.shared_intermediate_size
        adapter adapter.kind adapter.rank adapter.targets adapter.patterns
        optimizer.name optimizer.options
    """,
    "order": """
        data.format data.loss_on data.chat_template data.system_prompt data.date data.too_long data.max_characters
        data.pairs_per_row data.sequence_length data.validation_fraction data.max_documents data.shuffle data.seed
        data.flip data.image_filter data.stream data.stream.window data.stream.validation_bytes data.packing data.split
    """,
    "start": "model.init_std adapter.from train.seed",
}
Changed = Mapping[str, Sequence[Any]]
"""Keys with their values before and now."""

EFFECTS: dict[str, Effect] = {key: effect for effect, listed in _KEYS.items() for key in listed.split()}
"""The effect of every key of a recipe; of a section, that of having it or not, and of the keys that are not listed."""

_WHY: dict[Effect, str] = {
    "state": "cannot change in a run: what its checkpoints hold would not fit, or mean something else",
    "order": "cannot change in a run: the tokens or their order would be others, and its place in them mean nothing",
    "start": "cannot change in a run: it is read at the start alone",
    "compared": "may change as long as what it leads to is the same, which is compared; other data or another base "
    "cannot be accepted",
}


@dataclass(frozen=True)
class Change:
    """A key whose value is not what it was in the run's last session."""

    key: str
    before: Any
    now: Any
    where: str
    """Place where it was written; empty for a default."""

    @property
    def effect(self) -> Effect:
        if self.key in ("optimizer.clip_norm", "optimizer.ema") and None in (self.before, self.now):
            return "state"  # a stage of the optimizer, with a place of its own in the state
        return effect_of(self.key)

    def refusal(self, accept: Sequence[str]) -> str:
        """Why the run cannot go on with it, and what would let it; empty where it can."""
        if self.effect in ("same", "compared", "longer") or (self.effect == "numbers" and covers(accept, self.key)):
            return ""
        key = "stages" if self.key.startswith("stages.") else self.key  # as far as keys are known
        why = _WHY.get(self.effect, f"changes the losses; --accept {key} goes on with it, or accept=[{key!r}]")
        where = f" ({self.where})" if self.where else ""
        return f"{self.key}: {self.before!r:.60} there, {self.now!r:.60} here{where}: {why}"


def changes(before: Recipe, now: Recipe) -> list[Change]:
    """List the differences in the order of keys; a section that only one recipe has counts as one."""
    found = before.differences(now)
    for section in EFFECTS:
        inside = [key for key in found if key.startswith(f"{section}.")]
        pair: list[Any] = [_value(recipe, section) for recipe in (before, now)] if inside else []
        if None in pair:
            found = {key: value for key, value in found.items() if key not in inside}
            had, has = (None if one is None else one.model_dump(exclude_defaults=True) for one in pair)
            found[section] = (had, has)
    return [Change(key, *values, now.written(key)) for key, values in found.items()]


def _value(recipe: Recipe, key: str) -> Any:
    found: Any = recipe
    for part in key.split("."):
        found = getattr(found, part, None)  # of another family, a section may not be there
    return found


def covers(accept: Sequence[str], key: str) -> bool:
    """Tell whether a key, or a section that it is in, is among those accepted."""
    return any(key == accepted or key.startswith(f"{accepted}.") for accepted in accept)


def effect_of(key: str) -> Effect:
    """Return the effect of the key, or of the nearest section it is in (`parallel.rules.embed`)."""
    while key not in EFFECTS:
        key = key.rpartition(".")[0]
        assert key, "every section is listed"
    return EFFECTS[key]


def check_accept(accept: Sequence[str]) -> None:
    """Raise UserError for what `--accept` does not take: no key, or one that cannot change."""
    for key in accept:
        if not key.isprintable():
            raise UserError(f"accept: {key!r:.60}: expected a key of the recipe")
        if "=" in key:
            name = key.partition("=")[0]
            raise UserError(f"accept: {key}: expected a key alone: {name}, beside {key}")
        if key not in keys():
            raise UserError(f"accept: {key}: unknown key{nearest_key(key)}")
        effects = [EFFECTS[other] for other in EFFECTS if covers([key], other)]
        if all(effect in _WHY for effect in effects):
            raise UserError(f"accept: {key}: {_WHY[effects[0]]}")


def cut_of(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """Return how a batch is cut over devices and microbatches, by key."""
    return {
        "train.accumulation_steps": recipe.train.accumulation_steps,
        "parallel.pipeline_microbatches": recipe.parallel.pipeline_microbatches,
        **{f"parallel.{axis}": size for axis, size in layout.sizes.items()},
    }


def cut_changes(recipe: Recipe, before: Mapping[str, Any], now: Mapping[str, Any], accept: Sequence[str]) -> Changed:
    """List what changes in how batches are cut, beyond rounding. Raises UserError unless it is accepted."""
    changed = {key: (before[key], now[key]) for key in now if key in before and before[key] != now[key]}
    why = recipe.model.depends_on_cut
    if not why and recipe.adapter is not None and recipe.adapter.dropout:
        why = "adapter.dropout draws for the part of the batch"
    other = [key for key in changed if not covers(accept, key)]
    if not why or not other:
        return changed if why else {}
    lines = "".join(f"  {key}: {before[key]} there, {now[key]} here\n" for key in other)
    flags = " ".join(f"--accept {key}" for key in other)
    raise UserError(
        f"cuts its batches otherwise, and {why}:\n{lines}cut them as before, or go on with {flags} (accept={other})"
    )
