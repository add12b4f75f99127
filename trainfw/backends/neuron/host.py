"""Neuron's devices and software on this machine, read from files: nothing of it is started."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainfw.backends.neuron.plugin import Plugin, detect_plugin
from trainfw.backends.neuron.sysroot import below, compiler_path, find_command, sysroot

DRIVER, RUNTIME = "aws-neuronx-dkms", "aws-neuronx-runtime-lib"
_PACKAGES = "aws-neuronx-"
_WATCHERS = re.compile(r"k8s-neuron-|neuron-(?:monitor|top|ls|device-)")
"""Names of programs that open devices to look at them, and run nothing: the kernel tells 15 letters of a name."""
_RPM_SECONDS = 30


@dataclass(frozen=True)
class Holder:
    """A process that has Neuron devices open."""

    pid: int
    command: str
    devices: tuple[str, ...]
    """Names of the devices, such as `neuron0`."""


@dataclass(frozen=True)
class Host:
    """A machine: what it has of Neuron, and who uses it."""

    root: Path
    """The directory that stands for `/`."""
    environ: Mapping[str, str]
    python: str
    jax: str | None
    plugin: Plugin
    devices: tuple[str, ...]
    """Files of /dev, such as `neuron0`, in order of number."""
    driver: str | None
    """Version of the kernel module that is loaded; None where none is."""
    packages: dict[str, str] | None
    """Version of every aws-neuronx package, as deb or rpm; None where no database of packages can be read."""
    runtime_file: bool
    """True where there is a libnrt.so in /opt/aws/neuron/lib."""
    compiler: str | None
    """neuronx-cc as a child process finds it."""
    compiler_directory: str | None
    """The directory of this environment's neuronx-cc, if that is another: trainfw puts it first on PATH."""
    holders: tuple[Holder, ...]
    unseen: int
    """Processes whose open files this user may not see."""
    memory_bytes: int | None

    @property
    def neuron(self) -> bool:
        """Tell whether programs are to run here: there is a device, driver or runtime, or jax is told to use one."""
        installed = self.packages or {}
        told = self.environ.get("JAX_PLATFORMS", "").split(",")[0].strip() == "neuron"
        return bool(self.devices or self.driver or told or DRIVER in installed or RUNTIME in installed)


def read_host(environ: Mapping[str, str] | None = None) -> Host:
    """Read this machine, or the one below `TRAINFW_SYSROOT`. Opens no device and imports no plugin."""
    environ = dict(os.environ if environ is None else environ)
    root = sysroot(environ)
    path = [str(below(root, entry)) for entry in sys.path if entry]
    devices = [entry.name for entry in below(root, "/dev").glob("neuron*")]
    loaded = re.search(r"^neuron ", _text(below(root, "/proc/modules")), re.MULTILINE)
    memory = re.search(r"^MemTotal: *(\d+) kB", _text(below(root, "/proc/meminfo")), re.MULTILINE)
    holders, unseen = _holders(root)
    compiler, directory = compiler_path(environ)
    jax = next(iter(importlib.metadata.distributions(name="jax", path=path)), None)
    return Host(
        root=root,
        environ=environ,
        python=platform.python_version(),
        jax=None if jax is None else jax.version,
        plugin=detect_plugin(path),
        devices=tuple(sorted((name for name in devices if re.fullmatch(r"neuron\d+", name)), key=_number)),
        # The first is where the runtime itself reads it.
        driver=_text(below(root, "/sys/module/neuron/version")).strip() or ("of unknown version" if loaded else None),
        packages=_packages(root, environ),
        runtime_file=any(below(root, "/opt/aws/neuron/lib").glob("libnrt.so*")),
        compiler=compiler,
        compiler_directory=directory,
        holders=holders,
        unseen=unseen,
        memory_bytes=int(memory[1]) * 1024 if memory else None,
    )


def _number(device: str) -> int:
    return int(device.removeprefix("neuron"))


def _packages(root: Path, environ: Mapping[str, str]) -> dict[str, str] | None:
    """Read dpkg's database, or else ask rpm."""
    status = below(root, "/var/lib/dpkg/status")
    if status.is_file():
        paragraphs = (
            dict(re.findall(r"^(Package|Status|Version): *(.*)$", paragraph, re.MULTILINE))
            for paragraph in _text(status).split("\n\n")
        )
        return {
            fields["Package"]: fields.get("Version", "")
            for fields in paragraphs
            if fields.get("Package", "").startswith(_PACKAGES) and fields.get("Status", "").endswith(" installed")
        }
    directories = environ.get("PATH", os.defpath).split(os.pathsep)
    if (rpm := find_command("rpm", directories, root)) is None:
        return None
    command = [str(below(root, rpm)), "-qa", f"{_PACKAGES}*", "--qf", r"%{NAME} %{VERSION}\n"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_RPM_SECONDS)
        if said.returncode == 0:
            return dict(line.split() for line in said.stdout.splitlines() if len(line.split()) == 2)
    return None


def _holders(root: Path) -> tuple[tuple[Holder, ...], int]:
    found, unseen = [], 0
    for process in sorted(below(root, "/proc").glob("[0-9]*"), key=lambda entry: entry.name.zfill(20)):
        devices = set()
        try:
            for link in os.scandir(process / "fd"):
                with contextlib.suppress(OSError):  # closed meanwhile
                    if match := re.fullmatch(r"/dev/(neuron\d+)(?: \(deleted\))?", os.readlink(link.path)):
                        devices.add(match[1])
        except PermissionError:
            unseen += 1
        except OSError:  # it has ended
            continue
        command = _text(process / "cmdline").replace("\0", " ").strip()
        name = _text(process / "comm").strip() or os.path.basename(command.split(" ")[0])
        if devices and not _WATCHERS.match(name):
            found.append(Holder(int(process.name), command or name, tuple(sorted(devices, key=_number))))
    return tuple(found), unseen


def _text(file: Path) -> str:
    """Read a file's text; empty where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
