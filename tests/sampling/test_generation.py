from dataclasses import replace
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import quicker
from trainfw.errors import UserError
from trainfw.models import ModelConfig, ModelOptions, Transformer
from trainfw.sampling import generate, generate_batch, sample

LOGITS = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.3, 0.15]))


def drawn(temperature=1.0, top_k=None, top_p=None, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.vmap(lambda key: sample(LOGITS, key, temperature, top_k, top_p))(keys))


def test_temperature_zero_takes_the_likeliest():
    assert set(drawn(temperature=0, count=8)) == {1}


def test_samples_follow_the_distribution():
    frequencies = np.bincount(drawn(), minlength=5) / 4000
    np.testing.assert_allclose(frequencies, jnp.exp(LOGITS), atol=0.03)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-6}, {1}),
        ({"top_p": 0.5}, {1, 3}),
        ({"top_p": 0.8}, {1, 3, 4}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.5}, {1}),
    ],
)
def test_truncation_keeps_the_likeliest(options, kept):
    assert set(drawn(**options)) == kept


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.floats(-30, 30), min_size=3, max_size=3), st.integers(1, 3), st.floats(0.01, 1), st.floats(0.01, 5))
def test_a_sample_is_always_a_token_that_truncation_keeps(logits, top_k, top_p, temperature):
    token = int(sample(jnp.array(logits), jax.random.key(0), temperature, top_k, top_p))
    assert sorted(logits, reverse=True).index(pytest.approx(logits[token])) < top_k


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


def test_a_batch_stops_when_all_have_ended(model, monkeypatch):
    from trainfw.sampling import generation

    calls = []
    extend = generation._extend_batch
    monkeypatch.setattr(generation, "_extend_batch", lambda *args, **kw: calls.append(1) or extend(*args, **kw))
    assert generate_batch(model, PROMPTS[:2], max_tokens=9, eos_ids=range(64)) == [[], []]
    assert len(calls) == 1
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


SHAPES = {
    "tied": {"tie_embeddings": True},
    "untied": {"tie_embeddings": False},
    "biases": {"qkv_bias": True, "qk_norm": True, "post_norms": True, "zero_centered_norm": True},
    "softcap": {"attention_softcap": 2.0, "final_softcap": 3.0, "scale_embeddings": True, "tie_embeddings": True},
    "windows": {"sliding_window": 5, "layer_pattern": ["sliding", "global"], "rope_local_theta": 100.0},
    "moe": MOE,
}


def shaped(name: str, **options: str) -> Transformer:
    config = ModelConfig(preset="tiny", vocab_size=64, init_std=0.3, **SHAPES[name])
    built = Transformer(config, ModelOptions(**options), rngs=nnx.Rngs(2))
    rng = np.random.default_rng(0)  # so that biases are not 0, nor scales 1
    for _, variable in nnx.to_flat_state(nnx.state(built)):
        variable.set_value(variable.get_value() + rng.normal(0, 0.05, variable.shape).astype(np.float32))
    return built


def logits_by_layer(built, tokens_BS, length, first_B=None):
    """Of every token after the first `length`, decoded one at a time from a cache by layers."""
    from trainfw.sampling.decoding import by_layer, decode_token, decoding_weights

    rows, count = tokens_BS.shape
    cache = replace(built.init_cache(rows, length), first_B=first_B)
    _, cache = built.decode(tokens_BS[:, :length], cache)
    prepared = decoding_weights(built, rows)
    weights, cache, found = (prepared.layers, prepared.joined), by_layer(cache, count), []
    step = nnx.jit(decode_token)
    for i in range(length, count):
        logits_BV, cache = step(built, weights, tokens_BS[:, i], cache, None)
        found.append(logits_BV)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("rows", quicker([1, 3, 17], [3]))
@pytest.mark.parametrize("name", SHAPES)
def test_decoding_by_layers_is_decoding(name, rows):
    built = shaped(name)
    tokens_BS = jax.random.randint(jax.random.key(0), (rows, 12), 0, 64)
    first_B = jnp.arange(rows) % 3  # padding on the left
    cache = replace(built.init_cache(rows, 12), first_B=first_B)
    expected = np.asarray(nnx.jit(lambda m, t, c: m.decode(t, c)[0])(built, tokens_BS, cache))[:, 6:]
    found = logits_by_layer(built, tokens_BS, 6, first_B)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.long
def test_decoding_by_layers_computes_in_the_models_dtype():
    built = shaped("tied", compute_dtype="bfloat16")
    tokens_BS = jax.random.randint(jax.random.key(0), (2, 10), 0, 64)
    expected = np.asarray(built.decode(tokens_BS, built.init_cache(2, 10))[0])[:, 6:]
    found = logits_by_layer(built, tokens_BS, 6)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_weights_to_decode_with_are_views_where_memory_is_short(model, monkeypatch):
    from trainfw.sampling import decoding

    tokens = list(generate(model, [1, 2, 3], max_tokens=6, temperature=0))
    copied = decoding.decoding_weights(model, 1)
    assert copied.joined[0]
    monkeypatch.setattr(decoding.backends, "free_memory", lambda: 0)
    viewed = decoding.decoding_weights(model, 1)
    assert not viewed.joined[0]
    stacked = model.layers.mlp.gate.kernel.get_value()
    (own,) = [v.get_value() for path, v in nnx.to_flat_state(viewed.layers[1][0]) if path[:2] == ("mlp", "gate")]
    assert own.unsafe_buffer_pointer() == stacked.unsafe_buffer_pointer() + stacked[0].nbytes
    assert list(generate(model, [1, 2, 3], max_tokens=6, temperature=0)) == tokens


def test_weights_to_decode_with_are_kept_until_the_model_changes():
    from trainfw.sampling.decoding import decoding_weights

    built = shaped("untied")
    first = decoding_weights(built, 1)
    assert decoding_weights(built, 1) is first
    assert decoding_weights(built, 4) is not first
    before = list(generate(built, [1, 2, 3], max_tokens=6, temperature=0))
    kernel = built.layers.mlp.down.kernel
    kernel.set_value(-kernel.get_value())
    assert decoding_weights(built, 1) is not first
    after = list(generate(built, [1, 2, 3], max_tokens=6, temperature=0))
    logits_SV = built(jnp.array([[1, 2, 3, *after]]))[0]
    assert before != after == jnp.argmax(logits_SV[2:-1], axis=-1).tolist()


def test_the_weights_are_left_as_they_were():
    """The set of an array's devices is its sharding's own."""
    model = Transformer(ModelConfig(preset="tiny", vocab_size=64), rngs=nnx.Rngs(0))
    list(generate(model, [1, 2], max_tokens=2))
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(nnx.state(model)))
