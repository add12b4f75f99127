"""cuDNN's attention as far as it goes without a GPU: what is asked of it, and what is lowered for one."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from trainfw.backends import AttentionRequest
from trainfw.backends.gpu import cudnn
from trainfw.models.layer_stack import REMAT_POLICIES

REQUEST = AttentionRequest(query_length=256, key_length=256, num_heads=4, num_kv_heads=2, head_dim=64, dtype="bfloat16")


@pytest.fixture
def on_hopper(monkeypatch):
    """jax is told that there is a Hopper GPU, for which it can lower but not compile."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "get_backend", lambda: type("Client", (), {"platform_version": "cuda 13000"}))


def lowered(request: AttentionRequest, remat: str) -> list[str]:
    """cuDNN's calls in the gradient of two layers of attention."""
    attend = cudnn.load(request)

    def layer(x_BSD):
        q, k, v = (x_BSD.reshape(*x_BSD.shape[:2], -1, request.head_dim)[:, :, :n] for n in (4, 2, 2))
        mask_BST = jnp.ones((2, request.query_length, request.key_length), bool)
        return x_BSD + attend(q, k, v, mask_BST, scale=0.1).reshape(x_BSD.shape)

    kept = {} if remat == "full" else {"policy": REMAT_POLICIES[remat]}
    layer = jax.checkpoint(layer, **kept)
    x = jax.ShapeDtypeStruct((2, request.query_length, 4 * request.head_dim), jnp.bfloat16)
    loss = jax.grad(lambda x: layer(layer(x)).astype(jnp.float32).sum())
    text = jax.jit(loss).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @(__cudnn\$\w+)", text)


@pytest.mark.parametrize(("segments", "softmax"), [(False, "Softmax"), (True, "ScaleBiasSoftmax")])
@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("dots", 0), ("full", 1)])
def test_a_layer_calls_it_once_forward_and_once_backward(on_hopper, segments, softmax, remat, again):
    calls = lowered(replace(REQUEST, segments=segments), remat)
    forward, backward = f"__cudnn$fmha{softmax}", f"__cudnn$fmha{softmax}Backward"
    # With full remat the last layer's first forward pass, whose result nobody reads, is gone before lowering.
    assert (calls.count(forward), calls.count(backward)) == (2 + again, 2), calls


def test_a_window_is_told(on_hopper):
    attend = cudnn.load(replace(REQUEST, window=100))
    q, k = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
    mask = jax.ShapeDtypeStruct((2, 256, 256), jnp.bool_)
    traced = jax.jit(lambda *x: attend(*x, scale=0.1)).trace(q, k, k, mask)
    assert '"sliding_window_length": 100' in traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')


@pytest.mark.parametrize(("causal", "mask"), [(True, "CAUSAL"), (False, "NO_MASK")])
def test_attention_to_all_keys_has_no_mask(on_hopper, causal, mask):
    attend = cudnn.load(replace(REQUEST, causal=causal))
    q, k = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
    traced = jax.jit(lambda *x: attend(*x, None, scale=0.1)).trace(q, k, k)
    assert f'"mask_type": "{mask}"' in traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"dtype": "float32"}, "not float32"),
        ({"causal": False, "segments": True}, "all keys"),
        ({"causal": False, "window": 9}, "all keys"),
        ({"key_length": 512}, "self-attention"),
        ({"softcap": 50.0}, "cap"),
        ({"head_dim": 60}, "60 numbers"),
        ({"head_dim": 256}, "256 numbers"),
        ({"query_length": 255, "key_length": 255}, "odd"),
    ],
)
def test_what_it_cannot_do_is_refused(changed, why):
    assert cudnn.refuses(REQUEST) is None
    assert why in (cudnn.refuses(replace(REQUEST, **changed)) or "")


def test_other_gpus_have_none(monkeypatch):
    monkeypatch.setattr(cudnn, "get_backend", lambda: type("Client", (), {"platform_version": "rocm 7"}))
    with pytest.raises(ImportError, match="CUDA"):
        cudnn.load(REQUEST)
