"""Conversion of diffusers' scheduler_config.json to a schedule and a sampler, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from trainfw.config import SMALLEST
from trainfw.errors import UserError, one_of, short
from trainfw.json_text import json_object, read_member
from trainfw.objectives import TIMES, DDPMSchedule, FlowSchedule, Schedule

_Choice = TypeVar("_Choice")

CONFIG = "scheduler_config.json"
_INFINITE = re.compile(rb'("lambda_min_clipped"\s*:\s*)-Infinity')
"""A value that diffusers writes and JSON does not have."""


@dataclass(frozen=True)
class _Scheduler:
    """Class of diffusers, with the sampler that it is, and its keys with their defaults."""

    sampler: str
    reads: Mapping[str, object]
    needs: Mapping[str, object] = field(default_factory=dict)
    """Keys that must have these values, which are the defaults."""
    idle: tuple[str, ...] = ()
    """Keys that count only beside others, which are refused."""


_BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
_STEPS = {"prediction_type": "epsilon", "steps_offset": 0}
_DDPM_NEEDS = {"trained_betas": None, "thresholding": False, "rescale_betas_zero_snr": False}
_SIGMAS = dict.fromkeys(
    ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting"), False
)
_MULTISTEP = "DPMSolverMultistepScheduler"
_SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": _Scheduler(
        "euler",
        {"shift": 1.0},
        {**_SIGMAS, "invert_sigmas": False, "shift_terminal": None, "stochastic_sampling": False},
        ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"),
    ),
    "FlowMatchHeunDiscreteScheduler": _Scheduler("heun", {"shift": 1.0}),
    "DDIMScheduler": _Scheduler(
        "ddim",
        {**_BETAS, **_STEPS, "timestep_spacing": "leading", "clip_sample": True},
        {**_DDPM_NEEDS, "set_alpha_to_one": True},
        ("dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value"),
    ),
    _MULTISTEP: _Scheduler(
        "dpm++",
        {**_BETAS, **_STEPS, "timestep_spacing": "linspace", "use_flow_sigmas": False, "flow_shift": 1.0},
        {
            **_DDPM_NEEDS,
            **_SIGMAS,
            "use_lu_lambdas": False,
            "solver_order": 2,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "final_sigmas_type": "zero",
            "lambda_min_clipped": None,  # in the place of -Infinity
            "variance_type": None,
        },
        # The first two say how the last step is taken where it does not end without noise.
        ("lower_order_final", "euler_at_final", "dynamic_thresholding_ratio", "sample_max_value", "time_shift_type"),
    ),
}
_SPACINGS: tuple[Literal["trailing", "leading", "linspace"], ...] = ("trailing", "leading", "linspace")
_DDIM_SPACINGS = _SPACINGS[:2]
"""DDIMScheduler leaps by 1000 // steps, also where `linspace` has its next step elsewhere."""
_PREDICTIONS: dict[str, Literal["epsilon", "v"]] = {"epsilon": "epsilon", "v_prediction": "v"}


def read_scheduler(file: Path) -> tuple[Schedule, str]:
    """Read the schedule and the name of the sampler of a scheduler_config.json; see `scheduler_from_diffusers`."""
    data = _INFINITE.sub(rb"\1null", read_member(file))
    try:
        return scheduler_from_diffusers(json_object(data, file))
    except UserError as error:
        raise UserError(str(error).replace(CONFIG, str(file), 1)) from None


def scheduler_from_diffusers(config: Mapping[str, object]) -> tuple[Schedule, str]:
    """Return the schedule and the name of the sampler of a scheduler_config.json.

    Raises UserError for a scheduler or a setting that is not supported, and for values that make no sense.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _SCHEDULERS:
        known = one_of(name, _SCHEDULERS) if isinstance(name, str) else f"; one of: {', '.join(_SCHEDULERS)}"
        raise UserError(f"{CONFIG}: _class_name = {short(name)} is not supported{known}")
    kind = _SCHEDULERS[name]
    needs = {**kind.needs, "num_train_timesteps": TIMES}
    for key, value in config.items():
        if key in needs and not _same(value, needs[key]):
            raise UserError(f"{CONFIG}: {key} = {short(value)} is not supported; expected {needs[key]!r}")
        if value and key not in (*needs, *kind.reads, *kind.idle, "_class_name", "_diffusers_version"):
            raise UserError(f"{CONFIG}: {short(key)[1:-1]} = {short(value)} is not supported by {name}")
    values = {**kind.reads, **config}
    if "shift" in kind.reads:
        return FlowSchedule(_number(values, "shift", SMALLEST, 1e3)), kind.sampler
    if name == _MULTISTEP and _one_of(values, "use_flow_sigmas", False, True):
        _one_of(values, "prediction_type", "flow_prediction")
        return FlowSchedule(_number(values, "flow_shift", SMALLEST, 1e3)), kind.sampler
    return _ddpm(values), kind.sampler


def _ddpm(values: Mapping[str, object]) -> DDPMSchedule:
    if "clip_sample" in values:
        _one_of(values, "clip_sample", False)
        spacing = _one_of(values, "timestep_spacing", *_DDIM_SPACINGS)
    else:
        spacing = _one_of(values, "timestep_spacing", *_SPACINGS)
    offset = values["steps_offset"]
    if not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset < TIMES:
        raise UserError(f"{CONFIG}: steps_offset = {short(offset)}: expected a whole number from 0 to {TIMES - 1}")
    return DDPMSchedule(
        betas=_one_of(values, "beta_schedule", "linear", "scaled_linear", "squaredcos_cap_v2"),
        beta_start=_number(values, "beta_start", SMALLEST, 0.999),
        beta_end=_number(values, "beta_end", SMALLEST, 0.999),
        prediction=_PREDICTIONS[_one_of(values, "prediction_type", *_PREDICTIONS)],
        spacing=spacing,
        offset=offset if spacing == "leading" else 0,
    )


def scheduler_to_diffusers(schedule: Schedule, sampler: str) -> dict[str, object]:
    """Return a scheduler_config.json by which diffusers draws the same images, from the same noise in as many steps.

    (DDIMScheduler where the steps divide 1000.) Raises UserError where no scheduler does that.
    """
    values: dict[str, object] = {"num_train_timesteps": TIMES}
    if isinstance(schedule, FlowSchedule):
        names = dict.fromkeys(("euler", "ddim"), "FlowMatchEulerDiscreteScheduler")
        names |= {"heun": "FlowMatchHeunDiscreteScheduler", "dpm++": _MULTISTEP}
        if sampler == "dpm++":
            values |= {"use_flow_sigmas": True, "flow_shift": schedule.shift, "prediction_type": "flow_prediction"}
        else:
            values["shift"] = schedule.shift
        spacings: tuple[str, ...] = ("linspace",)
    else:
        names = {**dict.fromkeys(("euler", "ddim"), "DDIMScheduler"), "dpm++": _MULTISTEP}
        values |= {"beta_schedule": schedule.betas, "beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
        values["prediction_type"] = next(key for key, ours in _PREDICTIONS.items() if ours == schedule.prediction)
        values |= {"timestep_spacing": schedule.spacing, "steps_offset": schedule.offset}
        values |= {} if sampler == "dpm++" else {"clip_sample": False}
        spacings = _SPACINGS if sampler == "dpm++" else _DDIM_SPACINGS
    if sampler not in names:
        raise UserError(f"sampler = {sampler!r}: no scheduler of diffusers draws so; expected {', '.join(names)}")
    if schedule.spacing not in spacings:
        raise UserError(
            f"spacing = {schedule.spacing!r}: {names[sampler]} has no such steps; expected {' or '.join(spacings)}"
        )
    needs = _SCHEDULERS[names[sampler]].needs
    return {
        "_class_name": names[sampler],
        **values,
        **{key: value for key, value in needs.items() if value is not None},
    }


def _same(value: object, needed: object) -> bool:
    return (not value and not needed) or (value == needed and type(value) is type(needed))


def _one_of(values: Mapping[str, object], key: str, *choices: _Choice) -> _Choice:
    for choice in choices:
        if _same(values[key], choice):
            return choice
    raise UserError(
        f"{CONFIG}: {key} = {short(values[key])} is not supported; expected {' or '.join(map(repr, choices))}"
    )


def _number(values: Mapping[str, object], key: str, low: float, high: float) -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{CONFIG}: {key} = {short(value)}: expected a number from {low:g} to {high:g}")
    return float(value)
