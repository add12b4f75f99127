import gc
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import quicker
from trainfw.errors import UserError
from trainfw.models import ModelConfig, ModelOptions, Transformer
from trainfw.program import ServerShape, server_of
from trainfw.serving import generate, generate_batch
from trainfw.serving.engine import SlotEngine


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        preset="tiny", vocab_size=64, init_std=0.3, sliding_window=5, layer_pattern=["sliding", "global"]
    )
    return Transformer(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("length", [3, 16, 17])  # in a bucket, filling it, one more
def test_greedy_generation_is_the_argmax_of_the_whole_sequence(model, length):
    prompt = [(7 * i) % 64 for i in range(length)]
    new = list(generate(model, prompt, max_tokens=6, temperature=0))
    logits_SV = nnx.jit(lambda model, text: model(text))(model, jnp.array([prompt + new]))[0]
    assert new == jnp.argmax(logits_SV[length - 1 : -1], axis=-1).tolist()
    assert len(new) == 6


def test_a_seed_repeats_and_another_does_not(model):
    first, again, other = (list(generate(model, [1, 2], max_tokens=12, temperature=2.0, seed=s)) for s in (0, 0, 1))
    assert first == again != other


def test_generation_streams_and_ends_before_eos(model):
    tokens = list(generate(model, [1, 2, 3], max_tokens=8, temperature=0))
    assert list(islice(generate(model, [1, 2, 3], max_tokens=8, temperature=0), 2)) == tokens[:2]
    cut = tokens.index(tokens[4])
    assert list(generate(model, [1, 2, 3], max_tokens=8, temperature=0, eos_id=tokens[4])) == tokens[:cut]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([64], {}, "token 64 is not in the vocabulary of 64"),
        ([1], {"max_tokens": 0}, "max_tokens = 0"),
        ([1], {"temperature": -1}, "temperature = -1"),
        ([1], {"top_k": 0}, "top_k = 0"),
        ([1], {"top_p": 0.0}, "top_p = 0.0"),
        ([1], {"seed": -1}, "seed = -1"),
        ([1.5], {}, "prompt: 1.5 is no token"),
        ("abc", {}, "prompt: 'a' is no token"),
        ([1], {"max_tokens": 2.5}, "max_tokens = 2.5: expected a whole number"),
        ([1], {"top_k": 2.5}, "top_k = 2.5: expected a whole number"),
        ([1], {"seed": 1.5}, "seed = 1.5: expected a whole number"),
        ([1], {"max_tokens": 2**20}, "a slot of 1,048,576 has room for 1,048,575"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_the_call(model, prompt, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompt, **{"max_tokens": 1} | options)


MOE = {
    "intermediate_size": 32,
    "moe": {"num_experts": 4, "experts_per_token": 2, "dispatch": "capacity", "capacity_factor": 1.0},
}


@pytest.fixture(scope="module", params=["sliding", "moe"])
def either(request, model) -> Transformer:
    if request.param == "sliding":
        return model
    return Transformer(ModelConfig(preset="tiny", vocab_size=64, init_std=0.3, **MOE), rngs=nnx.Rngs(1))


PROMPTS = [[(7 * i + 3 * n) % 64 for i in range(n)] for n in (3, 16, 1, 11, 7)]


def test_a_batch_is_each_prompt_alone(either):
    alone = [list(generate(either, prompt, max_tokens=9, temperature=0)) for prompt in PROMPTS]
    assert generate_batch(either, PROMPTS, max_tokens=9) == alone
    # And each ends before its own end.
    ends = {alone[0][4], alone[3][2]}
    cut = [tokens[: next((i for i, t in enumerate(tokens) if t in ends), 9)] for tokens in alone]
    assert generate_batch(either, PROMPTS, max_tokens=9, eos_ids=ends) == cut
    assert [list(generate(either, p, max_tokens=9, temperature=0, eos_ids=ends)) for p in PROMPTS] == cut


def test_fewer_slots_than_prompts_write_the_same(model):
    said = []
    written = generate_batch(model, PROMPTS, max_tokens=9, slots=2, progress=lambda *told: said.append(told))
    assert written == generate_batch(model, PROMPTS, max_tokens=9)
    assert said[-1] == ("writing, prompts", 5, 5)
    assert generate_batch(model, PROMPTS[:2], max_tokens=9, eos_ids=range(64)) == [[], []]
    assert generate_batch(model, [], max_tokens=9) == []


def test_samples_of_a_batch_differ_and_repeat(model):
    first, again, other = (
        generate_batch(model, [[1, 2]] * 3, max_tokens=12, temperature=2.0, top_k=50, seed=s) for s in (0, 0, 1)
    )
    assert first == again != other
    assert first[0] != first[1] != first[2]


def test_a_batch_refuses_what_makes_no_sense(model):
    with pytest.raises(UserError, match="at least one token"):
        generate_batch(model, [[1], []], max_tokens=1)
    with pytest.raises(UserError, match=r"slots = 2\.5: expected a whole number"):
        generate_batch(model, [[1]], max_tokens=1, slots=2.5)


def test_a_top_k_beyond_the_vocabulary_leaves_nothing_out(model):
    settings = {"max_tokens": 12, "temperature": 2.0}
    free = list(generate(model, [1, 2], **settings))
    assert list(generate(model, [1, 2], top_k=2**32 + 1, **settings)) == free
    assert list(generate(model, [1, 2], top_k=2**70, **settings)) == free


def test_an_unread_text_may_be_collected_by_the_thread_that_writes_it(model, monkeypatch):
    text = generate(model, [1, 2], max_tokens=2000, temperature=0)
    next(text)
    (writer,) = (each for each in threading.enumerate() if each.name == "trainfw engine" and each.is_alive())
    cycle: list[object] = [text]
    cycle.append(cycle)
    collected, own = threading.Event(), SlotEngine._do_tasks

    def collect(engine: SlotEngine) -> None:
        gc.collect()
        collected.set()
        own(engine)

    gc.disable()
    try:
        del text, cycle
        monkeypatch.setattr(SlotEngine, "_do_tasks", collect)
        assert collected.wait(10)
    finally:
        gc.enable()
    writer.join(10)
    assert not writer.is_alive()


LEAVES = """
import sys
from flax import nnx
from trainfw.models import ModelConfig, Transformer
from trainfw.serving import generate
text = generate(Transformer(ModelConfig(preset="tiny", vocab_size=64), rngs=nnx.Rngs(0)), [1, 2], max_tokens=4000)
next(text)
sys.exit(3)
"""


def test_a_process_may_leave_amid_a_text():
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (3, "")


SHAPES = {
    "tied": {"tie_embeddings": True},
    "untied": {"tie_embeddings": False},
    "biases": {"qkv_bias": True, "qk_norm": True, "post_norms": True, "zero_centered_norm": True},
    "softcap": {"attention_softcap": 2.0, "final_softcap": 3.0, "scale_embeddings": True, "tie_embeddings": True},
    "windows": {"sliding_window": 5, "layer_pattern": ["sliding", "global"], "rope_local_theta": 100.0},
    "moe": MOE,
    "dropless": MOE | {"moe": MOE["moe"] | {"dispatch": "dropless"}},
}


def shaped(name: str, **options: str) -> Transformer:
    config = ModelConfig(preset="tiny", vocab_size=64, init_std=0.3, **SHAPES[name])
    built = Transformer(config, ModelOptions(**options), rngs=nnx.Rngs(2))
    rng = np.random.default_rng(0)  # so that biases are not 0, nor scales 1
    for _, variable in nnx.to_flat_state(nnx.state(built)):
        variable.set_value(variable.get_value() + rng.normal(0, 0.05, variable.shape).astype(np.float32))
    return built


@pytest.mark.parametrize("rows", quicker([1, 3, 17], [3]))
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "dropless"])
def test_every_shape_writes_the_argmax_of_the_whole_sequence(name, rows):
    built = shaped(name)
    prompts = np.random.default_rng(1).integers(0, 64, (rows, 5)).tolist()
    texts_BS = jnp.array(
        [p + new for p, new in zip(prompts, generate_batch(built, prompts, max_tokens=8), strict=True)]
    )
    whole = shaped("dropless") if name == "moe" else built  # as a batch of training it drops tokens
    logits_BSV = nnx.jit(lambda model, texts: model(texts))(whole, texts_BS)
    assert jnp.argmax(logits_BSV[:, 4:-1], axis=-1).tolist() == texts_BS[:, 5:].tolist()


def test_a_model_computes_in_its_own_dtype():
    built = shaped("tied", compute_dtype="bfloat16")
    _, weights = server_of(built, ServerShape(slots=2, length=16, chunk=16))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(weights["layers"]["mlp"])} == {"bfloat16"}
    new = generate_batch(built, [[1, 2, 3]], max_tokens=8)[0]
    logits_SV = nnx.jit(lambda model, texts: model(texts))(built, jnp.array([[1, 2, 3, *new]]))[0, 2:-1]
    best = jnp.max(logits_SV, axis=-1)
    assert jnp.all(best - logits_SV[jnp.arange(8), jnp.array(new)] < 0.05 * jnp.abs(best))


SHAPE = ServerShape(slots=1, length=16, chunk=16, cache="float32")


def test_weights_are_views_where_memory_is_short(model, monkeypatch):
    tokens = list(generate(model, [1, 2, 3], max_tokens=6, temperature=0))
    assert server_of(model, SHAPE)[0].forms.joined
    monkeypatch.setattr("trainfw.backends.free_memory", lambda: 0)
    server, weights = server_of(model, SHAPE)
    assert not server.forms.joined
    stacked, own = model.layers.mlp.gate.kernel.get_value(), weights["layers"]["mlp"]["gate"]["kernel"].parts[1]
    assert own.unsafe_buffer_pointer() == stacked.unsafe_buffer_pointer() + stacked[0].nbytes
    assert list(generate(model, [1, 2, 3], max_tokens=6, temperature=0)) == tokens


def test_keys_and_values_that_do_not_fit_are_refused(model, monkeypatch):
    monkeypatch.setattr("trainfw.backends.free_memory", lambda: 2**20)
    with pytest.raises(UserError, match=r"slots = 1, length = 131,072: their keys and values take .* fewer slots or"):
        list(generate(model, [1, 2, 3], max_tokens=2**16))


def test_weights_are_kept_until_the_model_changes():
    built = shaped("untied")
    first = server_of(built, SHAPE)
    again = server_of(built, replace(SHAPE, length=32))
    assert again[1] is first[1]
    assert server_of(built, SHAPE)[0] is first[0]
    assert server_of(built, replace(SHAPE, slots=4))[1] is not first[1]
    before = list(generate(built, [1, 2, 3], max_tokens=6, temperature=0))
    kernel = built.layers.mlp.down.kernel
    kernel.set_value(-kernel.get_value())
    after = list(generate(built, [1, 2, 3], max_tokens=6, temperature=0))
    logits_SV = built(jnp.array([[1, 2, 3, *after]]))[0]
    assert before != after == jnp.argmax(logits_SV[2:-1], axis=-1).tolist()


def test_the_weights_are_left_as_they_were():
    """The set of an array's devices is its sharding's own."""
    model = Transformer(ModelConfig(preset="tiny", vocab_size=64), rngs=nnx.Rngs(0))
    list(generate(model, [1, 2], max_tokens=2))
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(nnx.state(model)))
