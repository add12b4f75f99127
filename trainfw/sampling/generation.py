"""Generation of text from a model, a token at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainfw import backends
from trainfw.errors import UserError, did_you_mean
from trainfw.models import MOST_ROUNDS, AdapterInputs, KVCache, LanguageModel, Transformer, iterative_top_k, likeliest
from trainfw.sampling import decoding

_LONGEST = 2**20
_SAMPLING = ("temperature", "top_k", "top_p", "chosen_by")


def sample(
    logits_V: jax.Array,
    key: jax.Array,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    chosen_by: Literal["native", "iterative"] | None = None,
) -> jax.Array:
    """Draw a token, i32[], from softmax(logits / temperature).

    Args:
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the fewest likeliest tokens that hold this much of the probability (Holtzman et al.,
            arXiv:1904.09751); after `top_k`.
        chosen_by: method to find the likeliest tokens; None: the backend's `top_k`. With `iterative`, a top_k up to
            `MOST_ROUNDS` draws the same token; otherwise it is drawn among the same tokens by other random numbers.
    """
    chosen_by = chosen_by or backends.current().top_k
    draw = _draw_by_maximum if chosen_by == "iterative" else jax.random.categorical
    if temperature == 0:
        return iterative_top_k(logits_V, 1)[1][0] if chosen_by == "iterative" else jnp.argmax(logits_V)
    if top_k is None and top_p is None:
        return draw(key, logits_V / temperature)
    scaled_V, k = logits_V / temperature, min(top_k or logits_V.size, logits_V.size)
    if chosen_by == "iterative" and k > MOST_ROUNDS:
        return draw(key, jnp.where(likeliest(scaled_V, k, top_p), scaled_V, -jnp.inf))
    # Likeliest first: top-k is a prefix, and top-p another.
    sorted_V, tokens_V = (iterative_top_k if chosen_by == "iterative" else jax.lax.top_k)(scaled_V, k)
    if top_p is not None:
        weights_V = jax.nn.softmax(sorted_V)
        before_V = jnp.cumsum(weights_V) - weights_V
        sorted_V = jnp.where((before_V < top_p) | (jnp.arange(k) == 0), sorted_V, -jnp.inf)
    return tokens_V[draw(key, sorted_V)]


def _draw_by_maximum(key: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Draw the index that `jax.random.categorical` draws, i32[], without argmax, which reduces pairs."""
    return iterative_top_k(jax.random.gumbel(key, logits_V.shape, logits_V.dtype) + logits_V, 1)[1][0]


def generate(
    model: LanguageModel,
    prompt_tokens: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    eos_ids: Collection[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """Continue a prompt: yield each new token as soon as it is drawn, up to `max_tokens`, ending before `eos_id` or any
    of `eos_ids`.

    It compiles once for each power of two that the prompt and the whole text fill. A CPU with memory to spare keeps a
    copy of the layers' weights as long as the model exists, in the form that a token's products read fastest. Raises
    UserError, at the call, for an argument that makes no sense.
    """
    prompt, model = list(prompt_tokens), _decoder(model)
    _check([prompt], model.config.vocab_size, max_tokens, temperature, top_k, top_p, seed)
    ends = {*eos_ids} if eos_id is None else {eos_id, *eos_ids}
    if model.adapter_names:
        raise UserError("this model has several adapters: generate_batch takes one for each prompt")
    length = _power_of_two(len(prompt))
    room = _power_of_two(length + max_tokens) - length
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    drawn = _drawn(model, [prompt], max_tokens, room, None, seed, sampling)
    return itertools.takewhile(lambda token: token not in ends, (token for (token,) in drawn))


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_ids: Collection[int] = (),
    seed: int = 0,
    adapters: Sequence[str | None] | None = None,
) -> list[list[int]]:
    """Continue several prompts at once; return up to `max_tokens` tokens of each, ending before any of `eos_ids`.

    By default it takes the likeliest tokens, the same as `generate` for each prompt alone (except where two are equal
    within rounding). Prompts are padded to the power of two that the longest fills; it compiles once for each such
    size, number of prompts and number of tokens (in sixteens). Raises UserError for an argument that makes no sense.

    Args:
        adapters: the name of each prompt's adapter, for a model that was loaded with several, or None for the model
            without any (the default).
    """
    rows, model = [list(prompt) for prompt in prompts], _decoder(model)
    _check(rows, model.config.vocab_size, max_tokens, temperature, top_k, top_p, seed)
    if not rows:
        return []
    ends = set(eos_ids)
    new: list[list[int]] = [[] for _ in rows]
    open_rows = set(range(len(rows)))
    inputs = _adapter_inputs(model, len(rows), adapters)
    room = -(-max_tokens // 16) * 16
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for drawn in _drawn(model, rows, max_tokens, room, inputs, seed, sampling):
        for i in list(open_rows):
            if drawn[i] in ends:
                open_rows.remove(i)
            else:
                new[i].append(drawn[i])
        if not open_rows:
            break
    return new


def _decoder(model: LanguageModel) -> Transformer:
    if isinstance(model, Transformer):
        return model
    raise UserError(f"family = {model.config.family!r}: no text can be drawn from its models; expected a decoder")


def _check(
    prompts: list[list[int]],
    vocab: int,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    for prompt in prompts:
        if not prompt:
            raise UserError("prompt: needs at least one token")
        if bad := [token for token in prompt if not 0 <= token < vocab]:
            raise UserError(f"prompt: token {bad[0]} is not in the vocabulary of {vocab}")
    if max_tokens < 1:
        raise UserError(f"max_tokens = {max_tokens}: expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature = {temperature}: expected 0 (take the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k = {top_k}: expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p}: expected more than 0 and at most 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed = {seed}: expected 0 to {2**32 - 1}")
    if max(map(len, prompts), default=0) + max_tokens > _LONGEST:
        raise UserError(f"max_tokens = {max_tokens}: the prompt and these tokens exceed {_LONGEST:,}")


def _drawn(
    model: Transformer,
    rows: list[list[int]],
    max_tokens: int,
    room: int,
    adapters: AdapterInputs | None,
    seed: int,
    sampling: Mapping[str, object],
) -> Iterator[list[int]]:
    """Yield the next token of every row, again and again.

    Args:
        room: number of tokens that the cache has room for, besides the padded rows.
    """
    sampling = {**sampling, "chosen_by": backends.current().top_k}
    graphdef, params = nnx.split(model)
    by_layers = max_tokens > 1 and decoding.decodes_by_layer(model)
    key = jax.random.key(seed)
    length = _power_of_two(max(map(len, rows)))
    padded = np.zeros((len(rows), length), np.int32)
    for row, prompt in zip(padded, rows):
        row[length - len(prompt) :] = prompt
    cache: Any = replace(
        model.init_cache(len(rows), length + (0 if by_layers else room)),
        first_B=jnp.asarray([length - len(prompt) for prompt in rows], jnp.int32),
    )
    tokens_B, cache = _extend_batch(graphdef, params, padded, cache, jax.random.fold_in(key, 0), adapters, **sampling)
    yield np.asarray(tokens_B).tolist()
    if max_tokens == 1:
        return
    extend: Callable[..., tuple[jax.Array, Any]]
    if by_layers:
        extend = _by_layers(model, graphdef, params, len(rows), adapters, sampling)
        cache = _by_layer(cache, length + room)
    else:

        def extend(tokens_B: jax.Array, cache: KVCache, key: jax.Array, count: np.int32) -> tuple[jax.Array, KVCache]:
            step_key = jax.random.fold_in(key, count)
            return _extend_batch(graphdef, params, tokens_B[:, None], cache, step_key, adapters, **sampling)

    tokens_B, cache = extend(tokens_B, cache, key, np.int32(1))
    for count in range(1, max_tokens):
        # The next step is started before this one's token is read, so that none waits for Python.
        drawn_B = tokens_B
        if count + 1 < max_tokens:
            tokens_B, cache = extend(tokens_B, cache, key, np.int32(count + 1))
        yield np.asarray(drawn_B).tolist()


@functools.partial(jax.jit, static_argnames=("graphdef", *_SAMPLING), donate_argnames="cache")
def _extend_batch(
    graphdef: nnx.GraphDef[Transformer],
    params: nnx.State,
    tokens_BS: jax.Array,
    cache: KVCache,
    key: jax.Array,
    adapters: AdapterInputs | None,
    **sampling: object,
) -> tuple[jax.Array, KVCache]:
    """Draw the token after each row, i32[B], and return it with the extended cache."""
    model = nnx.merge(graphdef, params)
    x_BSD, cache = model.decode_hidden_states(tokens_BS, cache, adapters)
    logits_BV = model.logits(x_BSD[:, -1:])[:, 0]
    return _samples(logits_BV, key, sampling), cache


def _by_layers(
    model: Transformer, graphdef: Any, params: Any, rows: int, adapters: AdapterInputs | None, sampling: dict[str, Any]
) -> Callable[..., tuple[jax.Array, decoding.LayerCaches]]:
    """Return the counterpart of `_extend_batch` on a CPU: (tokens_B, cache, key, count) -> (next tokens_B, cache)."""
    prepared = decoding.decoding_weights(model, rows)
    leaves, structure = jax.tree.flatten((params, prepared.layers, prepared.joined, adapters))
    kernels = decoding.decoding_kernels(model.compute_dtype, rows)
    options = {} if kernels is None else kernels.compiler_options(rows)
    step = _layers_step(graphdef, structure, tuple(sampling.items()), tuple(options.items()))
    return functools.partial(step, leaves)


@functools.lru_cache(maxsize=32)
def _layers_step(
    graphdef: Any, structure: Any, sampling: tuple[tuple[str, Any], ...], options: tuple[tuple[str, str], ...]
) -> Any:
    """Compile the step of `_by_layers`. It takes the weights as leaves: passing trees of them takes 2 ms."""

    def step(
        leaves: list[jax.Array], tokens_B: jax.Array, cache: decoding.LayerCaches, key: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, decoding.LayerCaches]:
        params, layers, joined, adapters = jax.tree.unflatten(structure, leaves)
        model = nnx.merge(graphdef, params)
        logits_BV, cache = decoding.decode_token(model, (layers, joined), tokens_B, cache, adapters)
        return _samples(logits_BV, jax.random.fold_in(key, count), dict(sampling)), cache

    return jax.jit(step, donate_argnums=2, compiler_options=dict(options))


_by_layer = jax.jit(decoding.by_layer, static_argnums=1)


def _samples(logits_BV: jax.Array, key: jax.Array, sampling: dict[str, Any]) -> jax.Array:
    keys_B = jax.random.split(key, logits_BV.shape[0])
    return jax.vmap(lambda logits_V, key: sample(logits_V, key, **sampling))(logits_BV, keys_B)


def _adapter_inputs(model: Transformer, rows: int, adapters: Sequence[str | None] | None) -> AdapterInputs | None:
    """Return the number of each row's adapter in the model's bank. Raises UserError for an unknown name."""
    names = model.adapter_names
    if not names:
        if adapters is not None and any(name is not None for name in adapters):
            raise UserError("adapters: this model was loaded without any; name them to load_model")
        return None
    chosen = [None] * rows if adapters is None else list(adapters)
    if len(chosen) != rows:
        raise UserError(f"adapters: {len(chosen)} for {rows} prompts")
    for name in chosen:
        if name is not None and name not in names:
            raise UserError(f"adapters: no {name!r}{did_you_mean(name, names)}")
    numbers = [len(names) if name is None else names.index(name) for name in chosen]
    return AdapterInputs(rows_B=jnp.asarray(numbers, jnp.int32))


def _power_of_two(size: int) -> int:
    """Return the least power of two that is `size` or more, and 16 or more."""
    return max(16, 1 << (size - 1).bit_length())
