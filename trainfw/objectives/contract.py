"""Checks of what somebody's own objective says and returns: of all of it, before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainfw.errors import UserError, short
from trainfw.objectives.objective import Mean, Objective, Sums, reads_of
from trainfw.objectives.schema import ImageShape, Schema, image_rows, token_rows
from trainfw.pieces import check_parts

RESERVED = frozenset(
    {
        *("step", "step_time_seconds", "tokens_per_second", "images_per_second", "mfu", "grad_norm", "learning_rate"),
        *("tokens", "images", "goodput"),
        *("update_norm", "spike", "skipped_steps", "rollbacks", "perplexity", "bits_per_byte"),
        *("neuroncore_utilization", "neuroncores_in_use", "device_memory_bytes", "execution_errors"),
    }
)
"""Names in a row of metrics that are trainfw's own, as are those that begin with `validation_` or `evaluation_`."""
_PARTS = ("schema", "loss", "roles", "unit")


def check_objective(made: Any, name: str) -> Objective:
    """Return somebody's own objective. Raises UserError, which begins with `name`, where it is none."""
    wrong = f"name = {name!r}: "
    if isinstance(made, type):
        raise UserError(f"{wrong}is a class; expected an object, such as {made.__name__}()")
    check_parts(made, "name", name, _PARTS, "trainfw.objectives.Objective")
    roles = made.roles
    if not isinstance(roles, tuple) or not all(isinstance(role, str) and role for role in roles):
        raise UserError(f'{wrong}roles is {short(roles)}; expected a tuple of names, such as ("reference",), or ()')
    if {"learner", "base"} & set(roles) or len(set(roles)) < len(roles):
        raise UserError(
            f"{wrong}roles is {short(roles)}; expected frozen models beside the learner and the base of its adapter, "
            "each once"
        )
    if not (isinstance(made.unit, str) and made.unit):
        raise UserError(f"{wrong}unit is {short(made.unit)}; expected a name, such as 'token'")
    if reads_of(made) not in ("tokens", "images"):
        raise UserError(f"{wrong}reads is {short(made.reads)}; expected 'tokens' or 'images'")
    objective: Objective = made
    return objective


def check_reads(objective: Objective | type[Objective], name: str, image: ImageShape | None) -> None:
    """Check that an objective reads what the model does: images, where these have a shape.

    Raises UserError, which begins with `name`, where it does not.
    """
    if (reads := reads_of(objective)) != (needed := "tokens" if image is None else "images"):
        raise UserError(
            f"name = {name!r}: reads {reads}, and the model reads {needed}; expected an objective of {needed}"
        )


def check_schema(
    schema: object,
    name: str,
    batch: int,
    sequence: int,
    group: int,
    *,
    image: ImageShape | None = None,
    draws: bool = False,
) -> None:
    """Check that a schema is of the rows that there are. Raises UserError, which begins with `name`, where it is not.

    Args:
        group: rows of tokens in each of the batch, as `data.format` makes them.
        image: sizes of images, where these are read in place of tokens.
        draws: the objective has `drawn`, and so may have arrays beside those of the data.
    """
    if not isinstance(schema, Schema):
        raise UserError(f"name = {name!r}: schema returns {short(schema)}; expected a trainfw.objectives.Schema")
    if image is None:
        rows = token_rows(batch, sequence, group=None if group == 1 else group)
        expected = f"token_rows(batch, sequence{'' if group == 1 else f', group={group}'})"
    else:
        rows, expected = image_rows(batch, image), "image_rows(batch, image)"
    try:
        said, there = (
            {key: f"{np.dtype(field.dtype)} {s.shape(key)}" for key, field in s.fields.items()} for s in (schema, rows)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"name = {name!r}: schema does not describe its arrays: {error!r}") from error
    for key in [*there, *(() if draws else said)]:
        if (has := said.get(key)) != (needs := there.get(key)):
            raise UserError(
                f"name = {name!r}: schema has {key} of {has or 'no shape'}, and the rows of data.format have it of "
                f"{needs or 'no shape'}; expected {expected}"
            )
    for key in said:
        if schema.fields[key].dims[:1] != ("batch",) or schema.sizes["batch"] != batch:
            raise UserError(f"name = {name!r}: schema has {key} of {said[key]}; expected its first dim to be batch")


def check_drawn(arrays: Mapping[str, np.ndarray], schema: Schema, name: str) -> None:
    """Check that what an objective draws has its schema. Raises UserError, which begins with `name`, where it has not.

    The number of rows may differ: a process has some of them.
    """
    for key in [*schema.fields, *arrays]:
        if key not in schema.fields or key not in arrays:
            raise UserError(f"name = {name!r}: drawn returns {sorted(arrays)}; expected {sorted(schema.fields)}")
        has, needs = arrays[key], (np.dtype(schema.fields[key].dtype), schema.shape(key)[1:])
        if (getattr(has, "dtype", None), getattr(has, "shape", ())[1:]) != needs:
            raise UserError(
                f"name = {name!r}: drawn returns {key} of {_shown(has)}; expected {needs[0]} {needs[1]} a row"
            )


def check_returned(returned: object, name: str, unit: str) -> tuple[jax.Array, Sums]:
    """Return what `loss` returned while it is traced. Raises UserError, which begins with `name`, where it is wrong."""
    wrong = f"name = {name!r}: loss returns "
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        raise UserError(f"{wrong}{_shown(returned)}; expected a pair (loss, sums), of which sums is a dict")
    loss, sums = returned
    if not _number(loss, jnp.floating):
        raise UserError(f"{wrong}{_shown(loss)} as the loss; expected one floating-point number")
    if not isinstance(sums.get("loss"), Mean):
        has = _shown(sums["loss"]) if "loss" in sums else f"no 'loss' among {short(sorted(map(str, sums)))}"
        raise UserError(f"{wrong}sums that have {has}; expected sums['loss'], a trainfw.objectives.Mean")
    taken = set(RESERVED) | {f"{unit}s"}
    for key, value in _metrics(sums, wrong):
        if not isinstance(key, str) or not key:
            raise UserError(f"{wrong}a metric named {short(key)}; expected a str")
        if key in taken or key.startswith(("validation_", "evaluation_")):
            raise UserError(f"{wrong}a metric named {key!r}, which trainfw or another metric has; name it otherwise")
        taken.add(key)
        parts = (value.total, value.count) if isinstance(value, Mean) else value
        if not (isinstance(parts, tuple) and len(parts) == 2 and all(_number(part, jnp.number) for part in parts)):
            raise UserError(f"{wrong}{_shown(parts)} as the metric {key!r}; expected (total, count), one number each")
    return loss, sums


def _metrics(sums: Mapping[Any, Any], wrong: str) -> Iterator[tuple[Any, Any]]:
    for key, value in sums.items():
        if isinstance(value, Mean) or not isinstance(key, str):
            yield key, value
        elif callable(getattr(value, "metrics", None)):
            yield from jax.eval_shape(value.metrics).items()
        else:
            raise UserError(f"{wrong}{_shown(value)} as the metric {key!r}; expected a trainfw.objectives.Mean")


def _number(value: Any, kind: Any) -> bool:
    try:
        return jnp.shape(value) == () and bool(jnp.issubdtype(jnp.result_type(value), kind))
    except (TypeError, ValueError):
        return False


def _shown(value: Any) -> str:
    """Show arrays by dtype and shape: while a loss is traced they have no values."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else short(value)
