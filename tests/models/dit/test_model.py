"""A small diffusion transformer: how it starts, what it leaves out, and that every layout computes the same."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.helpers import quicker
from trainfw.errors import UserError
from trainfw.models import Condition, DiT, DiTConfig, ModelOptions, dims_of, flops_per_token, load_family, unspread_of
from trainfw.models.common.rope import apply_rope
from trainfw.models.dit.model import rotary_angles
from trainfw.parallel import Layout, Rules, all_reduce, make_mesh, reduce_gradient, use_rules

KINDS = {
    "none": {"positions": "rotary", "qk_norm": True},
    "class": {"num_classes": 7},
    "cross": {"caption_size": 12, "caption_length": 6},
    "joint": {"caption_size": 12, "caption_length": 6, "positions": "rotary", "qk_norm": True},
}


def small(conditioning: str, **changes) -> DiTConfig:
    fields = {"image_size": 8, "channels": 3, "hidden_size": 32, "num_layers": 4, "num_heads": 4}
    return DiTConfig(**fields | {"conditioning": conditioning} | KINDS[conditioning] | changes)


def build(config: DiTConfig, **options) -> DiT:
    return nnx.jit(lambda: DiT(config, ModelOptions(**options), rngs=nnx.Rngs(0)))()


def disturbed(model: DiT, seed: int = 0):
    """(graphdef, parameters, none of which is zero)"""
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), state)


@functools.cache
def batch(rows: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(rows, 8, 8, 3)).astype(np.float32),
        "target": rng.normal(size=(rows, 8, 8, 3)).astype(np.float32),
        "time": rng.uniform(0, 1000, rows).astype(np.float32),
        "label": rng.integers(0, 7, rows).astype(np.int32),
        "caption": rng.normal(size=(rows, 6, 12)).astype(np.float32),
        "mask": (np.arange(6) < rng.integers(1, 7, (rows, 1))).astype(np.float32),
        "keep": np.array([1, 0] * (rows // 2), np.float32),
    }


@nnx.jit
def predicted(model: DiT, batch) -> jax.Array:
    condition = Condition(
        label_B=batch["label"], caption_BTF=batch["caption"], caption_mask_BT=batch["mask"], keep_B=batch["keep"]
    )
    return model.forward(batch["image"], batch["time"], condition)


def loss_and_gradients(config: DiTConfig, sizes: dict[str, int], **options):
    """(sum of squares, predictions, gradients by path) of random weights, on a mesh of these sizes."""
    graphdef, params = disturbed(build(config, **options))

    def local(params, batch):
        def loss(params):
            model = nnx.merge(graphdef, params)
            out = predicted(model, batch)
            return jnp.sum((out - model.patches(batch["target"])) ** 2), model.unpatched(out)

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, out, grads

    if not sizes:
        value, out, grads = jax.jit(local)(params, batch())
    else:
        layout = Layout(**{"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1, "pipeline": 1} | sizes)
        rules = Rules(make_mesh(layout, jax.devices()[: math.prod(sizes.values())]), own=dims_of(config))
        leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
        specs = [rules.spec("weight", leaf.shape, leaf.axes) for leaf in leaves]
        structure = jax.tree.structure(params)
        held = jax.tree.unflatten(structure, specs)
        rows = P(rules.axes("batch") or None)

        def sharded(params, batch):
            with use_rules(rules):
                value, out, grads = local(params, batch)
                parts = [reduce_gradient(g, x.axes, rules) for g, x in zip(jax.tree.leaves(grads), leaves)]
                return all_reduce(value, rules.mesh.axis_names), out, jax.tree.unflatten(structure, parts)

        mapped = jax.shard_map(
            sharded, mesh=rules.mesh, in_specs=(held, rows), out_specs=(P(), rows, held), check_vma=False
        )
        value, out, grads = jax.jit(mapped)(params, batch())
    flat = {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in nnx.to_flat_state(grads)}
    return float(value), np.asarray(out), flat


@functools.cache
def one_device(conditioning: str):
    return loss_and_gradients(small(conditioning), {})


FULL = {"remat": "full", "prefetch": True}
LAYOUTS = {
    "fsdp, context, tensor": ({"fsdp": 2, "context": 2, "tensor": 2}, {}),
    "prefetched": ({"fsdp": 2, "context": 2, "tensor": 2}, FULL),
    "prefetched, unrolled": ({"fsdp": 4}, {**FULL, "scan_layers": False}),
    "one device, unrolled": ({}, {"scan_layers": False, "remat": "dots"}),
    "pipeline, tensor": ({"pipeline": 2, "tensor": 2}, {"remat": "full"}),
    "pipeline, fsdp, context": ({"pipeline": 2, "fsdp": 2, "context": 2}, FULL),
    "tensor 4": ({"tensor": 4, "data": 2}, {"remat": "dots"}),
}


@pytest.mark.parametrize("layout", quicker(LAYOUTS, ["prefetched", "pipeline, tensor"]))
@pytest.mark.parametrize("conditioning", KINDS)
def test_every_layout_computes_what_one_device_does(conditioning, layout):
    sizes, options = LAYOUTS[layout]
    if conditioning == "joint" and "pipeline" in sizes:
        assert "pipeline" in unspread_of(small(conditioning))
        sizes = {"fsdp" if axis == "pipeline" else axis: size for axis, size in sizes.items() if axis != "fsdp"}
    value, out, grads = one_device(conditioning)
    found, others, parts = loss_and_gradients(small(conditioning), sizes, **options)
    assert found == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(others, out, atol=1e-5 * np.abs(out).max())
    for name, grad in grads.items():
        # A softmax does not change with a bias of the keys, whose gradient is rounding.
        size = np.abs(grads[name.replace("key.bias", "value.bias")]).max()
        np.testing.assert_allclose(parts[name], grad, rtol=0, atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("conditioning", KINDS)
def test_it_starts_as_the_identity_and_predicts_nothing(conditioning):
    model = build(small(conditioning))
    assert not np.any(predicted(model, batch()))
    for layer in ("layers.modulation.map", "final.modulation", "final.output"):
        for name in ("kernel", "bias"):
            weight = model
            for part in (*layer.split("."), name):
                weight = getattr(weight, part, None)
            assert weight is None or not np.any(weight[...]), layer


def test_every_parameter_names_its_dims():
    for conditioning in KINDS:
        config = small(conditioning)
        known = Rules(make_mesh(Layout(1, 1, 1, 1, 1, 1), jax.devices()[:1]), own=dims_of(config)).table
        for path, param in nnx.to_flat_state(nnx.state(build(config))):
            assert type(param) is nnx.Param, path
            assert len(param.axes) == len(param.shape), path
            assert set(param.axes) <= known.keys(), path
            assert (param.axes[0] == "layers") == (path[0] == "layers"), path


def test_patches_are_put_together_again():
    model, images = build(small("class", patch_size=4)), batch()["image"]
    assert model.patches(images).shape == (4, 4, 48)
    np.testing.assert_array_equal(model.patches(images)[0, 1], images[0, :4, 4:].reshape(-1))
    np.testing.assert_array_equal(model.unpatched(model.patches(images)), images)


@pytest.mark.parametrize("conditioning", ["class", "cross", "joint"])
def test_a_condition_that_is_left_out_is_not_read(conditioning):
    graphdef, params = disturbed(build(small(conditioning)))
    model, rows = nnx.merge(graphdef, params), batch()
    other = rows | {"label": (rows["label"] + 1) % 7, "caption": rows["caption"] + 1.0, "mask": rows["mask"] * 0 + 1}
    before, after = predicted(model, rows), predicted(model, other)
    np.testing.assert_array_equal(before[1::2], after[1::2])
    assert (np.asarray(before[::2]) != after[::2]).any(axis=(1, 2)).all()


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_padding_of_a_caption_is_not_read(conditioning):
    graphdef, params = disturbed(build(small(conditioning)))
    model, rows = nnx.merge(graphdef, params), batch() | {"keep": np.ones(4, np.float32)}
    other = rows | {"caption": np.where(rows["mask"][..., None] > 0, rows["caption"], 9.0)}
    np.testing.assert_array_equal(predicted(model, rows), predicted(model, other))


def test_rotary_positions_tell_patches_apart_and_are_of_distances():
    angles = rotary_angles(small("none", image_size=16)).reshape(8, 8, 4)
    heads = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def met(query, key):
        turned = (
            apply_rope(x, tuple(f(angles[place])[None, None] for f in (np.cos, np.sin)))
            for x, place in zip(heads, (query, key))
        )
        return float(np.sum(np.multiply(*turned)))

    assert met((1, 2), (4, 3)) == pytest.approx(met((3, 5), (6, 6)), rel=1e-5)
    assert len({round(met((1, 2), place), 4) for place in ((1, 2), (2, 1), (3, 2), (2, 3), (1, 4))}) == 5


def test_flops_count_matrices_once():
    T = 6
    for conditioning in KINDS:
        config = small(conditioning)
        N, counted = config.num_patches, 0.0
        for path, param in nnx.to_flat_state(nnx.state(build(config))):
            name = ".".join(map(str, path))
            if not name.endswith("kernel") or name.startswith("last.caption_attention.query"):
                continue
            of_image = name.startswith(("time", "modulation", "pooled")) or "modulation" in name
            of_token = name.startswith("caption") or (".caption_" in name and conditioning == "joint")
            of_token |= ".caption_attention.key" in name or ".caption_attention.value" in name
            counted += math.prod(param.shape) * (1 / N if of_image else T / N if of_token else 1)
        attended = {"cross": 4 * (N + T), "joint": 3 * (N + T) ** 2 / N + N + T}.get(conditioning, 4 * N)
        assert flops_per_token(config, N) == pytest.approx(6 * counted + 12 * 32 * attended)


def test_fields_that_do_not_fit_are_refused():
    assert load_family("dit").reads == "images"
    for changes, said in {
        (("image_size", 9),): "image_size = 9 does not divide by patch_size = 2",
        (("num_classes", None),): "num_classes is required by conditioning: class",
        (("caption_size", 4),): "caption_size does not apply to conditioning: class",
        (("positions", "none"), ("position_scale", 2.0)): "position_scale does not apply to positions: none",
        (("hidden_size", 30),): "hidden_size = 30 does not divide by num_heads = 4",
        (("out_channels", 2),): "out_channels = 2 is less than channels = 3",
    }.items():
        with pytest.raises(ValueError, match=said):
            small("class", **dict(changes))
    with pytest.raises(UserError, match="needs the label of every image"):
        build(small("class")).forward(batch()["image"], batch()["time"], Condition())


def test_bfloat16_is_near():
    config = small("cross")
    graphdef, params = disturbed(build(config))
    exact = predicted(nnx.merge(graphdef, params), batch())
    rough_def, _ = nnx.split(build(config, compute_dtype="bfloat16"))
    rough = predicted(nnx.merge(rough_def, params), batch())
    assert rough.dtype == jnp.float32
    assert np.abs(rough - exact).mean() < 0.05 * np.abs(exact).mean()


def test_the_step_uses_no_operation_that_neuron_refuses():
    graphdef, params = disturbed(build(small("cross"), remat="full"))

    def loss(params):
        return jnp.sum(predicted(nnx.merge(graphdef, params), batch()) ** 2)

    program = jax.jit(jax.value_and_grad(loss)).lower(params).as_text()
    for operation in ("stablehlo.if", "stablehlo.case", "custom_call @xla_python", "stablehlo.sort"):
        assert operation not in program
