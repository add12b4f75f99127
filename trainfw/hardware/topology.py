"""The physical graph: chips, cores, the dimensions they stand in, and the links between them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from trainfw.errors import UserError, did_you_mean
from trainfw.hardware.figures import Figure, parsed, units
from trainfw.hardware.schema import ChipFile, GroupsFile, KubernetesFile, LinkFile, PriceFile, SplitFile, TopologyFile

MAX_COUNT = 2**20
"""Units of a topology: far more than anyone can rent, and still quick to plan for."""

_HERE = Path(__file__).parent
_REPLACED = "the recipe"
"""The source of a figure that `hardware.parameters` gave."""


@dataclass(frozen=True)
class Dimension:
    """One physical dimension: of the cores of a chip, of the chips of a unit, or of units on a network."""

    name: str
    size: int
    kind: str
    """`chip` (cores of one chip), `ring`, `line`, `switch` or `network`."""
    bandwidth: float
    """Bytes/s of one link in one direction (of one chip's port, for a switch or network; of one core, in a chip)."""
    latency: float
    """Seconds a hop."""
    inside_instance: bool
    link: str
    """Dotted name of the kind of link, such as `links.neuronlink`: its figures are `<link>.bandwidth`, `.latency`."""
    description: str

    @property
    def wraps(self) -> bool:
        """Tell whether a link of its own joins the last place to the first."""
        return self.kind == "ring" and self.size > 2

    def distance(self, a: int, b: int) -> int:
        """Count the hops between two places along it."""
        if self.kind == "ring":
            return min((a - b) % self.size, (b - a) % self.size)
        return abs(a - b) if self.kind == "line" else int(a != b)


@dataclass(frozen=True)
class Link:
    """A physical link between chips `a` and `b` (or between chip `a` and switch `b`, a string)."""

    a: int
    b: int | str
    dim: str
    bandwidth: float


@dataclass(frozen=True, repr=False)
class Topology:
    """`count` units of rentable hardware and the network between them.

    Cores are *logical* (LNC applied: one core is one JAX device), numbered unit by unit and chip by chip, with the
    last dimension fastest: the order in which JAX numbers devices when processes are numbered by host position.
    """

    name: str
    description: str
    count: int
    lnc: int
    chip: ChipFile
    dims: tuple[Dimension, ...]
    """Outermost first: the network (when count > 1), the grid of chips, the cores of a chip (when more than one)."""
    splits: Mapping[str, tuple[SplitFile, ...]]
    """Ways to cut a dim in two; no two of them have a part of the same name."""
    groups: tuple[GroupsFile, ...] | None
    """Group shapes inside an instance that documents list. None: no document restricts or lists them."""
    rules: str | None
    """Name of the backend whose rules hold, such as `neuron`; None for none (`backends.for_topology`)."""
    figures: Mapping[str, Figure]
    """Every figure by its dotted name, such as `links.neuronlink.bandwidth`: what `hardware.parameters` overrides."""
    sources: tuple[str, ...]
    kubernetes: KubernetesFile | None = None
    """Names in Kubernetes; None where no document says."""
    price: PriceFile | None = None
    """Price of one unit; None where no dated source gives it."""

    @property
    def in_words(self) -> str:
        """Name the units: `trn2.48xlarge`, `4 x trn2.48xlarge`."""
        return f"{self.count} x {self.name}" if self.count > 1 else self.name

    def __repr__(self) -> str:
        return f"<Topology: {self.in_words}, {self.chips:,} chips, {self.cores:,} cores>"

    @property
    def cores_per_chip(self) -> int:
        return self.chip.cores // self.lnc

    @property
    def cores(self) -> int:
        return math.prod(dim.size for dim in self.dims)

    @property
    def chips(self) -> int:
        return self.cores // self.cores_per_chip

    @property
    def cores_per_instance(self) -> int:
        return math.prod(dim.size for dim in self.dims if dim.inside_instance)

    @property
    def instances(self) -> int:
        """Count the hosts, each with one process on Neuron."""
        return self.cores // self.cores_per_instance

    @property
    def device_kinds(self) -> tuple[str, ...]:
        return tuple(self.chip.device_kinds[self.lnc])

    @property
    def dollars_per_hour(self) -> float | None:
        """Return the price of all units, or None where no dated source gives it (never a guess)."""
        figure = self.figures.get("price.hourly")
        return None if figure is None else figure.number * self.count

    @property
    def is_cpu(self) -> bool:
        """Tell whether a machine of CPU alone is this hardware, rather than simulates it."""
        return self.device_kinds == ("cpu",)

    def peak_flops(self, dtype: str) -> float | None:
        """Return the dense peak of one core in FLOP/s, or None where no source gives it (never a guess)."""
        return self._of_core(f"chip.peak_flops.{dtype}")

    @property
    def hbm_size(self) -> float | None:
        """Return the bytes of device memory of one core."""
        return self._of_core("chip.hbm_size")

    @property
    def hbm_bandwidth(self) -> float | None:
        """Return the bytes/s of one core's share of the chip's memory."""
        return self._of_core("chip.hbm_bandwidth")

    def _of_core(self, key: str) -> float | None:
        figure = self.figures.get(key)
        return None if figure is None else figure.number / self.cores_per_chip

    @property
    def core_overhead(self) -> float:
        """Return the bytes of device memory that the runtime takes on one logical core, whatever its release."""
        figure = self.figures.get("chip.core_overhead")
        return 0.0 if figure is None else figure.number * self.lnc

    def is_replaced(self, figure: str) -> bool:
        """Tell whether a recipe's `hardware.parameters` gave this figure."""
        return figure in self.figures and self.figures[figure].source == _REPLACED

    def dim(self, name: str) -> Dimension:
        return next(dim for dim in self.dims if dim.name == name)

    @functools.cached_property
    def chip_dims(self) -> tuple[Dimension, ...]:
        """Return the dimensions of chips: all but the cores of a chip."""
        return tuple(dim for dim in self.dims if dim.kind != "chip")

    def split(self, dim: str, part: str) -> SplitFile:
        """Give the way to cut a dim that has this part."""
        return next(split for split in self.splits[dim] if part in split.parts)

    def coordinates(self, core: int) -> dict[str, int]:
        """Locate a core: its coordinate by dimension."""
        place: dict[str, int] = {}
        for dim in reversed(self.dims):
            core, place[dim.name] = divmod(core, dim.size)
        return place

    def chip_distance(self, a: int, b: int) -> int:
        """Count the hops between two chips: 0 the same, 1 joined by a link, through one switch or over the network."""
        hops = 0
        for dim in reversed(self.chip_dims):
            (a, x), (b, y) = divmod(a, dim.size), divmod(b, dim.size)
            hops += dim.distance(x, y)
        return hops

    def links(self) -> Iterator[Link]:
        """List every link inside one unit, once. A switch counts one link for each chip it serves."""
        dims = [dim for dim in self.chip_dims if dim.kind != "network"]
        chips = math.prod(dim.size for dim in dims)
        for i, dim in enumerate(dims):
            stride = math.prod(d.size for d in dims[i + 1 :])
            for chip in range(chips):
                at = chip // stride % dim.size
                if dim.kind == "switch":
                    if dim.size > 1:
                        yield Link(chip, f"{dim.name} switch {chip - at * stride}", dim.name, dim.bandwidth)
                elif at + 1 < dim.size or dim.wraps:
                    yield Link(chip, chip + ((at + 1) % dim.size - at) * stride, dim.name, dim.bandwidth)


def topology_names() -> list[str]:
    return sorted(path.stem for path in (_HERE / "topologies").glob("*.yaml"))


def load_topology(
    name: str, *, count: int = 1, lnc: int | None = None, parameters: Mapping[str, object] | None = None
) -> Topology:
    """Load `count` units of a known topology.

    Args:
        name: one of `topology_names()`, or the path of a topology file of one's own (ending in .yaml).
        lnc: logical-core configuration (physical cores in a logical one); the chip's default when left out.
        parameters: figures to replace, by dotted name (`links.neuronlink.bandwidth: 128 GB/s`).

    Raises UserError for a name, LNC or parameter that does not exist, and a file that is not a topology.
    """
    if not isinstance(name, str):
        raise UserError(
            f"hardware = {name!r:.60}: expected a topology, or the name of one: {', '.join(topology_names())}"
        )
    for key, value in {"count": count, "lnc": lnc}.items():
        if type(value) is not int and (key, value) != ("lnc", None):
            raise UserError(f"{key} = {value!r:.60}: expected a whole number")
    return _load(name, count, lnc, tuple(sorted((k, str(v)) for k, v in (parameters or {}).items())))


@functools.cache
def _load(name: str, count: int, lnc: int | None, parameters: tuple[tuple[str, str], ...]) -> Topology:
    file, chip = _files(name)
    if not 1 <= count <= MAX_COUNT:
        raise UserError(f"count = {count}: expected 1 to {MAX_COUNT:,}")
    if lnc is None:
        lnc = next(iter(chip.device_kinds))
    if lnc not in chip.device_kinds:
        expected = " or ".join(map(str, chip.device_kinds))
        raise UserError(f"lnc = {lnc}: {name} has LNC {expected} only")
    if count > 1 and file.network is None:
        raise UserError(f"{count} x {name}: no network joins them; expected count = 1")
    tree = {"chip": chip, "links": file.links, "network": file.network, "host_memory": file.host_memory}
    tree |= {"price": file.price}
    figures = dict(_figures(tree | {"reliability": file.reliability, "storage": file.storage}))
    for key, value in parameters:
        if key not in figures:
            raise UserError(f"parameters.{key}: {name} has no such figure{did_you_mean(key, figures)}")
        try:
            number, given = parsed(value)
        except ValueError as error:
            raise UserError(f"parameters.{key} = {error}") from None
        expected, says = parsed(figures[key].value)[1], f"parameters.{key} = {value!r}: expected"
        if given != expected:
            raise UserError(f"{says} {expected}{units(expected)}, such as {figures[key].value}")
        if key.endswith("efficiency") and not 0 < number <= 1:
            raise UserError(f"{says} a share, more than 0 and at most 1")
        if number == 0 and not key.endswith(".latency"):
            raise UserError(f"{says} more than 0")
        figures[key] = figures[key].model_copy(update={"value": value, "source": _REPLACED})

    def placed(name: str, size: int, kind: str, inside: bool, link: str, about: LinkFile) -> Dimension:
        bandwidth, latency = figures[f"{link}.bandwidth"].number, figures[f"{link}.latency"].number
        share = size if kind == "chip" else 1
        return Dimension(name, size, kind, bandwidth / share, latency, inside, link, about.description)

    dims = [placed(d.name, d.size, d.kind, d.inside_instance, f"links.{d.link}", file.links[d.link]) for d in file.dims]
    if count > 1:
        assert file.network is not None
        dims.insert(0, placed("network", count, "network", False, "network", file.network))
    middle, around = chip.matmul_efficiency, chip.matmul_efficiency_range
    if around is not None and (middle is None or not around.low <= middle.number <= around.high):
        raise UserError(
            f"topology {name!r}: chip.matmul_efficiency_range: {around.low} to {around.high}: expected a range around "
            f"chip.matmul_efficiency = {None if middle is None else middle.value}"
        )
    if chip.cores > lnc:
        if chip.on_chip is None:
            raise UserError(f"topology {name!r}: chip.on_chip: is required, between the {chip.cores} cores of a chip")
        dims.append(placed("core", chip.cores // lnc, "chip", True, "chip.on_chip", chip.on_chip))
    return Topology(
        name=name,
        description=file.description,
        count=count,
        lnc=lnc,
        chip=chip,
        dims=tuple(dims),
        # A split of the cores of a chip is written for one LNC.
        splits={
            d.name: tuple(s for s in file.splits.get(d.name, ()) if sum(map(len, s.order)) == d.size) for d in dims
        },
        groups=None if file.groups is None else tuple(file.groups[lnc]),
        rules=file.rules,
        figures=figures,
        sources=tuple(file.sources),
        kubernetes=file.kubernetes,
        price=file.price,
    )


def _files(name: str) -> tuple[TopologyFile, ChipFile]:
    own = name.endswith(".yaml")
    if not own and name not in topology_names():
        raise UserError(f"topology {name!r}: unknown{did_you_mean(name, topology_names())}")
    try:
        file = TopologyFile.model_validate(_read_topology(name))
        chip = file.chip
        if isinstance(chip, str):
            chip = ChipFile.model_validate(_read(_HERE / "chips" / f"{chip}.yaml"))
    except (ValidationError, OSError, TypeError, AttributeError, RecursionError) as error:
        if not own:
            raise  # a mistake of ours
        raise UserError(f"topology {name!r}: {_problem(error)}") from None
    return file, chip


def _problem(error: Exception) -> str:
    """Say what is wrong with a file, in one line."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, RecursionError):
        return "is nested too deeply, or extends itself"
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    # A chip is a name or a section, and what is wrong with either is reported.
    first = next((e for e in error.errors() if "str" not in e["loc"]), error.errors()[0])
    path = [str(part) for part in first["loc"] if part not in ("str", "ChipFile")]
    if first["type"] == "combination":
        path.append(first["ctx"]["field"])
    problem = {"missing": "is required", "extra_forbidden": "unknown key"}.get(first["type"], first["msg"])
    return f"{'.'.join(path)}: {problem}"


def _read(path: Path) -> dict[str, Any]:
    from trainfw import yaml_text

    try:
        return yaml_text.load(yaml_text.read_text(path), path.name)
    except UserError as error:
        raise UserError(f"topology {str(path)!r}: {str(error).removeprefix(f'{path}: ')}") from None


def _read_topology(name: str) -> dict[str, Any]:
    values = _read(Path(name) if name.endswith(".yaml") else _HERE / "topologies" / f"{name}.yaml")
    if not isinstance(values, dict):
        raise UserError(f"topology {name!r}: expected keys such as description, chip and dims")
    extended = values.get("extends")
    if isinstance(extended, str) and not extended.endswith(".yaml") and extended not in topology_names():
        raise UserError(f"topology {name!r}: extends = {extended!r}: unknown{did_you_mean(extended, topology_names())}")
    base = _read_topology(values["extends"]) if "extends" in values else _read(_HERE / "cluster.yaml")
    merged = {key: value for key, value in base.items() if key != "price"} | values
    for key in ("links", "splits", "reliability", "storage", "kubernetes"):
        if key in base and key in values:
            merged[key] = base[key] | values[key]
    return merged


def _figures(tree: Figure | dict[str, Any] | BaseModel, prefix: str = "") -> Iterator[tuple[str, Figure]]:
    if isinstance(tree, Figure):
        yield prefix, tree
    elif isinstance(tree, dict | BaseModel):
        for key, value in tree.items() if isinstance(tree, dict) else tree:  # a model lists its fields
            yield from _figures(value, f"{prefix}.{key}".lstrip("."))


@functools.cache
def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return the dense peak of one device in FLOP/s at `dtype`.

    None where no source gives it (never a guess), or several chips are of that kind whose peaks differ, as CPUs are.
    """
    peaks = {
        load_topology(name, lnc=lnc).peak_flops(dtype)
        for name in topology_names()
        for lnc, kinds in load_topology(name).chip.device_kinds.items()
        if device_kind in kinds
    }
    return peaks.pop() if len(peaks) == 1 else None
