"""A family that is none of ours, in this file alone: layers of gated linear attention, by whose decay tokens forget."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import Field

from tests.helpers import quicker, random_batches, write_recipe
from trainfw import UserError, build_program, load_recipe, plan
from trainfw.checking import check_program
from trainfw.config import Dim
from trainfw.models import (
    MLP,
    Embedding,
    Family,
    FamilyConfig,
    LanguageModel,
    Limit,
    Linear,
    RMSNorm,
    TokenFamilyConfig,
    gather_sequence,
    init_stack,
    scatter_sequence,
)
from trainfw.planning import survey
from trainfw.training import tiny_overrides

NAME = "tests.models.test_own_family:LinearAttention"
STD, EPS = 0.1, 1e-5


class Config(TokenFamilyConfig):
    """A model of gated linear attention."""

    num_memories: Dim
    """K: memories in a layer, each with a decay of its own."""
    memory_dim: Dim
    """h: a memory is a matrix of h x h."""
    expansion: int = Field(default=2, ge=1)
    """Width of the feed-forward layer over hidden_size."""


class Mixer(nnx.Module):
    """What a token reads of the memories: M_t = a_t M_{t-1} + k_t v_t', y_t = M_t' q_t, with a_t in (0, 1).

    Written out, y_t is the sum over s <= t of (a_{s+1} ... a_t) (q_t . k_s) v_s. Memories begin empty in a document.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        D, K, self.h = config.hidden_size, config.num_memories, config.memory_dim
        self.query, self.key, self.value, self.gate = (
            Linear((D, K * self.h), ("embed", "heads"), std=STD, rngs=rngs) for _ in range(4)
        )
        self.decay = Linear((D, K), ("embed", "heads"), std=STD, rngs=rngs)
        self.output = Linear((K * self.h, D), ("heads", "embed"), std=STD, rngs=rngs)

    def __call__(self, x_BSD, places):
        B, S, _ = x_BSD.shape
        q_BSKh, k_BSKh, v_BSKh = (m(x_BSD).reshape(B, S, -1, self.h) for m in (self.query, self.key, self.value))
        forgotten_BSK = jnp.cumsum(jax.nn.log_sigmoid(self.decay(x_BSD).astype(jnp.float32) + 2.0), axis=1)
        left_BSTK = jnp.exp(jnp.minimum(forgotten_BSK[:, :, None] - forgotten_BSK[:, None], 0.0))
        seen_BST = jnp.tri(S, dtype=bool)[None]
        if places.segment_ids_BS is not None:
            seen_BST = seen_BST & (places.segment_ids_BS[:, :, None] == places.segment_ids_BS[:, None])
        weights_BSTK = jnp.where(seen_BST[..., None], left_BSTK, 0.0).astype(x_BSD.dtype)
        met_BSTK = jnp.einsum("bskh,btkh->bstk", q_BSKh, k_BSKh) * weights_BSTK / self.h
        y_BSKh = jnp.einsum("bstk,btkh->bskh", met_BSTK, v_BSKh)
        return self.output(y_BSKh.reshape(B, S, -1) * jax.nn.silu(self.gate(x_BSD)))


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        D = config.hidden_size
        self.bias = nnx.Param(jnp.zeros(D), axes=("bias",))  # a dim name of the family's own
        self.mixer, self.mixer_norm, self.mlp_norm = Mixer(config, rngs), RMSNorm(D, eps=EPS), RMSNorm(D, eps=EPS)
        self.mlp = MLP(D, D * config.expansion, activation="silu", std=STD, rngs=rngs)

    def __call__(self, x_BSD, places):
        x_BSD = x_BSD + scatter_sequence(self.mixer(gather_sequence(self.mixer_norm(x_BSD)), places))
        h_BSD = self.mlp_norm(x_BSD) + self.bias[...].astype(x_BSD.dtype)
        return x_BSD + scatter_sequence(self.mlp(gather_sequence(h_BSD)))


class Model(LanguageModel):
    def __init__(self, config: Config, options, rngs: nnx.Rngs):
        super().__init__(config, options)
        D, V = config.hidden_size, config.vocab_size
        self.embedding = Embedding(V, D, std=STD, rngs=rngs)
        fp8 = options.matmul_dtype == "fp8"
        self.layers = init_stack(lambda rngs: Block(config, rngs), config.num_layers, rngs, fp8=fp8)
        self.final_norm = RMSNorm(D, eps=EPS)
        self.head = Linear((D, V), ("embed", "vocab"), std=STD, rngs=rngs)


class LinearAttention(Family):
    config = Config

    def build(self, config, options, rngs):
        return Model(config, options, rngs)

    def limits(self, config):
        yield Limit("num_memories", config.num_memories, "heads")
        yield Limit("hidden_size", config.hidden_size * config.expansion, "mlp")
        yield Limit("hidden_size", config.hidden_size, "embed")
        yield Limit("vocab_size", config.vocab_size, "vocab", pads=True)

    def dims(self, config):
        return {"bias": ("fsdp",)}

    def unspread(self, config):
        return {"context": "a memory is of the whole sequence", "expert": "there are no experts; use fsdp"}

    def flops_per_token(self, config, sequence_length):
        D, width = config.hidden_size, config.num_memories * config.memory_dim
        layer = 5 * D * width + D * config.num_memories + 3 * D * D * config.expansion
        return (
            6.0 * (config.num_layers * layer + D * config.vocab_size)
            + 6.0 * config.num_layers * width * sequence_length
        )

    def tiny(self, config, *, layers, tensor):
        return {"vocab_size": 320, "hidden_size": 32, "num_layers": layers, "num_memories": 4, "memory_dim": 8}


MODEL = {"family": NAME, "vocab_size": 258, "hidden_size": 32, "num_layers": 4, "num_memories": 4, "memory_dim": 8}


@pytest.fixture
def recipe_file(tmp_path):
    path = write_recipe(tmp_path)
    text = path.read_text().replace("model: {preset: tiny, vocab_size: 258}", f"model: {MODEL}".replace("'", ""))
    path.write_text(text.replace(NAME, f'"{NAME}"'))
    return path


def trained(recipe, devices, steps=3):
    """The losses of the first steps, on the same batches in every layout."""
    program = build_program(recipe, jax.devices()[:devices])
    state, found = program.init(), []
    for batch in random_batches(recipe, steps):
        state, metrics = program.train_step(state, program.shard_batch(batch))
        found.append(metrics["loss"].value())
    return found


LAYOUTS = {
    "fsdp x tensor": ("parallel={fsdp: 2, tensor: 2}", "train.remat=full"),
    "fsdp x pipeline": ("parallel={fsdp: 2, pipeline: 2, interleave: 2}", "train.remat=full"),
    "unrolled": ("parallel={fsdp: 4}", "train.scan_layers=false", "train.remat=dots", "train.accumulation_steps=2"),
}


@pytest.mark.parametrize("layout", quicker(LAYOUTS, ["fsdp x pipeline"]))
def test_it_learns_alike_in_every_layout(recipe_file, layout):
    expected = trained(load_recipe(recipe_file), 1)
    assert expected[-1] < expected[0] < math.log(258) + 1
    assert trained(load_recipe(recipe_file, LAYOUTS[layout]), 4) == pytest.approx(expected, abs=1e-5)


def test_a_token_sees_none_that_follows_and_no_other_document(recipe_file):
    recipe = load_recipe(recipe_file)
    program = build_program(recipe, jax.devices()[:1])
    state, batch = program.init(), random_batches(recipe, 1)[0]
    model = program.model(state.params)
    tokens, segments = batch["tokens"][:1], batch["segment_ids"][:1]
    start = int((segments[0] == 2).argmax())
    run = jax.jit(lambda tokens: model(tokens, segment_ids_BS=segments))
    before, after = run(tokens), run(np.where(np.arange(tokens.shape[1]) == start, tokens + 1, tokens))
    np.testing.assert_array_equal(before[:, :start], after[:, :start])
    assert (before[:, start] != after[:, start]).any()
    first = run(np.where(np.arange(tokens.shape[1]) == 0, tokens + 1, tokens))
    np.testing.assert_allclose(first[:, start:], before[:, start:], atol=1e-5)  # decays are summed over the row


@pytest.mark.long
def test_it_is_planned_and_checked(recipe_file):
    chip = ("hardware.topology=trn2.3xlarge", "train.compute_dtype=bfloat16")
    recipe = load_recipe(recipe_file, (*chip, "parallel={fsdp: 2, tensor: 2}"))
    told: list[str] = []
    made = plan(recipe)
    assert plan(recipe, progress=told.append).time == made.time
    assert not any("compiled before" in text for text in told)  # its code may have changed since
    assert made.time.seconds > 0
    assert 0 < made.mfu < 1
    report = check_program(build_program(recipe, jax.devices()[:4]), topology=recipe.hardware.load())
    assert report.ok, str(report)
    with pytest.raises(UserError, match=rf"recipe.yaml:\d+: model.family = '{NAME}'.*shapes"):
        survey(recipe)


def test_its_config_validates_the_section(recipe_file):
    recipe = load_recipe(recipe_file)
    assert isinstance(recipe.model, Config)
    saved = recipe_file.parent / "saved.yaml"
    saved.write_text(recipe.to_yaml())
    assert load_recipe(saved) == recipe
    for override, said in {
        "model.num_memory=4": r"command line: model.num_memory = 4: unknown key; did you mean 'model.num_memories'\?",
        "model.expansion=0": r"command line: model.expansion = 0: expected greater than or equal to 1",
        "model.num_heads=4": r"model.num_heads = 4: unknown key",
        "train.sample_prompt=Once": r"train.sample_prompt: needs text of the model, and family .* draws none",
        "model.memory_dim=null": r"command line: model.memory_dim = null: expected",
    }.items():
        with pytest.raises(UserError, match=said):
            load_recipe(recipe_file, [override], written="command line")
    written = recipe_file.read_text()
    recipe_file.write_text(written.replace("memory_dim: 8", "memory_dim: -8"))
    with pytest.raises(UserError, match=r"recipe.yaml:\d+: model.memory_dim = -8: expected greater than 0"):
        load_recipe(recipe_file)


def test_layouts_that_it_cannot_have_are_refused(recipe_file):
    for layout, said in {
        "{context: 2, fsdp: 4}": r"parallel.context = 2: a memory is of the whole sequence",
        "{tensor: 8}": r"model.num_memories = 4: does not divide over parallel.tensor = 8; .* that does: 4",
        "{pipeline: 8}": r"model.num_layers = 4: does not divide over pipeline\(8\)",
    }.items():
        recipe = load_recipe(recipe_file, [f"parallel={layout}"])
        with pytest.raises(UserError, match=said):
            build_program(recipe, jax.devices())


def test_it_is_made_tiny(recipe_file):
    recipe = load_recipe(recipe_file, ["model.hidden_size=4096", "parallel={tensor: 8}"])
    tiny = load_recipe(recipe_file, tiny_overrides(recipe, 4))
    assert (tiny.model.hidden_size, tiny.parallel.tensor) == (32, 2)


def test_another_family_takes_nothing_of_the_recipe_it_extends(recipe_file):
    other = recipe_file.parent / "decoder.yaml"
    other.write_text("extends: recipe.yaml\nmodel: {family: decoder, preset: tiny}\n")
    assert load_recipe(other).model.family == "decoder"
    assert load_recipe(recipe_file, ["model.family=decoder", "model.preset=tiny"]).model.family == "decoder"
    assert load_recipe(recipe_file, [f"model.family={NAME}"]) == load_recipe(recipe_file)


def test_a_family_that_is_none_is_refused(recipe_file):
    for name, said in {
        "decodr": r"model.family: 'decodr': unknown family; .*did you mean 'decoder'\?",
        "nowhere:Family": "No module named 'nowhere'",
        "tests.models.test_own_family:Block": r"has no config and no decodes",
        "tests.models.test_own_family:WithoutVocabulary": r"has no vocab_size.*TokenFamilyConfig",
        "collections:OrderedDict": r"has no config and no decodes .*expected a trainfw.models.Family",
    }.items():
        with pytest.raises(UserError, match=said):
            load_recipe(recipe_file, [f"model.family={name}"])


class WithoutVocabulary(LinearAttention):
    config = FamilyConfig


class Changed(LinearAttention):
    """A family whose parts a test changes."""


class WithPlainParameter(Model):
    def __init__(self, config: Config, options, rngs: nnx.Rngs):
        super().__init__(config, options, rngs)
        self.extra = nnx.Param(jnp.ones(3))


def test_parts_that_break_the_contract_are_refused(recipe_file, monkeypatch):
    def fails(*_):
        raise KeyError("lost")

    name = NAME.replace("LinearAttention", "Changed")
    recipe_file.write_text(recipe_file.read_text().replace(NAME, name))
    recipe = load_recipe(recipe_file)
    for part, made, said in (
        ("limits", lambda *_: None, "its limits raises TypeError: 'NoneType' object is not iterable"),
        ("limits", fails, r"its limits raises KeyError: 'lost' \(.*test_own_family.py:\d+\)"),
        ("limits", lambda *_: [Limit("num_memories", 4, "headz")], "expected a dim of the rules; did you mean 'heads'"),
        ("limits", lambda *_: [Limit("num_heads", 4, "heads")], "has no attribute 'num_heads'"),
        ("limits", lambda *_: [Limit("num_memories", 0, "heads")], "expected a size above zero"),
        ("unspread", lambda *_: {"contxt": "why"}, r"its unspread says .*; expected mesh axes; did you mean 'context'"),
        ("flops_per_token", lambda *_: -1.0, "its flops_per_token says -1.0; expected a number above zero"),
        ("flops_per_token", lambda *_: None, "its flops_per_token raises TypeError: float"),
        ("build", lambda *_: None, "its build returns a NoneType; expected an nnx.Module that is a"),
        ("build", fails, "its build raises KeyError: 'lost'"),
        (
            "build",
            WithPlainParameter,
            r"its build returns extra, a Param of shape \(3,\) with axes None; expected",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Changed, part, staticmethod(made))
            with pytest.raises(UserError, match=rf"^\S*recipe.yaml:\d+: model.family = '{name}': .*{said}"):
                build_program(recipe, jax.devices()[:1])
