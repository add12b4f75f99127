"""Experts against a loop over tokens, and many devices against one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from tests.helpers import quicker
from trainfw.backends import simulated
from trainfw.checking import check
from trainfw.models import ModelConfig, ModelOptions, MoE, Transformer
from trainfw.models.common import moe
from trainfw.models.common.moe import assign_slots, backend_problems
from trainfw.models.common.top_k import iterative_top_k
from trainfw.models.layer_shapes import Experts
from trainfw.parallel import Layout, Rules, all_reduce, axis_size, make_mesh, use_rules

D, F, E, K = 8, 12, 8, 3
ROOM = E / K  # a slot for every token in every expert
AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")


def model_config(**moe) -> ModelConfig:
    # Losses that weigh as much as the output.
    fields = {"num_experts": E, "experts_per_token": K, "balance_loss": 0.5, "z_loss": 0.3}
    shape = {"vocab_size": 32, "hidden_size": D, "intermediate_size": F, "num_layers": 2}
    return ModelConfig(**shape, num_heads=2, num_kv_heads=1, init_std=0.3, moe=fields | moe)


def split_layer(config: ModelConfig) -> tuple[nnx.GraphDef[MoE], dict]:
    """A layer whose weights are the same for every form of dispatch."""
    graphdef, params = nnx.split(MoE(config, rngs=nnx.Rngs(0)))
    return graphdef, nnx.to_pure_dict(params)


def tokens(rows: int, length: int, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, length, D))


def forward(graphdef, params, x_BSD):
    return nnx.merge(graphdef, nnx.State(params))(x_BSD)


run = jax.jit(forward, static_argnums=0)


def objective(graphdef, config, params, x_BSD, probe_BSD):
    """A number that depends on all of the output and on the losses; (output, stats)."""
    y_BSD, stats = forward(graphdef, params, x_BSD)
    y_BSD = all_reduce(y_BSD, "tensor")
    return jnp.sum(y_BSD * probe_BSD) / axis_size("tensor") + stats.loss(), (y_BSD, stats)


differentiated = jax.jit(jax.value_and_grad(objective, argnums=(2, 3), has_aux=True), static_argnums=(0, 1))


def routed(params: dict, x_BSD: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(logits_TE, the k experts of every token), by NumPy in f64."""
    logits_TE = np.asarray(x_BSD, np.float64).reshape(-1, D) @ np.asarray(params["router"]["kernel"], np.float64)
    return logits_TE, np.argsort(-logits_TE, axis=-1)[:, :K]


def feed_forward(x_D, gate, up, down):
    return (jax.nn.silu(x_D @ gate) * (x_D @ up)) @ down


@functools.partial(jax.jit, static_argnums=(0, 1))
def loop(config: ModelConfig, choices: tuple[tuple[int, ...], ...], params: dict, x_BSD: jax.Array) -> jax.Array:
    """Every token by itself, through every one of its experts."""
    outputs = []
    for x_D, chosen in zip(x_BSD.reshape(-1, D), choices, strict=True):
        probabilities_E = jax.nn.softmax(x_D @ params["router"]["kernel"])
        total = sum(probabilities_E[e] for e in chosen) if config.moe.normalize_weights else 1.0
        y_D = jnp.zeros(D)
        for e in chosen:
            kernels = (params[name]["kernel"][e] for name in ("gate", "up", "down"))
            y_D += probabilities_E[e] / total * feed_forward(x_D, *kernels)
        if "shared" in params:
            y_D += feed_forward(x_D, *(params["shared"][name]["kernel"] for name in ("gate", "up", "down")))
        outputs.append(y_D)
    return jnp.stack(outputs).reshape(x_BSD.shape)


def assert_close(found, expected, tolerance: float = 1e-5) -> None:
    """Every array of a tree, relative to its largest number."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max()), err_msg=str(path))


@pytest.mark.parametrize(("normalize", "shared"), [(True, None), (False, 5)])
def test_experts_are_what_a_loop_over_tokens_makes_of_them(normalize, shared):
    x_BSD, probe_BSD = tokens(2, 5), tokens(2, 5, seed=2)
    fields = {"normalize_weights": normalize, "shared_intermediate_size": shared, "balance_loss": 0.0, "z_loss": 0.0}
    config = model_config(**fields)
    _, params = split_layer(config)
    choices = tuple(map(tuple, routed(params, x_BSD)[1].tolist()))
    y_BSD, back = jax.vjp(functools.partial(loop, config, choices), params, x_BSD)
    expected = back(probe_BSD)
    for dispatch in ("dropless", "capacity"):
        other = model_config(dispatch=dispatch, capacity_factor=ROOM, **fields)
        (_, (found, stats)), grads = differentiated(split_layer(other)[0], other, params, x_BSD, probe_BSD)
        assert_close(found, y_BSD)
        assert_close(grads, expected)
        assert float(stats.dropped) == 0


def test_stats_are_the_published_formulas():
    config, rows, length = model_config(dispatch="dropless"), 3, 7
    graphdef, params = split_layer(config)
    x_BSD = tokens(rows, length)
    logits_TE, chosen_TK = routed(params, x_BSD)
    probabilities_BSE = (np.exp(logits_TE) / np.exp(logits_TE).sum(-1, keepdims=True)).reshape(rows, length, E)
    counts_BE = np.array([np.bincount(row.reshape(-1), minlength=E) for row in chosen_TK.reshape(rows, -1)])
    f_BE, P_BE = counts_BE * E / (K * length), probabilities_BSE.mean(1)
    _, stats = run(graphdef, params, x_BSD)
    np.testing.assert_allclose(stats.balance, length * (f_BE * P_BE).sum(), rtol=1e-5)
    np.testing.assert_allclose(stats.z, (np.log(np.exp(logits_TE).sum(-1)) ** 2).sum(), rtol=1e-5)
    np.testing.assert_array_equal(stats.load_E, counts_BE.sum(0))
    assert float(stats.choices) == rows * length * K
    # However a batch is cut, its parts add up.
    parts = [run(graphdef, params, x_BSD[row : row + 1])[1] for row in range(rows)]
    assert_close(jax.tree.map(lambda *leaves: sum(leaves), *parts), stats)
    metrics = {name: float(total / count) for name, (total, count) in stats.metrics().items()}
    assert metrics["balance_loss"] == pytest.approx((f_BE * P_BE).sum() / rows, rel=1e-5)
    assert metrics["expert_load"] == pytest.approx(counts_BE.sum(0).max() * E / counts_BE.sum())
    assert metrics["dropped"] == 0


def test_equal_choices_have_a_balance_of_one():
    config = model_config(num_experts=2, experts_per_token=1)
    graphdef, params = split_layer(config)
    params["router"]["kernel"] = jnp.zeros((D, 2)).at[0].set(jnp.array([1.0, -1.0]))
    x_BSD = jnp.zeros((1, 4, D)).at[0, :, 0].set(jnp.array([2.0, -2.0, 2.0, -2.0]))
    assert float(run(graphdef, params, x_BSD)[1].balance) == pytest.approx(4.0)


def test_what_finds_no_slot_is_dropped():
    """Four tokens for two slots of the first expert: the first two find one, and the others are left with nothing."""
    config = model_config(num_experts=2, experts_per_token=1, capacity_factor=1.0)
    graphdef, params = split_layer(config)
    params["router"]["kernel"] = jnp.zeros((D, 2)).at[0].set(jnp.array([1.0, -1.0]))
    x_BSD = tokens(2, 2).at[..., 0].set(1.0)
    y_BSD, stats = run(graphdef, params, x_BSD)
    kernels = [params[name]["kernel"][0] for name in ("gate", "up", "down")]
    np.testing.assert_allclose(y_BSD[0], feed_forward(x_BSD[0], *kernels), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y_BSD[1], 0.0)
    assert (float(stats.dropped), stats.load_E.tolist(), float(stats.choices)) == (2.0, [4.0, 0.0], 4.0)
    # What is dropped has no gradient but that of the losses.
    free = model_config(num_experts=2, experts_per_token=1, capacity_factor=1.0, balance_loss=0.0, z_loss=0.0)
    _, (_, grad_BSD) = differentiated(split_layer(free)[0], free, params, x_BSD, jnp.ones_like(x_BSD))
    assert (grad_BSD[0] != 0).any()
    np.testing.assert_array_equal(grad_BSD[1], 0.0)


def test_first_choices_find_slots_before_second_ones():
    slots_TK, tokens_EC, choices_EC = assign_slots(jnp.array([[0, 1], [1, 2], [1, 0]]), 3, 1)
    assert slots_TK.tolist() == [[0, 3], [1, 2], [3, 3]]
    assert tokens_EC.tolist() == [[0], [1], [1]]
    assert choices_EC.tolist() == [[0], [2], [3]]


@pytest.mark.parametrize(
    ("factor", "count", "slots"), [(1.0, 16, 6), (1.25, 16, 8), (0.01, 16, 1), (9.0, 16, 16), (1.25, 1, 1)]
)
def test_capacity_is_rounded_up_and_bounded(factor, count, slots):
    moe = model_config(capacity_factor=factor).moe
    assert Experts(moe.num_experts, moe.experts_per_token, moe.capacity_factor).slots(count) == slots


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_slots_go_round_in_order(data):
    # Few shapes, which are compiled; the last has more than one block of tokens.
    T, k, num_experts, C = data.draw(st.sampled_from([(1, 1, 1, 1), (7, 2, 3, 2), (7, 3, 3, 7), (300, 2, 4, 90)]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    skew = random.dirichlet(np.full(num_experts, data.draw(st.sampled_from([0.3, 1.0, 10.0]))) + 1e-3)
    experts_TK = np.array(
        [random.choice(num_experts, k, replace=False, p=(skew + 1e-3) / (skew + 1e-3).sum()) for _ in range(T)]
    )
    expected_TK = np.full((T, k), num_experts * C)
    tokens_EC, choices_EC = np.full((num_experts, C), T), np.full((num_experts, C), T * k)
    used = [0] * num_experts
    for rank in range(k):
        for token in range(T):
            expert = experts_TK[token, rank]
            if (place := used[expert]) < C:
                expected_TK[token, rank] = expert * C + place
                tokens_EC[expert, place], choices_EC[expert, place] = token, token * k + rank
            used[expert] += 1
    found = jax.jit(assign_slots, static_argnums=(1, 2))(jnp.asarray(experts_TK, jnp.int32), num_experts, C)
    for array, right in zip(found, (expected_TK, tokens_EC, choices_EC), strict=True):
        np.testing.assert_array_equal(array, right)


def on_mesh(sizes: dict[str, int], config: ModelConfig, x_BSD: jax.Array, probe_BSD: jax.Array):
    """What `differentiated` returns, of a layer and a batch that are split over devices."""
    graphdef, params = split_layer(config)
    layout = Layout(**sizes)
    rules = Rules(make_mesh(layout, jax.devices()[: np.prod(list(sizes.values()))]))
    split = {"gate": P("expert", None, "tensor"), "up": P("expert", None, "tensor"), "down": P("expert", "tensor")}
    specs = {name: {"kernel": split.get(name, P())} for name in params}
    batch = P(("data", "fsdp", "expert"), "context")

    def step(params, x_BSD, probe_BSD):
        local = functools.partial(objective, graphdef, config)
        (value, (y_BSD, stats)), (grads, grad_BSD) = jax.value_and_grad(local, argnums=(0, 1), has_aux=True)(
            params, x_BSD, probe_BSD
        )
        value, stats = jax.tree.map(lambda x: all_reduce(x, AXES), (value, stats))
        kept = ("expert", "tensor")
        grads = {
            name: {"kernel": all_reduce(grad["kernel"], [a for a in AXES if name not in split or a not in kept])}
            for name, grad in grads.items()
        }
        return (value, (y_BSD, stats)), (grads, all_reduce(grad_BSD, "tensor"))

    out_specs = ((P(), (batch, P())), (specs, batch))
    with use_rules(rules):
        mapped = jax.shard_map(
            step, mesh=rules.mesh, in_specs=(specs, batch, batch), out_specs=out_specs, check_vma=False
        )
        return jax.jit(mapped)(params, x_BSD, probe_BSD)


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"expert": 2}, marks=pytest.mark.long),
        pytest.param({"expert": 4}, marks=pytest.mark.long),
        {"expert": 2, "tensor": 2},
        {"data": 2, "context": 2},
        {"expert": 2, "context": 2, "tensor": 2},
        pytest.param({"fsdp": 2, "expert": 2, "context": 2}, marks=pytest.mark.long),
    ],
    ids=lambda sizes: " ".join(f"{axis}={size}" for axis, size in sizes.items()),
)
def test_devices_together_are_one(sizes, dispatch):
    config = model_config(dispatch=dispatch, capacity_factor=ROOM)
    x_BSD, probe_BSD = tokens(4, 6), tokens(4, 6, seed=2)
    graphdef, params = split_layer(config)
    expected = differentiated(graphdef, config, params, x_BSD, probe_BSD)
    assert_close(on_mesh(sizes, config, x_BSD, probe_BSD), expected)


def test_every_device_drops_by_its_own_tokens():
    config = model_config(capacity_factor=0.5)
    x_BSD, probe_BSD = tokens(4, 6), tokens(4, 6, seed=2)
    graphdef, params = split_layer(config)
    alone = [
        differentiated(graphdef, config, params, *(part[i : i + 2] for part in (x_BSD, probe_BSD))) for i in (0, 2)
    ]
    (_, (y_BSD, stats)), (grads, grad_BSD) = on_mesh({"expert": 2}, config, x_BSD, probe_BSD)
    assert float(stats.dropped) > 0
    assert_close(stats, jax.tree.map(jnp.add, *(stats for (_, (_, stats)), _ in alone)))
    assert_close(grads, jax.tree.map(jnp.add, *(grads for _, (grads, _) in alone)))
    assert_close(y_BSD, jnp.concatenate([y for (_, (y, _)), _ in alone]))
    assert_close(grad_BSD, jnp.concatenate([grad for _, (_, grad) in alone]))


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_nothing_is_scattered(dispatch):
    config = model_config(dispatch=dispatch)
    graphdef, params = split_layer(config)
    made = functools.partial(jax.value_and_grad(objective, argnums=(2, 3), has_aux=True), graphdef, config)
    operations = str(jax.make_jaxpr(made)(params, tokens(2, 6), tokens(2, 6)))
    assert "gather[" in operations
    assert "scatter" not in operations


def test_static_capacity_is_what_neuron_takes():
    config = model_config()
    graphdef, params = split_layer(config)
    made = functools.partial(jax.value_and_grad(objective, argnums=(2, 3), has_aux=True), graphdef, config)
    report = check(lambda *args: made(*args), params, tokens(2, 6), tokens(2, 6))
    assert [str(finding) for finding in report.findings if finding.severity != "note"] == []


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_routing_without_topk_is_the_same_routing_to_the_bit(dispatch, monkeypatch):
    config = model_config(dispatch=dispatch)
    _, params = split_layer(config)
    graphdef, x_BSD = split_layer(config)[0], tokens(2, 5)
    x_BSD = jnp.concatenate([x_BSD, jnp.zeros_like(x_BSD)], axis=1)  # whose experts are all equally likely

    def outputs():
        def function(params):
            (_, outputs), grads = differentiated.__wrapped__(graphdef, config, params, x_BSD, x_BSD)
            return outputs, grads

        return jax.jit(function)(params)

    native = outputs()
    monkeypatch.setattr(moe, "choose_top_k", iterative_top_k)
    jax.tree.map(np.testing.assert_array_equal, outputs(), native)


def test_more_experts_than_rounds_are_for_backends_with_topk():
    many = model_config(num_experts=80, experts_per_token=65)
    ((field, problem),) = backend_problems(many, simulated("neuron"))
    assert field == "moe.experts_per_token"
    assert "expected 64 at most" in problem
    assert not list(backend_problems(many, simulated()))
    assert not list(backend_problems(model_config(), simulated("neuron")))


def test_dropless_is_for_backends_with_grouped_products():
    capacity, dropless = (model_config(dispatch=dispatch) for dispatch in ("capacity", "dropless"))
    dense = ModelConfig(preset="tiny")
    ((field, problem),) = backend_problems(dropless, simulated("neuron"))
    assert field == "moe.dispatch"
    assert "neuron (simulated on the CPU) has no grouped matrix products" in problem
    assert not [*backend_problems(capacity, simulated("neuron")), *backend_problems(dense, simulated("neuron"))]
    assert not list(backend_problems(dropless, simulated()))


def test_routing_is_in_f32_whatever_the_dtype_of_the_rest():
    config = model_config(dispatch="dropless")
    graphdef, params = split_layer(config)
    x_BSD = tokens(2, 6).astype(jnp.bfloat16)
    y_BSD, stats = run(graphdef, params, x_BSD)
    _, exact = run(graphdef, params, x_BSD.astype(jnp.float32))
    assert y_BSD.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, stats, exact)


@pytest.mark.parametrize("dispatch", quicker(["dropless", "capacity"], ["capacity"]))
def test_scanned_and_unrolled_layers_of_experts_agree(dispatch):
    tokens_BS = jax.random.randint(jax.random.key(0), (2, 9), 0, 32)

    def loss(model):
        return jnp.mean(jnp.square(model(tokens_BS)))

    models = [
        Transformer(model_config(dispatch=dispatch), ModelOptions(scan_layers=scan, remat=remat), rngs=nnx.Rngs(0))
        for scan, remat in ((True, "full"), (False, "none"))
    ]
    scanned, unrolled = (nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(model)) for model in models)
    assert_close(scanned, unrolled)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(scanned))


def test_the_routers_losses_weigh_tokens_by_the_mask():
    graphdef, params = nnx.split(MoE(model_config(), rngs=nnx.Rngs(0)))
    x_BSD = jax.random.normal(jax.random.key(1), (2, 8, model_config().hidden_size))
    first = jnp.array([[1.0] * 8, [0.0] * 8])
    run = jax.jit(lambda x, mask: nnx.merge(graphdef, params)(x, mask)[1])
    alone, masked, padding = run(x_BSD[:1], first[:1]), run(x_BSD, first), run(x_BSD, 0 * first)
    for name in ("balance", "z", "tokens"):
        np.testing.assert_allclose(getattr(masked, name), getattr(alone, name), rtol=1e-6)
        assert getattr(padding, name) == 0
    assert masked.choices == 2 * alone.choices
