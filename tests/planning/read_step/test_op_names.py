"""Which pass an operation belongs to, by its path: as JAX 0.10 names them in trainfw's own programs."""

from __future__ import annotations

import pytest

from trainfw.planning.read_step.op_names import is_backward, is_forward, is_recomputed, is_within

INSIDE = "jit(train_step)/shard_map/while/body/closed_call"
FORWARD = [
    "jvp()/while/body/closed_call/dot_general",
    "jvp(bskgh,btkh->bkgst)/dot_general",
    "jvp(core)/bskgh,btkh->bkgst/dot_general",
]
RECOMPUTED = [
    "transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/dot_general",
    # In a backward pass that is written out, looped and not.
    "transpose(jvp())/while/body/closed_call/jvp(bskgh,btkh->bkgst)/dot_general",
    "transpose(jvp(jvp()))/dot_general",
    "transpose(jvp(jvp(core)))/bskgh,btkh->bkgst/dot_general",
    "transpose(jvp())/while/body/closed_call/checkpoint/while/body/closed_call/jvp(bkgst,btkh->bskgh)/dot_general",
    "transpose(jvp())/while/body/closed_call/checkpoint/jvp(bkgst,btkh->bskgh)/dot_general",
]
GRADIENTS = [
    "transpose(jvp())/while/body/closed_call/checkpoint/core/transpose(jvp(bskgh,btkh->bkgst))/dot_general",
    "transpose(jvp(transpose(jvp(core))))/bkgst,btkh->bskgh/dot_general",
    "transpose(jvp())/dot_general",
    "transpose(jvp())/while/body/closed_call/checkpoint/dot_general",
    "transpose(jvp(jvp()))/checkpoint/dot_general",
    "transpose(jvp(jvp()))/checkpoint/transpose(jvp(bskgh,btkh->bkgst))/dot_general",
    "transpose(jvp())/while/body/closed_call/checkpoint/transpose(jvp(bskgh,btkh->bkgst))/dot_general",
    "transpose(jvp())/while/body/closed_call/transpose(jvp(transpose(jvp(bskgh,btkh->bkgst))))/dot_general",
    "transpose(jvp(transpose(transpose(jvp(jvp(transpose(jvp(bskgh,btkh->bkgst))))))))/dot_general",
]


@pytest.mark.parametrize("prefix", ["", f"{INSIDE}/"])
@pytest.mark.parametrize("name", [*FORWARD, *RECOMPUTED, *GRADIENTS, "psum", "jit(train_step)/reduce_sum"])
def test_passes_by_name(name, prefix):
    path = prefix + name
    assert is_forward(path) == (name in FORWARD + RECOMPUTED)
    assert is_recomputed(path) == (name in RECOMPUTED)
    assert is_backward(path) == (name in RECOMPUTED + GRADIENTS)


@pytest.mark.parametrize("name", ["core/dot_general", "jvp(core)/dot_general", "while/body/core/exp", "jvp()/x/core"])
def test_a_scope_is_found_wherever_it_stands(name):
    assert all(is_within(f"{prefix}{name}", "core") for prefix in ("", f"{INSIDE}/"))


@pytest.mark.parametrize(
    "name", ["jit(core)/dot_general", "jvp(jit(core))/x", "core_norm/x", "my.core/x", "score/x", ""]
)
def test_what_only_looks_like_the_scope_is_not_it(name):
    assert not any(is_within(f"{prefix}{name}", "core") for prefix in ("", f"{INSIDE}/"))
