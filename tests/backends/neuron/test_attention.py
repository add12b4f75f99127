"""The kernels' adapters against the XLA form, with stand-ins that have the kernels' documented layouts.

attention_cte, attention_bwd: aws-neuron/nki-library 0759719d src/nkilib_src/nkilib/core/attention.
The kernels themselves run on Neuron only.
"""

from __future__ import annotations

import inspect
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
from trainfw.models.common.attention import Context, attend, attention_mask

B, S, H, K, h = 2, 256, 4, 2, 16
SCALE = 0.3
REQUEST = AttentionRequest(
    query_length=4096, key_length=4096, num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16"
)


class Launched:
    """A kernel that is launched as `kernel[grid](...)`, and checks the grid."""

    def __init__(self, function, expected=2, grid=None):
        self.func, self.expected, self.grid = function, expected, grid

    def __getitem__(self, grid):
        return Launched(self.func, self.expected, grid)

    def __call__(self, *arrays, **options):
        assert self.grid == self.expected
        return self.func(*arrays, **options)


def without_bounds(function):
    """The kernel of a library that has no arguments for segments."""
    signature = inspect.signature(function)
    kept = [p for p in signature.parameters.values() if not p.name.startswith("bound_")]

    def older(*arrays, **options):
        assert not {name for name in options if name.startswith("bound_")}
        return function(*arrays, **options)

    older.__signature__ = signature.replace(parameters=kept)
    return older


def weights(q_BHhS, k_BHhT, scale, bounds_BS=None):
    """Unnormalised scores with the causal mask and within the bounds, in f32."""
    scores = jnp.einsum("bhds,bhdt->bhst", q_BHhS * scale, k_BHhT)
    seen = jnp.tril(jnp.ones(scores.shape[2:], bool))
    if bounds_BS is not None:
        low, high = (bound[:, None, :, None] for bound in bounds_BS)
        seen = seen & (low <= jnp.arange(scores.shape[3])) & (jnp.arange(scores.shape[3]) < high)
    return jnp.where(seen, scores, -9984.0)


def by_partition(x_BHS):
    return x_BHS.reshape(*x_BHS.shape[:2], -1, 128).swapaxes(2, 3)


def from_partition(x_BHPn):
    return x_BHPn.swapaxes(2, 3).reshape(*x_BHPn.shape[:2], -1)


def attention_cte(q, k, v, scale, causal_mask, tp_q, tp_k, cache_softmax, bound_min=None, bound_max=None):
    assert causal_mask
    assert tp_q
    assert tp_k
    assert cache_softmax
    assert q.shape[1:] == k.shape[1:] == v.shape[1:] == (S, h)
    assert (k.shape[0], v.shape[0]) == (q.shape[0] * K // H,) * 2
    k, v = jnp.repeat(k, H // K, axis=0), jnp.repeat(v, H // K, axis=0)
    bounds = None
    if bound_min is not None:  # the same for all rows of a call
        assert bound_min.shape == bound_max.shape == (S, 1)
        assert q.shape[0] == H
        bounds = bound_min.T, bound_max.T
    scores = weights(q.swapaxes(1, 2)[None], k.swapaxes(1, 2)[None], scale, bounds)[0]
    top = scores.max(-1)
    total = jnp.exp(scores - top[..., None]).sum(-1)
    out = jnp.exp(scores - top[..., None]) @ v / total[..., None]
    return out, by_partition(-top[None])[0], by_partition(1 / total[None])[0]


def attention_bwd(
    q, k, v, o, dy, lse, *, use_causal_mask, mixed_precision, softmax_scale, bound_min=None, bound_max=None
):
    assert use_causal_mask
    assert mixed_precision
    assert q.shape == o.shape == dy.shape == (B, H, h, S)
    assert k.shape == v.shape == (B, K, h, S)
    assert lse.shape == (B, H, 128, S // 128)
    k, v = (jnp.repeat(x, H // K, axis=1) for x in (k, v))
    bounds = None
    if bound_min is not None:
        assert bound_min.shape == bound_max.shape == (B, S)
        assert bound_min.dtype == bound_max.dtype == jnp.float32
        bounds = bound_min, bound_max
    p = jnp.exp(weights(q, k, softmax_scale, bounds) - from_partition(lse)[..., None])
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


def install(monkeypatch, *, bounds: bool = True, nki: tuple[int, ...] = (0, 6, 0)) -> None:
    """A stand-in of nki-library, with arguments for segments or without, for a version of NKI."""
    for function in (attention_cte, attention_bwd):
        kernel = Launched(function if bounds else without_bounds(function), 2 if nki < (0, 7) else None)
        module(monkeypatch, f"nkilib.core.attention.{function.__name__}", **{function.__name__: kernel})
    monkeypatch.setattr(attention, "_nki_version", lambda: nki or ())


@pytest.fixture
def nkilib(monkeypatch):
    install(monkeypatch)
    monkeypatch.delenv("NEURON_LOGICAL_NC_CONFIG", raising=False)


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
        ({"segments": True}, "nkilib flash attention"),
        ({"window": 1024}, "XLA"),
        ({"window": 8192}, "nkilib flash attention"),
        ({"softcap": 50.0}, "XLA"),
        ({"dtype": "float32"}, "XLA"),
        ({"head_dim": 256}, "XLA"),
        ({"query_length": 1}, "XLA"),
        ({"query_length": 1000, "key_length": 1000}, "XLA"),
        ({"batch": 16}, "nkilib flash attention"),  # x 32 heads: 512
        ({"batch": 17}, "XLA"),
        ({"batch": 17, "segments": True}, "nkilib flash attention"),  # a call for each row
        ({"num_heads": 520, "segments": True}, "XLA"),
        ({"query_length": 131072, "key_length": 131072}, "nkilib flash attention"),
        ({"query_length": 131584, "key_length": 131584}, "XLA"),
    ],
)
def test_the_best_kernel_that_can_do_what_is_asked(changes, name):
    kernel = resolve("attention", replace(REQUEST, **changes), NEURON)
    assert kernel.name == name
    assert (kernel.call is None) == (name == "XLA")


def packed(*lengths: int) -> np.ndarray:
    """Segment ids of rows, whose documents have these lengths; the rest is padding."""
    ids = np.zeros(S, np.int32)
    ids[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return ids


@pytest.mark.usefixtures("nkilib")
def test_packed_documents_are_the_xla_form_with_its_mask():
    kernel = attention.load_nkilib(AttentionRequest(S, S, H, K, h, "float32", lnc=2, segments=True, batch=B))
    context = Context(turns={}, segment_ids_BS=jnp.array([packed(1, 100, 155), packed(130, 7, 3)]))
    mask = attention_mask(context, S, S, None)
    q, k, v, do = random_case(1)
    out, pull = jax.jit(lambda *qkv: jax.vjp(lambda *qkv: kernel(*qkv, mask, scale=SCALE), *qkv))(q, k, v)
    expected, expected_pull = jax.vjp(lambda *qkv: attend(*qkv, mask, scale=SCALE), q, k, v)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for grad, expected_grad, of in zip(pull(do), expected_pull(do), "qkv", strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=2e-5, err_msg=of)


def test_bounds_are_those_of_the_kernels_example():
    """As attention_bwd documents them: sequences of 2, 3 and 2 in a row of 7."""
    ids = jnp.array([[1, 1, 2, 2, 2, 3, 3]])
    low, high = attention.key_bounds(attention_mask(Context(turns={}, segment_ids_BS=ids), 7, 7, None), 1)
    assert low.tolist() == [[0, 0, 2, 2, 2, 5, 5]]
    assert high.tolist() == [[2, 2, 5, 5, 5, 7, 7]]


def test_a_library_without_bounds_takes_no_segments(monkeypatch):
    install(monkeypatch, bounds=False)
    kernel = resolve("attention", replace(REQUEST, segments=True, lnc=2), NEURON)
    assert kernel.name == "XLA"
    assert "no arguments for segments (bound_min, bound_max)" in str(kernel)
    assert resolve("attention", replace(REQUEST, lnc=2), NEURON).name == "nkilib flash attention"
    out = attention.load_nkilib(AttentionRequest(S, S, H, K, h, "float32", lnc=2))(
        *random_case()[:3], MASK, scale=SCALE
    )
    assert out.shape == (B, S, H, h)


@pytest.mark.parametrize(
    ("nki", "told", "lnc", "refused"),
    [
        ((0, 6, 0), None, 2, None),
        ((0, 6, 0), "1", 2, None),  # in brackets
        ((0, 7, 0), "2", 2, None),
        ((0, 7, 0), None, 1, None),
        ((0, 7, 0), None, 2, "which is unset, which it takes for 1; the devices have LNC 2"),
        ((0, 8, 1), "1", 2, "which is 1; the devices have LNC 2"),
        ((0, 7, 0), "2", 1, "which is 2; the devices have LNC 1"),
    ],
)
def test_lnc_is_in_brackets_or_in_the_environment(nki, told, lnc, refused, monkeypatch):
    install(monkeypatch, nki=nki)
    monkeypatch.delenv("NEURON_LOGICAL_NC_CONFIG", raising=False)
    if told is not None:
        monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", told)
    kernel = resolve("attention", replace(REQUEST, lnc=lnc), NEURON)
    assert (kernel.name == "XLA") == (refused is not None)
    assert refused is None or refused in str(kernel)
    if refused is None and lnc == 2:  # and the stand-in insists on how it is launched
        launched = attention.load_nkilib(AttentionRequest(S, S, H, K, h, "float32", lnc=lnc))
        assert launched(*random_case()[:3], MASK, scale=SCALE).shape == (B, S, H, h)


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
    assert caplog.records[0].getMessage().startswith("attention: nkilib flash attention for ")


@pytest.mark.usefixtures("nkilib")
def test_on_the_cpu_its_own_form_runs_and_none_where_it_stands_for_neuron():
    assert resolve("attention", REQUEST, CPU).name == "blocks of queries"
    assert resolve("attention", REQUEST, SIMULATED["neuron"]) == kernels.Kernel("XLA", None)


def test_an_unknown_operation():
    with pytest.raises(UserError, match="operation 'atention': has no kernels; did you mean 'attention'"):
        resolve("atention", REQUEST, CPU)
