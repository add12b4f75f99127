from __future__ import annotations

import math
from dataclasses import dataclass

from trainfw.backends import MAX_SIMULATED
from trainfw.errors import UserError
from trainfw.parallel.config import AXES, ParallelConfig


@dataclass(frozen=True)
class Layout:
    """The sizes of the mesh axes, every one concrete."""

    pipeline: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    @classmethod
    def resolve(cls, config: ParallelConfig, num_devices: int, *, simulate: bool = False) -> Layout:
        """Fill the axis that is -1 so that the product is `num_devices`; `simulate` tells how to have another number.

        Raises UserError with the whole product spelled out when it cannot be.
        """
        sizes = {axis: getattr(config, axis) for axis in AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        hint = _simulate(fixed, num_devices) if simulate else "; change parallel.<axis>"
        spelled = " * ".join(f"{axis}({size})" for axis, size in sizes.items())
        fill = [axis for axis, size in sizes.items() if size == -1]
        if fill and num_devices % fixed == 0:
            sizes[fill[0]] = num_devices // fixed
        elif fill:
            raise UserError(
                f"{spelled}: the fixed axes multiply to {fixed}, which does not divide {num_devices} "
                f"device{'s' * (num_devices != 1)}{hint}"
            )
        elif fixed != num_devices:
            raise UserError(
                f"{spelled} = {fixed}, but there {'is' if num_devices == 1 else 'are'} {num_devices} "
                f"device{'s' * (num_devices != 1)}{hint}"
            )
        return cls(**sizes)

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def batch_shards(self) -> int:
        """Into how many parts the global batch is split."""
        return self.data * self.fsdp * self.expert

    def __str__(self) -> str:
        return " * ".join(f"{axis}({size})" for axis, size in self.sizes.items() if size > 1) or "one device"


def _simulate(needed: int, found: int) -> str:
    if needed > MAX_SIMULATED:
        return ""
    fewer = "" if needed > found else ", set one axis to -1 to fill the devices,"
    return f"; change parallel.<axis>{fewer} or simulate {needed} devices on a CPU with --devices {needed}"
