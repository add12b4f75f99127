from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from trainfw.parallel.config import AXES
from trainfw.parallel.layout import Layout
from trainfw.parallel.placement import Placement


def physical_order(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Sort devices by host and then by number on it: the physical numbering of cores, as a topology numbers them.

    Processes are numbered by their hosts' place (see `backends.connect`), so no more than this is needed.
    """
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def make_mesh(layout: Layout, devices: Sequence[jax.Device], placement: Placement | None = None) -> Mesh:
    """Make the mesh of `layout` over `devices`: in their order, last axis fastest, or placed on their topology."""
    shape = tuple(layout.sizes.values())
    arranged = np.asarray(devices) if placement is None else np.asarray(physical_order(devices))[placement.order]
    # Auto: the partitioner propagates shardings from the constraints; explicit types are JAX's newer default.
    return Mesh(arranged.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
