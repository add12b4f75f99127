"""Quantities of serving by formula, and the times, memory and price that follow from them."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from tests.helpers import tiny_recipe
from trainfw import UserError
from trainfw.hardware import load_topology
from trainfw.models import ModelConfig, family_of
from trainfw.parallel import place_mesh
from trainfw.planning import (
    Kept,
    Load,
    Quantities,
    ServingMemory,
    Transfer,
    decoder_held,
    decoder_quantities,
    function_time,
    heads_of_core,
    plan,
    serving_estimate,
)
from trainfw.planning.predict.link_time import transfer_seconds
from trainfw.program import ServerShape, build_server


def preset(name: str, **fields: object) -> ModelConfig:
    return ModelConfig.model_validate({"preset": name, **fields})


def placed(name: str, cores: int = 1, **parameters: str):
    topology = load_topology(name, parameters={key.replace("__", "."): value for key, value in parameters.items()})
    return place_mesh(topology, ("tensor",), np.arange(cores))


ROUND = {
    "chip__hbm_bandwidth": "200 GB/s",  # of two cores
    "chip__peak_flops__bfloat16": "20 TFLOP/s",
    "chip__matmul_efficiency": "0.5",
    "chip__serving__weights_efficiency": "0.5",
    "chip__serving__memory_efficiency": "0.25",
    "chip__serving__layer_time": "10 ms",
}
QUANTITIES = Quantities({"int8": 20e9, "bfloat16": 30e9}, 25e9, 50e9, {"bf16": 5e12}, 1024, 32)


def test_parts_of_a_time():
    """Weights at their share, all else at its own, products only where they take longer."""
    place = placed("inf2.xlarge", **ROUND)
    time = function_time(QUANTITIES, place)
    parts = {"weights": 1.0, "cache": 1.0, "activations": 2.0, "collectives": 0.0, "layers": 0.32}
    assert time.parts == pytest.approx(parts)
    assert time.seconds == pytest.approx(4.32)
    assert time.bound_by == "activations"
    many = Quantities({"int8": 50e9}, 25e9, 0.0, {"bf16": 15e12}, 1024, 0)
    assert function_time(many, place).parts["compute"] == pytest.approx(3.0)
    few = Quantities({"int8": 50e9}, 25e9, 0.0, {"bf16": 1e12}, 1, 0)  # 64 cycles for a token
    assert function_time(few, place).bound_by == "compute"
    assert function_time(few, place).seconds == pytest.approx(6.4)


def test_collectives_take_the_time_of_their_links():
    transfer, place = Transfer("all-reduce", ("tensor",), "bf16", 10**9, 3), placed("inf2.48xlarge", 24)
    time = function_time(Quantities({}, 0.0, 0.0, {}, 1, 0, (transfer,)), place)
    assert time.bound_by == "collectives"
    assert time.seconds == pytest.approx(3 * transfer_seconds(transfer, place).seconds)


def test_without_fitted_figures_a_time_is_a_lower_bound():
    time = function_time(QUANTITIES, placed("h100-8"))
    assert time.parts["weights"] == pytest.approx(50e9 / 3.35e12)
    assert time.parts["layers"] == 0


@pytest.mark.parametrize(
    ("model", "tensor", "heads"),
    [
        ("llama2-7b", 1, (32, 32)),
        ("llama2-7b", 8, (4, 4)),
        ("llama3.1-70b", 4, (16, 2)),
        ("llama3.1-70b", 32, (2, 1)),  # four cores share a kv head, and each keeps it
        ("llama3.1-70b", 24, (3, 3)),  # 8 query heads of a kv head over 3 cores
        ("llama2-13b", 24, (2, 2)),
    ],
)
def test_heads_of_a_core(model, tensor, heads):
    shapes = family_of(preset(model)).shapes(preset(model))
    assert shapes is not None
    assert heads_of_core(shapes, tensor) == heads


@pytest.mark.parametrize("moe", [False, True])
def test_memory_is_that_of_the_server(tmp_path, moe):
    experts = ["model.moe={num_experts: 8, experts_per_token: 2, shared_intermediate_size: 32}"] if moe else []
    window = ["model.layer_pattern=[sliding, global]", "model.sliding_window=16"]
    recipe = tiny_recipe(tmp_path, "train.compute_dtype=bfloat16", *experts, *window)
    server = build_server(recipe, ServerShape(slots=3, length=96, chunk=32), jax.devices()[:1])
    assert isinstance(recipe.model, ModelConfig)
    held = decoder_held(recipe.model, Kept(), length=96, chunk=32)

    def size(tree: object) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    assert held.weights == size(server.abstract_params)
    rooms = sum(server.rooms[kind] for kind in recipe.model.layer_kinds)  # whole chunks: windows a little longer
    seen = 96 + 16 + 32
    assert held.slot * rooms / seen == pytest.approx(size(server.abstract_state["caches"]) / 3)


@pytest.mark.parametrize(("function", "rows", "tokens"), [("decode", 4, 1), ("prefill", 1, 32)])
def test_products_and_collectives_are_those_of_the_compiled_functions(tmp_path, function, rows, tokens):
    recipe = tiny_recipe(tmp_path, "train.compute_dtype=bfloat16", "parallel.tensor=2", "parallel.fsdp=1")
    server = build_server(recipe, ServerShape(slots=4, length=96, chunk=32), jax.devices()[:2])
    made = server.functions[function]
    compiled = plan(made.jitted, *made.arguments, hardware="trn2.48xlarge", mesh=server.fit.mesh)
    assert isinstance(recipe.model, ModelConfig)
    found = decoder_quantities(recipe.model, Kept(tensor=2), rows=rows, tokens=tokens, attended=96)
    assert found.flops["bf16"] == pytest.approx(compiled.flops, rel=1e-9)

    def sent(transfers):
        return sorted((t.kind, t.axes, t.dtype, t.bytes, t.times) for t in transfers)

    assert sent(found.transfers) == sent(transfer for transfer, _ in compiled.time.transfers)


def test_a_token_reads_every_weight_once_and_every_slot():
    config = preset("llama3.1-8b")
    one = decoder_quantities(config, Kept(), rows=8, tokens=1, attended=4096)
    embedding = 128256 * 4096
    assert one.weights["bfloat16"] == pytest.approx(2 * (8.03e9 - embedding), rel=1e-3)
    assert one.cache == pytest.approx(8 * 32 * 4097 * 2 * 8 * 128 * 2, rel=1e-3)
    assert one.flops["bf16"] == pytest.approx(8 * (2 * (8.03e9 - embedding) + 4 * 32 * 4097 * 4096), rel=1e-3)
    narrow = decoder_quantities(config, Kept(weights="int8", tables="bfloat16"), rows=8, tokens=1, attended=4096)
    assert narrow.weights["int8"] == pytest.approx(8.03e9 - 2 * embedding, rel=1e-3)
    split = decoder_quantities(config, Kept(tensor=8, weights="nf4", cache="int8"), rows=8, tokens=1, attended=4096)
    assert sum(split.weights.values()) < sum(one.weights.values()) / 8 * 0.27
    assert split.cache == pytest.approx(one.cache / 8 / 2 * (1 + 4 / 128))
    sums, logits = split.transfers
    assert (sums.kind, sums.bytes, sums.times) == ("all-reduce", 8 * 4096 * 2, 65)
    assert (logits.kind, logits.bytes) == ("all-gather", 8 * 128256 * 4)


def test_a_window_is_read_where_layers_slide():
    config = preset("gemma3-1b")
    near, far = (decoder_quantities(config, Kept(), rows=1, tokens=1, attended=n).cache for n in (2**14, 2**15))
    wide = [kind for kind in config.layer_kinds if kind == "global"]
    assert far - near == 2**14 * len(wide) * 2 * config.num_kv_heads * config.head_dim * 2


def test_experts_are_read_whole_or_as_tokens_touch_them():
    config = preset("qwen3-30b-a3b")
    every, grouped = Kept(), Kept(touched_experts=True)

    def of(kept: Kept, rows: int) -> Quantities:
        return decoder_quantities(config, kept, rows=rows, tokens=1, attended=128)

    experts = 2 * 48 * 128 * 3 * 2048 * 768
    rest = sum(of(every, 1).weights.values()) - experts
    assert sum(of(grouped, 1).weights.values()) == pytest.approx(rest + experts * 8 / 128, rel=1e-4)
    assert sum(of(grouped, 4096).weights.values()) == pytest.approx(sum(of(every, 4096).weights.values()), rel=1e-3)
    assert of(every, 1).flops["bf16"] > 5 * of(grouped, 1).flops["bf16"]
    shared = of(Kept(expert=4), 2)
    assert sum(shared.weights.values()) == pytest.approx(rest + experts / 4, rel=1e-3)
    assert [t.kind for t in shared.transfers] == ["all-to-all"]


def estimate(name: str, **load: int):
    config, kept = preset("llama3.1-8b"), Kept()
    load = {"slots": 4, "prompt": 300, "output": 100, "chunk": 128, **load}
    return serving_estimate(
        decoder_quantities(config, kept, rows=1, tokens=128, attended=1024),
        decoder_quantities(config, kept, rows=load["slots"], tokens=1, attended=1024),
        Load(**load),
        decoder_held(config, kept, length=1024, chunk=128),
        placed(name),
    )


def test_a_server_that_is_busy():
    found = estimate("trn2.3xlarge")
    first, each = found.prefill.seconds * 3, found.decode.seconds  # 300 tokens are three chunks
    assert found.time_to_first_token_seconds == pytest.approx(first)
    assert found.tokens_per_second == pytest.approx(4 * 100 / (4 * first + 100 * each))
    capacity, slot = 24 * 2**30, 32 * 1024 * 2 * 8 * 128 * 2
    weights = found.memory_bytes_per_core - found.overhead - 4 * slot
    assert weights == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert found.slots_that_fit == math.floor((capacity - found.overhead - weights) / slot)
    assert set(found.to_json()) == {
        *("slots", "time_to_first_token_seconds", "time_per_token_seconds", "tokens_per_second"),
        *("memory_bytes_per_core", "slots_that_fit", "dollars_per_million_tokens", "bound_by"),
        *("memory_parts_bytes_per_core", "prefill_parts_seconds", "decode_parts_seconds"),
    }
    assert sum(found.to_json()["memory_parts_bytes_per_core"].values()) == found.memory_bytes_per_core


def test_dollars_only_where_there_is_a_price():
    assert estimate("trn2.3xlarge").dollars_per_million_tokens is None
    assert estimate("trn2.3xlarge").assumptions[-1] == "trn2.3xlarge: no dated source gives its price"
    paid = estimate("inf2.xlarge")
    assert paid.dollars_per_million_tokens == pytest.approx(0.7582 / 3600 / paid.tokens_per_second * 1e6)
    assert "us-east-1, 2026-09-24" in paid.assumptions[-1]


def test_slots_of_several_groups_are_counted_together():
    topology = placed("trn2.3xlarge")
    one = Quantities({"bfloat16": 1e9}, 0.0, 0.0, {}, 1, 0)
    held = ServingMemory(weights=20 * 2**30, slot=2.0**30)
    both = serving_estimate(one, one, Load(slots=8, prompt=1, output=1, chunk=1, shards=4), held, topology)
    assert both.slots_that_fit == 4 * 3
    wide = ServingMemory(weights=25 * 2**30, slot=2.0**30)
    assert serving_estimate(one, one, Load(8, 1, 1, 1, 4), wide, topology).slots_that_fit == 0
    assert both.tokens_per_second == pytest.approx(8 / (2 + 1) / one_second(topology))


def one_second(place) -> float:
    return function_time(Quantities({"bfloat16": 1e9}, 0.0, 0.0, {}, 1, 0), place).seconds


def test_what_is_not_known_is_refused():
    with pytest.raises(UserError, match=r"weights = 'int9': expected one of .*did you mean 'int8'"):
        Kept(weights="int9")
    with pytest.raises(UserError, match="slots = 3: there are 2 groups of cores; expected a multiple"):
        Load(slots=3, prompt=1, output=1, chunk=1, shards=2)
    with pytest.raises(UserError, match=r"c7g.16xlarge: no source gives its peak in bfloat16"):
        function_time(QUANTITIES, placed("c7g.16xlarge"))
    with pytest.raises(UserError, match="cpu: no source gives the bandwidth of its memory"):
        function_time(QUANTITIES, placed("cpu"))
