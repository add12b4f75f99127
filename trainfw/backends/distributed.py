"""Places of processes among each other, read from their environments; one process an instance."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from trainfw.backends.neuron.place import Place, read_place
from trainfw.errors import TRY_AGAIN, PeerError, UserError
from trainfw.hardware import Topology

ROOT_PORT = 41000
"""Port of process 0 where Neuron's collectives meet. (The ports of AWS's Slurm scripts for JAX.)"""
COORDINATOR_PORT = 41001
"""Port of process 0 where JAX's processes meet."""

_MEETING_SECONDS = 300.0
"""Seconds that processes wait for each other to start, at most."""
_LOOK_SECONDS = 0.25
"""Seconds between the looks of a waiting process at whether the other has left."""

Order = Literal["chosen", "launcher's", "places"]


@dataclass(frozen=True)
class Wiring:
    """One process among `process_count`, one for each instance, numbered in the order of the topology's instances."""

    process_index: int = 0
    process_count: int = 1
    head: str | None = None
    """The host of process 0; None where nothing says."""
    launcher: str = "a single process"
    """Launcher of the processes, in words."""
    coordinator_port: int = COORDINATOR_PORT
    order: Order = "chosen"
    """Order of indices: the user's choice, the launcher's own order, which knows nothing of UltraServers, or
    hosts sorted by (server_id, node_id), as AWS's UltraServer script sorts them."""


def read_wiring(environ: Mapping[str, str], topology: Topology | None = None) -> Wiring:
    """Read the wiring from Slurm, Kubernetes or trainfw's own variables; each of the latter wins over a launcher's.

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
        count = _integer(environ, "TRAINFW_PROCESS_COUNT")
        if count > 1 and "TRAINFW_PROCESS_INDEX" not in environ:
            raise UserError(f"TRAINFW_PROCESS_COUNT = {count}: TRAINFW_PROCESS_INDEX must say which of them this is")
        wiring = _wired(environ, "TRAINFW_PROCESS_COUNT", "TRAINFW_PROCESS_INDEX", count, None)
    else:
        if half := _first(environ, "TRAINFW_PROCESS_INDEX", "TRAINFW_COORDINATOR"):
            raise UserError(f"{half} = {environ[half]}: TRAINFW_PROCESS_COUNT must say of how many processes")
        return Wiring()
    one_each = topology is not None and topology.rules == "neuron"  # GPUs may be shared out in other ways
    if topology is not None and one_each and wiring.process_count not in (1, instances):
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
    hosts = expand_hosts(environ[names], names) if names else []
    if names and "TRAINFW_PROCESS_COUNT" not in environ and len(hosts) != count:
        raise UserError(f"{names} = {environ[names]}: names {len(hosts)} hosts, but {count_name} = {count}")
    return _wired(environ, "Slurm", "SLURM_NODEID", count, hosts[0] if hosts else None)


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
    first = 0
    if "JOB_INDEX" in environ:  # one of several Jobs of the set
        jobs = _integer(environ, "REPLICATED_JOB_REPLICAS")
        if not jobs or count % jobs:
            raise UserError(f"REPLICATED_JOB_REPLICAS = {jobs}: the {count} pods are not so many equal Jobs")
        first = _integer(environ, "JOB_INDEX") * (count // jobs)
    return _wired(environ, "Kubernetes", "JOB_COMPLETION_INDEX", count, head, first)


def _wired(
    environ: Mapping[str, str], launcher: str, index_name: str, count: int, head: str | None, first: int = 0
) -> Wiring:
    name = _first(environ, "TRAINFW_PROCESS_INDEX", "NEURON_GLOBAL_TOPOID", index_name)
    order: Order = "chosen"
    index = _integer(environ, name) if name else 0
    if name == index_name != "TRAINFW_PROCESS_INDEX":
        order = "launcher's"
        index += first
    elif name == "NEURON_GLOBAL_TOPOID":
        order = "places"
        head = environ.get("NEURON_GLOBAL_TOPOID0_HOST")  # the launcher's first host need not be process 0
    port = COORDINATOR_PORT
    if "TRAINFW_COORDINATOR" in environ:
        head, _, given = environ["TRAINFW_COORDINATOR"].partition(":")
        if given:
            port = _integer(environ, "TRAINFW_COORDINATOR", given)
            if not 0 < port < 2**16:
                raise UserError(f"TRAINFW_COORDINATOR = {environ['TRAINFW_COORDINATOR']!r}: expected a port to 65535")
    if count > 1 and not head:
        missing = "NEURON_GLOBAL_TOPOID0_HOST" if order == "places" else "TRAINFW_COORDINATOR"
        raise UserError(f"{missing}: is missing; it names the host of process 0 to the {count} processes of {launcher}")
    if not 0 <= index < count:
        expected = f"0 to {count - 1}, since there are {count} processes" if count > 1 else "0, of one process"
        raise UserError(f"{name} = {index}: expected {expected}")
    return Wiring(index, count, head, launcher, port, order)


def connect(wiring: Wiring, start_seconds: float = 0) -> None:
    """Join the other processes. Before anything touches a device; nothing to do for a single process.

    Where they do not meet within `start_seconds` (0, or more than 300: 300), the process says who is missing and exits
    with `TRY_AGAIN`.

    Raises UserError where another program has the port of process 0, where JAX_PLATFORMS asks for what is not there
    and, in every process, where hosts of UltraServers are not numbered by their places.
    """
    import jax

    if wiring.process_count == 1 or jax.distributed.is_initialized():
        return
    which = f"process {wiring.process_index} of {wiring.process_count} ({wiring.launcher})"
    coordinator = f"{wiring.head}:{wiring.coordinator_port}"
    seconds = min(start_seconds or _MEETING_SECONDS, _MEETING_SECONDS)
    logging.getLogger("trainfw").info("%s: meeting the others at %s", which, coordinator)
    if wiring.process_index == 0:
        check_port(wiring, wiring.coordinator_port)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM from our own handler, which says when to stop to all processes (training/stopping.py).
    jax.config.update("jax_enable_preemption_service", False)

    def leave() -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"failed: {which}: {_missing(wiring)} within {seconds:g} s\n".encode())
        os._exit(TRY_AGAIN)

    timer = threading.Timer(seconds, leave)  # what waits hears no exception
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=wiring.process_count,
            process_id=wiring.process_index,
            cluster_detection_method="deactivate",  # under Slurm it would leave a process one GPU of its instance
            initialization_timeout=int(seconds) + 60,  # it aborts the process, without an exception to say this in
            shutdown_timeout_seconds=60,
        )
    finally:
        timer.cancel()
    from trainfw.backends.select import check_platforms

    check_platforms()
    place = read_place()
    places = exchange("place", place and asdict(replace(place, fqdn=socket.getfqdn())))
    if problem := order_problem([None if found is None else Place(**found) for found in places]):
        raise UserError(f"{which}: {problem}")


def check_port(wiring: Wiring, port: int) -> None:
    """Raise UserError where this machine, process 0's, has something else at the port: JAX crashes there."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is taken on this machine, by another run or program" if error.errno == errno.EADDRINUSE else "is refused"
        raise UserError(
            f"{wiring.head}:{port}, where the {wiring.process_count} processes meet ({wiring.launcher}): the port "
            f"{why}; name another in all of them, TRAINFW_COORDINATOR={wiring.head}:PORT"
        ) from None


def _missing(wiring: Wiring) -> str:
    """Say who has not come."""
    at = f"{wiring.head}:{wiring.coordinator_port}"
    if wiring.process_index:
        try:
            socket.create_connection((wiring.head or "", wiring.coordinator_port), timeout=2.0).close()
        except OSError as error:
            return f"nobody answered at {at}, where process 0 is to be ({error.strerror or error}),"
    return f"not all others came to {at}"


def expand_hosts(names: str, variable: str = "hosts") -> list[str]:
    """Expand Slurm's `trn[001-004,9],head` into a list of hosts, in order.

    Raises UserError, which blames `variable`, for what is not such a list.
    """
    hosts: list[str] = []
    if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]+\])+", names):
        raise UserError(f"{variable} = {names!r}: expected a list of hosts such as trn[001-004,9],head")
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", names):
        pieces = re.split(r"\[([^\]]*)\]", part)
        where = f"{variable} = {names!r}"
        choices = [[piece] if i % 2 == 0 else _ranges(piece, where) for i, piece in enumerate(pieces)]
        hosts += ["".join(choice) for choice in itertools.product(*choices)]
    return hosts


def _ranges(text: str, where: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (match[1], match[2] or match[1]) if match is not None else ("1", "0")
        if int(first) > int(last):
            raise UserError(f"{where}: expected numbers and ranges in brackets, such as [001-004,9], not {part!r}")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return numbers


def _first(environ: Mapping[str, str], *names: str) -> str | None:
    return next((name for name in names if name in environ), None)


def _integer(environ: Mapping[str, str], name: str, part: str | None = None) -> int:
    text = environ[name] if part is None else part
    if not text.strip().isdecimal():
        raise UserError(f"{name} = {environ[name]!r}: expected a number")
    return int(text)


def order_problem(places: Sequence[Place | None], nodes: int = 4) -> str | None:
    """Say why these places of processes, in order of index, are not those of UltraServers one after the other.

    None where they are, or where some host does not know its place.
    """
    known = [place for place in places if place is not None]
    if len(known) < len(places) or len(known) % nodes:
        return None
    blocks = [known[i : i + nodes] for i in range(0, len(known), nodes)]
    whole = all(len({p.server_id for p in b}) == 1 and [p.node_id for p in b] == list(range(nodes)) for b in blocks)
    if whole and len({block[0].server_id for block in blocks}) == len(blocks):
        return None
    order = ", ".join(p.fqdn or f"node {p.node_id} of UltraServer {p.server_id}" for p in sorted(known))
    return (
        f"processes do not follow their hosts' places: number them in the order {order}, in NEURON_GLOBAL_TOPOID (and "
        f"the first host in NEURON_GLOBAL_TOPOID0_HOST)"
    )


_rounds: Counter[str] = Counter()
"""Counts of exchanges by name: the store keeps what it was told."""


def exchange(name: str, value: Any, timeout: float = 300.0) -> list[Any]:
    """Collect every process's `value` (JSON), by index, once all have called with this `name`, as often as this one.

    Raises PeerError where one has not within `timeout` seconds, or has left (`announce_leaving`).
    """
    client, index, count = _coordination()
    if client is None:
        return [value]
    _rounds[name] += 1
    key = f"trainfw/{name}/{_rounds[name]}"
    client.key_value_set(f"{key}/{index}", json.dumps(value))
    deadline = time.monotonic() + timeout
    found = []
    for other in range(count):
        try:
            found.append(json.loads(_told(client, f"{key}/{other}", deadline)))
        except TimeoutError as error:
            raise PeerError(
                f"process {other} of {count} said nothing of {name!r} within {timeout:g} s: it died or hangs; its "
                "own log may say why"
            ) from error
    return found


def _told(client: Any, key: str, deadline: float) -> str:
    """Wait for the value of a key. Raises TimeoutError, and PeerError where a process has left."""
    while True:
        asked = time.monotonic()
        seconds = min(deadline - asked, _LOOK_SECONDS)
        try:
            return client.blocking_key_value_get(key, max(int(1000 * seconds), 1))
        except Exception as error:  # jaxlib raises its own kind
            if (signum := left_by()) is not None:
                _part(client)
                raise PeerError(f"another process was stopped by {signal.Signals(signum).name}") from error
            if time.monotonic() >= deadline:
                raise TimeoutError from error
            time.sleep(max(asked + 0.1 - time.monotonic(), 0))  # a coordinator that has gone fails at once


def announce(name: str, value: object) -> None:
    """Say `value` (JSON) to all processes; the first to speak of a `name` is heard, the others pass in silence."""
    client, _, _ = _coordination()
    if client is not None:
        with contextlib.suppress(Exception):  # another was first, or nobody is left to hear
            client.key_value_set(f"trainfw/{name}", json.dumps(value))


_LEFT = "left"


def announce_leaving(signum: int, timeout: float) -> None:
    """Say to all processes that this one leaves at once, at a signal: nobody needs to wait for it.

    In process 0 this returns once all others leave too, or after `timeout` seconds.
    """
    announce(_LEFT, signum)
    _part_last(timeout)


_all_end = False


def end_together() -> None:
    """Take note that all processes know why the run ends now: process 0 is to exit last (`leave_in_order`)."""
    global _all_end
    _all_end = True


def leave_in_order() -> None:
    """Say, where all end, that this process exits now; process 0 returns once all others do, or after 10 s."""
    if _all_end:
        _part_last(10.0)


_EXIT_SECONDS = 0.25
"""Seconds from saying that one exits to having exited."""


def _part_last(timeout: float) -> None:
    """Leave, process 0 after all others: it keeps what they are told, and JAX aborts one whose coordinator has gone."""
    client, index, count = _coordination()
    if client is None:
        return
    _part(client)
    if index:
        return
    deadline = time.monotonic() + timeout
    for other in range(1, count):
        with contextlib.suppress(Exception):  # it hangs, or died
            client.blocking_key_value_get(f"trainfw/{_LEFT}/{other}", max(int(1000 * (deadline - time.monotonic())), 1))
    time.sleep(_EXIT_SECONDS)


def _part(client: Any) -> None:
    """Tell the first process that this one leaves, so that it need not stay."""
    with contextlib.suppress(Exception):  # it has said so, or nobody is left to hear
        client.key_value_set(f"trainfw/{_LEFT}/{_coordination()[1]}", "")


def left_by() -> int | None:
    """Return the signal at which a process has left at once; None where none has."""
    client, _, _ = _coordination()
    try:
        return None if client is None else json.loads(client.key_value_try_get(f"trainfw/{_LEFT}"))
    except Exception:  # nobody has, or the coordinator is gone
        return None


def heard(name: str, timeout: float) -> Any:
    """Return what any process announced by this `name`; None where nobody did within `timeout` seconds."""
    client, _, _ = _coordination()
    if client is None:
        return None
    deadline = time.monotonic() + timeout
    try:
        return json.loads(client.blocking_key_value_get(f"trainfw/{name}", int(1000 * timeout)))
    except Exception:  # nobody spoke, or the coordinator has gone: the watchdog and the collectives will tell
        time.sleep(max(deadline - time.monotonic(), 0))
        return None


def _coordination() -> tuple[Any, int, int]:
    """Return (the client of the coordinator's store or None, this process's index, their number)."""
    from jax._src import distributed  # no public way reaches the coordinator's store before there are devices

    state = distributed.global_state
    return state.client, state.process_id, state.num_processes
