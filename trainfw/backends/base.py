from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Backend:
    """One kind of device, and what it asks of programs and of the host."""

    name: str
    """Whose contract holds: `cpu`, `gpu` or `neuron`."""
    platform: str
    """JAX's name of the platform that runs the programs: `name`, or `cpu` when the backend is simulated."""
    compiler_options: dict[str, str] = field(default_factory=dict)
    """XLA options with which the training step is compiled."""
    rules: Literal["neuron"] | None = None
    """Whose restrictions on programs are enforced."""
    host_init: bool = False
    """Parameters are initialised on the host's CPU and then placed, so that no random numbers are drawn on a device."""
    host_generate: bool = False
    """Text is sampled on the host's CPU: sorting, conditions and growing caches are not for the devices."""
    grouped_matmul: bool = True
    """jax.lax.ragged_dot is for the devices: native on GPUs; on CPUs, which are for tests, by masks. No document of
    Neuron names such an operator."""

    @property
    def simulated(self) -> bool:
        return self.platform != self.name

    def __str__(self) -> str:
        return f"{self.name} (simulated on the CPU)" if self.simulated else self.name
