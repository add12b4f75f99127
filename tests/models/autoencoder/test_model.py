"""Autoencoders on many devices and for Neuron; their sizes. What they compute: tests/interop/diffusers."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from pydantic import ValidationError

from tests.helpers import equations
from trainfw.checking import check
from trainfw.models import AutoencoderConfig, abstract_model, family_of, flops_per_token, limits_of
from trainfw.objectives import Draw, ImageShape, Reconstruction
from trainfw.parallel import Layout, ParallelConfig, Rules, make_mesh, reduce_gradient, use_rules
from trainfw.recipe.limits import _of_model

TINY = {"family": "autoencoder", "block_channels": (8, 16), "norm_groups": 4, "layers_per_block": 1, "image_size": 8}


def config(**fields) -> AutoencoderConfig:
    return AutoencoderConfig(**TINY | {"channels": 1, "latent_channels": 2} | fields)


def objective(config: AutoencoderConfig) -> Reconstruction:
    places, channels = config.num_patches, config.latent_channels
    return Reconstruction(
        ImageShape(config.image_size, config.channels, places, latent_channels=channels), kl_weight=0.1
    )


def batch(config: AutoencoderConfig, rows: int) -> dict[str, np.ndarray]:
    rng, loss = np.random.default_rng(0), objective(config)
    image = rng.uniform(-1, 1, (rows, *loss.image.shape)).astype(np.float32)
    weight = (np.arange(rows) % 3 > 0).astype(np.float32)
    return loss.drawn({"image": image, "weight": weight, "row": np.arange(rows)}, seed=7)


@pytest.fixture(scope="module")
def tiny():
    graphdef, weights = nnx.split(abstract_model(config()))
    rng = np.random.default_rng(3)
    return graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), weights)


def loss_of(graphdef, weights, arrays):
    total, sums = objective(config()).loss({"learner": nnx.merge(graphdef, weights)}, arrays, Draw(training=True))
    return total, sums


@pytest.fixture(scope="module")
def expected(tiny):
    graphdef, weights = tiny
    return jax.jit(jax.grad(functools.partial(loss_of, graphdef), has_aux=True))(weights, batch(config(), 8))


@pytest.mark.parametrize(("shards", "remat"), [("parameters", "none"), ("optimizer", "full")])
def test_many_devices_compute_what_one_does(shards, remat, tiny, expected):
    graphdef, weights = nnx.split(abstract_model(config(), remat=remat))[0], tiny[1]
    layout = Layout(data=2, fsdp=4)
    rules = Rules(make_mesh(layout, jax.devices()), {}, shards, {"window": (), "channels": ()})
    specs = jax.tree.map(
        lambda v: v.replace(rules.weight_sharding("a weight", v.shape, v.axes, "parameters").spec),
        weights,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    rows = P(("data", "fsdp"))

    def local(weights, arrays):
        with use_rules(rules):
            gradients, sums = jax.grad(functools.partial(loss_of, graphdef), has_aux=True)(weights, arrays)
            whole = jax.tree.map(
                lambda g: g.replace(reduce_gradient(g.get_value(), g.axes, rules)),
                gradients,
                is_leaf=lambda x: isinstance(x, nnx.Variable),
            )
            return whole, jax.lax.psum(sums, ("data", "fsdp"))

    kept = jax.tree.map(
        lambda v: v.replace(rules.weight_sharding("a gradient", v.shape, v.axes, "optimizer").spec),
        weights,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    run = jax.shard_map(local, mesh=rules.mesh, in_specs=(specs, rows), out_specs=(kept, P()), check_vma=False)
    gradients, sums = jax.jit(run)(weights, batch(config(), 8))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), sums, expected[1])
    for found, one in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(found, one, atol=2e-5 * max(float(jnp.abs(one).max()), 0.05))


def test_latents_are_scaled_for_a_diffusion_model_and_back(tiny):
    graphdef = nnx.split(abstract_model(config(scaling_factor=1.5305, shift_factor=0.0609)))[0]
    model, z = nnx.merge(graphdef, tiny[1]), np.linspace(-3, 3, 32, dtype=np.float32).reshape(1, 4, 4, 2)
    np.testing.assert_allclose(model.scaled(z), (z - 0.0609) * 1.5305, rtol=1e-6)
    np.testing.assert_allclose(model.unscaled(model.scaled(z)), z, atol=1e-6)


def test_it_learns(tiny):
    graphdef, weights = tiny
    images, optimizer = batch(config(), 8), optax.adam(3e-3)

    @jax.jit
    def step(weights, state):
        (_, sums), gradients = jax.value_and_grad(functools.partial(loss_of, graphdef), has_aux=True)(weights, images)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(weights, updates), state, sums

    state, errors = optimizer.init(weights), []
    for _ in range(60):
        weights, state, sums = step(weights, state)
        errors.append(sums["loss"].value())
    assert errors[-1] < 0.5 * errors[0]


def test_neuron_takes_its_programs(tiny):
    graphdef, weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny)
    arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch(config(), 2).items()}

    def train(weights, arrays):
        gradients, sums = jax.grad(functools.partial(loss_of, graphdef), has_aux=True)(weights, arrays)
        return gradients, sums, nnx.merge(graphdef, weights).decode(arrays["noise"])

    for chip in ("trn2-ultraserver", "inf2.48xlarge"):
        report = check(train, weights, arrays, hardware=chip)
        assert {finding.rule for finding in report.findings if finding.severity != "note"} <= {"arguments-many"}


PUBLISHED = {"sd-vae": 83_653_863, "sdxl-vae": 83_653_863, "sd3-vae": 83_819_683}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(preset):
    model = abstract_model(AutoencoderConfig(family="autoencoder", preset=preset))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model))) == PUBLISHED[preset]


def multiplications(jaxpr) -> int:
    found = 0
    for equation in equations(jaxpr):
        if equation.primitive.name not in ("conv_general_dilated", "dot_general"):
            continue
        left, right, out = (v.aval.shape for v in (*equation.invars, *equation.outvars))
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            found += math.prod(out) * math.prod(left[dim] for dim in contracted)
        else:
            found += math.prod(out) * math.prod(right[:3])
    return found


@pytest.mark.parametrize(
    "shape", [{}, {"block_channels": (8, 12, 16)}, {"mid_attention": False, "quant_conv": False, "layers_per_block": 2}]
)
def test_flops_are_those_of_its_products(shape):
    small = config(**shape)
    graphdef, weights = nnx.split(abstract_model(small))

    def both(weights, image):
        model = nnx.merge(graphdef, weights)
        return model.decode(model.encode(image)[0])

    image = jax.ShapeDtypeStruct((1, 8, 8, small.channels), jnp.float32)
    expected = 6 * multiplications(jax.make_jaxpr(both)(weights, image).jaxpr) / small.num_patches
    assert flops_per_token(small, small.num_patches) == expected


def test_values_that_do_not_fit_are_refused():
    for fields, said in (
        ({"norm_groups": 3}, r"block_channels = 8 does not divide by norm_groups = 3"),
        ({"image_size": 9}, r"image_size = 9 cannot be halved 1 times between 2 blocks"),
        ({"hidden_size": 16}, r"hidden_size follows from block_channels"),
        ({"preset": "sd-vea"}, r"unknown preset 'sd-vea'; did you mean 'sd-vae'\?"),
        ({"block_channels": ()}, r"at least 1 item"),
    ):
        with pytest.raises(ValidationError, match=said):
            config(**fields)
    assert config().hidden_size == 16
    assert "hidden_size" not in config().model_dump()
    assert AutoencoderConfig.model_validate(config().model_dump(by_alias=True)) == config()
    assert {limit.size for limit in limits_of(config())} == {8, 16}


def test_layouts_that_it_cannot_have_are_refused():
    recipe = SimpleNamespace(model=config(block_channels=(8, 12)), parallel=ParallelConfig())
    for layout, said in (
        (Layout(fsdp=8), "block_channels = [8, 12] does not divide over embed"),
        (Layout(tensor=2), "not to be spread over tensor"),
        (Layout(pipeline=2), "not to be spread over pipeline"),
    ):
        assert said.replace("embed", "fsdp") in str(list(_of_model(recipe, layout)))


def test_it_is_made_tiny():
    whole = AutoencoderConfig(family="autoencoder", preset="sd3-vae")
    small = AutoencoderConfig(
        family="autoencoder", preset="sd3-vae", **family_of(whole).tiny(whole, layers=2, tensor=1)
    )
    assert (small.latent_size, small.latent_channels, small.quant_conv) == (4, 16, False)
