from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainfw.config import Config

ATTENDED = "attended"
"""Name, for policies of `jax.checkpoint`, of what an attention kernel keeps of its result for the backward pass."""
ROTATED = "rotated"
"""Name of the queries and keys that it reads: what they are made of is then not needed again."""


@dataclass(frozen=True)
class Backend:
    """One kind of device, and what it asks of programs and of the host."""

    name: str
    """Name of the device whose contract holds: `cpu`, `gpu` or `neuron`."""
    platform: str
    """JAX's name of the platform that runs the programs: `name`, or `cpu` when the backend is simulated."""
    compiler_options: dict[str, str] = field(default_factory=dict)
    """XLA options with which the training step is compiled."""
    init_options: dict[str, str] = field(default_factory=dict)
    """XLA options with which the first state is computed: by the host, where `host_init` says so."""
    has_sdk: bool = False
    """Runtime, compiler and their environment come as one SDK, whose release counts."""
    restricts_groups: bool = False
    """Collectives run only among groups of cores of documented shapes."""
    one_process_an_instance: bool = False
    """A process takes all devices of its instance; else they may be shared out."""
    chooses_algorithms: bool = False
    """Collectives inside an instance take one of several algorithms, by their size."""
    tree_algorithm: str = "tree"
    """Name of the algorithm that plans assume between instances, of log2 hops."""
    has_monitor: bool = False
    """Counters of the device can be read while a run goes on."""
    times_kernels: bool = False
    """Compiling runs kernels on the device to choose among them, for which the device must be free."""
    host_init: bool = False
    """Parameters are initialised on the host's CPU and then placed, so that no random numbers are drawn on a device."""
    host_generate: bool = False
    """Text is sampled on the host's CPU: sorting, conditions and growing caches are not for the devices."""
    grouped_matmul: bool = True
    """jax.lax.ragged_dot is for the devices: native on GPUs; on CPUs, which are for tests, by masks. No document of
    Neuron names such an operator."""
    checks_donation: bool = False
    """The first step of a session is looked at, where its state was donated: runs disagree on whether that is right."""
    top_k: Literal["native", "iterative"] = "native"
    """Way to choose the largest of many: `jax.lax.top_k`, or maxima alone where a chip refuses that or nothing
    says that it takes it."""
    wide_caches: bool = False
    """Keys and values of serving are kept in float32 where nothing else is asked for: XLA's CPU backend widens a whole
    bfloat16 array to write a part of it."""
    fuses_all_attention: bool = True
    """A fused kernel is called for attention that is not causal, too."""
    fp8_dtypes: tuple[str, str] = ("float8_e4m3fn", "float8_e5m2")
    """Dtypes of operands in products of 8 bits: in the forward pass, and of gradients."""
    casts_once: bool = False
    """Weights are cast to the compute dtype once a step, and not for each of its microbatches, on one device: they are
    held twice for less work. Measured to pay on a GPU."""

    @property
    def simulated(self) -> bool:
        return self.platform != self.name

    @property
    def on_host(self) -> bool:
        """Tell whether programs run on this machine's CPU, and in its memory."""
        return self.platform == "cpu"

    def __str__(self) -> str:
        return f"{self.name} (simulated on the CPU)" if self.simulated else self.name


@dataclass(frozen=True)
class AttentionRequest:
    """Needs of one call of attention, in the sizes of one device."""

    query_length: int
    key_length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    causal: bool = True
    """A query sees keys up to its own index; else all, or those of a mask (`segments`)."""
    segments: bool = False
    """Tokens see only their own segment."""
    window: int | None = None
    """Keys that a query sees, itself included."""
    softcap: float | None = None
    lnc: int | None = None
    """Physical cores in a logical one. Left out, what the devices say."""
    batch: int = 1
    """Rows of the batch."""


@dataclass(frozen=True)
class DecodingRequest:
    """Needs of the products of one token of each row."""

    dtype: str
    """Dtype of activations."""
    rows: int
    kept: str
    """Form in which weights are kept: a dtype, or nf4."""


@dataclass(frozen=True)
class DecodingProduct:
    """Product of a few rows and a weight."""

    multiply: Callable[..., Any]
    """(x, weight) or, of int8, (x, codes, scales) -> f32."""
    turned: bool
    """Weights are (out, in)."""
    compiler_options: Mapping[str, str]
    """Options of XLA for a program of such products."""


@dataclass(frozen=True)
class MatmulRequest:
    """Needs of a product of activations and weights: `x_ND @ w_DF`, or with `over_rows` the sum over N of
    `x_ND` times `y_NF`, in float32."""

    dtype: str
    over_rows: bool = False


class BackendConfig(Config):
    """Use of the devices by programs, whatever the devices are."""

    donate: bool = True
    """Let the step write the new training state over the old one. Without, it takes the memory of both, and the next
    step begins when it is done; the numbers are the same. For Neuron, where one measured run had to turn it off (an
    error of must-alias donation) and another was right with it."""
