"""scheduler_config.json: what diffusers writes is read, and what is written draws the same in diffusers."""

import json

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainfw import UserError
from trainfw.interop import read_scheduler, scheduler_from_diffusers, scheduler_to_diffusers
from trainfw.objectives import DDPMSchedule, FlowSchedule
from trainfw.sampling import draw

STABLE = DDPMSchedule("scaled_linear", 0.00085, 0.012, "v", "leading", offset=1)
WRITTEN = [
    *((FlowSchedule(shift), sampler) for shift in (1.0, 3.0) for sampler in ("euler", "heun", "dpm++")),
    *((schedule, sampler) for schedule in (DDPMSchedule(), STABLE) for sampler in ("ddim", "dpm++")),
    (DDPMSchedule("squaredcos_cap_v2", spacing="linspace"), "dpm++"),
]


def their_images(scheduler, noise, steps):
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise)
    for time in scheduler.timesteps:
        x = scheduler.step(x.tanh() * float(time) / 1000, time, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize(("schedule", "sampler"), WRITTEN, ids=str)
def test_diffusers_draws_by_what_is_written_and_writes_what_is_read(tmp_path, schedule, sampler):
    written = scheduler_to_diffusers(schedule, sampler)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(written))
    scheduler = getattr(diffusers, written["_class_name"]).from_pretrained(tmp_path)
    noise = np.random.default_rng(0).standard_normal((2, 3, 3, 1)).astype(np.float32)
    images = draw(lambda x, time_B: np.tanh(x) * time_B[0] / 1000, noise, schedule=schedule, sampler=sampler, steps=20)
    theirs = their_images(scheduler, noise, 20)
    np.testing.assert_allclose(images, theirs, atol=1e-4 * np.abs(theirs).max())
    scheduler.save_pretrained(tmp_path / "saved")  # with all of its keys, and -Infinity
    assert read_scheduler(tmp_path / "saved" / "scheduler_config.json") == (schedule, sampler)
    assert scheduler_from_diffusers(written) == (schedule, sampler)


def test_what_is_left_out_has_diffusers_defaults():
    for name, schedule, sampler in (
        ("FlowMatchEulerDiscreteScheduler", FlowSchedule(), "euler"),
        ("FlowMatchHeunDiscreteScheduler", FlowSchedule(), "heun"),
        ("DPMSolverMultistepScheduler", DDPMSchedule(spacing="linspace"), "dpm++"),
    ):
        assert scheduler_from_diffusers({"_class_name": name}) == (schedule, sampler)
    ddim = {"_class_name": "DDIMScheduler", "clip_sample": False, "skipped": None}
    assert scheduler_from_diffusers(ddim) == (DDPMSchedule(spacing="leading"), "ddim")


KEYS = ["_class_name", *diffusers.DPMSolverMultistepScheduler().config, "shift", "clip_sample", "set_alpha_to_one"]
VALUES = st.one_of(
    st.sampled_from([True, False, None, 1, 2, 1000, 0.5, "epsilon", "v_prediction", "flow_prediction", "leading"]),
    st.recursive(st.text() | st.floats() | st.integers(), lambda inner: st.lists(inner, max_size=2), max_leaves=3),
)


@given(
    st.sampled_from([scheduler_to_diffusers(*one) for one in WRITTEN]),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
)
def test_any_values_are_read_or_refused(written, changed):
    try:
        read = scheduler_from_diffusers({**written, **changed})
    except UserError:
        return
    assert scheduler_from_diffusers(scheduler_to_diffusers(*read)) == read


def test_others_are_refused_by_name(tmp_path):
    flow, ddim = {"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"_class_name": "DDIMScheduler"}
    multistep = {"_class_name": "DPMSolverMultistepScheduler"}
    for config, said in (
        ({}, "_class_name = None is not supported; one of: FlowMatchEuler"),
        ({"_class_name": "PNDMScheduler"}, "_class_name = 'PNDMScheduler' is not supported; one of: "),
        ({"_class_name": "DDIMscheduler"}, "did you mean 'DDIMScheduler'"),
        (flow | {"use_dynamic_shifting": True}, "use_dynamic_shifting = True is not supported; expected False"),
        (flow | {"shift": 0}, "shift = 0: expected a number from 1e-30 to 1000"),
        (flow | {"shift": "3"}, "shift = '3': expected a number"),
        (flow | {"num_train_timesteps": 500}, "num_train_timesteps = 500 is not supported; expected 1000"),
        (flow | {"sigma_data": 0.5}, "sigma_data = 0.5 is not supported by FlowMatchEulerDiscreteScheduler"),
        (ddim, "clip_sample = True is not supported; expected False"),
        (ddim | {"clip_sample": False, "timestep_spacing": "linspace"}, "expected 'trailing' or 'leading'"),
        (ddim | {"clip_sample": False, "set_alpha_to_one": False}, "set_alpha_to_one = False is not supported"),
        (ddim | {"clip_sample": False, "prediction_type": "sample"}, "expected 'epsilon' or 'v_prediction'"),
        (ddim | {"clip_sample": False, "steps_offset": -1}, "steps_offset = -1: expected a whole number from 0 to 999"),
        (multistep | {"algorithm_type": "sde-dpmsolver++"}, "expected 'dpmsolver\\+\\+'"),
        (multistep | {"lambda_min_clipped": -5.1}, "lambda_min_clipped = -5.1 is not supported; expected None"),
        (multistep | {"use_flow_sigmas": True}, "prediction_type = 'epsilon' is not supported; expected 'flow_pred"),
        (multistep | {"beta_end": 1.5}, "beta_end = 1.5: expected a number from 1e-30 to 0.999"),
        (multistep | {"beta_schedule": ["linear"]}, "beta_schedule = .*expected 'linear' or 'scaled_linear' or"),
    ):
        (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=said) as error:
            read_scheduler(tmp_path / "scheduler_config.json")
        assert str(error.value).startswith(f"{tmp_path}/scheduler_config.json: ")
    for schedule, sampler, said in (
        (DDPMSchedule(), "heun", "sampler = 'heun': no scheduler of diffusers draws so; expected euler, ddim, dpm"),
        (
            FlowSchedule(spacing="trailing"),
            "euler",
            "spacing = 'trailing': FlowMatchEulerDiscreteScheduler has no such",
        ),
        (DDPMSchedule(spacing="linspace"), "ddim", "DDIMScheduler has no such steps; expected trailing or leading"),
    ):
        with pytest.raises(UserError, match=said):
            scheduler_to_diffusers(schedule, sampler)
