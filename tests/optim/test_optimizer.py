from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainfw import UserError
from trainfw.optim import OptimizerConfig, make_optimizer, make_schedule, optimizer_shardings
from trainfw.parallel import Layout, Rules, make_mesh


def parameters():
    key = jax.random.key(0)
    return {
        "embedding": {"table": jax.random.normal(key, (256, 160))},
        "layers": {
            "mlp": {"up": {"kernel": jax.random.normal(key, (3, 160, 256)), "bias": jnp.ones((3, 64))}},
            "norm": {"scale": jnp.ones((3, 48))},
        },
    }


def rms(x) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"schedule": "constant"}, {0: 0.2, 4: 1.0, 20: 1.0}),
        ({"schedule": "linear"}, {0: 0.2, 4: 1.0, 12: 0.55, 20: 0.1}),
        ({"schedule": "cosine"}, {0: 0.2, 4: 1.0, 12: 0.55, 20: 0.1}),
        ({"schedule": "wsd", "decay_steps": 4}, {4: 1.0, 16: 1.0, 18: 0.55, 20: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 0, "final_fraction": 0.0}, {0: 1.0, 10: 0.5, 20: 0.0}),
    ],
)
def test_schedules(config, expected):
    schedule = make_schedule(OptimizerConfig(**{"learning_rate": 1.0, "warmup_steps": 4} | config), 20)
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-5, abs=1e-7), step


def test_adamw_is_the_textbook_update():
    params = {"layers": {"w": {"kernel": jnp.array([[2.0, -1.0]])}}}
    grads = {"layers": {"w": {"kernel": jnp.array([[0.3, 0.1]])}}}
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5, clip_norm=None)
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # At the first step m / sqrt(v) is the gradient's sign; decay is decoupled, per unit of learning rate.
    expected = -0.1 * (np.array([[1.0, 1.0]]) + 0.5 * np.array([[2.0, -1.0]]))
    np.testing.assert_allclose(updates["layers"]["w"]["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_norms_and_biases_do_not_decay_and_matrices_do(name):
    params = parameters()
    config = OptimizerConfig(name=name, learning_rate=0.1, schedule="constant", weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    mlp = updates["layers"]["mlp"]["up"]
    assert rms(mlp["bias"]) == rms(updates["layers"]["norm"]["scale"]) == 0
    np.testing.assert_allclose(mlp["kernel"], -0.05 * params["layers"]["mlp"]["up"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(updates["embedding"]["table"], -0.05 * params["embedding"]["table"], rtol=1e-5)


def test_muon_orthogonalises_each_layer_and_adamw_takes_the_rest():
    params = parameters()
    config = OptimizerConfig(
        name="muon", learning_rate=0.1, adam_learning_rate=0.01, schedule="constant", weight_decay=0, clip_norm=None
    )
    optimizer = make_optimizer(config, 10)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    kernel = updates["layers"]["mlp"]["up"]["kernel"]
    for layer in kernel:
        singular = np.linalg.svd(np.asarray(layer), compute_uv=False)
        assert singular.max() / singular.min() < 2  # five Newton-Schulz steps bring them all near 1
    assert rms(kernel) == pytest.approx(0.1 * 0.2, rel=0.3)
    assert rms(updates["embedding"]["table"]) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_moments_are_sharded_as_their_parameters(name):
    rules = Rules(make_mesh(Layout(fsdp=2, tensor=2), jax.devices()[:4]))
    names = {
        "embedding": {"table": ("vocab", "embed")},
        "layers": {
            "mlp": {"up": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}},
            "norm": {"scale": ("layers", "norm")},
        },
    }
    params = jax.eval_shape(parameters)
    shardings = jax.tree.map(lambda p, n: rules.sharding("p", p.shape, n), params, names)
    optimizer = make_optimizer(OptimizerConfig(name=name), 10)
    state = jax.eval_shape(optimizer.init, params)
    result = optimizer_shardings(optimizer, params, shardings, rules.replicated)
    assert jax.tree.structure(state) == jax.tree.structure(result)
    by_shape = {p.shape: s for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(shardings))}
    found = 0
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(result)):
        assert sharding.is_equivalent_to(by_shape.get(leaf.shape, rules.replicated), leaf.ndim)
        found += leaf.shape in by_shape
    assert found >= (2 if name == "adafactor" else 4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_decay_pattern_may_match_any_parameter(name):
    params = parameters()
    config = OptimizerConfig(
        name=name, learning_rate=0.1, schedule="constant", weight_decay_exclude=["embedding.table", "layers.norm.*"]
    )
    optimizer = make_optimizer(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert rms(updates["embedding"]["table"]) == 0
    assert rms(updates["layers"]["mlp"]["up"]["kernel"]) > 0


def test_a_decay_pattern_that_matches_nothing_is_refused():
    optimizer = make_optimizer(OptimizerConfig(weight_decay_exclude=["layres.*"]), 10)
    with pytest.raises(UserError, match=r"'layres\.\*' matches none"):
        jax.eval_shape(optimizer.init, parameters())


def test_clipping_makes_the_update_blind_to_the_gradients_size():
    params = parameters()
    config = OptimizerConfig(name="lion", clip_norm=1.0, weight_decay=0)
    optimizer = make_optimizer(config, 10)
    grads = jax.tree.map(jnp.ones_like, params)
    _, small = optimizer.update(jax.tree.map(lambda g: 10 * g, grads), optimizer.init(params), params)
    _, large = optimizer.update(jax.tree.map(lambda g: 1000 * g, grads), optimizer.init(params), params)
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large)):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e3])
@pytest.mark.parametrize("handed", [False, True])
def test_clipping_is_optaxs(scale, handed):
    params = parameters()
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    grads = jax.tree.map(lambda p: scale * jax.random.normal(next(keys), p.shape), params)
    settings = {"name": "adamw", "schedule": "constant", "weight_decay": 0, "learning_rate": 0.1}
    ours, plain = (make_optimizer(OptimizerConfig(**settings, clip_norm=limit), 10) for limit in (1.0, None))
    theirs, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    extra = {"norm": optax.global_norm(grads)} if handed else {}
    updates, state = ours.update(grads, ours.init(params), params, **extra)
    expected, expected_state = plain.update(theirs, plain.init(params), params)
    moments, expected_moments = (jax.tree.leaves(optax.tree.get(s, "mu")) for s in (state, expected_state))
    for a, b in zip(jax.tree.leaves(updates) + moments, jax.tree.leaves(expected) + expected_moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-12)


def test_an_optimizer_of_ones_own_is_held_to_its_contract():
    params = {"w": jnp.ones((2, 3))}

    def fails(*_):
        raise KeyError("lost")

    def made(update, init=lambda params: jnp.zeros(1)):
        return lambda rate: optax.GradientTransformation(init, update)

    for own, said in (
        (fails, r"^name = 'optax:own': its function raises KeyError: 'lost' \(.*test_optimizer.py:\d+\)"),
        (lambda rate: None, "returns a NoneType of the learning rate; expected an Optax transformation"),
        (made(fails, fails), "its init raises KeyError: 'lost'"),
        (made(fails, lambda params: "abc"), r"its init returns \['str'\] in a tree; expected arrays alone"),
        (made(fails), "its update raises KeyError: 'lost'"),
        (optax.lbfgs, "its update raises TypeError: .*value"),
        (made(lambda g, s, p: None), r"its update returns a NoneType; expected \(updates, state\)"),
        (
            made(lambda g, s, p: ({"x": g["w"]}, s)),
            r"updates\['w'\] of nothing; expected \[2, 3\], as in the gradients",
        ),
        (made(lambda g, s, p: ({"w": g["w"][:1]}, s)), r"returns updates\['w'\] of \[1, 3\]; expected \[2, 3\]"),
        (made(lambda g, s, p: (g, jnp.zeros(2))), r"returns state of float32\[2\]; expected float32\[1\], as before"),
        (made(lambda g, s, p: (g, s.astype(int))), r"returns state of int32\[1\]; expected float32\[1\]"),
        (made(lambda g, s, p: (g, None)), r"returns state of nothing; expected float32\[1\]"),
        (
            made(lambda g, s, p: (g, tuple(s)), lambda p: [jnp.zeros(1)]),
            r"state in PyTreeDef\(\(\*,\)\); expected PyTree",
        ),
    ):

        def step(params, own=own):
            optimizer = make_optimizer(OptimizerConfig(name="optax:own", clip_norm=None), 10, own)
            return optimizer.update(params, optimizer.init(params), params)

        with pytest.raises(UserError, match=said):
            jax.eval_shape(step, params)
