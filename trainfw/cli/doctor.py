from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

import typer

from trainfw import backends
from trainfw.cli.options import Devices
from trainfw.cli.terminal import say
from trainfw.errors import UserError, pip_install
from trainfw.paths import cache_dir

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "pydantic")
_OPTIONAL = {"datasets": "datasets", "pyarrow": "datasets"}


def doctor(devices: Devices = None) -> None:
    """Show versions, devices and memory, and what is missing. On a Neuron host, exit with 1 where a run would fail."""
    host = backends.read_host()
    findings = backends.host_findings(host) if host.neuron else []
    start = not any(finding.fails for finding in findings) and str(host.root) == "/"
    if host.neuron and not start:
        os.environ["JAX_PLATFORMS"] = "cpu"  # the cores are another's, or it would fail
    no_jax = None
    try:
        backends.prepare(devices)
    except UserError as error:
        no_jax = error

    _line("trainfw", importlib.metadata.version("trainfw"))
    _line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        _line(package, importlib.metadata.version(package))
    for package, extra in _OPTIONAL.items():
        found = importlib.util.find_spec(package) is not None
        get = f"missing; Parquet and saved datasets need it: `{pip_install(extra)}`"
        _line(package, importlib.metadata.version(package) if found else get)
    if no_jax is not None:
        _line("backend", f"none: {no_jax}")
    elif not host.neuron or not start:
        _devices()
        if host.neuron:
            _line("", "Neuron's devices were left alone")
    else:
        findings += _started()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _line("host memory", f"{pages / 2**30:.1f} GiB, {os.cpu_count()} CPUs")
    cache = cache_dir()
    existing = next(p for p in (cache, *cache.parents) if p.exists())
    _line("cache", f"{cache} ({shutil.disk_usage(existing).free / 2**30:.0f} GiB free)")
    if shutil.which("nvidia-smi") and (no_jax is not None or backends.current().on_host):
        _line("gpu", f"an NVIDIA driver is here but jax does not use it: `{pip_install('gpu')}`")
    _neuron(host)
    for finding in findings:
        say(str(finding))
    if no_jax is not None:
        raise no_jax
    if any(finding.fails for finding in findings):
        raise typer.Exit(1)


def _line(label: str, text: object) -> None:
    say(f"{label:17}  {text}")


def _neuron(host: backends.Host) -> None:
    """Print what is here of Neuron; what is wrong with it on a host of its own is for findings to say."""
    if host.neuron:
        _line("neuron devices", f"{len(host.devices)}: {backends.ranges(host.devices)}" if host.devices else "none")
        _line("neuron driver", host.driver or "not loaded")
        packages = host.packages or {}
        _line("neuron packages", ", ".join(f"{n} {v}" for n, v in sorted(packages.items())) or "none known")
        own = host.compiler_directory and os.path.join(host.compiler_directory, "neuronx-cc")
        _line("neuronx-cc", own or host.compiler or "not found")
        held = "; ".join(f"process {h.pid}: {backends.ranges(h.devices)}" for h in host.holders)
        hidden = f"; the open files of {host.unseen} processes are for root to see" if host.unseen else ""
        _line("held cores", (held or "none seen") + hidden)
    plugin = host.plugin
    _line("neuron plugin", plugin)
    release = backends.sdk_of(host) if host.neuron else backends.installed_sdk(plugin.versions)
    sdk = release or backends.load_sdk()
    known = f"{sdk.version} of {sdk.released}"
    if release is None:
        here = "these packages are of no one release" if plugin.state == "installed" else "not here"
        known = f"{here}; the newest known is {known}"
    _line("neuron SDK", known)
    if not host.neuron:
        import jax

        for problem in backends.sdk_problems(sdk, jax.__version__, platform.python_version()):
            _line("", f"{problem}; there `{pip_install('neuron')}`" if problem.startswith("jax") else problem)
    _line("neuron", "trainfw has not run on Neuron hardware; --as neuron keeps its rules on the CPU")


def _started() -> list[backends.HostFinding]:
    """Start Neuron's devices and show them; what keeps them from starting, if something does."""
    try:
        _devices()
    except Exception as error:  # of several kinds
        return [backends.HostFinding(f"jax does not start on Neuron: {error}", "the runtime's log above may say more")]
    return []


def _devices() -> None:
    import jax

    _line("backend", backends.current())
    kinds = sorted({d.device_kind for d in jax.devices()})
    _line("devices", f"{jax.device_count()} ({', '.join(kinds)}), {jax.local_device_count()} in this process")
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        _line("device memory", f"{stats['bytes_limit'] / 2**30:.1f} GiB each")
