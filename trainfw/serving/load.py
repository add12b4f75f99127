"""Engines of models by path."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import jax

from trainfw.data import Progress, Tokenizer, load_tokenizer
from trainfw.errors import UserError
from trainfw.models import family_of
from trainfw.paths import path_text
from trainfw.program import KeptAs, ServerShape, build_server, default_cache, place_weights, serving_recipe
from trainfw.serving.adapters import AdapterPlaces
from trainfw.serving.engine import SlotEngine
from trainfw.weights import check_tokenizer, is_run, merge, open_base, read_adapter, run_recipe


def load_engine(
    path: str | os.PathLike[str],
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    slots: int = 8,
    length: int = 4096,
    chunk: int = 128,
    places: int | None = None,
    rank: int = 16,
    weights: KeptAs | None = None,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    cache: Literal["float32", "bfloat16", "int8"] | None = None,
    layout: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    queue: int = 256,
    progress: Progress | None = None,
) -> tuple[SlotEngine, Tokenizer]:
    """Load a model on devices (default: the first), and start an engine of it; returns its tokenizer too.

    Args:
        path: a Hugging Face directory, a GGUF file, `package:NAME`, or a run; that of an adapter is merged.
        adapters: adapters of this model by name, each a run or a directory in PEFT's form.
        slots: requests that are answered at once.
        length: tokens of prompt and answer that a slot holds.
        chunk: tokens of a prompt that are read at once.
        places: adapters that there is room for (default: as many as are given).
        rank: the largest of an adapter.
        weights: what they are kept as (default: `compute_dtype`).
        cache: dtype of keys and values (default: `compute_dtype`, on a CPU float32).
        layout: sizes of mesh axes, such as `{"tensor": 2}`.
        queue: most requests that wait for a slot.

    Raises UserError for a path that holds no model that writes text, and for adapters that do not fit it.
    """
    path, adapters = path_text(path), adapters or {}
    adapted = is_run(path) and run_recipe(path).adapter is not None
    if adapted and (adapters or places):
        raise UserError(
            f"{path}: is a run of an adapter itself; give the model it adapts, {run_recipe(path).model.from_}, and it "
            "among the adapters"
        )
    opened = None if adapted else open_base(path)
    base = opened or merge(path)
    if not family_of(base.config).decodes:
        raise UserError(f"{path}: is a model of family {base.config.family!r}; no text can be drawn from it")
    tokenizer = load_tokenizer(path)
    check_tokenizer(path, base.config, tokenizer)
    if (most := base.config.longest_context) is not None and length > most:
        text = f"length = {length:,}: more than the {most:,} positions that the model was made for"
        warnings.warn(text, stacklevel=2)
    for at in adapters.values():
        read_adapter(path_text(at), base.config)  # what is none is refused before weights are read and code is compiled
    recipe = serving_recipe(base.config, weights=weights or compute_dtype, compute_dtype=compute_dtype, layout=layout)
    shape = ServerShape(
        slots=slots,
        length=length,
        chunk=min(chunk, length),
        cache=cache or default_cache(compute_dtype),
        adapters=len(adapters) if places is None else places,
        rank=rank,
    )
    server = build_server(recipe, shape, jax.devices()[:1] if devices is None else devices)
    params = place_weights(server, base.read, progress)
    loader = None if opened is None or not shape.adapters else AdapterPlaces(server, params, opened, path)
    engine = SlotEngine(server, params, loader, queue=queue)
    try:
        for name, at in adapters.items():
            engine.add_adapter(name, os.fspath(at))
    except BaseException:
        engine.close()
        raise
    return engine, tokenizer
