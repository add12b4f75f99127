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
        fill = [axis for axis, size in sizes.items() if size == -1]
        if num_devices % fixed if fill else num_devices != fixed:
            spelled = " * ".join(f"{axis}({size})" for axis, size in sizes.items())
            devices = f"{num_devices:,} device{'s' * (num_devices != 1)}"
            hint = _simulate(fixed, num_devices) if simulate else "; change parallel.<axis>"
            if fill:
                wrong = f": the fixed axes multiply to {fixed:,}, which does not divide {devices}"
            else:
                wrong = f" = {fixed:,}, but there {'is' if num_devices == 1 else 'are'} {devices}"
            raise UserError(f"{spelled}{wrong}{hint}")
        return cls(**sizes | dict.fromkeys(fill, num_devices // fixed))

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def batch_shards(self) -> int:
        """Count the parts into which the global batch is split."""
        return self.pipeline * self.data * self.fsdp * self.expert

    @property
    def batch_product(self) -> str:
        """Write the axes over which the batch is split: `data(2) * fsdp(4)`."""
        axes = [a for a in ("pipeline", "data", "fsdp", "expert") if a in ("data", "fsdp") or self.sizes[a] > 1]
        return " * ".join(f"{axis}({self.sizes[axis]:,})" for axis in axes)

    def batch_problem(self, rows: int, accumulation_steps: int) -> str:
        """Say why a global batch of so many rows does not divide, and what would; empty where it does."""
        shards = self.batch_shards
        parts = shards * accumulation_steps
        if rows % parts == 0:
            return ""
        ways = f"the nearest that do: {_nearest_multiples(rows, parts)}"
        if rows % shards == 0:
            each = rows // shards
            fewer = next(n for n in range(min(accumulation_steps, each), 0, -1) if each % n == 0)
            ways = f"train.accumulation_steps={fewer} makes it divide; {ways}"
        return (
            f"does not divide over {self.batch_product} * accumulation_steps({accumulation_steps}) = {parts:,}; {ways}"
        )

    def __str__(self) -> str:
        return " * ".join(f"{axis}({size})" for axis, size in self.sizes.items() if size > 1) or "one device"


def nearest_divisors(size: int, parts: int) -> str:
    """Suggest `; the nearest sizes that do: 64, 192` that a dim divides over, where it does not over so many parts.

    The largest that do not exceed `parts`: of all, and of those that leave the other parts to another axis.
    """
    below = next(n for n in range(min(size, parts), 0, -1) if size % n == 0)
    found = sorted({below, math.gcd(size, parts)} - {1}) or [1]
    return f"; the nearest size{'s' * (len(found) > 1)} that do{'es' * (len(found) == 1)}: {', '.join(map(str, found))}"


def context_problem(length: int, context: int, tensor: int) -> str:
    """Say why a sequence of so many tokens does not divide over these axes, and what would; empty where it does.

    Over context in two chunks a device (see `zigzag_order`), and what lies on one of these devices over tensor.
    """
    parts = context * math.lcm(2, tensor) if context > 1 else tensor
    if length % parts == 0:
        return ""
    over = [f"2 * context({context})"] * (context > 1)
    if tensor > 1:
        over.append(f"context({context}) * tensor({tensor})" if context > 1 else f"tensor({tensor})")
    lengths = _nearest_multiples(length, parts)
    return f"does not divide over {' and over '.join(over)}; the nearest lengths that do: {lengths}"


def _nearest_multiples(size: int, parts: int) -> str:
    """Write the multiples below and above; `parts` itself where nothing is below."""
    return " or ".join(f"{n * parts:,}" for n in ((size // parts, size // parts + 1) if size > parts else (1,)))


def layers_problem(num_layers: int, stages: int, chunks: int, period: int = 1) -> str:
    """Say why the layers, whose kinds repeat with `period`, do not divide over the stages, and what would; or nothing.

    All chunks are run by one program, so each is the same number of whole periods.
    """
    parts = stages * chunks
    if stages == 1 or num_layers % (parts * period) == 0:
        return ""
    over = f"pipeline({stages})" + (f" * interleave({chunks}) = {parts}" if chunks > 1 else "")
    if num_layers % period:
        return f"does not divide over {over}: {num_layers} layers are no whole number of periods of {period} layers"
    periods = num_layers // period
    divisors = [n for n in range(1, periods + 1) if periods % n == 0]
    nearest = [max(n for n in divisors if n < parts), *[n for n in divisors if n > parts][:1]]
    unit = f" in whole periods of {period} layers" if period > 1 else ""
    product = "products" if chunks > 1 else "numbers of stages"
    return f"does not divide over {over}{unit}; the nearest {product} that do: {', '.join(map(str, nearest))}"


def microbatches_problem(microbatches: int, stages: int, rows: int) -> str:
    """Why so many of a pipeline's microbatches cannot be of so many rows a device, and what can; empty where they can.

    All stages pass on microbatches of their own rows, as many each.
    """
    if microbatches % stages == 0 and rows % (microbatches // stages) == 0:
        return ""
    legal = [stages * n for n in range(1, rows + 1) if rows % n == 0]
    return (
        f"expected a multiple of parallel.pipeline = {stages} that divides the rows of {stages} stages, "
        f"{rows * stages:,}: {', '.join(map(str, legal))}"
    )


def bubble(stages: int, microbatches: int, chunks: int = 1) -> float:
    """Compute the share of iterations in which a stage has nothing to do, of `microbatches` over all stages."""
    return (stages - 1) / (microbatches * chunks + stages - 1)


def _simulate(needed: int, found: int) -> str:
    if needed > MAX_SIMULATED:
        return ""
    fewer = "" if needed > found else ", set one axis to -1 to fill the devices,"
    how = f"trainfw.simulate(devices={needed}), --devices {needed}"
    return f"; change parallel.<axis>{fewer} or simulate {needed} devices on a CPU: {how}"
