"""Servers for hardware that is not there: what `plan` and `check` read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainfw.errors import UserError, did_you_mean
from trainfw.hardware import Topology
from trainfw.interop import read_model_config
from trainfw.models import CacheDtype, FamilyConfig, family_of, load_presets
from trainfw.program import KeptAs, serving_recipe
from trainfw.recipe import Recipe, bundled_recipes, load_recipe

if TYPE_CHECKING:
    from trainfw.program import Server

_SPLIT = ("data", "fsdp", "expert", "tensor")
"""Axes that a server has."""
_COPIES = ("data", "fsdp", "expert")
"""Axes along which groups of devices have slots of their own."""


@dataclass(frozen=True)
class Serving:
    """A server as the command line asks for it."""

    model: str
    layout: Mapping[str, int]
    slots: int = 8
    """Requests at once of each group of devices that has slots of its own."""
    length: int = 4096
    chunk: int = 128
    weights: KeptAs = "bfloat16"
    cache: CacheDtype = "bfloat16"


def read_layout(text: str) -> dict[str, int]:
    """Read sizes of mesh axes as they are written on a command line: `tensor=4,data=2`. Raises UserError."""
    sizes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in _SPLIT:
            raise UserError(f"--layout {part}: unknown axis{did_you_mean(name, _SPLIT)}")
        if name in sizes or not value.isdecimal() or int(value) < 1:
            raise UserError(f"--layout {part}: expected {name}=N once, N at least 1")
        sizes[name] = int(value)
    return sizes


def config_to_serve(model: str) -> FamilyConfig:
    """Return the config of a model: a preset's name, a recipe or its bundled name, or a path; no weights are read.

    Raises UserError where there is none, or it writes no text.
    """
    presets = load_presets("trainfw.models.decoder")
    if model in presets:
        config: FamilyConfig = load_recipe({"model": {"preset": model}, "data": {"sequence_length": 16}}).model
    elif model in bundled_recipes() or model.endswith((".yaml", ".yml")) or (Path(model) / "recipe.yaml").is_file():
        config = load_recipe(model).model
    elif not model.startswith("package:") and not Path(model).exists():
        known = [*presets, *bundled_recipes()]
        raise UserError(f"{model}: no such model: expected a path, a recipe or a preset{did_you_mean(model, known)}")
    else:
        config = read_model_config(model)
    if not family_of(config).decodes:
        raise UserError(f"{model}: is a model of family {config.family!r}; no text can be drawn from it")
    return config


def fill_layout(layout: Mapping[str, int], config: FamilyConfig, topology: Topology) -> dict[str, int]:
    """Return a layout of all cores: `data` takes those that are left, and `tensor`, if nothing is said, all it can.

    Raises UserError where the sizes do not divide the cores.
    """
    sizes, cores = dict(layout), topology.cores
    if not sizes:
        heads = int(getattr(config, "num_heads", 1))
        sizes["tensor"] = max(n for n in range(1, cores + 1) if cores % n == 0 and heads % n == 0)
    product = 1
    for size in sizes.values():
        product *= size
    if cores % product or ("data" in sizes and product != cores):
        written = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(f"--layout {written}: is of {product} cores; {topology.name} has {cores:,}")
    return sizes if product == cores else sizes | {"data": cores // product}


def absent_recipe(serving: Serving, topology: Topology) -> Recipe:
    """Return the recipe of a server on a topology.

    Raises UserError for a model that cannot be served, and where the layout does not divide the cores.
    """
    config = config_to_serve(serving.model)
    return serving_recipe(
        config,
        weights=serving.weights,
        compute_dtype="float32" if topology.is_cpu else "bfloat16",
        layout=fill_layout(serving.layout, config, topology),
        scan_layers=True,
        hardware={"topology": topology.name, "count": topology.count},
    )


def build_absent(serving: Serving, topology: Topology) -> Server:
    """Build a server on simulated devices that stand for a topology's cores. Compiles nothing.

    Raises UserError where the model, the layout and the hardware do not fit together.
    """
    import jax

    from trainfw.program import ServerShape, build_server

    recipe = absent_recipe(serving, topology)
    shape = ServerShape(
        slots=serving.slots * math.prod(getattr(recipe.parallel, axis) for axis in _COPIES),
        length=serving.length,
        chunk=serving.chunk,
        cache=serving.cache,
    )
    devices: Sequence[jax.Device] = jax.devices()
    return build_server(recipe, shape, devices)
