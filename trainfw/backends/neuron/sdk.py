from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainfw.config import Config, PositiveInt
from trainfw.errors import UserError
from trainfw.hardware import Topology

_DIRECTORY = Path(__file__).parent / "sdk"


class Sdk(Config):
    """One release of the Neuron SDK (`sdk/<version>.yaml`): its packages and its limits."""

    version: str
    released: str
    packages: dict[str, str]
    """Distribution -> version."""
    system: dict[str, str] = {}
    """Package of the host (deb or rpm) -> version, as much of it as is known; those that are not known are left out."""
    jax: list[str]
    """The oldest and the newest JAX it supports."""
    python: list[str]
    """The oldest and the newest Python."""
    communicators: PositiveInt
    """Distinct sets of replica groups that one program may use."""
    max_tensor_bytes: int
    """A single buffer must be smaller."""
    profile_bytes: int = 0
    """Device memory that its runtime reserves for profiles of transfers on every physical core, by default."""
    sources: list[str]
    notes: list[str] = []

    def core_overhead(self, topology: Topology) -> int:
        """Count the bytes of device memory that the runtime takes on one logical core of `topology`.

        On Neuron that is what the chip's figure says and this release's `profile_bytes`; a recipe that replaces the
        figure has said all of it. Elsewhere it is the figure, if there is one.
        """
        more = topology.rules == "neuron" and not topology.is_replaced("chip.core_overhead")
        return round(topology.core_overhead) + (self.profile_bytes * topology.lnc if more else 0)


def sdk_versions() -> list[str]:
    """List the releases, the oldest first."""
    return sorted((path.stem for path in _DIRECTORY.glob("*.yaml")), key=lambda v: [int(n) for n in v.split(".")])


@functools.cache
def load_sdk(version: str | float | None = None) -> Sdk:
    """Load the profile of a release; the newest when left out. Raises UserError for one without a profile.

    A number is taken for the release that is written so: YAML reads 2.30 as 2.3.
    """
    import yaml

    known = sdk_versions()
    if isinstance(version, int | float):
        version = next((text for text in known if float(text) == version), str(version))
    version = version or known[-1]
    if version not in known:
        release = ".".join(version.split(".")[:2])
        hint = f"; {release} is the profile of all its patch releases" if release in known else ""
        raise UserError(f"sdk = {version!r}: no profile of this Neuron SDK; one of: {', '.join(known)}{hint}")
    return Sdk.model_validate(yaml.safe_load((_DIRECTORY / f"{version}.yaml").read_text()))


def installed_sdk(packages: Mapping[str, str]) -> Sdk | None:
    """Find the release whose packages these are (distribution -> version), newest first; None for a mixture."""
    for sdk in map(load_sdk, reversed(sdk_versions())):
        shared = packages.keys() & sdk.packages.keys()
        if shared and all(_begins(packages[name], sdk.packages[name]) for name in shared):
            return sdk
    return None


def releases_of(package: str, version: str) -> list[str]:
    """Return the releases that have this version of a package, oldest first."""
    of = {sdk: load_sdk(sdk).packages.get(package) for sdk in sdk_versions()}
    return [sdk for sdk, expected in of.items() if expected is not None and _begins(version, expected)]


def sdk_problems(sdk: Sdk, jax: str, python: str) -> list[str]:
    """List where these versions of JAX and Python are outside what a release supports."""
    return [
        f"{name} {found} is outside {first} to {last}, which Neuron SDK {sdk.version} supports"
        for name, found, (first, last) in (("jax", jax, sdk.jax), ("python", python, sdk.python))
        if not supports((first, last), found)
    ]


def supports(bounds: Sequence[str], version: str) -> bool:
    """Tell whether a version is none below the first bound, and none above all that begin as the last does."""
    (first, last), found = map(version_parts, bounds), version_parts(version)
    return first <= found and found[: len(last)] <= last


def _begins(version: str, prefix: str) -> bool:
    return version_parts(version)[: len(version_parts(prefix))] == version_parts(prefix)


def version_parts(version: str) -> list[int]:
    """Return the numbers of a version, up to a build's name."""
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]
