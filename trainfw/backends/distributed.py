"""Where a process stands among the others, read from its environment; one process an instance."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainfw.errors import UserError
from trainfw.hardware import Topology

ROOT_PORT = 41000
"""Of process 0, where Neuron's collectives meet. (The ports of AWS's Slurm scripts for JAX.)"""
COORDINATOR_PORT = 41001
"""Of process 0, where JAX's processes meet."""


@dataclass(frozen=True)
class Wiring:
    """One process among `process_count`, one for each instance, numbered in the order of the topology's instances."""

    process_index: int = 0
    process_count: int = 1
    head: str | None = None
    """The host of process 0; None where nothing says."""
    launcher: str = "a single process"
    """Who started the processes, in words."""
    coordinator_port: int = COORDINATOR_PORT
    placed: bool = False
    """The index follows hosts sorted by (server_id, node_id), as AWS's UltraServer script sorts them."""


def read_wiring(environ: Mapping[str, str], topology: Topology | None = None) -> Wiring:
    """From Slurm, Kubernetes or trainfw's own variables; each of the latter wins over what a launcher says.

    TRAINFW_PROCESS_INDEX, TRAINFW_PROCESS_COUNT and TRAINFW_COORDINATOR (host or host:port). NEURON_GLOBAL_TOPOID and
    NEURON_GLOBAL_TOPOID0_HOST, which AWS's UltraServer script sets, win over the launcher's index and first host:
    processes must be numbered by their hosts' place for neighbours in the mesh to be neighbours in the torus.
    Kubernetes does not say how many pods there are: where nothing else does, one for each instance of `topology`.

    Raises UserError for values that contradict each other or the topology.
    """
    instances = topology.instances if topology is not None else 1
    if "SLURM_NODEID" in environ:
        wiring = _slurm(environ)
    elif "JOB_COMPLETION_INDEX" in environ or "NEURON_GLOBAL_TOPOID" in environ:
        wiring = _kubernetes(environ, instances)
    elif "TRAINFW_PROCESS_COUNT" in environ:
        wiring = _explicit(environ)
    else:
        return Wiring()
    one_each = topology is not None and topology.rules == "neuron"  # GPUs may be shared out in other ways
    if wiring.process_count > 1 and topology is not None and one_each and wiring.process_count != instances:
        raise UserError(
            f"{wiring.process_count} processes from {wiring.launcher}: {topology.count} x {topology.name} has "
            f"{instances} instance{'s' * (instances > 1)}, and each takes one process; "
            f"change hardware.count or the number of nodes"
        )
    return wiring


def _slurm(environ: Mapping[str, str]) -> Wiring:
    count_name = _first(environ, "TRAINFW_PROCESS_COUNT", "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    count = _integer(environ, count_name) if count_name else 1
    tasks = _integer(environ, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environ else count
    if count > 1 and tasks != count:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS = {tasks} on {count} nodes: expected one process a node; "
            f"start with srun --ntasks-per-node=1"
        )
    names = _first(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    head = expand_hosts(environ[names])[0] if names else None
    return _wired(environ, "Slurm", "SLURM_NODEID", count, head)


def _kubernetes(environ: Mapping[str, str], instances: int) -> Wiring:
    # OMPI_COMM_WORLD_SIZE: pods of an MPIJob, which AWS's UltraServer script is for.
    count_name = _first(environ, "TRAINFW_PROCESS_COUNT", "OMPI_COMM_WORLD_SIZE")
    count = _integer(environ, count_name) if count_name else instances
    if count == 1:
        return Wiring(launcher="Kubernetes")  # the index of an indexed Job is then not about this program
    head = None
    if "JOBSET_NAME" in environ and "REPLICATED_JOB_NAME" in environ:
        # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>, as in kubernetes-sigs/jobset's
        # site/static/examples/simple/jobset-with-network.yaml
        jobset = environ["JOBSET_NAME"]
        head = f"{jobset}-{environ['REPLICATED_JOB_NAME']}-0-0.{jobset}"
    return _wired(environ, "Kubernetes", "JOB_COMPLETION_INDEX", count, head)


def _explicit(environ: Mapping[str, str]) -> Wiring:
    count = _integer(environ, "TRAINFW_PROCESS_COUNT")
    if count > 1 and "TRAINFW_PROCESS_INDEX" not in environ:
        raise UserError(f"TRAINFW_PROCESS_COUNT = {count}: TRAINFW_PROCESS_INDEX must say which of them this is")
    return _wired(environ, "TRAINFW_PROCESS_COUNT", "TRAINFW_PROCESS_INDEX", count, None)


def _wired(environ: Mapping[str, str], launcher: str, index_name: str, count: int, head: str | None) -> Wiring:
    placed = "NEURON_GLOBAL_TOPOID" in environ
    name = _first(environ, "TRAINFW_PROCESS_INDEX", "NEURON_GLOBAL_TOPOID", index_name)
    index = _integer(environ, name) if name else 0
    if placed:
        head = environ.get("NEURON_GLOBAL_TOPOID0_HOST")  # the launcher's first host need not be process 0
    port = COORDINATOR_PORT
    if "TRAINFW_COORDINATOR" in environ:
        head, _, given = environ["TRAINFW_COORDINATOR"].partition(":")
        if given:
            port = _number("TRAINFW_COORDINATOR", given, environ["TRAINFW_COORDINATOR"])
    if count > 1 and not head:
        missing = "NEURON_GLOBAL_TOPOID0_HOST" if placed else "TRAINFW_COORDINATOR"
        raise UserError(f"{missing}: is missing; it names the host of process 0 to the {count} processes of {launcher}")
    if not 0 <= index < count:
        raise UserError(f"{name} = {index}: expected 0 to {count - 1}, since there are {count} processes")
    return Wiring(index, count, head, launcher, port, placed)


def connect(wiring: Wiring) -> None:
    """Join the other processes. Before anything touches a device; nothing to do for a single process."""
    import jax

    if wiring.process_count == 1 or jax.distributed.is_initialized():
        return
    coordinator = f"{wiring.head}:{wiring.coordinator_port}"
    which = f"process {wiring.process_index} of {wiring.process_count}"
    # jax ends a process that nobody answers within 5 minutes, without an exception to say this in.
    logging.getLogger("trainfw").info("%s (%s): meeting the others at %s", which, wiring.launcher, coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=wiring.process_count,
        process_id=wiring.process_index,
        cluster_detection_method="deactivate",  # under Slurm it would leave a process one GPU of its instance
    )


def expand_hosts(names: str) -> list[str]:
    """Slurm's `trn[001-004,9],head` as a list of hosts, in order. Raises UserError for what is not such a list."""
    hosts: list[str] = []
    if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]+\])+", names):
        raise UserError(f"{names!r}: expected a list of hosts such as trn[001-004,9],head")
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", names):
        pieces = re.split(r"\[([^\]]*)\]", part)
        choices = [[piece] if i % 2 == 0 else _ranges(piece, names) for i, piece in enumerate(pieces)]
        hosts += ["".join(choice) for choice in itertools.product(*choices)]
    return hosts


def _ranges(text: str, names: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise UserError(f"{names!r}: expected numbers and ranges in brackets, such as [001-004,9], not {part!r}")
        first, last = match[1], match[2] or match[1]
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return numbers


def _first(environ: Mapping[str, str], *names: str) -> str | None:
    return next((name for name in names if name in environ), None)


def _integer(environ: Mapping[str, str], name: str) -> int:
    return _number(name, environ[name], environ[name])


def _number(name: str, text: str, value: str) -> int:
    if not text.strip().isdecimal():
        raise UserError(f"{name} = {value!r}: expected a number")
    return int(text)
