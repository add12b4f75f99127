from __future__ import annotations

import contextlib
import numbers
import os
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING

from trainfw.backends.base import Backend
from trainfw.backends.distributed import Wiring, read_wiring
from trainfw.backends.memory import share_freed_memory
from trainfw.backends.neuron import environment, plugin
from trainfw.backends.neuron.numbering import number_by_place
from trainfw.backends.neuron.place import read_place
from trainfw.errors import UserError, did_you_mean, expect, nearest
from trainfw.hardware import HardwareConfig, Topology
from trainfw.pieces import is_own, load_piece

if TYPE_CHECKING:
    import jax

_HOST_DEVICES = "--xla_force_host_platform_device_count="

CPU = Backend(
    "cpu",
    "cpu",
    # Else the CPU pipeline drops remat's optimization barriers before it schedules, and recomputes every unrolled
    # layer at once: all of the work and none of the memory saved.
    compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"},
    # It runs once, as fast and to the same bits, and takes less time to compile.
    init_options={"xla_backend_optimization_level": "1"},
    wide_caches=True,
)
GPU = Backend("gpu", "gpu", casts_once=True, times_kernels=True)
NEURON = Backend(
    "neuron",
    "neuron",
    has_sdk=True,
    restricts_groups=True,
    one_process_an_instance=True,
    chooses_algorithms=True,
    tree_algorithm="RDH",
    has_monitor=True,
    host_init=True,
    init_options=CPU.init_options,
    host_generate=True,
    grouped_matmul=False,
    checks_donation=True,
    fuses_all_attention=False,  # `nkilib_refuses`
    top_k="iterative",  # inf2: neuronx-cc 2.23 and 2.26 refuse topk (NCC_EVRF001, measured); others: see _NATIVE_TOP_K
    fp8_dtypes=("float8_e4m3", "float8_e5m2"),  # e4m3fn from Trainium3 on only (NCC_EVRF051)
)
BACKENDS = {backend.name: backend for backend in (CPU, GPU, NEURON)}
SIMULATED = {NEURON.name: replace(NEURON, platform="cpu", compiler_options=CPU.compiler_options, has_monitor=False)}
"""Backends that `prepare(as_backend=...)` takes: the contract of another one, kept on the CPU."""

_NATIVE_TOP_K = {"NC_v3", "NC_v3d"}
"""Kinds of Neuron devices that take `topk`: Trainium2's, where the compiler recommends it in place of a sort (what it
says with NCC_EVRF029). For Trainium3 nothing that was read says so, and Trainium1 has the cores of Inferentia2."""

GPU_MEMORY = "0.93"
"""Share of a GPU's memory that jax takes: what is left of 80 GB is enough for CUDA's own."""
MAX_SIMULATED = 2048
"""The most devices that one process is known to simulate."""

_PLATFORM_VARIABLES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
_PLATFORMS = ("cpu", "cuda", "gpu", "neuron", "rocm", "tpu")
"""Platforms that these variables may name."""

_as_backend: str | None = None
_lent = False
"""True where devices are simulated only because a plan or a check asked for them."""
_device_kind: ContextVar[str | None] = ContextVar("device_kind", default=None)
"""Kind of the devices that simulated ones stand for."""


def register(backend: Backend) -> None:
    """Add a backend of somebody's own: for JAX's platform `backend.platform`, and to be simulated under its name.

    Raises UserError where there is one already.
    """
    known = {one.name: one for one in BACKENDS.values()} | BACKENDS
    for name in (backend.name, backend.platform):
        if known.get(name, backend) != backend:
            raise UserError(f"backend {backend.name!r}: trainfw has one for {name!r} already; expected another name")
    BACKENDS[backend.platform] = backend
    SIMULATED[backend.name] = replace(backend, platform="cpu", compiler_options=CPU.compiler_options)


@contextlib.contextmanager
def standing_for(device_kind: str | None) -> Iterator[None]:
    """Let simulated devices stand for ones of a kind (as JAX names it), by which `current` then knows the chip."""
    token = _device_kind.set(device_kind)
    try:
        yield
    finally:
        _device_kind.reset(token)


def for_topology(topology: Topology | None) -> Backend:
    """Find the backend whose contract holds on a topology; the CPU's where a recipe names none."""
    if topology is None or topology.is_cpu:
        return CPU
    return GPU if topology.rules is None else BACKENDS[topology.rules]


def simulated(as_backend: str | None = None) -> Backend:
    """Return the backend that is `current` once `prepare` has been told to simulate devices; starts nothing."""
    return CPU if as_backend is None else SIMULATED[as_backend]


@contextlib.contextmanager
def contract(as_backend: str | None) -> Iterator[None]:
    """Keep the contract of another backend on the CPU meanwhile (see `prepare`)."""
    global _as_backend
    before, _as_backend = _as_backend, as_backend
    try:
        yield
    finally:
        _as_backend = before


def started() -> bool:
    """Tell whether jax has its devices already, which stay as they are."""
    if sys.modules.get("jax") is None:
        return False
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def simulate(devices: int, *, as_backend: str | None = None) -> None:
    """Simulate `devices` devices on the CPU, in place of this machine's own. Call it before anything uses jax.

    Args:
        devices: 1 to 2,048.
        as_backend: `neuron` keeps that backend's contract on the CPU.

    Raises UserError where jax has already started with another number of devices.
    """
    _expect_number(devices)
    prepare(devices, as_backend)


def _expect_number(devices: object) -> None:
    fits = (
        isinstance(devices, numbers.Integral) and not isinstance(devices, bool) and 1 <= int(devices) <= MAX_SIMULATED
    )
    expect("devices", devices, fits, f"a positive number of simulated CPU devices, {MAX_SIMULATED} at most")


def lend(devices: int) -> None:
    """Simulate devices for a program that is only read. What runs one then refuses to (`refuse_lent`)."""
    global _lent
    if not started():
        prepare(devices)
        _lent = True


def refuse_lent() -> None:
    """Raise UserError where this process simulates devices only because a plan or a check asked for them."""
    if _lent:
        import jax

        count = jax.device_count()
        raise UserError(
            f"this process has {count} simulated device{'s' * (count > 1)}, for a plan or a check made in it: train in "
            f"another process, or call trainfw.simulate(devices={count}) first, to train on these"
        )


def prepare(
    devices: int | None = None,
    as_backend: str | None = None,
    *,
    hardware: HardwareConfig | None = None,
    layout: Mapping[str, int] | None = None,
    scan_layers: bool = True,
) -> Wiring:
    """Set up the environment in which jax is to be imported; where this process stands among others.

    On UltraServers, processes that a launcher has numbered meet here, to be numbered by their hosts' places.

    Args:
        devices: simulate this many devices on the CPU.
        as_backend: `neuron`: run on the CPU under that backend's contract, which `current` then returns. Or one of your
            own: the name of one that was registered, or `package.module:NAME` of a `Backend`.
        hardware: what the recipe is for. Left out, this process runs on its own.
        layout: the sizes of the mesh axes (one may be -1), by which Neuron's environment is chosen.
        scan_layers: whether the program loops over its layers, as above.

    Raises UserError when jax has already been started with another number of devices, since it reads the number only
    once, where the environment contradicts itself or the hardware, and where JAX_PLATFORMS asks for what is not there.
    """
    global _as_backend, _lent
    expect("as_backend", as_backend, as_backend is None or isinstance(as_backend, str), "the name of a backend")
    if as_backend is not None and is_own(as_backend):
        own = load_piece(as_backend)
        register(own)
        as_backend = own.name
    if as_backend is not None and as_backend not in SIMULATED:
        raise UserError(
            f"as_backend = {as_backend!r}: is not a backend to simulate{did_you_mean(as_backend, SIMULATED)}"
        )
    if devices is not None:
        _expect_number(devices)
    topology = hardware.load() if hardware is not None else None
    wiring = read_wiring(os.environ, topology) if hardware is not None else Wiring()
    if devices is None and as_backend is None and plugin.on_neuron(os.environ):
        if wiring.order == "launcher's" and topology is not None and topology.instances > topology.count:
            wiring = number_by_place(wiring, read_place(topology.instances // topology.count))
        environment.apply(hardware or HardwareConfig(), wiring, layout=layout or {}, scan_layers=scan_layers)
        _tell_jax()
    else:  # of a GPU's memory jax takes three quarters if nothing is said
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY)
    # XLA's own warnings (such as about the CPU the cache was compiled on) are not for users of recipes.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if devices is not None or as_backend is not None:
        _simulate(devices)
    _as_backend, _lent = as_backend, False
    if wiring.process_count == 1:  # others are to meet first (`connect`)
        check_platforms()
    return wiring


def check_platforms() -> None:
    """Raise UserError where the environment asks jax for what is not there. Starts jax, unless it asks for the CPU."""
    asked = {name: os.environ[name] for name in _PLATFORM_VARIABLES if os.environ.get(name) not in (None, "", "cpu")}
    if not asked:
        return
    import jax
    from jax.extend.backend import clear_backends

    try:
        jax.devices()
    except Exception as error:  # of several kinds, some without words
        for name in _PLATFORM_VARIABLES:
            jax.config.update(name.lower(), "")
        found = sorted({"cpu", jax.default_backend()})
        clear_backends()
        for name in _PLATFORM_VARIABLES:
            jax.config.update(name.lower(), asked.get(name, ""))
        variable, value = next(iter(asked.items()))
        known = "," in value or nearest(value, _PLATFORMS) in (None, value)
        meant = "" if known else did_you_mean(value, _PLATFORMS)
        raise UserError(
            f"{variable} = {value!r}: jax has no such platform here{meant}; it has {', '.join(found)}; without the "
            "variable it takes the best"
        ) from error


def _tell_jax() -> None:
    """Set in an imported jax what it has already read of the environment."""
    if "jax" in sys.modules:
        import jax

        for name in ("jax_platforms", "jax_default_prng_impl"):
            jax.config.update(name, os.environ[name.upper()])


def _simulate(devices: int | None) -> None:
    before = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if devices is not None:
        if devices > 1:
            share_freed_memory()
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(_HOST_DEVICES)]
        os.environ["XLA_FLAGS"] = " ".join([*flags, f"{_HOST_DEVICES}{devices}"])
    if "jax" not in sys.modules:
        return
    import jax

    jax.config.update("jax_platforms", "cpu")  # was read at import; means nothing once devices exist
    if devices is not None and jax.device_count() != devices:
        os.environ.clear()
        os.environ.update(before)
        raise UserError(
            f"devices = {devices}: jax is already running with {jax.device_count()}; "
            f"ask for simulated devices before anything uses jax"
        )


def current() -> Backend:
    """Return the backend whose contract holds: of jax's default platform, or the one that `prepare` simulates.

    Every program of ours asks for it before it is compiled: from then on, what is compiled is kept (`keep_compiled`),
    except on Neuron, whose compiler has a cache of its own and must be found (`environment.put_compiler_on_path`).
    Raises UserError for a platform trainfw has no backend for.
    """
    import jax

    from trainfw.backends.compiled import keep_compiled, keep_nothing

    platform = jax.default_backend()
    if platform == NEURON.name:
        keep_nothing()
        environment.put_compiler_on_path()
    else:
        keep_compiled()
    if platform == "cpu":
        from trainfw.backends.cpu.lowering import leave_saved

        leave_saved(lambda: _as_backend is None)
    if _as_backend is not None:
        if platform != "cpu":
            raise UserError(f"as_backend = {_as_backend!r}: is for the CPU, but jax is already running on {platform!r}")
        return _of_chip(simulated(_as_backend), _device_kind.get())
    if platform not in BACKENDS:
        raise UserError(f"platform {platform!r}: trainfw has no backend for it; it has {', '.join(BACKENDS)}")
    return _of_chip(BACKENDS[platform], jax.devices()[0].device_kind)


def _of_chip(backend: Backend, device_kind: str | None) -> Backend:
    """Add to a backend what a kind of chip takes besides."""
    known = backend.name == NEURON.name and device_kind in _NATIVE_TOP_K
    return replace(backend, top_k="native") if known else backend


def is_host(device: jax.Device) -> bool:
    """Tell whether a device is this machine's CPU."""
    return device.platform == "cpu"


def host_device() -> jax.Device:
    """Return this process's first CPU device, whatever the default platform."""
    import jax

    return jax.local_devices(backend="cpu")[0]
