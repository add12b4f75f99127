"""Losses of images beside diffusers' schedulers; and draws that depend on a seed and a row alone."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from trainfw import UserError
from trainfw.objectives import (
    DDPM,
    Draw,
    FlowMatching,
    ImageShape,
    NextToken,
    ObjectiveConfig,
    check_drawn,
    check_objective,
    check_schema,
    drawn_batch,
    image_rows,
    make_objective,
    reads_of,
)
from trainfw.parallel import Layout, Rules, all_reduce, axis_index, axis_size, make_mesh, use_rules

IMAGE = ImageShape(size=8, channels=3, num_patches=16, conditioning="class")
ROWS, PATCH = 8, 2
RNG = np.random.default_rng(0)
PIXELS = PATCH * PATCH * IMAGE.channels
NAMES = {"epsilon": "epsilon", "v": "v_prediction"}


@dataclass(frozen=True)
class Denoiser:
    """A model of one product; its weight may have columns for a variance, beside each pixel's channels."""

    weight: np.ndarray

    def forward(self, x_BHWC, time_B, condition, *, adapters=None):
        x_BSO = jnp.tanh(self.patches(x_BHWC) @ self.weight)
        keep_B = jnp.ones_like(time_B) if condition.keep_B is None else condition.keep_B
        return x_BSO + (time_B / 1000 + condition.label_B * keep_B)[:, None, None]

    def patches(self, x_BHWC):
        rows, size, _, channels = x_BHWC.shape
        cells = x_BHWC.reshape(rows, size // PATCH, PATCH, size // PATCH, PATCH, channels)
        x_BSO = cells.transpose(0, 1, 3, 2, 4, 5).reshape(rows, -1, PATCH * PATCH * channels)
        parts = axis_size("context") * axis_size("tensor")
        place = axis_index("context") * axis_size("tensor") + axis_index("tensor")
        return jax.lax.dynamic_slice_in_dim(x_BSO, place * (x_BSO.shape[1] // parts), x_BSO.shape[1] // parts, 1)


WEIGHT = RNG.normal(size=(PIXELS, PIXELS)).astype(np.float32)
DENOISER = Denoiser(WEIGHT)


def rows_of_data(numbers=range(ROWS), image=IMAGE):
    rng = np.random.default_rng(1)
    batch = {"image": rng.uniform(-1, 1, (len(numbers), *image.shape)), "weight": rng.random(len(numbers)) > 0.2}
    batch = {name: array.astype(np.float32) for name, array in batch.items()}
    if image.conditioning == "class":
        batch["label"] = rng.integers(0, 10, len(numbers), np.int32)
    return batch | {"row": np.array(numbers, np.int64)}


def reference(batch, noisy, target, weight_B=1.0, *, training=True):
    """The mean of images' errors, in PyTorch, of images with their channels first."""
    corners = torch.from_numpy(noisy).unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    patches = corners.permute(0, 2, 3, 4, 5, 1).reshape(ROWS, -1, PIXELS)
    keep_B = torch.from_numpy(batch["keep"]) if training else 1
    said_B = torch.from_numpy(batch["time"]) / 1000 + torch.from_numpy(batch["label"]) * keep_B
    prediction = (patches @ torch.from_numpy(WEIGHT)).tanh() + said_B[:, None, None]
    aim = torch.from_numpy(target).unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1)
    error_B = (prediction - aim.reshape(prediction.shape)).double().square().mean((1, 2))
    counted_B = torch.from_numpy(batch["weight"]).double()
    return float((error_B * weight_B * counted_B).sum() / counted_B.sum())


def first(x_BHWC):
    return torch.from_numpy(np.ascontiguousarray(x_BHWC.transpose(0, 3, 1, 2)))


def loss_of(objective, batch, *, training=True, model=DENOISER):
    total, sums = jax.jit(lambda batch: objective.loss({"learner": model}, batch, Draw(training=training)))(batch)
    assert float(total) == float(sums["loss"].total)
    assert float(sums["loss"].count) == batch["weight"].sum()
    return sums["loss"].value()


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_flow_matching_is_that_of_diffusers(times):
    batch = FlowMatching(IMAGE, times, logit_mean=-0.4, logit_std=1.2, shift=3.0).drawn(rows_of_data(), seed=7)
    scheduler = FlowMatchEulerDiscreteScheduler()
    steps = scheduler.timesteps[[3, 100, 250, 500, 501, 750, 998, 999]]  # those that scale_noise takes
    batch["time"] = steps.numpy()
    noise, image = first(batch["noise"]), first(batch["image"])
    noisy = scheduler.scale_noise(image, steps, noise).numpy()
    for training in (True, False):
        expected = reference(batch, noisy, (noise - image).numpy(), training=training)
        assert loss_of(FlowMatching(IMAGE), batch, training=training) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddpm_is_that_of_diffusers(betas, prediction, gamma):
    objective = DDPM(IMAGE, prediction, betas, 0.00085, 0.012, gamma)
    batch = objective.drawn(rows_of_data(), seed=7)
    batch["time"][:2] = 0, 999
    scheduler = DDPMScheduler(
        beta_schedule=betas, beta_start=0.00085, beta_end=0.012, prediction_type=NAMES[prediction]
    )
    noise, image, steps = first(batch["noise"]), first(batch["image"]), torch.from_numpy(batch["time"]).long()
    noisy = scheduler.add_noise(image, noise, steps).numpy()
    target = noise if prediction == "epsilon" else scheduler.get_velocity(image, noise, steps)
    signal = scheduler.alphas_cumprod[steps].double()
    # The error of the image, weighed by min(SNR, gamma), is that of noise (or v) times its part in the image, squared.
    of_image = (1 - signal) / signal if prediction == "epsilon" else 1 - signal
    weight_B = 1.0 if gamma is None else (signal / (1 - signal)).clamp(max=gamma) * of_image
    expected = reference(batch, noisy, target.numpy(), weight_B)
    assert loss_of(objective, batch) == pytest.approx(expected, rel=1e-6)


def test_channels_of_a_variance_are_not_learnt():
    objective = DDPM(IMAGE)
    batch = objective.drawn(rows_of_data(), seed=0)
    wide = np.zeros((PIXELS, PATCH * PATCH, 2 * IMAGE.channels), np.float32)
    wide[..., : IMAGE.channels] = WEIGHT.reshape(PIXELS, PATCH * PATCH, IMAGE.channels)
    wide[..., IMAGE.channels :] = 5
    model = Denoiser(wide.reshape(PIXELS, -1))
    assert loss_of(objective, batch, model=model) == pytest.approx(loss_of(objective, batch), rel=1e-6)


@pytest.mark.parametrize(("devices", "layout"), [(4, Layout(context=2, tensor=2)), (8, Layout(fsdp=2, tensor=4))])
def test_devices_sum_what_one_computes(devices, layout):
    objective = DDPM(IMAGE, min_snr_gamma=5.0)
    batch = objective.drawn(rows_of_data(), seed=0)

    def summed(weight, batch):
        with use_rules(rules):
            loss, sums = objective.loss({"learner": Denoiser(weight)}, batch, Draw(training=True))
            return jax.tree.map(lambda x: all_reduce(x, ("fsdp", "context", "tensor")), (loss, sums["loss"]))

    def gradient(weight, batch):
        with use_rules(rules):
            grad = jax.grad(lambda w: objective.loss({"learner": Denoiser(w)}, batch, Draw(training=True))[0])(weight)
            return all_reduce(grad, ("fsdp", "context", "tensor"))

    rules = Rules(make_mesh(layout, jax.devices()[:devices]))
    specs = (jax.P(), {name: jax.P("fsdp") for name in batch})
    found = [
        jax.jit(jax.shard_map(f, mesh=rules.mesh, in_specs=specs, out_specs=jax.P(), check_vma=False))(WEIGHT, batch)
        for f in (summed, gradient)
    ]
    rules = None
    (loss, mean), grad = found
    assert mean.value() == pytest.approx(loss_of(objective, batch), rel=1e-6)
    assert float(loss) == float(mean.total)
    np.testing.assert_allclose(grad, gradient(jnp.asarray(WEIGHT), batch), rtol=1e-5, atol=1e-5)


@given(
    numbers=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5, unique=True),
    seed=st.integers(0, 2**64 - 1),
    other=st.integers(0, 2**63 - 1),
)
def test_a_row_draws_by_seed_and_number_alone(numbers, seed, other):
    objective = FlowMatching(IMAGE, "logit_normal", drop_condition=0.5)
    together = objective.drawn(rows_of_data(numbers), seed)
    check_drawn(together, objective.schema(len(numbers), 1), "flow_matching")
    for place, number in enumerate(numbers):
        alone = objective.drawn(rows_of_data([other, number]), seed)
        for name in ("noise", "time", "keep"):
            np.testing.assert_array_equal(alone[name][1], together[name][place])
    again = objective.drawn(rows_of_data(numbers), seed ^ 1)
    for place, number in enumerate(numbers):
        assert not np.array_equal(again["noise"][place], together["noise"][place])
        assert number == numbers[0] or not np.array_equal(together["noise"][0], together["noise"][place])


def test_draws_have_their_distribution():
    image = ImageShape(size=2, channels=1, num_patches=1, conditioning="class")
    batch = rows_of_data(range(20_000), image)
    uniform = FlowMatching(image, shift=1.0, drop_condition=0.3).drawn(batch, seed=1)
    times = {"uniform": uniform["time"] / 1000}
    assert stats.kstest(times["uniform"], "uniform").pvalue > 0.01
    assert stats.kstest(uniform["noise"].ravel(), "norm").pvalue > 0.01
    assert abs(stats.pearsonr(uniform["noise"][:, 0, 0, 0], uniform["time"]).statistic) < 0.02
    assert uniform["keep"].mean() == pytest.approx(0.7, abs=0.01)
    drawn = FlowMatching(image, "logit_normal", logit_mean=0.5, logit_std=0.8, shift=3.0).drawn(batch, seed=1)["time"]
    unshifted = drawn / 1000 / (3 - 2 * drawn / 1000)
    assert stats.kstest((np.log(unshifted / (1 - unshifted)) - 0.5) / 0.8, "norm").pvalue > 0.01
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[:-1].numpy() * 1000  # of 1, 0.999, ... 0.001
    quantiles = np.quantile(FlowMatching(image, shift=3.0).drawn(batch, seed=1)["time"], np.arange(1, 10) / 10)
    np.testing.assert_allclose(quantiles, shifted[[900, 800, 700, 600, 500, 400, 300, 200, 100]], atol=12)
    steps = DDPM(image).drawn(batch, seed=1)["time"]
    assert stats.chisquare(np.bincount(steps.astype(int), minlength=1000)).pvalue > 0.01


def test_settings_are_for_their_losses():
    for settings, said in {
        (("name", "dpo"), ("shift", 3.0)): "shift is for flow_matching, but name is 'dpo'",
        (("name", "ddpm"), ("times", "uniform")): "times is for flow_matching, but name is 'ddpm'",
        (("name", "flow_matching"), ("min_snr_gamma", 5.0)): "min_snr_gamma is for ddpm",
        (("name", "flow_matching"), ("beta", 0.1)): "beta is for dpo",
        (("name", "next_token"), ("drop_condition", 0.1)): "drop_condition is for flow_matching and ddpm, but",
        (("name", "flow_matching"), ("logit_std", 1.0)): "logit_std is for times: logit_normal, but times is uniform",
        (("name", "ddpm"), ("betas", "squaredcos_cap_v2"), ("beta_end", 0.1)): "beta_end is for linear betas",
        (("name", "flow_match"),): "did you mean 'flow_matching'",
    }.items():
        with pytest.raises(ValidationError, match=said):
            ObjectiveConfig(**dict(settings))


def made(image=IMAGE, **settings):
    others = {"chunk": 1, "mask_documents": True, "z_loss": 0.0, "pairs_per_row": 1}
    return make_objective(ObjectiveConfig(**settings), image=image, **others)


def test_they_are_made_as_the_model_is():
    flow = {"times": "logit_normal", "logit_mean": 0.1, "shift": 3.0, "drop_condition": 0.2}
    assert made(name="flow_matching", **flow) == FlowMatching(IMAGE, **flow)
    assert made(name="ddpm", prediction="v", min_snr_gamma=5.0) == DDPM(IMAGE, "v", min_snr_gamma=5.0)
    assert reads_of(made(name="ddpm")) == "images"
    plain = ImageShape(8, 3, 16)
    unconditional = made(plain, name="ddpm")
    check_drawn(unconditional.drawn(rows_of_data(), 0), unconditional.schema(4, 99), "ddpm")  # data has labels
    captioned = made(ImageShape(8, 3, 16, "joint", caption_length=5, caption_size=7), name="flow_matching")
    texts = {"caption": np.zeros((ROWS, 5, 7), np.float32), "caption_mask": np.ones((ROWS, 5), np.float32)}
    check_drawn(captioned.drawn(rows_of_data() | texts, 0), captioned.schema(ROWS, 1), "flow_matching")
    assert {"caption", "caption_mask", "keep"} <= captioned.schema(ROWS, 1).fields.keys()
    with pytest.raises(UserError, match=r"drop_condition = 0.1: expected 0: the model has no condition"):
        made(plain, name="ddpm", drop_condition=0.1)
    for name, image, said in (
        ("next_token", IMAGE, "reads tokens, and the model reads images"),
        ("simpo", IMAGE, "reads tokens"),
        ("ddpm", None, "name = 'ddpm': reads images, and the model reads tokens; expected an objective of tokens"),
        (f"{__name__}:Own", None, "reads images"),
    ):
        with pytest.raises(UserError, match=said):
            made(image, name=name)


class Own(FlowMatching):
    """An objective of images that is none of ours."""

    loss = schema = lambda self, *_: None


def test_own_objectives_are_held_to_the_rows_of_images():
    assert made(name=f"{__name__}:Own", options={"shift": 2.0}).image == IMAGE
    flow = FlowMatching(IMAGE)
    schema, sizes = flow.schema(ROWS, 5), ("x", ROWS, 5, 1)
    assert schema.tokens == ROWS * IMAGE.num_patches
    check_schema(schema, *sizes, image=IMAGE, draws=True)
    check_schema(image_rows(ROWS, IMAGE), *sizes, image=IMAGE)
    for wrong, said in (
        (
            schema,
            r"noise of float32 \(8, 8, 8, 3\), and the rows of data.format have it of no shape; expected",
        ),
        (FlowMatching(ImageShape(8, 3, 16)).schema(ROWS, 5), "schema has label of no shape, and the rows"),
        (NextToken().schema(ROWS, 5), r"schema has image of no shape, and .* of float32 \(8, 8, 8, 3\)"),
    ):
        with pytest.raises(UserError, match=said):
            check_schema(wrong, *sizes, image=IMAGE)
    with pytest.raises(UserError, match="reads is 'pictures'; expected 'tokens' or 'images'"):
        check_objective(type("Odd", (FlowMatching,), {"reads": "pictures"})(IMAGE), "x")
    batch = flow.drawn(rows_of_data(), 0)
    for wrong, said in (
        (
            {name: batch[name] for name in batch if name != "keep"},
            r"drawn returns \['image', .*expected \['image', 'keep'",
        ),
        (batch | {"time": batch["time"].astype(int)}, r"returns time of int64\[8\]; expected float32 \(\) a row"),
        (batch | {"noise": batch["noise"][:, 1:]}, r"noise of float32\[8, 7, 8, 3\]; expected float32 \(8, 8, 3\)"),
    ):
        with pytest.raises(UserError, match=said):
            check_drawn(wrong, schema, "x")
    assert "row" not in drawn_batch(NextToken(), rows_of_data(), 0)
    assert set(drawn_batch(flow, rows_of_data(), 0)) == set(schema.fields)
