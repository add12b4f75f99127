"""Samplers beside diffusers' schedulers, step by step and over whole trajectories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

from trainfw import UserError
from trainfw.models import Condition
from trainfw.objectives import DDPMSchedule, FlowSchedule
from trainfw.sampling import draw, guided, sampler_steps

NOISE = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
MEAN = np.linspace(-1, 1, 48).reshape(4, 4, 3)
NAMES = {"epsilon": "epsilon", "v": "v_prediction"}
COSINE = {"betas": "squaredcos_cap_v2"}
STABLE = {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def parts(schedule, time):
    """Of image and of noise."""
    if isinstance(schedule, FlowSchedule):
        return 1 - time / 1000, time / 1000
    theirs = {"beta_schedule": schedule.betas, "beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    signal = float(DDIMScheduler(**theirs).alphas_cumprod[int(time)])
    return signal**0.5, (1 - signal) ** 0.5


def model(schedule, x, time):
    """A prediction that is neither linear nor alike at two places, of an image of which it knows something."""
    image_part, noise_part = parts(schedule, time)
    x = np.asarray(x, np.float64)
    image = np.tanh(2 * MEAN + image_part * (x + 0.3 * np.roll(x, 1, axis=2)) / (image_part**2 + noise_part**2))
    noise = (x - image_part * image) / noise_part
    predictions = {
        "velocity": noise - image,
        "epsilon": noise,
        "v": image_part * noise - noise_part * image,
    }
    return predictions[schedule.prediction].astype(np.float32)


def theirs(schedule, sampler):
    """The scheduler of diffusers, without settings that are ours by default."""
    if isinstance(schedule, FlowSchedule):
        return {
            "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=schedule.shift),
            "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=schedule.shift),
            "dpm++": lambda: DPMSolverMultistepScheduler(
                use_flow_sigmas=True, flow_shift=schedule.shift, prediction_type="flow_prediction"
            ),
        }[sampler]()
    settings = {
        "beta_schedule": schedule.betas,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": NAMES[schedule.prediction],
        "timestep_spacing": schedule.spacing,
        "steps_offset": schedule.offset,
    }
    kind = {"ddim": DDIMScheduler, "heun": HeunDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler}[sampler]
    return kind(**settings, **({"clip_sample": False} if sampler == "ddim" else {}))


def trajectory(schedule, sampler, steps):
    """(time, x, prediction) of every evaluation by diffusers, and the image at last."""
    scheduler = theirs(schedule, sampler)
    scheduler.set_timesteps(steps)
    scaled = isinstance(scheduler, HeunDiscreteScheduler)  # its images are divided by the part of the image
    x, found = torch.from_numpy(NOISE), []
    if scaled:
        x = x / parts(schedule, scheduler.timesteps[0])[0]
    for time in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, time) if scaled else x
        prediction = model(schedule, seen.numpy(), float(time))
        found.append((float(time), seen.numpy(), prediction))
        x = scheduler.step(torch.from_numpy(prediction), time, x).prev_sample
    return found, x.numpy()


SETTINGS = [
    *((FlowSchedule(shift), sampler) for sampler in ("euler", "heun", "dpm++") for shift in (1.0, 3.0)),
    *((DDPMSchedule(prediction=kind), sampler) for sampler in ("ddim", "heun", "dpm++") for kind in ("epsilon", "v")),
    (DDPMSchedule(**STABLE, spacing="leading", offset=1), "ddim"),
    (DDPMSchedule(**STABLE, spacing="leading", offset=1), "dpm++"),
    (DDPMSchedule(**COSINE, prediction="v", spacing="leading"), "heun"),
    (DDPMSchedule(**COSINE, prediction="v", spacing="linspace"), "dpm++"),
]


@pytest.mark.parametrize("steps", [20, 4])  # by which 1000 divides: DDIMScheduler leaps by 1000 // steps
@pytest.mark.parametrize(("schedule", "sampler"), SETTINGS, ids=str)
def test_steps_and_trajectories_are_those_of_diffusers(schedule, sampler, steps):
    expected, image = trajectory(schedule, sampler, steps)
    seen = []

    def denoise(x, time_B):
        seen.append((float(time_B[0]), np.asarray(x)))
        return model(schedule, x, float(time_B[0]))

    drawn = draw(denoise, jnp.asarray(NOISE), schedule=schedule, sampler=sampler, steps=steps)
    np.testing.assert_allclose([time for time, _ in seen], [time for time, _, _ in expected], rtol=1e-6)
    # Each step by itself, from where they are.
    carried, after = NOISE, [x for _, x, _ in expected[1:]] + [image]
    for (_, x, prediction), then, (_, a, b, c, p, q) in zip(
        expected, after, sampler_steps(schedule, sampler, steps), strict=True
    ):
        near(a * x + b * prediction + c * carried, then, 1e-5)
        carried = p * x + q * prediction
    near(np.asarray(drawn), image, 1e-4)
    assert len(expected) == (2 * steps - 1 if sampler == "heun" else steps)


def near(ours, theirs, tolerance):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("schedule", "sampler"),
    [
        *((FlowSchedule(2.0, "trailing"), sampler) for sampler in ("euler", "heun", "ddim", "dpm++")),
        *((DDPMSchedule(spacing="linspace"), sampler) for sampler in ("euler", "heun", "ddim")),
    ],
    ids=str,
)
def test_others_come_to_the_solution_by_their_order(schedule, sampler):
    """Images of one brightness: of the equation that is solved, the solution is known."""

    def denoise(x, time_B):  # the mean of what an image may be that is drawn from a normal distribution
        image_part, noise_part = parts(schedule, float(time_B[0]))
        image = 0.5 + image_part * 0.09 * (x - image_part * 0.5) / (image_part**2 * 0.09 + noise_part**2)
        noise = (x - image_part * image) / noise_part
        return noise - image if schedule.prediction == "velocity" else noise

    image_part, noise_part = parts(schedule, 1000 if schedule.prediction == "velocity" else 999)
    scale = np.hypot(image_part * 0.3, noise_part)
    exact, errors = 0.5 + 0.3 * (NOISE - image_part * 0.5) / scale, []
    for steps in (20, 80):
        drawn = draw(denoise, jnp.asarray(NOISE), schedule=schedule, sampler=sampler, steps=steps)
        errors.append(np.abs(np.asarray(drawn) - exact).max())
    order, largest = (1, 0.05) if sampler in ("euler", "ddim") else (2, 0.01)
    assert errors[1] < largest
    assert errors[1] < errors[0] / (0.9 * 4**order) or (sampler == "dpm++" and errors[1] < errors[0] / 6)


def test_an_image_is_its_noise_alone_and_steps_are_compiled_once():
    progress, traced, schedule = [], [], FlowSchedule()

    @jax.jit
    def denoise(x, time_B):
        traced.append(x.shape)
        return jnp.tanh(x) * time_B[:, None, None, None] / 1000

    both = draw(denoise, jnp.asarray(NOISE), schedule=schedule, steps=5, progress=lambda *done: progress.append(done))
    assert progress == [(n, 5) for n in range(1, 6)]
    assert len(traced) == 1
    alone = draw(denoise, jnp.asarray(NOISE[1:]), schedule=schedule, steps=5)
    np.testing.assert_array_equal(alone[0], both[1])


def test_guidance_asks_for_both_in_one_batch():
    calls = []

    def predict(x, time_B, condition):
        calls.append(x.shape)
        kept = condition.label_B * condition.keep_B + condition.caption_BTF.sum((1, 2)) * condition.keep_B
        return x * kept[:, None, None, None] + time_B[:, None, None, None]

    time_B, labels, captions = np.float32([3, 5]), jnp.float32([2, 4]), jnp.ones((2, 2, 2))
    condition = Condition(label_B=labels, caption_BTF=captions)
    guide = jax.jit(guided(predict))
    for guidance in (np.float32(4), np.float32([1, 6])):
        found = guide(NOISE, time_B, condition, guidance)
        scale = (guidance * (labels + 4)).reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(found, NOISE * scale + time_B[:, None, None, None], rtol=1e-5, atol=1e-5)
    assert calls == [(4, *NOISE.shape[1:])] * 2  # one for each shape of the guidance


def test_what_there_is_not_is_refused():
    for schedule, sampler, steps, said in (
        (FlowSchedule(), "dpm", 20, r"sampler = 'dpm': unknown; expected euler, heun, ddim, dpm\+\+; did you mean"),
        (FlowSchedule(), "euler", 0, "steps = 0: expected a whole number from 1 to 1000"),
        (FlowSchedule(), "euler", 2.5, "steps = 2.5: expected a whole number"),
        (DDPMSchedule(spacing="leading"), "ddim", 1, "steps = 1: expected a number of different steps"),
        (DDPMSchedule(spacing="linspace"), "dpm++", 1000, "steps = 1000: expected a number of different steps"),
        (DDPMSchedule(spacing="leading", offset=1), "ddim", 1000, "different steps from 0 to 999, spaced as leading"),
    ):
        with pytest.raises(UserError, match=said):
            sampler_steps(schedule, sampler, steps)
