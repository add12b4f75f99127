"""Place of an instance in its UltraServer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys/class/neuron_device")


@dataclass(frozen=True, order=True)
class Place:
    """One host's place, as the driver elected it (aws-neuron-driver fca19f7d v3/neuron_pelect.c).

    Sorted, places are in the order of processes: the instances of an UltraServer together, around its ring
    (aws-neuron-sdk 2.32.0 src/k8/k8s-ultraserver-init-script.sh).
    """

    server_id: str
    """Shared by the instances of one UltraServer."""
    node_id: int
    """Around the ring of instances: 0-1-2-3-0."""
    fqdn: str = ""


def read_place(nodes: int = 4, sysfs: Path | None = None) -> Place | None:
    """Read this host's place in an UltraServer of `nodes` instances; None where the driver gives none.

    Files as in aws-neuron-sdk 2.32.0 src/k8/k8s-ultraserver-init-script.sh.
    """
    root = sysfs or SYSFS
    for server, node in (("reservation_id", "node_id"), (f"server_id_{nodes}", f"node_id_{nodes}")):
        try:
            node_id = int((root / node).read_text())
            server_id = (root / server).read_text().strip()
        except (OSError, ValueError):
            continue
        if node_id >= 0 and server_id.strip("0"):  # -1 and zeros: the election has not been held
            return Place(server_id, node_id)
    return None
