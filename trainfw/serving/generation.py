"""Text from a model that is in memory, by an engine of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

from trainfw.data import Progress
from trainfw.errors import RunError, UserError, did_you_mean, expect
from trainfw.models import LanguageModel, family_of, vocabulary_of
from trainfw.program import ServerShape, default_cache, server_of
from trainfw.serving.engine import SlotEngine
from trainfw.serving.requests import Answer, Sampling, check_request

_LONGEST = 2**20
_CHUNK = 128


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

    It compiles once for each power of two that the prompt (up to a chunk) and the whole text fill. A CPU with memory to
    spare keeps a copy of the layers' weights as long as the model exists, in the form that a token's products read
    fastest. Raises UserError, at the call, for an argument that makes no sense.
    """
    prompt, ends = list(prompt_tokens), frozenset(eos_ids if eos_id is None else {eos_id, *eos_ids})
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed, stop_ids=ends)
    _check(model, [prompt], sampling)
    if model.adapter_names:
        raise UserError("this model has several adapters: generate_batch takes one for each prompt")

    def drawn() -> Iterator[int]:
        with _engine(model, [prompt], max_tokens, 1) as engine:
            yield from _tokens(engine.submit(prompt, sampling))

    return drawn()


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
    slots: int | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continue several prompts; return up to `max_tokens` tokens of each, ending before any of `eos_ids`.

    By default it takes the likeliest tokens, the same as `generate` for each prompt alone (except where two are equal
    within rounding). It compiles once for each number of slots and power of two that the longest prompt (up to a chunk)
    and text fill. Raises UserError for an argument that makes no sense.

    Args:
        seed: of the first prompt; each has the next.
        adapters: the name of each prompt's adapter, for a model that was loaded with several, or None for the model
            without any (the default).
        slots: prompts that are continued at once (default: all).
    """
    rows, names = [list(prompt) for prompt in prompts], _adapter_names(model, len(prompts), adapters)
    ends = frozenset(eos_ids)
    settings = [
        Sampling(max_tokens, temperature, top_k, top_p, (seed + i) % 2**32, stop_ids=ends, adapter=name)
        for i, name in enumerate(names)
    ]
    _check(model, rows, Sampling(max_tokens, temperature, top_k, top_p, seed))
    if not rows:
        return []
    written = []
    with _engine(model, rows, max_tokens, len(rows) if slots is None else slots) as engine:
        answers = [engine.submit(*one) for one in zip(rows, settings, strict=True)]
        for answer in answers:
            written.append(list(_tokens(answer)))
            if progress is not None:
                progress("writing, prompts", len(written), len(rows))
    return written


def _check(model: LanguageModel, prompts: list[list[int]], sampling: Sampling) -> None:
    config, seed = model.config, sampling.seed
    if not family_of(config).decodes:
        raise UserError(f"family = {config.family!r}: no text can be drawn from its models; expected a decoder")
    for prompt in prompts:
        check_request(prompt, sampling, vocabulary_of(config), _LONGEST)
    expect("seed", seed, seed is not None and 0 <= seed < 2**32, f"0 to {2**32 - 1}")


def _adapter_names(model: LanguageModel, count: int, adapters: Sequence[str | None] | None) -> list[str | None]:
    chosen: list[str | None] = [None] * count if adapters is None else [*adapters]
    names = model.adapter_names
    if not names and any(name is not None for name in chosen):
        raise UserError("adapters: this model was loaded without any; name them to load_model")
    if len(chosen) != count:
        raise UserError(f"adapters: {len(chosen)} for {count} prompts")
    for name in chosen:
        if name is not None and name not in names:
            raise UserError(f"adapters: no {name!r}{did_you_mean(name, names)}")
    return chosen


@contextlib.contextmanager
def _engine(model: LanguageModel, prompts: list[list[int]], max_tokens: int, slots: int) -> Iterator[SlotEngine]:
    """Run an engine with room for the longest of the prompts and its answer."""
    longest = max(map(len, prompts))
    chunk = min(_power_of_two(longest), _CHUNK)
    shape = ServerShape(
        slots=slots,
        length=_power_of_two(longest + max_tokens),
        chunk=chunk,
        cache=default_cache(model.compute_dtype),
        adapters=len(model.adapter_names),
    )
    server, weights = server_of(model, shape)
    engine = SlotEngine(server, weights, names=model.adapter_names, queue=None, compiles_first=False)
    try:
        yield engine
    finally:
        engine.close()


def _tokens(answer: Answer) -> Iterator[int]:
    for drawn in answer:
        yield drawn.token
    if answer.error is not None:
        raise RunError(answer.error)


def _power_of_two(size: int) -> int:
    """Return the least power of two that is `size` or more, and 16 or more."""
    return max(16, 1 << (size - 1).bit_length())
