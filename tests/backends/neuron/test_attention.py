"""The kernels' adapters against the XLA form, with stand-ins that have the kernels' documented layouts.

attention_cte, attention_bwd: aws-neuron/nki-library 0759719d src/nkilib_src/nkilib/core/attention.
The kernels themselves run on Neuron only.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainfw import UserError
from trainfw.backends import AttentionRequest, kernels, resolve
from trainfw.backends.neuron import attention
from trainfw.backends.select import CPU, NEURON, SIMULATED
from trainfw.models.attention import Context, attend, attention_mask

B, S, H, K, h = 2, 256, 4, 2, 16
SCALE = 0.3
REQUEST = AttentionRequest(
    query_length=4096, key_length=4096, num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16"
)


class Launched:
    """A kernel that takes a grid, `kernel[grid](...)`, and checks it."""

    def __init__(self, function, grid=None):
        self.function, self.grid = function, grid

    def __getitem__(self, grid):
        return Launched(self.function, grid)

    def __call__(self, *arrays, **options):
        return self.function(self.grid, *arrays, **options)


def weights(q_BHhS, k_BHhT, scale):
    """Unnormalised scores with the causal mask, in f32."""
    scores = jnp.einsum("bhds,bhdt->bhst", q_BHhS * scale, k_BHhT)
    return jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -9984.0)


def by_partition(x_BHS):
    return x_BHS.reshape(*x_BHS.shape[:2], -1, 128).swapaxes(2, 3)


def from_partition(x_BHPn):
    return x_BHPn.swapaxes(2, 3).reshape(*x_BHPn.shape[:2], -1)


def attention_cte(grid, q, k, v, scale, causal_mask, tp_q, tp_k, cache_softmax):
    assert grid == 2
    assert causal_mask
    assert tp_q
    assert tp_k
    assert cache_softmax
    assert q.shape[1:] == k.shape[1:] == v.shape[1:] == (S, h)
    assert (k.shape[0], v.shape[0]) == (q.shape[0] * K // H,) * 2
    k, v = jnp.repeat(k, H // K, axis=0), jnp.repeat(v, H // K, axis=0)
    scores = weights(q.swapaxes(1, 2)[None], k.swapaxes(1, 2)[None], scale)[0]
    top = scores.max(-1)
    total = jnp.exp(scores - top[..., None]).sum(-1)
    out = jnp.exp(scores - top[..., None]) @ v / total[..., None]
    return out, by_partition(-top[None])[0], by_partition(1 / total[None])[0]


def attention_bwd(grid, q, k, v, o, dy, lse, *, use_causal_mask, mixed_precision, softmax_scale):
    assert grid == 2
    assert use_causal_mask
    assert mixed_precision
    assert q.shape == o.shape == dy.shape == (B, H, h, S)
    assert k.shape == v.shape == (B, K, h, S)
    assert lse.shape == (B, H, 128, S // 128)
    k, v = (jnp.repeat(x, H // K, axis=1) for x in (k, v))
    p = jnp.exp(weights(q, k, softmax_scale) - from_partition(lse)[..., None])
    dp = jnp.einsum("bhds,bhdt->bhst", dy, v)
    ds = p * (dp - jnp.sum(dy * o, 2)[..., None])
    dq = jnp.einsum("bhst,bhdt->bhds", ds, k) * softmax_scale
    dk = jnp.einsum("bhst,bhds->bhdt", ds, q) * softmax_scale
    dv = jnp.einsum("bhst,bhds->bhdt", p, dy)
    return dq, *(x.reshape(B, K, H // K, h, S).sum(2) for x in (dk, dv))


def module(monkeypatch, name: str, **contents):
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        if ".".join(parts[:i]) not in sys.modules:
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


@pytest.fixture
def nkilib(monkeypatch):
    module(monkeypatch, "nkilib.core.attention.attention_cte", attention_cte=Launched(attention_cte))
    module(monkeypatch, "nkilib.core.attention.attention_bwd", attention_bwd=Launched(attention_bwd))


@pytest.fixture(autouse=True)
def fresh_choices():
    kernels._resolve.cache_clear()
    yield
    kernels._resolve.cache_clear()


def random_case(seed: int = 0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((B, S, n, h)).astype(np.float32) for n in (H, K, K, H)]


MASK = attention_mask(Context(turns={}), S, S, None)


@pytest.mark.usefixtures("nkilib")
def test_nkilibs_flash_attention_is_the_xla_form():
    kernel = attention.load_nkilib(AttentionRequest(S, S, H, K, h, "float32", lnc=2))
    q, k, v, do = random_case()
    out, pull = jax.vjp(lambda *qkv: kernel(*qkv, MASK, scale=SCALE), q, k, v)
    expected, expected_pull = jax.vjp(lambda *qkv: attend(*qkv, MASK, scale=SCALE), q, k, v)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for grad, expected_grad, of in zip(pull(do), expected_pull(do), "qkv", strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=2e-5, err_msg=of)


@pytest.mark.usefixtures("nkilib")
def test_it_compiles_inside_jit_and_shard_map():
    kernel = attention.load_nkilib(AttentionRequest(S, S, H // 2, K // 2, h, "float32", lnc=2))
    q, k, v, _ = random_case()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("batch", "heads"))
    spec = jax.sharding.PartitionSpec("batch", None, "heads")
    sharded = jax.jit(
        jax.shard_map(
            lambda q, k, v: kernel(q, k, v, MASK, scale=SCALE), mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec
        )
    )
    np.testing.assert_allclose(sharded(q, k, v), attend(q, k, v, MASK, scale=SCALE), atol=2e-6)


@pytest.mark.usefixtures("nkilib")
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "nkilib flash attention"),
        ({"segments": True}, "XLA"),
        ({"window": 1024}, "XLA"),
        ({"window": 8192}, "nkilib flash attention"),
        ({"softcap": 50.0}, "XLA"),
        ({"cached": True}, "XLA"),
        ({"dtype": "float32"}, "XLA"),
        ({"head_dim": 256}, "XLA"),
        ({"query_length": 1}, "XLA"),
        ({"query_length": 1000, "key_length": 1000}, "XLA"),
        ({"ring": 4}, "XLA"),
    ],
)
def test_the_best_kernel_that_can_do_what_is_asked(changes, name):
    kernel = resolve("attention", replace(REQUEST, **changes), NEURON)
    assert kernel.name == name
    assert (kernel.call is None) == (name == "XLA")
    assert "nkilib ring attention: " in str(kernel)


def test_without_the_kernels_the_xla_form_and_the_reason(caplog):
    with caplog.at_level(logging.INFO, "trainfw"):
        kernel = resolve("attention", REQUEST, NEURON)
        resolve("attention", REQUEST, NEURON)
    assert kernel.call is None
    assert "nkilib flash attention: cannot be imported: No module named 'nkilib'" in kernel.passed_over
    assert [(r.levelname, r.getMessage().split(" (")[0]) for r in caplog.records] == [("WARNING", "attention: XLA")]


@pytest.mark.usefixtures("nkilib")
def test_a_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, "trainfw"):
        for _ in range(3):
            resolve("attention", REQUEST, NEURON)
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert caplog.records[0].getMessage().startswith("attention: nkilib flash attention (not nkilib ring")


@pytest.mark.usefixtures("nkilib")
def test_on_the_cpu_its_own_form_runs_and_none_where_it_stands_for_neuron():
    assert resolve("attention", REQUEST, CPU).name == "blocks of queries"
    assert resolve("attention", REQUEST, SIMULATED["neuron"]) == kernels.Kernel("XLA", None)


def test_an_unknown_operation():
    with pytest.raises(UserError, match="operation 'atention': has no kernels; did you mean 'attention'"):
        resolve("atention", REQUEST, CPU)
