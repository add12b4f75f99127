from __future__ import annotations

import functools
from pathlib import Path

from trainfw.config import Config, PositiveInt
from trainfw.errors import UserError, did_you_mean

_DIRECTORY = Path(__file__).parent / "sdk"


class Sdk(Config):
    """One release of the Neuron SDK (`sdk/<version>.yaml`): its packages and its limits."""

    version: str
    released: str
    packages: dict[str, str]
    """Distribution -> version."""
    jax: list[str]
    """The oldest and the newest JAX it supports."""
    python: list[str]
    """The oldest and the newest Python."""
    communicators: PositiveInt
    """Distinct sets of replica groups that one program may use."""
    collective_streams: PositiveInt
    """Collectives that run at once."""
    max_tensor_bytes: int
    """A single buffer must be smaller."""
    sources: list[str]
    notes: list[str] = []


def sdk_versions() -> list[str]:
    """Oldest first."""
    return sorted((path.stem for path in _DIRECTORY.glob("*.yaml")), key=lambda v: [int(n) for n in v.split(".")])


@functools.cache
def load_sdk(version: str | None = None) -> Sdk:
    """The profile of a release; the newest when left out. Raises UserError for one without a profile."""
    import yaml

    version = version or sdk_versions()[-1]
    if version not in sdk_versions():
        raise UserError(f"sdk {version!r}: no profile of this Neuron SDK{did_you_mean(version, sdk_versions())}")
    return Sdk.model_validate(yaml.safe_load((_DIRECTORY / f"{version}.yaml").read_text()))
