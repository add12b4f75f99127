"""Search for JAX's Neuron plugin, which PyPI's package of that name is not."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainfw.errors import UserError

INSTALL = 'pip install "jax-neuronx[stable]" --extra-index-url=https://pip.repos.neuron.amazonaws.com'
"""aws-neuron-sdk 2.32.0 frameworks/jax/setup/jax-setup.rst"""

DISTRIBUTIONS = ("jax-neuronx", "libneuronxla", "neuronx-cc", "nki", "nki-lib")


@dataclass(frozen=True)
class Plugin:
    """State of the plugin's installation."""

    state: Literal["installed", "placeholder", "missing"]
    versions: dict[str, str]
    """Versions of the real distributions among `DISTRIBUTIONS`."""
    placeholders: tuple[str, ...]
    """Distributions that are PyPI's stand-ins, as `name version`."""
    broken: tuple[str, ...] = ()
    """Distributions without metadata, or without a version in it: their installation was cut short."""

    def __str__(self) -> str:
        if self.state == "installed":
            real = ", ".join(f"{name} {version}" for name, version in self.versions.items())
            wrong = f"; but PyPI's placeholder of {', '.join(self.placeholders)}" if self.placeholders else ""
            return real + wrong
        if self.state == "placeholder":
            return f"{', '.join(self.placeholders)} from PyPI: placeholders without the plugin; install: `{INSTALL}`"
        return f"not installed; on a Neuron instance: `{INSTALL}`"


def detect_plugin(path: Sequence[str] | None = None) -> Plugin:
    """Look at the metadata of installed distributions, in `path` (default: sys.path). Imports none of them."""
    versions: dict[str, str] = {}
    placeholders: list[str] = []
    broken: list[str] = []
    for name in DISTRIBUTIONS:
        found = next(iter(importlib.metadata.distributions(name=name, path=list(path or sys.path))), None)
        if found is None:
            continue
        # PyPI's jax-neuronx 0.0.0, libneuronxla 1.0 and neuronx-cc 1.0 have this for a description, and no code.
        if "Version" not in found.metadata:
            broken.append(name)
        elif "WRONG PACKAGE" in str(found.read_text("METADATA")):
            placeholders.append(f"{name} {found.version}")
        else:
            versions[name] = found.version
    # The plugin is libneuronxla; the others compile for it.
    state = "installed" if "libneuronxla" in versions else "placeholder" if placeholders else "missing"
    return Plugin(state, versions, tuple(placeholders), tuple(broken))  # type: ignore[arg-type]


def on_neuron(environ: Mapping[str, str], *, path: Sequence[str] | None = None, dev: Path = Path("/dev")) -> bool:
    """Tell whether jax, once imported, will run on Neuron: the plugin is installed and there are devices for it.

    Raises UserError when JAX_PLATFORMS asks for Neuron first and the plugin is not there.
    """
    wanted = [name.strip() for name in environ.get("JAX_PLATFORMS", "").split(",") if name.strip()]
    plugin = detect_plugin(path)
    if wanted:
        if wanted[0] == "neuron" and plugin.state != "installed":
            raise UserError(f"JAX_PLATFORMS = {environ['JAX_PLATFORMS']}: jax's Neuron plugin: {plugin}")
        return wanted[0] == "neuron"
    return plugin.state == "installed" and any(dev.glob("neuron[0-9]*"))
