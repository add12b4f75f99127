from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable

from trainfw.cli.options import Devices
from trainfw.cli.terminal import say
from trainfw.errors import UserError, pip_install

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "pydantic")
_OPTIONAL = {"datasets": "datasets", "pyarrow": "datasets"}


def doctor(devices: Devices = None) -> None:
    """Show versions, devices and memory, and what is missing."""
    from trainfw import backends
    from trainfw.paths import cache_dir

    no_jax = None
    try:
        backends.prepare(devices)
    except UserError as error:
        no_jax = error

    import jax

    def line(label: str, text: object) -> None:
        say(f"{label:17}  {text}")

    line("trainfw", importlib.metadata.version("trainfw"))
    line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        line(package, importlib.metadata.version(package))
    for package, extra in _OPTIONAL.items():
        found = importlib.util.find_spec(package) is not None
        get = f"missing; Parquet and saved datasets need it: `{pip_install(extra)}`"
        line(package, importlib.metadata.version(package) if found else get)
    if no_jax is None:
        _devices(line)
    else:
        line("backend", f"none: {no_jax}")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    line("host memory", f"{pages / 2**30:.1f} GiB, {os.cpu_count()} CPUs")
    cache = cache_dir()
    existing = next(p for p in (cache, *cache.parents) if p.exists())
    line("cache", f"{cache} ({shutil.disk_usage(existing).free / 2**30:.0f} GiB free)")
    if shutil.which("nvidia-smi") and (no_jax or backends.current().name == "cpu"):
        line("gpu", f"an NVIDIA driver is here but jax does not use it: `{pip_install('gpu')}`")
    plugin = backends.detect_plugin()
    line("neuron plugin", plugin)
    release = backends.installed_sdk(plugin.versions)
    sdk = release or backends.load_sdk()
    known = f"{sdk.version} of {sdk.released}"
    if release is None:
        here = "these packages are of no one release" if plugin.state == "installed" else "not here"
        known = f"{here}; the newest known is {known}"
    line("neuron SDK", known)
    for problem in backends.sdk_problems(sdk, jax.__version__, platform.python_version()):
        line("", f"{problem}; there `{pip_install('neuron')}`" if problem.startswith("jax") else problem)
    line("neuron", "trainfw has not run on Neuron hardware; --as neuron keeps its rules on the CPU")
    if no_jax is not None:
        raise no_jax


def _devices(line: Callable[[str, object], None]) -> None:
    import jax

    from trainfw import backends

    line("backend", backends.current())
    kinds = sorted({d.device_kind for d in jax.devices()})
    line("devices", f"{jax.device_count()} ({', '.join(kinds)}), {jax.local_device_count()} in this process")
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        line("device memory", f"{stats['bytes_limit'] / 2**30:.1f} GiB each")
