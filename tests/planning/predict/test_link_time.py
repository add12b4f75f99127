"""Collectives: how many bytes a program moves, by formula, and how long they take on the links of a placement."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from tests.helpers import tiny_recipe
from trainfw import backends
from trainfw.hardware import load_topology
from trainfw.hlo import partition
from trainfw.parallel import Layout, Placement, place
from trainfw.planning import Analysis, Transfer
from trainfw.planning.predict.link_time import link_utilisation, transfer_seconds
from trainfw.planning.read_step.analysis import read
from trainfw.program import build_program

MB, GB = 1e6, 1e9
LINK = 256e9 / 4
"""Of NeuronLink on Trainium2 in one direction, for each of the four cores of a chip."""


def placed(topology: str = "trn2.48xlarge", count: int = 1, **sizes: int) -> Placement:
    return place(load_topology(topology, count=count), Layout(**sizes))


def transfer(kind: str, axis: str, size: float) -> Transfer:
    return Transfer(kind, (axis,), "bf16", int(size), 1)


# Traffic ------------------------------------------------------------------------------------------------------------

D, F, WIDTH, VOCAB, LAYERS, ROWS, LENGTH, MICROBATCHES = 64, 192, 128, 512, 3, 16, 32, 2
LAYER = 4 * D * WIDTH + 3 * D * F
"""Elements of a layer's matrices (as many kv heads as heads)."""


def traffic(tmp_path: Path, remat: str, **sizes: int) -> tuple[dict[tuple[str, str], int], Analysis]:
    """(kind, axes) -> bytes of a small model's step, without vectors and scalars."""
    overrides = [
        *(f"model.{key}={value}" for key, value in {"hidden_size": D, "intermediate_size": F, "num_heads": 8}.items()),
        *("model.num_kv_heads=8", "model.head_dim=16", f"model.vocab_size={VOCAB}", f"model.num_layers={LAYERS}"),
        *("model.tie_embeddings=false", f"data.sequence_length={LENGTH}", f"train.global_batch_size={ROWS}"),
        *(f"train.accumulation_steps={MICROBATCHES}", "train.compute_dtype=bfloat16", f"train.remat={remat}"),
        *(f"parallel.{axis}={size}" for axis, size in ({"fsdp": 1} | sizes).items()),
    ]
    program = build_program(tiny_recipe(tmp_path, *overrides), jax.devices(), stands_in=True)
    lowered = program.train_step.lower(program.abstract_state, program.abstract_batch)
    module = partition(lowered, backends.current().compiler_options).module
    analysis = read(module, program.mesh, Layout(**sizes))
    tokens = ROWS * LENGTH // MICROBATCHES // program.layout.batch_shards
    found: dict[tuple[str, str], int] = {}
    for t in analysis.transfers:
        # Norms of gradients and metrics, scales of norms, statistics of the loss.
        if t.bytes not in (4, 8, 12, 16, 4 * D, 4 * LAYERS * D, 4 * tokens, 8 * tokens):
            key = t.kind, "+".join(t.axes)
            found[key] = found.get(key, 0) + t.bytes * t.times
    return found, analysis


def gathered() -> int:
    """Bytes of the weights as a step gathers them: in bf16 forward and again backward, whatever of a layer is saved;
    the head once; the embedding in f32, since its rows are looked up in f32."""
    return MICROBATCHES * (2 * 2 * LAYERS * LAYER + 2 * D * VOCAB + 4 * D * VOCAB)


def scattered() -> int:
    """Bytes of their gradients: in bf16, those of the embedding in f32."""
    return MICROBATCHES * (2 * LAYERS * LAYER + (2 + 4) * D * VOCAB)


def activations(tokens: int) -> int:
    """Bytes of activations that tensor parallelism gathers, and as many that it scatters.

    Forward, the inputs and the outputs of attention and feed-forward; backward, the gradients of the outputs and of the
    inputs. That is what the scaling book counts (jax-ml.github.io/scaling-book/training, tensor parallelism). And the
    rows of the embedding and the input of the head, with their gradients.
    """
    return MICROBATCHES * tokens * D * 2 * (LAYERS * 2 * 2 + 2)


def recomputed(tokens: int) -> dict[tuple[str, str], int]:
    """What full remat does again: all but the last sum of a layer, which nothing of its backward pass reads."""
    each = MICROBATCHES * tokens * D * 2 * LAYERS
    return {("all-gather", "tensor"): 2 * each, ("reduce-scatter", "tensor"): each}


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.long)])
def test_fsdp_gathers_every_weight_and_scatters_every_gradient(tmp_path, remat):
    found, _ = traffic(tmp_path, remat, fsdp=8)
    assert found == {("all-gather", "fsdp"): gathered(), ("reduce-scatter", "fsdp"): scattered()}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_tensor_parallelism_gathers_and_scatters_activations(tmp_path, remat):
    found, _ = traffic(tmp_path, remat, tensor=8)
    tokens = ROWS * LENGTH // MICROBATCHES
    again = recomputed(tokens) if remat == "full" else {}
    keys = ("all-gather", "tensor"), ("reduce-scatter", "tensor")
    assert found == {key: activations(tokens) + again.get(key, 0) for key in keys}


def test_both_divide_each_others_traffic(tmp_path):
    found, _ = traffic(tmp_path, "none", fsdp=2, tensor=4)
    exchanged = activations(ROWS * LENGTH // MICROBATCHES // 2)
    assert found == {
        ("all-gather", "fsdp"): gathered() // 4,
        ("reduce-scatter", "fsdp"): scattered() // 4,
        ("all-gather", "tensor"): exchanged,
        ("reduce-scatter", "tensor"): exchanged,
    }


def test_replicas_sum_their_shares_of_gradients_once_a_step(tmp_path):
    found, _ = traffic(tmp_path, "none", data=2, fsdp=2, tensor=2)
    matrices = LAYERS * LAYER + 2 * D * VOCAB
    assert found["all-reduce", "data"] == 4 * matrices // 4


def test_attention_is_told_apart(tmp_path):
    _, analysis = traffic(tmp_path, "none", fsdp=8)
    rows = ROWS // 8
    attention = [m for m in analysis.matmuls if m.attention]
    once = 2 * rows * 8 * 16 * LENGTH**2 * LAYERS  # of one product with the scores
    assert sum(m.flops for m in attention if not m.backward) == 2 * once
    assert sum(m.flops for m in attention if m.backward) == 4 * once
    tokens, matrices = rows * LENGTH, LAYERS * LAYER + D * VOCAB
    assert sum(m.flops for m in analysis.matmuls if not m.attention) == 6 * tokens * matrices
    assert 0 < analysis.streamed_bytes("attention") < analysis.streamed_bytes() - analysis.streamed_bytes("update")


# Time ---------------------------------------------------------------------------------------------------------------


def test_an_all_gather_goes_level_by_level():
    time = transfer_seconds(transfer("all-gather", "fsdp", GB), placed(fsdp=16, tensor=4))
    assert [level.dim for level in time.levels] == ["column", "row"]
    assert [level.bytes for level in time.levels] == [GB * 3 / 4, GB * 3 / 16]
    # Both ways around each ring.
    assert [level.seconds for level in time.levels] == pytest.approx([GB * 3 / 4 / 2 / LINK, GB * 3 / 16 / 2 / LINK])
    assert time.seconds == pytest.approx(GB * 15 / 16 / 2 / LINK + time.latency)


def test_the_network_moves_what_the_instance_shares_out():
    time = transfer_seconds(transfer("reduce-scatter", "fsdp", GB), placed(count=2, fsdp=32, tensor=4))
    outer = time.levels[-1]
    assert (outer.dim, outer.bytes) == ("network", GB / 2 / 16)
    assert outer.seconds == pytest.approx(GB / 2 / 16 / 6.25e9)  # 50 Gbit/s a core


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    placement = placed(count=2, fsdp=32, tensor=4)
    once, both = (
        sum(level.seconds for level in transfer_seconds(transfer(kind, "fsdp", GB), placement).levels)
        for kind in ("reduce-scatter", "all-reduce")
    )
    assert both == pytest.approx(2 * once)


def test_cores_of_a_chip_share_its_inner_bandwidth():
    time = transfer_seconds(transfer("all-gather", "tensor", GB), placed(fsdp=16, tensor=4))
    assert time.seconds == pytest.approx(GB * 3 / 4 / (2.9e12 / 4) + time.latency)


def test_a_switch_gives_every_chip_its_port():
    placement = placed("h100-8", fsdp=8)
    for kind in ("all-gather", "all-to-all"):
        time = transfer_seconds(transfer(kind, "fsdp", GB), placement)
        assert time.seconds == pytest.approx(GB * 7 / 8 / 360e9 + time.latency)


def test_links_reach_the_share_of_their_bandwidth_that_is_known_of_them():
    def seconds(**parameters: str) -> list[float]:
        figures = {key.replace("__", "."): value for key, value in parameters.items()}
        placement = place(load_topology("h100-8", count=2, parameters=figures), Layout(data=2, fsdp=8))
        gathers = (transfer("all-gather", axis, GB) for axis in ("fsdp", "data"))
        return [transfer_seconds(gather, placement).levels[0].seconds for gather in gathers]

    whole = seconds(links__nvlink__efficiency="1", network__efficiency="1")
    assert whole == pytest.approx([GB * 7 / 8 / 450e9, GB / 2 / 50e9])
    assert seconds() == pytest.approx([whole[0] / 0.8, whole[1] / 0.94])


def test_a_permute_goes_one_way():
    time = transfer_seconds(transfer("collective-permute", "fsdp", GB), placed(data=16, fsdp=4))
    assert [level.dim for level in time.levels] == ["core"]
    ring = transfer_seconds(transfer("collective-permute", "data", GB), placed(data=4, fsdp=16))
    assert ring.levels[0].dim == "row"
    assert ring.levels[0].seconds == pytest.approx(GB / LINK)


def busiest_link(n: int, closed: bool) -> float:
    """Chunks over the busiest direction of a link when every place of n sends one to every other, the short way."""
    load: dict[tuple[int, int], float] = {}
    for a in range(n):
        for b in range(n):
            right = (b - a) % n
            ways = [(1, right, 1.0)] if closed else [(1 if b > a else -1, abs(b - a), 1.0)]
            if closed and 2 * right > n:
                ways = [(-1, n - right, 1.0)]
            elif closed and 2 * right == n:
                ways = [(1, right, 0.5), (-1, right, 0.5)]
            for step, hops, share in ways:
                for hop in range(hops):
                    link = (a + step * hop) % n, (a + step * (hop + 1)) % n
                    load[link] = load.get(link, 0.0) + share
    return max(load.values())


def test_an_all_to_all_passes_through_others():
    ring = transfer_seconds(transfer("all-to-all", "data", GB), placed(data=4, fsdp=16))
    assert busiest_link(4, closed=True) == 4**2 / 8
    assert ring.levels[0].seconds == pytest.approx(busiest_link(4, closed=True) * GB / 4 / LINK)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8, 12])
def test_detours_by_routing(n):
    crossing = (n // 2) * ((n + 1) // 2)
    assert busiest_link(n, closed=False) == crossing
    if n > 2:
        assert busiest_link(n, closed=True) == crossing / 2


@pytest.mark.parametrize(
    ("axis", "size", "algorithm", "hops"),
    [
        ("fsdp", 0.5 * MB, "Mesh", 1),
        ("fsdp", 10 * MB, "RDH", 4),
        ("fsdp", 100 * MB, "Ring", 15),
        ("tensor", 100 * MB, "in chip", 1),
    ],
)
def test_the_algorithm_goes_by_size(axis, size, algorithm, hops):
    time = transfer_seconds(transfer("all-gather", axis, size), placed(fsdp=16, tensor=4))
    assert time.algorithm == algorithm
    assert time.latency == pytest.approx(hops * (1e-6 if axis == "tensor" else 1.5e-6))


def test_whole_chips_go_around_in_kangaroo_hops():
    whole = placed(fsdp=64)
    assert transfer_seconds(transfer("all-gather", "fsdp", 100 * MB), whole).algorithm == "KangaRing"
    small = transfer_seconds(transfer("all-reduce", "fsdp", 4), whole)
    assert (small.algorithm, small.latency) == ("Mesh", pytest.approx(2 * 2 * 1.5e-6))


def test_stages_add_their_latency():
    time = transfer_seconds(transfer("all-reduce", "fsdp", 4), placed(count=8, fsdp=128, tensor=4))
    assert time.algorithm == "Mesh + RDH"
    assert time.latency == pytest.approx(2 * (1 * 1.5e-6 + 3 * 15e-6))


def test_utilisation_is_time_on_a_link_over_time():
    placement = placed(count=2, fsdp=32, tensor=4)
    transfers = [Transfer("all-gather", ("fsdp",), "bf16", int(GB), 3), transfer("all-reduce", "tensor", GB)]
    shares = link_utilisation(transfers, placement, step_seconds=1.0)
    assert list(shares) == ["network", "row", "column", "core"]
    assert shares["network"] == pytest.approx(3 * GB / 2 / 16 / 6.25e9)
    assert shares["column"] == pytest.approx(3 * GB * 3 / 4 / 2 / LINK)
    assert shares["core"] == pytest.approx(2 * GB * 3 / 4 / (2.9e12 / 4))
