from __future__ import annotations

import os
import sys

from trainfw.backends.base import Backend
from trainfw.errors import UserError

_HOST_DEVICES = "--xla_force_host_platform_device_count="

CPU = Backend(
    "cpu",
    # Else the CPU pipeline drops remat's optimization barriers before it schedules, and recomputes every unrolled
    # layer at once: all of the work and none of the memory saved.
    compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"},
)
GPU = Backend("gpu")
# Neuron's environment, flags and kernels are not built yet: `current` refuses the platform by name.
BACKENDS = {backend.name: backend for backend in (CPU, GPU)}


MAX_SIMULATED = 2048
"""The most devices that one process is known to simulate."""


def prepare(devices: int | None = None) -> None:
    """Set up the environment in which jax is to be imported.

    `devices`: simulate this many devices on the CPU. Raises UserError when jax has already been started with
    another number, since it reads the number only once.
    """
    # XLA's own warnings (such as about the CPU the cache was compiled on) are not for users of recipes.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if devices is None:
        return
    if not 1 <= devices <= MAX_SIMULATED:
        raise UserError(
            f"--devices {devices}: expected a positive number of simulated CPU devices, {MAX_SIMULATED} at most"
        )
    before = dict(os.environ)
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(_HOST_DEVICES)]
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"{_HOST_DEVICES}{devices}"])
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", "cpu")  # was read at import; means nothing once devices exist
        if jax.device_count() != devices:
            os.environ.clear()
            os.environ.update(before)
            raise UserError(
                f"devices = {devices}: jax is already running with {jax.device_count()}; "
                f"ask for simulated devices before anything uses jax"
            )


def current() -> Backend:
    """The backend of jax's default platform. Raises UserError for a platform trainfw has no backend for."""
    import jax

    name = jax.default_backend()
    if name not in BACKENDS:
        raise UserError(f"platform {name!r}: trainfw has no backend for it yet; it has {', '.join(BACKENDS)}")
    return BACKENDS[name]
