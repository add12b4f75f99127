from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from trainfw.config import Config, PositiveInt, invalid
from trainfw.errors import UserError, did_you_mean
from trainfw.hardware.topology import Topology, load_topology, topology_names


class HardwareConfig(Config):
    """Hardware that the recipe is meant to run on. Left out, it runs on the devices it finds."""

    topology: str | None = None
    """A known topology (`trn2.48xlarge`, `h100-8`, ...), or the path of a file that describes one: the run then
    insists on its number of devices."""
    count: PositiveInt = 1
    """Number of units of that topology, joined by their network."""
    lnc: Literal[1, 2] | None = None
    """Physical NeuronCores in a logical one, hence in one JAX device. Left out, the chip's default."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Replace figures of the topology by dotted name, such as `links.neuronlink.bandwidth: 128 GB/s`."""
    dollars_per_chip_hour: PositiveFloat | None = None
    """Price of a chip, for plans."""
    sdk: str | float | None = None
    """The Neuron SDK whose limits and packages count. Left out, the newest that trainfw has a profile of."""
    compiler_flags: list[str] = Field(default_factory=list)
    """More options of neuronx-cc, after trainfw's own."""
    fsdp_overlap: bool = True
    """Let Neuron overlap FSDP's collectives with compute (NEURON_FSDP and others, which AWS calls experimental)."""
    fused_attention: bool = False
    """Plan the time of attention as a fused kernel's, its scores kept on chip. (Runs take one wherever the backend has
    it; memory is planned as without.)"""

    @model_validator(mode="after")
    def _names_something_known(self) -> HardwareConfig:
        if self.topology is None:
            for field in ("count", "lnc", "parameters"):
                if getattr(self, field) != type(self).model_fields[field].get_default(call_default_factory=True):
                    invalid(field, f"{field} = {getattr(self, field)} needs hardware.topology to say of what")
            return self
        if not self.topology.endswith(".yaml") and self.topology not in topology_names():
            invalid("topology", f"unknown topology {self.topology!r}{did_you_mean(self.topology, topology_names())}")
        try:
            self.load()
        except UserError as error:
            field = next((f for f in ("lnc", "parameters", "topology") if str(error).startswith(f)), "count")
            invalid(field, str(error))
        return self

    def load(self) -> Topology | None:
        """Load the topology; None when the recipe names none."""
        if self.topology is None:
            return None
        return load_topology(self.topology, count=self.count, lnc=self.lnc, parameters=self.parameters)
