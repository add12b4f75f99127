"""Drawing images: a loop on the host that takes noise out of them, with a model, step by step.

Every sampler here is linear in the noisy image, in the model's prediction and in one image that it carries from step to
step. So a sampler is a table of factors, made on the host in float64, and its steps are one compiled function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trainfw.errors import UserError, did_you_mean, expect
from trainfw.models import Condition
from trainfw.objectives import TIMES, DDPMSchedule, FlowSchedule, Schedule, shifted

SAMPLERS = ("euler", "heun", "ddim", "dpm++")
"""`euler`, first order; `ddim`, another name of the same step (Song et al., arXiv:2010.02502, eq. 13); `heun`, second
order, which asks the model twice a step but for the last (Karras et al., arXiv:2206.00364, algorithm 1); `dpm++`,
second order from one evaluation and the step before it: DPM-Solver++(2M) (Lu et al., arXiv:2211.01095, algorithm 2)."""
Denoise = Callable[[jax.Array, np.ndarray], jax.Array]
Predict = Callable[[jax.Array, jax.Array, Condition], jax.Array]


class Evaluation(NamedTuple):
    """One evaluation of the model at `time`, and what becomes of its prediction m, the image x and what is carried, y.

    x becomes a x + b m + c y, and y becomes p x + q m.
    """

    time: float
    a: float
    b: float
    c: float
    p: float
    q: float


def draw(
    denoise: Denoise,
    noise: jax.Array,
    *,
    schedule: Schedule,
    sampler: str = "euler",
    steps: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> jax.Array:
    """Draw images, f32[B, H, W, C].

    Args:
        denoise: function of (x_BHWC, time_B) that returns what the model predicts, as the schedule has it.
        noise: standard normal numbers, f32[B, H, W, C]; an image depends on its own alone.
        sampler: one of `SAMPLERS`.
        progress: called after each evaluation of the model with their number so far, and that of all.

    Raises UserError for a sampler that there is not, or a number of steps that the schedule's times do not give.
    """
    evaluations = sampler_steps(schedule, sampler, steps)
    x, carried = noise, noise
    for done, (time, *factors) in enumerate(evaluations, start=1):
        prediction = denoise(x, np.full(noise.shape[0], time, np.float32))
        x, carried = _advance(x, prediction, carried, np.array(factors, np.float32))
        if progress is not None:
            jax.block_until_ready(x)
            progress(done, len(evaluations))
    return x


@jax.jit
def _advance(
    x: jax.Array, prediction: jax.Array, carried: jax.Array, factors: jax.Array
) -> tuple[jax.Array, jax.Array]:
    a, b, c, p, q = factors
    return a * x + b * prediction + c * carried, p * x + q * prediction


def guided(predict: Predict) -> Callable[[jax.Array, jax.Array, Condition, jax.Array], jax.Array]:
    """Return a prediction guided away from that without the condition (Ho and Salimans, arXiv:2207.12598).

    It is a function of (x_BHWC, time_B, condition, guidance), for a device's own rows, which asks `predict` once, for
    both in one batch, and returns without + guidance (with - without); guidance is one number, or one for each row.
    """

    def both(x_BHWC: jax.Array, time_B: jax.Array, condition: Condition, guidance: jax.Array) -> jax.Array:
        keep_B = jnp.ones_like(time_B)
        x, time, condition = jax.tree.map(lambda part: jnp.concatenate([part, part]), (x_BHWC, time_B, condition))
        condition = replace(condition, keep_B=jnp.concatenate([keep_B, 0 * keep_B]))
        kept, left_out = jnp.split(predict(x, time, condition), 2)
        return left_out + jnp.reshape(guidance, (-1, *(1,) * (kept.ndim - 1))) * (kept - left_out)

    return both


def sampler_steps(schedule: Schedule, sampler: str, steps: int) -> list[Evaluation]:
    """List the evaluations of the model by which a sampler draws. Raises UserError as `draw`."""
    if sampler not in SAMPLERS:
        raise UserError(
            f"sampler = {sampler!r}: unknown; expected {', '.join(SAMPLERS)}{did_you_mean(sampler, SAMPLERS)}"
        )
    whole = isinstance(steps, Integral) and not isinstance(steps, bool)
    expect("steps", steps, whole and 1 <= steps <= TIMES, f"a whole number from 1 to {TIMES}")
    multistep = sampler == "dpm++"
    levels = (
        _flow_levels(schedule, steps, multistep)
        if isinstance(schedule, FlowSchedule)
        else _ddpm_levels(schedule, steps, multistep)
    )
    make = {"heun": _heun, "dpm++": _multistep}.get(sampler, _first_order)
    return list(make(levels))


@dataclass(frozen=True)
class _Level:
    """Place of a sampler: x is image_part image + noise_part noise, or x = scale z with dz / dplace a derivative.

    Derivative, and the image without noise, are each (of x) x + (of m) m, with the prediction m.
    """

    time: float
    image_part: float
    noise_part: float
    scale: float
    place: float
    derivative: tuple[float, float]
    image: tuple[float, float]


def _flow_levels(schedule: FlowSchedule, steps: int, multistep: bool) -> list[_Level]:
    if schedule.spacing == "trailing":
        share_S = shifted(np.linspace(1, 1 / steps, steps), schedule.shift)
    elif multistep:  # as diffusers' DPMSolverMultistepScheduler, which gives the model whole times
        share_S = shifted(1.0 - np.linspace(1, 1 / TIMES, steps + 1), schedule.shift)[:0:-1]
    else:  # as its FlowMatchEulerDiscreteScheduler, whose last time is shifted twice
        least = schedule.shift / (TIMES + schedule.shift - 1)
        share_S = shifted(np.linspace(1, least, steps), schedule.shift)
    time_S = TIMES * share_S
    if multistep and schedule.spacing == "linspace":
        time_S = np.floor(time_S)
    return [
        _Level(time, 1 - share, share, scale=1.0, place=share, derivative=(0.0, 1.0), image=(1.0, -share))
        for time, share in zip([*time_S.tolist(), 0.0], [*share_S.tolist(), 0.0], strict=True)
    ]


def _ddpm_levels(schedule: DDPMSchedule, steps: int, multistep: bool) -> list[_Level]:
    points = steps + 1 if multistep else steps
    match schedule.spacing:  # as diffusers' DDIMScheduler and DPMSolverMultistepScheduler
        case "trailing":
            step_S = np.round(TIMES - np.arange(steps) * (TIMES / steps)) - 1
        case "leading":
            step_S = (np.arange(points) * (TIMES // points))[::-1][:steps] + schedule.offset
        case "linspace":
            step_S = np.linspace(0, TIMES - 1, points).round()[::-1][:steps]
    step_S = step_S.astype(np.int64)
    fits = TIMES > step_S[0] > 0 and bool(np.all(np.diff(step_S) < 0))
    expect("steps", steps, fits, f"a number of different steps from 0 to {TIMES - 1}, spaced as {schedule.spacing}")
    signal_S = schedule.signal()[step_S]
    levels = []
    for time, signal in zip([*step_S.tolist(), 0], [*signal_S.tolist(), 1.0], strict=True):
        image, noise = signal**0.5, (1.0 - signal) ** 0.5
        if schedule.prediction == "epsilon":
            derivative, of_image = (0.0, 1.0), (1 / image, -noise / image)
        else:
            derivative, of_image = (noise, image), (image, -noise)
        levels.append(_Level(float(time), image, noise, image, noise / image, derivative, of_image))
    return levels


def _first_order(levels: list[_Level]) -> Iterator[Evaluation]:
    for this, after in itertools.pairwise(levels):
        yield _euler(this, after)


def _euler(this: _Level, after: _Level) -> Evaluation:
    length = after.scale * (after.place - this.place)
    of_x, of_m = this.derivative
    return Evaluation(this.time, after.scale / this.scale + length * of_x, length * of_m, 0, 0, 0)


def _heun(levels: list[_Level]) -> Iterator[Evaluation]:
    """Step to the next level as Euler does, and to it again with the mean of the derivatives here and there."""
    for this, after in itertools.pairwise(levels[:-1]):
        half = after.scale * (after.place - this.place) / 2
        (of_x, of_m), (next_x, next_m) = this.derivative, after.derivative
        yield _euler(this, after)._replace(p=after.scale / this.scale + half * of_x, q=half * of_m)
        yield Evaluation(after.time, half * next_x, half * next_m, 1, 0, 0)
    yield _euler(levels[-2], levels[-1])


def _multistep(levels: list[_Level]) -> Iterator[Evaluation]:
    """Carry the image without noise; the last step, after which its logarithms are infinite, is of first order."""
    with np.errstate(divide="ignore"):
        snr = [np.log(np.float64(level.image_part)) - np.log(np.float64(level.noise_part)) for level in levels]
    for i, (this, after) in enumerate(itertools.pairwise(levels)):
        whole = after.image_part * -np.expm1(snr[i] - snr[i + 1])
        extra = whole * (snr[i + 1] - snr[i]) / (snr[i] - snr[i - 1]) / 2 if 0 < i < len(levels) - 2 else 0.0
        of_x, of_m = this.image
        kept = after.noise_part / this.noise_part
        yield Evaluation(this.time, kept + (whole + extra) * of_x, (whole + extra) * of_m, -extra, of_x, of_m)
