from __future__ import annotations

from typing import Any

from trainfw.errors import UserError
from trainfw.models import family_of
from trainfw.parallel import AXES
from trainfw.recipe import Recipe


def tiny_overrides(recipe: Recipe, devices: int) -> list[str]:
    """Overrides that shrink a recipe to seconds on a laptop: every mesh axis that it uses stays, of two devices.

    Model, batch, sequence and steps are small, the text is that of Python's standard library, pictures are digits, and
    the hardware is forgotten. What is left is the recipe's form: axes, stages and chunks, dispatch, remat, scan,
    dtypes.

    Raises UserError where `devices` is no multiple of what the axes take.
    """
    parallel, model, train = recipe.parallel, recipe.model, recipe.train
    sizes = {axis: 1 if getattr(parallel, axis) == 1 else 2 for axis in AXES}
    used = [axis for axis in AXES if sizes[axis] > 1]
    if devices % (least := 2 ** len(used)):
        raise UserError(
            f"devices = {devices} (--devices): {' * '.join(used)} of two devices each take a multiple of {least}"
        )
    sizes["fsdp" if "fsdp" in used else "data"] *= devices // least
    pairs = recipe.data.format == "preferences"
    interleave = min(parallel.interleave, 2)
    layers = sizes["pipeline"] * interleave * model.layer_period * 2
    small = family_of(model).tiny(model, layers=layers, tensor=parallel.tensor)
    rows = sizes["pipeline"] * sizes["data"] * sizes["fsdp"] * sizes["expert"]
    accumulation = min(train.accumulation_steps, 2)
    of_text = {
        "data.source": "python-stdlib-preferences" if pairs else "python-stdlib",
        "data.format": "preferences" if pairs else "text",
        "data.chosen_field": "chosen",
        "data.rejected_field": "rejected",
        "data.pairs_per_row": 8,
        "data.loss_on": ["assistant"],
        "data.chat_template": not pairs,
        "data.system_prompt": None,
        "data.too_long": "refuse",
        "data.split": "long",  # few documents fit into so short a row
        "data.max_characters": 150 if pairs else None,
        "data.tokenizer": {"name": "bytes"},
        "data.sequence_length": 256 if pairs else 64,
        "train.sample_prompt": None,
    }
    of_images = {
        "data.source": "digits",
        "data.image_field": None,
        "data.caption_field": "text",
        "data.label_field": "label",
        "train.sample_images": 0,
    }
    changes: dict[str, Any] = {
        "name": f"tiny-{recipe.name}",
        "hardware.topology": None,
        "hardware.count": 1,
        **{f"parallel.{axis}": size for axis, size in sizes.items()},
        "parallel.interleave": interleave,
        "parallel.pipeline_microbatches": None,
        "parallel.traffic": {},
        **{f"model.{field}": value for field, value in small.items()},
        **(of_images if recipe.reads_images else of_text),
        "train.steps": 5,
        "train.log_every": 1,
        "train.validate_every": 0,
        "train.validation_batches": 0,
        "train.accumulation_steps": accumulation,
        "train.global_batch_size": 2 * rows * accumulation,
        "checkpoint.directory": None,
        "optimizer.warmup_steps": 1,
        "evaluation": None,
    }
    if model.from_ is not None:
        changes["model.from"] = None  # weights of another shape
    if recipe.adapter is not None:
        changes |= {"adapter.from": None, "adapter.block": 16}
    return [f"{key}={'null' if value is None else value}" for key, value in changes.items()]
