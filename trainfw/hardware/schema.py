"""Schemas of chip files and topology files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from trainfw.config import Config, PositiveInt, invalid
from trainfw.errors import did_you_mean
from trainfw.hardware.figures import Figure, Flops, Number, Price, Rate, Seconds, Share, Size


class LinkFile(Config):
    """One kind of link."""

    description: str
    bandwidth: Rate
    """Bandwidth of one link, or of one chip's port into a switch or network; one direction."""
    latency: Seconds
    """Latency of one hop."""
    efficiency: Share | None = None
    """Share of the bandwidth that large collectives reach. Left out, all of it."""


class EfficiencyRangeFile(Config):
    """Range of the efficiencies of matrix products that published runs of a chip reach."""

    low: PositiveFloat
    high: PositiveFloat
    source: str


class TensorEngineFile(Config):
    """A systolic array of one physical core: what it multiplies, it cuts into tiles, and pads."""

    rows: PositiveInt
    """Places along the contracted dim."""
    columns: PositiveInt
    """Places along the free dim of the operand that stays."""
    moving: PositiveInt
    """Longest part of the other operand's free dim that goes through at once."""
    moving_cycles: PositiveInt
    """Cycles that the shortest such part takes."""
    source: str


class MatmulRatesFile(Config):
    """Measured rates of products (m, k) x (k, n), for a chip for which no formula says how they depend on the shape."""

    sizes: list[PositiveInt]
    """Sizes of each of m, n and k that were measured, the least first."""
    rates: dict[str, list[list[list[PositiveFloat]]]]
    """Rates of the whole chip in FLOP/s, by dtype: [size of m][size of n][size of k]."""
    source: str

    @model_validator(mode="after")
    def _is_a_cube(self) -> MatmulRatesFile:
        count = len(self.sizes)
        _check_rising(self.sizes)
        for dtype, cube in self.rates.items():
            if {len(cube), *map(len, cube), *(len(row) for plane in cube for row in plane)} != {count}:
                invalid(f"rates.{dtype}", f"expected {count} x {count} x {count} rates, one for each of sizes")
        return self


class ElementwiseRatesFile(Config):
    """Measured rates of elementwise operations and reductions, where they do not reach the bandwidth of memory."""

    sizes: list[PositiveInt]
    """Sizes of the largest array that a kernel reads or writes, in bytes, the least first."""
    rates: list[PositiveFloat]
    """Bytes/s that the whole chip moves, as plans count them, one for each of sizes."""
    source: str

    @model_validator(mode="after")
    def _is_a_curve(self) -> ElementwiseRatesFile:
        _check_rising(self.sizes)
        if len(self.rates) != len(self.sizes):
            invalid("rates", f"expected {len(self.sizes)}, one for each of sizes")
        return self


def _check_rising(sizes: list[PositiveInt]) -> None:
    if sorted(set(sizes)) != sizes or len(sizes) < 2:
        invalid("sizes", f"{sizes}: expected two or more, each larger than the one before")


class ServingFile(Config):
    """Shares and times that a model reaches on a chip as it writes tokens, fitted on published runs."""

    weights_efficiency: Share
    """Share of the bandwidth of memory at which weights are read."""
    memory_efficiency: Share
    """Share of it that all other reads and writes reach: the cache's, scattered by slot and head, and activations'."""
    layer_time: Seconds
    """Fixed time of a layer: of starting its operations and its collectives, or of threads that wait for each other."""


class ChipFile(Config):
    """One kind of chip (`chips/<name>.yaml`). Figures are of the whole chip."""

    description: str
    neuron_family: Literal["inf2", "trn1", "trn2", "trn3"] | None = None
    """Name by which Neuron's rules tell chips apart. Left out, rules count as on the chip that takes least."""
    cores: PositiveInt
    """Physical cores of a chip."""
    device_kinds: dict[int, list[str]]
    """The `device_kind` that JAX reports, by LNC (physical cores that make one logical core, hence one JAX device).

    The first LNC is the default.
    """
    peak_flops: dict[str, Flops]
    """Dense peak of the chip by dtype."""
    matmul_efficiency: Share | None = None
    """Share of the peak that matrix products of large, even shapes reach in training. Left out, all of it."""
    matmul_efficiency_range: EfficiencyRangeFile | None = None
    """Range of `matmul_efficiency`, for that of a plan's time. Left out, as far as a plan allows
    where only one run is known."""
    tensor_engine: TensorEngineFile | None = None
    """Tensor engine of a core. Left out, odd shapes cost nothing extra."""
    matmul_rates: MatmulRatesFile | None = None
    """Measured rates, in place of `matmul_efficiency` and `tensor_engine`."""
    hbm_size: Size | None = None
    hbm_bandwidth: Rate | None = None
    elementwise_rates: ElementwiseRatesFile | None = None
    """Measured rates. Left out, elementwise operations and reductions run at `hbm_bandwidth`."""
    on_chip_memory: Size | None = None
    """SBUF (or cache) of the chip."""
    collective_cores: Number | None = None
    """Cores that only orchestrate collectives."""
    core_overhead: Size | None = None
    """Device memory that the runtime takes for itself on every physical core."""
    serving: ServingFile | None = None
    """Left out, memory is read at all of its bandwidth and a layer costs nothing more: times are lower bounds."""
    on_chip: LinkFile | None = None
    """Link between the cores of the chip, which share the bandwidth. Left out, the chip is one core."""


class DimensionFile(Config):
    """One physical dimension of the grid of chips."""

    name: str
    size: PositiveInt
    kind: Literal["ring", "line", "switch", "network"]
    link: str
    """The one of `links` that joins neighbours along it."""
    inside_instance: bool = True


class SplitFile(Config):
    """Cut of a dimension in two parts, the outer first."""

    parts: tuple[str, str] = Field(strict=False)
    order: list[list[int]]
    """[outer][inner] -> index along the dimension."""


class GroupsFile(Config):
    """Sets of cores of one instance that may form collective groups, as far as documents say."""

    cover: list[list[str]]
    """Dims (or parts of dims) that each mesh axis covers, innermost axis first; together the whole instance."""
    source: str


class ReliabilityFile(Config):
    """Rate at which instances fail, and the cost of a failure."""

    instance_mtbf: Seconds
    """Mean time between failures of one instance that stop the job."""
    detection: Seconds
    """Time until the job knows."""
    restart: Seconds
    """Time from then to the first step, without reading the checkpoint."""
    repair: Seconds
    """Time until an instance that failed, or another in its place, can be used again."""


class StorageFile(Config):
    """Storage for checkpoints."""

    bandwidth: Rate
    """Bandwidth of one instance."""
    total: Rate
    """Bandwidth of the file system, however many instances use it."""
    host_copy: Rate
    """Bandwidth from the memory of one chip to that of its host."""


class PriceFile(Config):
    """Price of one unit."""

    hourly: Price
    terms: str
    """Terms it is for, with the region: `on demand, Linux, us-east-1`."""
    date: str
    """Day on which it was the price, year first."""


class KubernetesFile(Config):
    """Names and resources of nodes of this kind in Kubernetes."""

    instance_type: str | None = None
    """The nodes' label `node.kubernetes.io/instance-type`."""
    devices: str
    """The resource by which pods ask for chips."""
    efa: int = Field(default=0, ge=0)
    """EFA interfaces of an instance, the resource `vpc.amazonaws.com/efa`."""
    unit_label: str | None = None
    """The nodes' label whose value the instances of one unit share, where a unit is several."""
    sources: list[str]


class TopologyFile(Config):
    """One unit of rentable hardware (`topologies/<name>.yaml`)."""

    description: str
    chip: str | ChipFile
    """A file of chips/, or all that one would hold."""
    extends: str | None = None
    """Take what this file leaves out from that topology."""
    dims: list[DimensionFile]
    """Dimensions of the grid of chips, outermost first: chips are numbered with the last fastest."""
    links: dict[str, LinkFile]
    network: LinkFile | None = None
    """Link between units; the bandwidth is one chip's. Left out, units cannot be joined."""
    splits: dict[str, list[SplitFile]] = {}
    """Ways to cut each dim, of which those count that are of its size (cores of a chip are as many as LNC makes)."""
    groups: dict[int, list[GroupsFile]] | None = None
    """Groups by LNC. Null: no document restricts or lists them."""
    rules: Literal["neuron"] | None = None
    """Name of the backend whose rules on collective groups hold here."""
    core_links: list[list[int]] = []
    """Cores of an instance that the links join, at the default LNC, where a document shows it: tests hold us to it."""
    host_memory: Size | None = None
    """Host memory of one unit."""
    reliability: ReliabilityFile
    """Figures that are left out, here and in `storage`, are those of cluster.yaml."""
    storage: StorageFile
    price: PriceFile | None = None
    """Left out where no dated source gives it; what `extends` takes over leaves it out, for it is of one unit alone."""
    kubernetes: KubernetesFile | None = None
    """Names in Kubernetes. Left out where no document says."""
    totals: dict[str, Figure] = {}
    """Figures of the whole unit by the source (`cores`, `hbm_size`, a dtype's FLOP/s, ...): tests hold us to them."""
    sources: list[str]

    @model_validator(mode="after")
    def _dims_have_links(self) -> TopologyFile:
        for number, dim in enumerate(self.dims):
            if dim.link not in self.links:
                invalid(f"dims.{number}.link", f"{dim.link!r}: not among links{did_you_mean(dim.link, self.links)}")
        return self
