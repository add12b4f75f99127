"""Verdict on a Neuron host: what will fail, and what to do about it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainfw.backends.neuron.environment import environment_warnings
from trainfw.backends.neuron.host import DRIVER, RUNTIME, Host
from trainfw.backends.neuron.plugin import INSTALL
from trainfw.backends.neuron.sdk import (
    Sdk,
    installed_sdk,
    load_sdk,
    releases_of,
    sdk_problems,
    sdk_versions,
    version_parts,
)

COLLECTIVES, TOOLS = "aws-neuronx-collectives", "aws-neuronx-tools"
COMPILING_BYTES = 14 * 10**9
"""Host memory of cold compilations of 20 to 36 minutes, as others measured them."""
_OF_JAX = ("jax-neuronx", "libneuronxla")
"""Packages of which a release has others for JAX 0.7, which the profiles do not have."""


@dataclass(frozen=True)
class HostFinding:
    """One thing about a host."""

    what: str
    do: str
    fails: bool = True
    """A run fails by it; else it is good to know."""

    def __str__(self) -> str:
        return f"{'will fail' if self.fails else 'note'}: {self.what}{': ' * bool(self.do)}{self.do}"


def sdk_of(host: Host) -> Sdk | None:
    """Find the release of the known packages; of a mixture the one of libneuronxla; None where none is known."""
    known = {name: version for name, version in host.plugin.versions.items() if releases_of(name, version)}
    plugin = {name: version for name, version in known.items() if name == "libneuronxla"}
    return installed_sdk(known) or installed_sdk(plugin or dict(list(known.items())[:1]))


def host_findings(host: Host) -> list[HostFinding]:
    """List all that is known against a run on this host, what fails first.

    It is held to its own release, or to the newest that is no newer than its plugin, or to the newest.
    """
    profiles = [load_sdk(version) for version in sdk_versions()]
    own, plugin = sdk_of(host), host.plugin.versions.get("libneuronxla", "")
    sdk = own or profiles[-1]
    if own is None and _readable(plugin):
        older = [one for one in profiles if version_parts(one.packages["libneuronxla"]) <= version_parts(plugin)]
        sdk = [profiles[0], *older][-1]
    found = [*_driver(host, sdk), *_runtime(host, sdk), *_plugin(host, sdk), *_rest(host, sdk)]
    return sorted(found, key=lambda finding: not finding.fails)


def _driver(host: Host, sdk: Sdk) -> Iterator[HostFinding]:
    installed = (host.packages or {}).get(DRIVER)
    if not host.devices:
        if host.driver:
            do = (
                "take an instance that has them; a container is given them (aws.amazon.com/neuron in a pod's resources)"
            )
            yield HostFinding("the driver is loaded, and there is no /dev/neuron*", do)
        elif installed is not None:
            do = "`sudo modprobe neuron`; where that fails, the module was not built for this kernel: see `dkms status`"
            yield HostFinding(f"no /dev/neuron*: {DRIVER} is installed, and its kernel module is not loaded", do)
        else:
            yield HostFinding("no /dev/neuron*, and no driver", f"on a Neuron instance, install {DRIVER}")
        return
    if host.driver is None or not _readable(host.driver):
        seen = "no kernel module of it is seen" if host.driver is None else f"its version reads {host.driver!r:.40}"
        yield HostFinding(f"the driver was not compared: {seen}", "`modinfo neuron` tells its version", False)
        return
    installed = installed if _readable(installed or "") else None
    stale = installed is not None and _minor(installed) != _minor(host.driver)
    reload = "; the module is loaded anew by a reboot, or by `sudo rmmod neuron && sudo modprobe neuron`"
    expected = sdk.system.get(DRIVER)
    if expected is not None and _minor(host.driver) < _minor(expected):
        newer = stale and _minor(str(installed)) >= _minor(expected)
        do = f"install {DRIVER} {expected}{reload}" if not newer else f"{DRIVER} {installed} is installed{reload}"
        yield HostFinding(f"driver {host.driver} is older than that of Neuron SDK {sdk.version}, {expected}", do)
    elif expected is None:
        what = f"driver {host.driver} was not compared: which one Neuron SDK {sdk.version} has is not known here"
        yield HostFinding(what, "see the release notes of that SDK", False)
    elif stale:
        yield HostFinding(f"driver {host.driver} is loaded, and {DRIVER} {installed} installed", reload[2:], False)


def _runtime(host: Host, sdk: Sdk) -> Iterator[HostFinding]:
    """Judge the libraries of the host: those of an older release fail, newer ones are only said."""
    if host.packages is None:
        if not host.runtime_file:
            yield HostFinding("no libnrt.so in /opt/aws/neuron/lib", f"install {RUNTIME} and {COLLECTIVES}")
        else:
            do = "no database of dpkg or rpm; compare them with the SDK's release notes"
            yield HostFinding("the versions of runtime and collectives cannot be read", do, False)
        return
    for name in (RUNTIME, COLLECTIVES, TOOLS):
        needed = name != TOOLS
        found, expected = host.packages.get(name), sdk.system.get(name)
        version = f" {expected}" if expected else ""
        if found is None:
            if name == RUNTIME and host.runtime_file:
                yield HostFinding(f"{name} is no package, though libnrt.so is there", "its version is not known", False)
                continue
            why = "is not installed" if needed else "is not installed: no neuron-ls, neuron-top and neuron-monitor"
            yield HostFinding(f"{name} {why}", f"install {name}{version}", needed)
        elif not _readable(found):
            yield HostFinding(f"{name} was not compared: its version reads {found!r:.40}", "", False)
        elif expected is not None and _minor(found) != _minor(expected):
            old = _minor(found) < _minor(expected)
            is_what = "is older than" if old else "is newer than"
            do = f"install {name}{version}" if old else "packages are tested as releases; other pairs are not known"
            what = f"{name} {found} {is_what} that of Neuron SDK {sdk.version}, {expected}"
            yield HostFinding(what, do, old and needed)


def _plugin(host: Host, sdk: Sdk) -> Iterator[HostFinding]:
    plugin = host.plugin
    if plugin.placeholders:
        names = ", ".join(plugin.placeholders)
        yield HostFinding(f"{names} from PyPI: placeholders without code", f"`{INSTALL}`")
    for name in plugin.broken:
        yield HostFinding(f"{name} is half installed: it has no metadata", f"`pip uninstall {name}`, then `{INSTALL}`")
    if not plugin.placeholders and "libneuronxla" not in (*plugin.versions, *plugin.broken):
        yield HostFinding("jax's Neuron plugin, libneuronxla, is not installed", f"`{INSTALL}`")
    if "jax-neuronx" not in (*plugin.versions, *plugin.broken) and plugin.state == "installed":
        yield HostFinding("jax-neuronx is not installed", f"libneuronxla alone is no release: `{INSTALL}`", False)
    yield from _packages(host, sdk)
    if host.jax is None:
        yield HostFinding("jax is not installed", f"`{INSTALL}`")
    elif plugin.versions and not any(_is_newer(name, plugin.versions, sdk) for name in _OF_JAX):
        for problem in sdk_problems(sdk, host.jax, host.python):
            low, high = sdk.jax if problem.startswith("jax") else sdk.python
            do = f"`pip install jax=={high} jaxlib=={high}`" if problem.startswith("jax") else f"take {low} to {high}"
            yield HostFinding(problem, do)


def _packages(host: Host, sdk: Sdk) -> Iterator[HostFinding]:
    """Judge Python's packages: those of different releases, and those of none that is known."""
    versions = host.plugin.versions
    releases = {name: of for name, version in versions.items() if (of := releases_of(name, version))}
    if releases and not set.intersection(*map(set, releases.values())):
        mixture = ", ".join(f"{name} {versions[name]} of {' and '.join(of)}" for name, of in releases.items())
        yield HostFinding(f"packages of different releases: {mixture}", f"take all of one: `{INSTALL}`")
    known = sdk_versions()
    for name in (name for name in versions if name not in releases):
        expected, found = sdk.packages.get(name), f"{name} {versions[name]}"
        of_old_jax = name in _OF_JAX and host.jax is not None and _minor(host.jax) <= [0, 7]
        if expected is None or not _readable(versions[name]) or _is_newer(name, versions, sdk) or of_old_jax:
            what = f"{found} was not compared: it is of no release that trainfw knows ({known[0]} to {known[-1]})"
            yield HostFinding(what, "", False)
        else:
            what = f"{found} is older than that of Neuron SDK {sdk.version}, {expected}"
            yield HostFinding(what, f"take all of one release: `{INSTALL}`")


def _is_newer(name: str, versions: dict[str, str], sdk: Sdk) -> bool:
    return version_parts(versions.get(name, "")) > version_parts(sdk.packages.get(name, ""))


def _rest(host: Host, sdk: Sdk) -> Iterator[HostFinding]:
    if host.compiler is None and host.compiler_directory is None:
        do = "it comes with the plugin, into the bin directory of its environment, which must be on PATH"
        yield HostFinding("neuronx-cc is not found, as libneuronxla calls it", do)
    elif host.compiler_directory is not None:
        other = "is not on PATH" if host.compiler is None else f"comes after {host.compiler} on PATH"
        do = f"trainfw puts {host.compiler_directory} first for its own processes; others need it on PATH"
        yield HostFinding(f"this environment's neuronx-cc {other}", do, False)
    for holder in host.holders:
        do = "cores belong to one process, so wait for it, or end it; this is no fault of the hardware"
        what = f"process {holder.pid} holds {ranges(holder.devices)} ({holder.command[:60]})"
        yield HostFinding(f"a run that starts now, for {what}", do)
    for warning in environment_warnings(host.environ, sdk, None):
        yield HostFinding(warning, "", False)
    if "nki-lib" not in host.plugin.versions and host.plugin.state == "installed":
        yield HostFinding("nki-lib is not installed", "attention takes XLA's form, whose scores are in memory", False)
    if host.memory_bytes is not None and host.memory_bytes < COMPILING_BYTES:
        what = f"{host.memory_bytes / 1e9:.0f} GB of host memory"
        do = f"others measured {COMPILING_BYTES / 1e9:.0f} GB for compilations of 20 to 36 minutes"
        yield HostFinding(what, do, False)


def ranges(devices: Sequence[str]) -> str:
    """Write devices in order as `neuron0 to neuron3, neuron8`."""
    numbers = enumerate(int(device.removeprefix("neuron")) for device in devices)
    runs = [[number for _, number in run] for _, run in itertools.groupby(numbers, lambda pair: pair[1] - pair[0])]
    return ", ".join(f"neuron{run[0]}" + (f" to neuron{run[-1]}" if len(run) > 1 else "") for run in runs)


def _minor(version: str) -> list[int]:
    """Return major and minor, which tell releases apart: what follows is a build."""
    return version_parts(version)[:2]


def _readable(version: str) -> bool:
    return bool(re.match(r"\d+\.\d+", version))
