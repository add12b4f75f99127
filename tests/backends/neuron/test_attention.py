"""The kernels' adapters against the XLA form, with stand-ins that have the kernels' documented layouts.

flash_fwd, flash_attn_bwd: aws-neuron/nki-samples 6905a68a src/nki_samples/reference/attention.py.
attention_cte, attention_bwd: aws-neuron/nki-library 0759719d src/nkilib_src/nkilib/core/attention.
The kernels themselves run on Neuron only.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Cores:
    """`nl.nc(2) * n`: n programs on each of 2 physical cores."""

    count: int

    def __mul__(self, programs: int) -> int:
        return self.count * programs


class Launched:
    """A kernel that takes a grid, `kernel[grid](...)`, and checks it."""

    def __init__(self, function, grid=None):
        self.function, self.grid = function, grid

    def __getitem__(self, grid):
        return Launched(self.function, grid)

    def __call__(self, *arrays, **options):
        return self.function(self.grid, *arrays, **options)


def weights(q_BHhS, k_BHhT, bias, scale):
    """Unnormalised scores with the causal mask, in f32."""
    scores = jnp.einsum("bhds,bhdt->bhst", q_BHhS * scale, k_BHhT)
    scores = scores if bias is None else scores + bias
    return jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -9984.0)


def by_partition(x_BHS):
    return x_BHS.reshape(*x_BHS.shape[:2], -1, 128).swapaxes(2, 3)


def from_partition(x_BHPn):
    return x_BHPn.swapaxes(2, 3).reshape(*x_BHPn.shape[:2], -1)


def flash_fwd(grid, q, k, v, seed, logit_bias=None, *, softmax_scale, use_causal_mask, mixed_precision, dropout_p):
    b, n, d, s = q.shape
    assert grid == (b, n)
    assert k.shape == (b, n, d, s)
    assert v.shape == (b, n, s, d)
    assert seed.shape == (1,)
    assert (use_causal_mask, mixed_precision, dropout_p) == (True, True, 0.0)
    assert logit_bias is None or logit_bias.shape == (1, 1, s, s)
    scores = weights(q, k, logit_bias, softmax_scale)
    lse = jax.nn.logsumexp(scores, -1)
    return jnp.exp(scores - lse[..., None]) @ v, by_partition(lse)


def flash_attn_bwd(
    grid, q, k, v, o, dy, lse, seed, logit_bias=None, *, use_causal_mask, mixed_precision, dropout_p, softmax_scale
):
    b, n, d, s = q.shape
    assert grid == (b, n)
    assert k.shape == v.shape == o.shape == dy.shape == (b, n, d, s)
    assert lse.shape == (b, n, 128, s // 128)
    assert seed.shape == (1,)
    assert logit_bias is None or logit_bias.shape == (1, 1, s, s)
    p = jnp.exp(weights(q, k, logit_bias, softmax_scale) - from_partition(lse)[..., None])
    dp = jnp.einsum("bhds,bhdt->bhst", dy, v)
    ds = p * (dp - jnp.sum(dy * o, 2)[..., None])
    return (
        jnp.einsum("bhst,bhdt->bhds", ds, k) * softmax_scale,
        jnp.einsum("bhst,bhds->bhdt", ds, q) * softmax_scale,
        jnp.einsum("bhst,bhds->bhdt", p, dy),
    )


def attention_cte(grid, q, k, v, scale, causal_mask, tp_q, tp_k, cache_softmax):
    assert grid == 2
    assert causal_mask
    assert tp_q
    assert tp_k
    assert cache_softmax
    assert (q.shape, k.shape, v.shape) == ((B * H, S, h), (B * K, S, h), (B * K, S, h))
    k, v = jnp.repeat(k, H // K, axis=0), jnp.repeat(v, H // K, axis=0)
    scores = weights(q.swapaxes(1, 2)[None], k.swapaxes(1, 2)[None], None, scale)[0]
    top = scores.max(-1)
    total = jnp.exp(scores - top[..., None]).sum(-1)
    out = jnp.exp(scores - top[..., None]) @ v / total[..., None]
    return out, by_partition(-top[None])[0], by_partition(1 / total[None])[0]


def attention_bwd(grid, q, k, v, o, dy, lse, *, use_causal_mask, mixed_precision, softmax_scale):
    assert grid == 2
    assert use_causal_mask
    assert q.shape == o.shape == dy.shape == (B, H, h, S)
    assert k.shape == v.shape == (B, K, h, S)
    wide = (jnp.repeat(x, H // K, axis=1) for x in (k, v))
    options = {"use_causal_mask": True, "mixed_precision": True, "dropout_p": 0.0, "softmax_scale": softmax_scale}
    dq, *dkv = flash_attn_bwd((B, H), q, *wide, o, dy, lse, jnp.ones(1), **options)
    return dq, *(x.reshape(B, K, H // K, h, S).sum(2) for x in dkv)


def module(monkeypatch, name: str, **contents):
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        if ".".join(parts[:i]) not in sys.modules:
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


@pytest.fixture
def neuronxcc(monkeypatch):
    kernels_ = {"flash_fwd": Launched(flash_fwd), "flash_attn_bwd": Launched(flash_attn_bwd)}
    module(monkeypatch, "neuronxcc.nki.kernels.attention", **kernels_)
    module(monkeypatch, "neuronxcc.nki.language", nc=Cores)


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
    q, k, v, do = (rng.standard_normal((B, S, n, h)).astype(np.float32) for n in (H, K, K, H))
    segments = jnp.asarray(np.cumsum(rng.random((B, S)) < 0.03, axis=1), jnp.int32)
    return q, k, v, do, segments


def compare(kernel, window=None, segmented=False):
    q, k, v, do, segments = random_case()
    context = Context(turns={}, segment_ids_BS=segments if segmented else None)
    mask = attention_mask(context, S, S, window)
    out, pull = jax.vjp(lambda *qkv: kernel(*qkv, mask, scale=SCALE), q, k, v)
    expected, expected_pull = jax.vjp(lambda *qkv: attend(*qkv, mask, scale=SCALE), q, k, v)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for grad, expected_grad, of in zip(pull(do), expected_pull(do), "qkv", strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=2e-5, err_msg=of)


@pytest.mark.usefixtures("neuronxcc")
@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize(("window", "segmented"), [(None, False), (None, True), (64, False), (64, True)])
def test_flash_attention_is_the_xla_form(window, segmented, lnc):
    request = AttentionRequest(S, S, H, K, h, "float32", window=window, segments=segmented, lnc=lnc)
    compare(attention.load_flash(request), window, segmented)


@pytest.mark.usefixtures("nkilib")
def test_nkilibs_flash_attention_is_the_xla_form():
    compare(attention.load_nkilib(AttentionRequest(S, S, H, K, h, "float32", lnc=2)))


@pytest.mark.usefixtures("neuronxcc")
def test_it_compiles_inside_jit_and_shard_map():
    kernel = attention.load_flash(AttentionRequest(S, S, H // 2, K // 2, h, "float32", segments=True))
    q, k, v, _, segments = random_case()
    mask = attention_mask(Context(turns={}, segment_ids_BS=segments), S, S, None)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("batch", "heads"))
    spec = jax.sharding.PartitionSpec("batch", None, "heads")
    sharded = jax.jit(
        jax.shard_map(
            lambda q, k, v, mask: kernel(q, k, v, mask, scale=SCALE),
            mesh=mesh,
            in_specs=(spec, spec, spec, jax.sharding.PartitionSpec("batch")),
            out_specs=spec,
        )
    )
    np.testing.assert_allclose(sharded(q, k, v, mask), attend(q, k, v, mask, scale=SCALE), atol=2e-6)


@pytest.mark.usefixtures("neuronxcc", "nkilib")
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "nkilib flash attention"),
        ({"segments": True}, "neuronx-cc flash attention"),
        ({"window": 1024}, "neuronx-cc flash attention"),
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
    assert "neuronx-cc flash attention: cannot be imported: No module named 'neuronxcc'" in kernel.passed_over
    assert [(r.levelname, r.getMessage().split(" (")[0]) for r in caplog.records] == [("WARNING", "attention: XLA")]


@pytest.mark.usefixtures("neuronxcc")
def test_a_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, "trainfw"):
        for _ in range(3):
            resolve("attention", replace(REQUEST, segments=True), NEURON)
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert caplog.records[0].getMessage().startswith("attention: neuronx-cc flash attention (not nkilib ring")


@pytest.mark.usefixtures("neuronxcc", "nkilib")
@pytest.mark.parametrize("backend", [CPU, SIMULATED["neuron"]])
def test_on_the_cpu_the_xla_form_runs(backend):
    assert resolve("attention", REQUEST, backend) == kernels.Kernel("XLA", None)


def test_an_unknown_operation():
    with pytest.raises(UserError, match="operation 'atention': has no kernels; did you mean 'attention'"):
        resolve("atention", REQUEST, CPU)
