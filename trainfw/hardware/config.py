from __future__ import annotations

from pydantic import model_validator

from trainfw.config import Config, PositiveInt, invalid
from trainfw.errors import did_you_mean


class HardwareConfig(Config):
    """What the recipe is meant to run on. Left out, it runs on the devices it finds."""

    topology: str | None = None
    """A known topology (`trn2.48xlarge`, `h100-8`, ...): the run then insists on its number of devices."""
    count: PositiveInt = 1
    """How many of that topology."""

    @model_validator(mode="after")
    def _topology_is_known(self) -> HardwareConfig:
        from trainfw.hardware.topology import topology_names

        if self.topology is not None and self.topology not in topology_names():
            invalid("topology", f"unknown topology{did_you_mean(self.topology, topology_names())}")
        if self.topology is None and self.count != 1:
            invalid("count", f"count = {self.count} needs hardware.topology to say of what")
        return self
