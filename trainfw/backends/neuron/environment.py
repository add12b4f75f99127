"""Every variable that a process on Neuron sets before jax is imported, each with its reason and its source."""

from __future__ import annotations

import logging
import math
import os
import platform
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from trainfw.backends.distributed import ROOT_PORT, Wiring
from trainfw.backends.neuron.place import read_place
from trainfw.backends.neuron.sdk import Sdk, load_sdk, version_parts
from trainfw.backends.neuron.sysroot import compiler_path, find_tcmalloc, sysroot
from trainfw.errors import UserError
from trainfw.hardware import HardwareConfig, Topology
from trainfw.paths import cache_dir

_SDK = "aws-neuron-sdk 2.32.0"
_ENVVARS = f"{_SDK} frameworks/jax/api-reference-guide/neuron-envvars.rst"
_CONFIGURATION = f"{_SDK} neuron-runtime/guides/configuration-guide.rst"
_DEVELOPER = f"{_SDK} neuron-runtime/guides/nrt-developer-guide.rst"
_LNC = f"{_SDK} about-neuron/arch/neuron-features/logical-neuroncore-config.rst"
_COMPILER = f"{_SDK} compiler/neuronx-cc/api-reference-guide/index.rst"
_JAX_ISSUES = f"{_SDK} frameworks/jax/setup/jax-neuronx-known-issues.rst"
_OVERLAP = f"{_SDK} neuron-runtime/explore/compute-comm-overlap.rst"
_TIPS = f"{_SDK} neuron-runtime/explore/runtime-performance-tips.rst"
_MULTI_NODE = f"{_SDK} frameworks/torch/torch-neuronx/setup-trn1-multi-node-execution.rst"
_ULTRASERVER = f"{_SDK} src/k8/k8s-ultraserver-init-script.sh"
_RELEASES = f"{_SDK} release-notes/components/runtime.rst"
_AXLEARN = "AWS's scripts for AXLearn, rahul003/axlearn 05907108; AWS does not document it"
_CACHE_FAILS = "measured by others on inf2, jax 0.9.2 with libneuronxla 3.0.3854: 'No program shape found' at start"
_ON_THE_HOST = "measured by others on inf2: 65 to 2,700 times slower, in silence"

_OFF = ("", "0", "false", "no", "off", "n", "f")

_TARGETS = ("inf2", "trn1", "trn2")
"""Chips that neuronx-cc documents for --target; trn1n is trn1 with more of the network."""


@dataclass(frozen=True)
class Variable:
    """One variable of the environment."""

    name: str
    value: str | None
    """None: only the host itself can say."""
    reason: str
    source: str
    experimental: bool = False
    """AWS calls it experimental, or does not document it."""
    already_set: bool = False
    """The user set it, to `value`: it stays."""
    removed: bool = False
    """The user set it, and it must not be: it is unset."""
    prepended: bool = False
    """`value` goes before what is set already, with a colon between."""
    early: bool = False
    """True where it is read when a program starts: it counts where it is set before Python, and for child processes."""


def neuron_environment(
    hardware: HardwareConfig, wiring: Wiring, *, layout: Mapping[str, int], scan_layers: bool
) -> list[Variable]:
    """List what a process on `hardware` sets, in order; what is set already stays as it is.

    Args:
        hardware: names a Neuron topology, or none, which suits a single process only.
        layout: the sizes of the mesh axes; one may be -1.
        scan_layers: whether the program loops over its layers.

    Raises UserError where processes, hosts and topology contradict each other.
    """
    environ, topology = os.environ, hardware.load()
    instances = topology.instances if topology is not None else 1
    if wiring.process_count != instances:
        named = f"{topology.count} x {topology.name}" if topology is not None else "no hardware.topology"
        raise UserError(
            f"{wiring.process_count} process{'es' * (wiring.process_count > 1)} ({wiring.launcher}): {named} takes "
            f"{instances}, one for each instance"
        )
    _same_cores(environ, hardware, topology)
    wanted = [
        *_search_path(environ),
        *_platform(topology, environ),
        *_processes(topology, wiring),
        *_ultraserver(topology, wiring, environ),
        *_network(topology, wiring, environ),
        *_compiler(topology, hardware, load_sdk(hardware.sdk)),
        *_of_every_process(environ),
        *_overlap(topology, hardware, layout, scan_layers),
    ]
    return [_kept(variable, environ) for variable in wanted]


def apply(hardware: HardwareConfig, wiring: Wiring, *, layout: Mapping[str, int], scan_layers: bool) -> None:
    """Set them, where the user has not, and unset what must not be set."""
    for warning in environment_warnings(os.environ, load_sdk(hardware.sdk), hardware.load()):
        logging.getLogger("trainfw").warning(warning)
    for variable in neuron_environment(hardware, wiring, layout=layout, scan_layers=scan_layers):
        if variable.removed:
            del os.environ[variable.name]
        elif variable.value is not None:
            os.environ[variable.name] = new_value(variable, os.environ)


def new_value(variable: Variable, environ: Mapping[str, str]) -> str:
    """Return the value of a variable once it is set, what is to stay of the old one included."""
    before = environ.get(variable.name, "") if variable.prepended and not variable.already_set else ""
    return f"{variable.value}{os.pathsep}{before}" if before else str(variable.value)


def put_compiler_on_path() -> None:
    """Put this environment's neuronx-cc where child processes of this one find it, if it is not there already."""
    for variable in _search_path(os.environ):
        os.environ[variable.name] = new_value(variable, os.environ)


def compiler_flags(hardware: HardwareConfig) -> list[str]:
    """Give neuronx-cc's options for a recipe's hardware: NEURON_CC_FLAGS as `neuron_environment` has it, and the
    machine where the user's own does not name it.

    Raises UserError where the user's own contradict the hardware, or cannot be read.
    """
    environ, topology = os.environ, hardware.load()
    _same_cores(environ, hardware, topology)
    wanted = shlex.split(" ".join(str(v.value) for v in _compiler(topology, hardware, load_sdk(hardware.sdk))))
    if "NEURON_CC_FLAGS" not in environ:
        return wanted
    own = shlex.split(environ["NEURON_CC_FLAGS"])
    for name, option in {"--lnc": "--(?:lnc|logical-nc-config)", "--target": "--target"}.items():
        if not any(re.match(rf"{option}(?:=|$)", flag) for flag in own):
            own = [*(flag for flag in wanted if flag.startswith(f"{name}=")), *own]
    return own


def environment_warnings(environ: Mapping[str, str], sdk: Sdk, topology: Topology | None) -> list[str]:
    """Say what is wrong with variables that the user has set."""
    warnings = []
    removed = "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS"
    if removed in environ and version_parts(sdk.version) >= [2, 31]:
        warnings.append(f"{removed} = {environ[removed]}: was removed in Neuron SDK 2.31; unset it ({_RELEASES})")
    if directory := environ.get("JAX_COMPILATION_CACHE_DIR"):
        warnings.append(
            f"JAX_COMPILATION_CACHE_DIR = {directory}: trainfw unsets it, for JAX's cache ends programs on Neuron "
            f"({_CACHE_FAILS}); NEURON_COMPILE_CACHE_URL names the compiler's own"
        )
    if _trivial_on_host(environ) and _cores(environ, topology) == 1:
        name = "NEURON_RUN_TRIVIAL_COMPUTATION_ON_CPU"
        warnings.append(
            f"{name} = {environ[name]}: trainfw unsets it, for on one core nothing has collectives, and the step "
            f"itself would run on the host ({_ON_THE_HOST})"
        )
    platforms = environ.get("JAX_PLATFORMS", "neuron,cpu").split(",")
    if "cpu" not in platforms:
        warnings.append(f"JAX_PLATFORMS = {environ['JAX_PLATFORMS']}: parameters are initialised on the CPU; add cpu")
    return warnings


def _same_cores(environ: Mapping[str, str], hardware: HardwareConfig, topology: Topology | None) -> None:
    """Check that the user's variables make the recipe's cores. Raises UserError where they do not or are unreadable."""
    flags = {"NEURON_CC_FLAGS": environ.get("NEURON_CC_FLAGS", "")}
    flags["hardware.compiler_flags"] = " ".join(hardware.compiler_flags)
    for name, text in flags.items():
        try:
            shlex.split(text)
        except ValueError as error:
            raise UserError(
                f"{name} = {text}: {error}; expected options of neuronx-cc as a shell reads them"
            ) from error
    if topology is None:
        return
    told = {name: environ.get(name, "") for name in ("NEURON_LOGICAL_NC_CONFIG", "NEURON_RT_VIRTUAL_CORE_SIZE")}
    for name, text in flags.items():
        if found := re.search(r"--(?:lnc|logical-nc-config)[= ](\d+)", text):
            told[name] = found[1]
    for name, lnc in told.items():
        if lnc and lnc != str(topology.lnc):
            raise UserError(
                f"{name}: says LNC {lnc}, but the recipe has {topology.name} at LNC {topology.lnc}; unset it, or set "
                f"hardware.lnc ({_LNC})"
            )
    for name, cores in _core_counts(environ).items():
        if cores not in ("", "0", str(topology.cores_per_instance)):
            raise UserError(
                f"{name} = {environ[name]}: leaves a process {cores} cores, but an instance of {topology.name} has "
                f"{topology.cores_per_instance}; unset it ({_CONFIGURATION})"
            )


def _core_counts(environ: Mapping[str, str]) -> dict[str, str]:
    """Read how many cores each variable of the runtime leaves a process, as written; "" or "0": all."""
    counts = {"NEURON_RT_NUM_CORES": environ.get("NEURON_RT_NUM_CORES", "")}
    if found := re.fullmatch(r"(\d+)(?:-(\d+))?", environ.get("NEURON_RT_VISIBLE_CORES", "")):
        counts["NEURON_RT_VISIBLE_CORES"] = str(int(found[2] or found[1]) - int(found[1]) + 1)
    return counts


def _cores(environ: Mapping[str, str], topology: Topology | None) -> int | None:
    """Return the cores that programs run on; None where only the instance knows, of which the smallest has two."""
    if topology is not None:
        return topology.cores
    counts = _core_counts(environ)  # NEURON_RT_VISIBLE_CORES wins over NEURON_RT_NUM_CORES
    text = counts.get("NEURON_RT_VISIBLE_CORES") or counts["NEURON_RT_NUM_CORES"]
    return int(text) if text.isdecimal() and int(text) else None


def _trivial_on_host(environ: Mapping[str, str]) -> bool:
    return environ.get("NEURON_RUN_TRIVIAL_COMPUTATION_ON_CPU", "").strip().lower() not in _OFF


def _kept(variable: Variable, environ: Mapping[str, str]) -> Variable:
    if variable.name not in environ or variable.removed or variable.prepended:
        return variable
    value = environ[variable.name]
    instead = "" if variable.value in (None, value) else f"; trainfw would set {variable.value}"
    return replace(variable, value=value, reason=f"already set, and kept{instead}", already_set=True)


def _search_path(environ: Mapping[str, str]) -> Iterator[Variable]:
    _, directory = compiler_path(environ)
    if directory is not None:
        reason = "libneuronxla calls neuronx-cc by bare name, and srun, systemd and Kubernetes may leave this out"
        source = "measured by others; libneuronxla's own log lines `Call compiler with cmd: neuronx-cc compile`"
        yield Variable("PATH", directory, reason, source, prepended=True)


def _platform(topology: Topology | None, environ: Mapping[str, str]) -> Iterator[Variable]:
    reason = "Neuron first; the host's CPU initialises parameters and samples text"
    yield Variable("JAX_PLATFORMS", "neuron,cpu", reason, _JAX_ISSUES)
    reason = "Threefry is not fully supported; the compiler takes RNG_DEFAULT only"
    yield Variable("JAX_DEFAULT_PRNG_IMPL", "rbg", reason, _JAX_ISSUES)
    name = "NEURON_RUN_TRIVIAL_COMPUTATION_ON_CPU"
    if _cores(environ, topology) != 1:
        reason = "programs without collectives are compiled for the CPU, in seconds; the training step has collectives"
        yield Variable(name, "1", reason, _ENVVARS)
    elif _trivial_on_host(environ):
        reason = "on one core the training step itself has no collectives, and would run on the host"
        yield Variable(name, None, reason, _ON_THE_HOST, removed=True)


def _processes(topology: Topology | None, wiring: Wiring) -> Iterator[Variable]:
    if topology is None:
        return
    cores = topology.cores_per_instance
    if len(topology.chip.device_kinds) > 1:
        reason = f"physical cores in a logical one, hence {cores} devices an instance; as --lnc below"
        yield Variable("NEURON_LOGICAL_NC_CONFIG", str(topology.lnc), reason, _LNC)
    if wiring.process_count == 1:
        return
    root = f"{wiring.head}:{ROOT_PORT}" if wiring.head else None
    yield Variable("NEURON_RT_ROOT_COMM_ID", root, "where the runtimes meet for collectives: process 0", _DEVELOPER)
    devices, reason = ",".join([str(cores)] * wiring.process_count), "devices of each process: one process an instance"
    yield Variable("NEURON_PJRT_PROCESSES_NUM_DEVICES", devices, reason, _ENVVARS)
    order = "hosts sorted by (server_id, node_id)" if wiring.order == "places" else wiring.launcher
    index, reason = str(wiring.process_index), f"this process, numbered by {order}"
    yield Variable("NEURON_PJRT_PROCESS_INDEX", index, reason, _ENVVARS)


def _ultraserver(topology: Topology | None, wiring: Wiring, environ: Mapping[str, str]) -> Iterator[Variable]:
    # Documented for Trn2's; nothing says what others take.
    if topology is None or topology.name != "trn2-ultraserver":
        return
    nodes = topology.instances // topology.count
    config = environ.get("NEURON_ULTRASERVER_NODE_CONFIG", str(nodes))
    if config != str(nodes):
        raise UserError(f"NEURON_ULTRASERVER_NODE_CONFIG = {config}: {topology.name} joins {nodes} instances")
    place, index = read_place(nodes), wiring.process_index
    if place is not None and place.node_id != index % nodes:
        advice = "the hosts are not whole UltraServers: ask the scheduler for those"
        if wiring.order != "places":
            advice = (
                "number processes by hosts sorted by (server_id, node_id), in NEURON_GLOBAL_TOPOID (and the first host "
                "in NEURON_GLOBAL_TOPOID0_HOST)"
            )
        raise UserError(
            f"process {index} of {wiring.launcher}: this host is node {place.node_id} of UltraServer "
            f"{place.server_id}, but process {index} takes node {index % nodes}: {advice}"
        )
    host = "read from /sys/class/neuron_device on the host"
    server, node = (None, None) if place is None else (place.server_id, str(place.node_id))
    yield Variable("NEURON_RT_ULTRASERVER_MODE", "1", "4 instances joined by NeuronLink", _ULTRASERVER)
    yield Variable("NEURON_RT_ULTRASERVER_SERVER_ID", server, f"which UltraServer: {host}", _ULTRASERVER)
    yield Variable("NEURON_RT_ULTRASERVER_NODE_ID", node, f"which of its instances: {host}", _ULTRASERVER)


def _network(topology: Topology | None, wiring: Wiring, environ: Mapping[str, str]) -> Iterator[Variable]:
    if topology is None or wiring.process_count == 1:
        return
    yield Variable("FI_PROVIDER", "efa", "libfabric's provider between instances", _MULTI_NODE)
    yield Variable("FI_EFA_USE_DEVICE_RDMA", "1", "RDMA to and from device memory", _MULTI_NODE)
    yield Variable("OFI_NCCL_PROTOCOL", "RDMA", "the EFA plugin's protocol", _AXLEARN, experimental=True)
    reason = "the EFA plugin keeps no cache of memory registrations"
    yield Variable("OFI_NCCL_MR_CACHE_DISABLE", "1", reason, _AXLEARN, experimental=True)
    if wiring.launcher == "Kubernetes":
        reason = (
            "the pod's interface by which collectives find each other, often required on EKS; another name where "
            "pods have another"
        )
        yield Variable("CCOM_SOCKET_IFNAME", "eth0", reason, _AXLEARN, experimental=True)
    if version_parts(platform.release())[:2] < [5, 15]:
        reason = f"kernels before 5.15 need it to fork; this is {platform.release()}"
        yield Variable("FI_EFA_FORK_SAFE", "1", reason, _MULTI_NODE)
    if topology.name in ("trn2.48xlarge", "trn2-ultraserver"):
        cpus = "40-47,88-95,136-143,184-191"
        reason = (
            "CPUs for the threads that drive EFA, over both NUMA nodes of a trn2.48xlarge; keep other work off them"
        )
        yield Variable("NEURON_RT_LOW_LATENCY_TASKS_CPU_AFFINITY", cpus, reason, _TIPS)
    set_before = "; counts where it is set before Python starts"
    directory = "/opt/amazon/efa/lib"
    name = "LD_LIBRARY_PATH"
    if directory not in (part.rstrip("/") for part in environ.get(name, "").split(os.pathsep)):
        reason = f"where EFA's installer puts libfabric, which pods may not know of{set_before}"
        yield Variable(name, directory, reason, _AXLEARN, experimental=True, prepended=True, early=True)
    name = "LD_PRELOAD"
    if "tcmalloc" not in environ.get(name, ""):
        library, source = find_tcmalloc(sysroot(environ)), f"{_AXLEARN}; AWS's tutorial for AXLearn requires it"
        packages = "libgoogle-perftools4 of Ubuntu, gperftools-libs of Amazon Linux"
        reason = f"tcmalloc for the host's memory ({packages}){set_before}"
        yield Variable(name, library, reason, source, experimental=True, prepended=True, early=True)


def _compiler(topology: Topology | None, hardware: HardwareConfig, sdk: Sdk) -> Iterator[Variable]:
    flags = []
    if topology is not None:
        chip = topology.chip.neuron_family
        target = "trn1n" if topology.name.startswith("trn1n") else chip
        flags += [f"--target={target}"] if chip in _TARGETS else []
        flags += [f"--lnc={topology.lnc}"] if len(topology.chip.device_kinds) > 1 else []
    flags += ["--model-type=transformer", "-O1"]
    own = "; then hardware.compiler_flags" if hardware.compiler_flags else ""
    reason = f"options of neuronx-cc {sdk.packages['neuronx-cc']}; -O1 as AWS trains JAX models{own}"
    yield Variable("NEURON_CC_FLAGS", " ".join([*flags, *hardware.compiler_flags]), reason, _COMPILER)


def _of_every_process(environ: Mapping[str, str]) -> Iterator[Variable]:
    if "JAX_COMPILATION_CACHE_DIR" in environ:
        reason = "JAX's cache of compiled programs ends them on Neuron"
        yield Variable("JAX_COMPILATION_CACHE_DIR", None, reason, _CACHE_FAILS, removed=True)
    reason = "the compiler's own cache below is the only one: JAX's ends programs"
    yield Variable("JAX_ENABLE_COMPILATION_CACHE", "false", reason, _CACHE_FAILS)
    reason = "compile once for all runs; a shared path or s3:// serves all hosts"
    source = f"{_SDK} frameworks/torch; AWS's scripts for JAX set it too"
    yield Variable("NEURON_COMPILE_CACHE_URL", str(cache_dir() / "neuron"), reason, source)
    reason = "seconds a step may take; documents differ on the default"
    yield Variable("NEURON_RT_EXEC_TIMEOUT", "600", reason, _CONFIGURATION)
    reason = "XLA's own warnings are not for users of recipes"
    yield Variable("TF_CPP_MIN_LOG_LEVEL", "2", reason, "trainfw, on every backend")


def _overlap(
    topology: Topology | None, hardware: HardwareConfig, layout: Mapping[str, int], scan_layers: bool
) -> Iterator[Variable]:
    if topology is None or not hardware.fsdp_overlap:
        return
    fixed = math.prod(size for size in layout.values() if size != -1)
    sizes = {axis: topology.cores // fixed if size == -1 else size for axis, size in layout.items()}
    if sizes.get("fsdp", 1) == 1:
        return

    def experimental(name: str, value: str, reason: str, source: str = _OVERLAP) -> Variable:
        return Variable(name, value, reason, source, experimental=True)

    if scan_layers:
        third_party = "rahul003/axlearn 05907108 launch scripts, third party; AWS does not document it"
        yield experimental("NEURON_FSDP_REPEATED", "1", "overlap FSDP's collectives in scanned layers", third_party)
    else:
        yield experimental("NEURON_FSDP", "1", "order tensor's and FSDP's collectives to overlap compute")
        yield experimental("NEURON_FSDP_NUM_LAYER_EARLY_AG_SHIFT", "1", "gather parameters this many layers ahead")
        yield experimental("NEURON_FSDP_NUM_LAYER_LATE_RS_SHIFT", "2", "scatter gradients this many layers later")
    if topology.lnc != 2 or scan_layers:
        return  # described for LNC 2, whose logical cores have 4 communication cores
    yield experimental("NEURON_FSDP_CC_MULTISTREAM", "1", "tensor's collectives on stream 0, FSDP's on stream 1")
    if sizes.get("tensor", 1) > 1:
        yield experimental("NEURON_RT_DBG_DMA_PACKETIZATION_SIZE", "65536", "bytes: compute's transfers before FSDP's")
        reason = "bytes by stream: tensor's before compute's before FSDP's"
        yield experimental("NEURON_RT_DBG_CC_DMA_PACKET_SIZE", "65536,4096", reason)
