from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

_DIRECTORY = Path(__file__).parent / "topologies"


@dataclass(frozen=True)
class Topology:
    """One unit of rentable hardware, as far as a run needs it."""

    name: str
    description: str
    devices: int
    """JAX devices in one unit (on Trainium: logical NeuronCores at the default LNC)."""
    device_kinds: tuple[str, ...]
    """The `device_kind` strings under which JAX reports these devices."""
    peak_flops: dict[str, float]
    """Dense peak of one device, FLOP/s by compute dtype."""
    sources: tuple[str, ...]


def topology_names() -> list[str]:
    return sorted(path.stem for path in _DIRECTORY.glob("*.yaml"))


@functools.cache
def load_topology(name: str) -> Topology:
    import yaml

    values = yaml.safe_load((_DIRECTORY / f"{name}.yaml").read_text())
    return Topology(
        name=name,
        description=values["description"],
        devices=values["devices"],
        device_kinds=tuple(values["device_kinds"]),
        peak_flops={dtype: float(flops) for dtype, flops in values["peak_flops"].items()},
        sources=tuple(values["sources"]),
    )


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s at `dtype`, or None where no source gives it (never a guess)."""
    for name in topology_names():
        topology = load_topology(name)
        if device_kind in topology.device_kinds:
            return topology.peak_flops.get(dtype)
    return None
