"""What a chip file and a topology file hold."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainfw.config import Config, PositiveInt
from trainfw.hardware.figures import Figure

DimensionKind = Literal["ring", "line", "switch", "network"]


class LinkFile(Config):
    """One kind of link."""

    description: str
    bandwidth: Figure
    """Of one link, or of one chip's port into a switch or network; one direction."""
    latency: Figure
    """Of one hop."""
    efficiency: Figure | None = None
    """Share of the bandwidth that large collectives reach. Left out, all of it."""


class TensorEngineFile(Config):
    """A systolic array of one physical core: what it multiplies, it cuts into tiles, and pads."""

    rows: PositiveInt
    """Places along the contracted dim."""
    columns: PositiveInt
    """Along the free dim of the operand that stays."""
    moving: PositiveInt
    """Longest part of the other operand's free dim that goes through at once."""
    moving_cycles: PositiveInt
    """Cycles that the shortest such part takes."""
    source: str


class ChipFile(Config):
    """One kind of chip (`chips/<name>.yaml`). Figures are of the whole chip."""

    description: str
    cores: PositiveInt
    """Physical cores of a chip."""
    device_kinds: dict[int, list[str]]
    """By LNC (physical cores that make one logical core, hence one JAX device): the `device_kind` JAX reports.

    The first LNC is the default.
    """
    peak_flops: dict[str, Figure]
    """Dense peak of the chip by dtype."""
    matmul_efficiency: Figure | None = None
    """Share of the peak that matrix products of large, even shapes reach in training. Left out, all of it."""
    tensor_engine: TensorEngineFile | None = None
    """Left out, odd shapes cost nothing extra."""
    hbm_size: Figure | None = None
    hbm_bandwidth: Figure | None = None
    on_chip_memory: Figure | None = None
    """SBUF (or cache) of the chip."""
    collective_cores: Figure | None = None
    """Cores that only orchestrate collectives."""
    core_overhead: Figure | None = None
    """Device memory that the runtime takes for itself on every physical core."""
    on_chip: LinkFile | None = None
    """Between the cores of the chip, which share the bandwidth. Left out, the chip is one core."""


class DimensionFile(Config):
    """One physical dimension of the grid of chips."""

    name: str
    size: PositiveInt
    kind: DimensionKind
    link: str
    """Which of `links` joins neighbours along it."""
    inside_instance: bool = True


class SplitFile(Config):
    """How a dimension is cut in two parts, the outer first."""

    parts: tuple[str, str] = Field(strict=False)
    order: list[list[int]]
    """[outer][inner] -> index along the dimension."""

    @property
    def size(self) -> int:
        """Of the dimension it cuts."""
        return sum(map(len, self.order))


class GroupsFile(Config):
    """Which sets of cores of one instance may form collective groups, as far as documents say."""

    cover: list[list[str]]
    """Dims (or parts of dims) that each mesh axis covers, innermost axis first; together the whole instance."""
    source: str


class TopologyFile(Config):
    """One unit of rentable hardware (`topologies/<name>.yaml`)."""

    description: str
    chip: str | ChipFile
    """A file of chips/, or all that one would hold."""
    extends: str | None = None
    """Take what this file leaves out from that topology."""
    dims: list[DimensionFile]
    """Of the grid of chips, outermost first: chips are numbered with the last fastest."""
    links: dict[str, LinkFile]
    network: LinkFile | None = None
    """Between units; the bandwidth is one chip's. Left out, units cannot be joined."""
    splits: dict[str, SplitFile] = {}
    """By dim."""
    groups: dict[int, list[GroupsFile]] | None = None
    """By LNC. Null: no document restricts or lists them."""
    rules: Literal["neuron"] | None = None
    """Whose rules on collective groups hold here."""
    core_links: list[list[int]] = []
    """Which cores of an instance the links join, at the default LNC, where a document shows it."""
    host_memory: Figure | None = None
    """Of one unit."""
    totals: dict[str, Figure] = {}
    """What the source says of the whole unit (`cores`, `hbm_size`, a dtype's FLOP/s, ...): tests hold us to it."""
    sources: list[str]
