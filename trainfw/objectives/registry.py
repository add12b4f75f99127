from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

from trainfw import objectives
from trainfw.errors import UserError, about, expect
from trainfw.objectives.config import DIFFUSION, PREFERENCES, ObjectiveConfig
from trainfw.objectives.contract import check_objective, check_reads
from trainfw.objectives.noise import DDPMSchedule, FlowSchedule, Schedule
from trainfw.objectives.objective import Objective
from trainfw.objectives.schema import ImageShape
from trainfw.pieces import is_own, load_piece, make_piece

_CLASSES = {
    "next_token": "NextToken",
    **dict.fromkeys(PREFERENCES, "Preference"),
    "flow_matching": "FlowMatching",
    "ddpm": "DDPM",
    "reconstruction": "Reconstruction",
}
"""Names within `trainfw.objectives`, which imports them when they are asked for."""


def make_objective(
    config: ObjectiveConfig,
    *,
    chunk: int,
    mask_documents: bool,
    z_loss: float,
    pairs_per_row: int,
    image: ImageShape | None = None,
) -> Objective:
    """Return what a model learns.

    Raises UserError where one's own cannot be made, or it does not read what the model does.

    Args:
        image: sizes of the images of a model that reads these.
    """
    own = is_own(config.name)
    kind: Any = load_piece(config.name) if own else getattr(objectives, _CLASSES[config.name])
    check_reads(kind, config.name, image)
    if own:
        images = () if image is None else (image,)
        expected = "trainfw.objectives.Objective"
        made = make_piece(config.name, config.options, *images, methods=("schema", "loss"), expected=expected)
        return check_objective(made, config.name)
    if config.name == "next_token":
        return cast(Objective, kind(chunk, mask_documents, z_loss))
    if image is None:
        beta = PREFERENCES[config.name] if config.beta is None else config.beta
        return cast(Objective, kind(config.name, beta, config.margin, pairs_per_row, chunk))
    if (config.name == "reconstruction") != (image.latent_channels is not None):
        learnt = "an autoencoder" if image.latent_channels is not None else "no autoencoder"
        raise UserError(f"name = {config.name!r}: does not suit a model that is {learnt}")
    if config.name in DIFFUSION:
        with about("drop_condition"):
            dropped = config.drop_condition
            given = not dropped or image.conditioning != "none"
            expect("drop_condition", dropped, given, "0: the model has no condition")
    return cast(Objective, kind(image, **config.of_images))


def schedule_of(config: ObjectiveConfig) -> Schedule | None:
    """Return the schedule of noise of an objective; None for one that has none, and for somebody's own."""
    if config.name not in DIFFUSION:
        return None
    kind = FlowSchedule if config.name == "flow_matching" else DDPMSchedule
    known = {field.name for field in fields(kind)}
    return kind(**{key: value for key, value in config.of_images.items() if key in known})
