"""Who tells a process where it stands."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from trainfw import UserError
from trainfw.backends import Place, Wiring, read_wiring
from trainfw.backends.distributed import expand_hosts, order_problem
from trainfw.hardware import load_topology

SLURM = {"SLURM_NODEID": "2", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "trn[001-004]"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "3", "JOBSET_NAME": "llama", "REPLICATED_JOB_NAME": "workers"}
PLACED = {"NEURON_GLOBAL_TOPOID": "1", "NEURON_GLOBAL_TOPOID0_HOST": "trn003"}


@pytest.mark.parametrize(
    ("names", "hosts"),
    [
        ("head", ["head"]),
        ("trn[001-004,9],head", ["trn001", "trn002", "trn003", "trn004", "trn9", "head"]),
        ("trn[09-11]", ["trn09", "trn10", "trn11"]),
        ("a1,b[2,4-5]", ["a1", "b2", "b4", "b5"]),
        ("r[1-2]n[01-02].cluster", ["r1n01.cluster", "r1n02.cluster", "r2n01.cluster", "r2n02.cluster"]),
    ],
)
def test_slurms_lists_of_hosts(names, hosts):
    assert expand_hosts(names) == hosts


@pytest.mark.parametrize("names", ["", "trn[1-", "trn[a-b]", "trn[3-1]"])
def test_what_is_no_list_of_hosts_is_refused(names):
    with pytest.raises(UserError, match="expected"):
        expand_hosts(names)


def test_nothing_means_a_single_process():
    assert read_wiring({}, load_topology("trn2-ultraserver")) == Wiring()


def test_slurm():
    assert read_wiring(SLURM, load_topology("trn2-ultraserver")) == Wiring(2, 4, "trn001", "Slurm", order="launcher's")


def test_a_step_of_fewer_nodes_than_the_job():
    step = {**SLURM, "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "trn[003-004]"}
    assert read_wiring(step, load_topology("trn2.48xlarge", count=2)) == Wiring(
        1, 2, "trn003", "Slurm", order="launcher's"
    )


def test_kubernetes_takes_the_number_of_pods_from_the_topology():
    wiring = read_wiring(KUBERNETES, load_topology("trn2-ultraserver"))
    assert wiring == Wiring(3, 4, "llama-workers-0-0.llama", "Kubernetes", order="launcher's")


def test_an_indexed_job_of_independent_runs_is_a_single_process():
    assert read_wiring({"JOB_COMPLETION_INDEX": "7"}).process_count == 1
    assert read_wiring(KUBERNETES, load_topology("trn2.48xlarge")).process_index == 0


@pytest.mark.parametrize("launcher", [SLURM, KUBERNETES])
def test_the_place_in_the_ultraserver_wins_over_the_launchers_number(launcher):
    wiring = read_wiring({**launcher, **PLACED}, load_topology("trn2-ultraserver"))
    assert (wiring.process_index, wiring.process_count, wiring.head, wiring.order) == (1, 4, "trn003", "places")


def test_trainfws_own_variables_win_over_all():
    own = {"TRAINFW_PROCESS_INDEX": "0", "TRAINFW_PROCESS_COUNT": "2", "TRAINFW_COORDINATOR": "localhost:5000"}
    wiring = read_wiring({**SLURM, **PLACED, **own})
    assert (wiring.process_index, wiring.process_count) == (0, 2)
    assert (wiring.head, wiring.coordinator_port) == ("localhost", 5000)
    assert read_wiring(own).head == "localhost"


# (variables, topology and count, what the message must say)
CONTRADICTIONS = {
    "index beyond the count": ({**SLURM, "SLURM_NODEID": "4"}, "SLURM_NODEID = 4: expected 0 to 3"),
    "place beyond the count": ({**SLURM, **PLACED, "NEURON_GLOBAL_TOPOID": "9"}, "NEURON_GLOBAL_TOPOID = 9: expected"),
    "other than the topology's instances": (
        {**SLURM, "TRAINFW_PROCESS_COUNT": "2", "SLURM_NODEID": "0"},
        "2 processes from Slurm: 1 x trn2-ultraserver has 4 instances",
    ),
    "several tasks a node": ({**SLURM, "SLURM_STEP_NUM_TASKS": "256"}, "srun --ntasks-per-node=1"),
    "no host of process 0": ({**SLURM, "NEURON_GLOBAL_TOPOID": "1"}, "NEURON_GLOBAL_TOPOID0_HOST: is missing"),
    "no coordinator": ({"JOB_COMPLETION_INDEX": "1"}, "TRAINFW_COORDINATOR: is missing"),
    "no index": ({"TRAINFW_PROCESS_COUNT": "4", "TRAINFW_COORDINATOR": "a"}, "TRAINFW_PROCESS_INDEX must say"),
    "other hosts than nodes": ({**SLURM, "SLURM_NNODES": "2"}, "hosts, but SLURM_NNODES = 2"),
    "only the index": ({"TRAINFW_PROCESS_INDEX": "2"}, "TRAINFW_PROCESS_INDEX = 2: TRAINFW_PROCESS_COUNT must say"),
    "only the coordinator": ({"TRAINFW_COORDINATOR": "a"}, "TRAINFW_COORDINATOR = a: TRAINFW_PROCESS_COUNT must say"),
    "not a number": ({**SLURM, "SLURM_NNODES": "four"}, "SLURM_NNODES = 'four': expected a number"),
    "not a port": ({**SLURM, "TRAINFW_COORDINATOR": "a:b"}, "TRAINFW_COORDINATOR = 'a:b': expected a number"),
}


@pytest.mark.parametrize(("environ", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions(environ, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read_wiring(environ, load_topology("trn2-ultraserver"))


def places(*ids: str) -> list[Place]:
    """`A0` is node 0 of UltraServer A."""
    return [Place(text[0], int(text[1]), f"host-{text}") for text in ids]


@pytest.mark.parametrize(
    "order",
    [
        places("A0", "A1", "A2", "A3"),
        places("B0", "B1", "B2", "B3", "A0", "A1", "A2", "A3"),
        [*places("A1", "A0", "A2"), None],
        places("A3"),
        [],
    ],
)
def test_an_order_that_follows_places_or_cannot_be_known(order):
    assert order_problem(order) is None


@pytest.mark.parametrize(
    "order",
    [
        places("A1", "A0", "A2", "A3"),
        places("A0", "B1", "A2", "B3", "B0", "A1", "B2", "A3"),
        places("A0", "A1", "A2", "A3", "A0", "A1", "A2", "A3"),
    ],
)
def test_another_order_is_told_with_the_right_one(order):
    problem = order_problem(order)
    assert problem is not None
    assert "NEURON_GLOBAL_TOPOID" in problem
    assert problem.index("host-A0") < problem.index("host-A1") < problem.index("host-A2") < problem.index("host-A3")


PROCESS = """
import json
from unittest import mock
from trainfw import backends
from trainfw.hardware import HardwareConfig

hardware = HardwareConfig(topology="trn2-ultraserver")
wiring = backends.prepare(2, "neuron", hardware=hardware)
backends.connect(wiring)

import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()), ("all",))
x = jax.make_array_from_process_local_data(
    NamedSharding(mesh, P("all")), np.float32([2 * wiring.process_index, 2 * wiring.process_index + 1]))
total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(10.0**x, "all"), mesh=mesh, in_specs=P("all"), out_specs=P()))(x)
with mock.patch.dict("os.environ", clear=True):
    variables = backends.neuron_environment(hardware, wiring, layout={"fsdp": 64}, scan_layers=False)
print(json.dumps({
    "index": jax.process_index(), "count": jax.process_count(), "backend": str(backends.current()),
    "local": [d.id for d in jax.local_devices()], "processes": [d.process_index for d in jax.devices()],
    "total": float(total[0]), "variables": {v.name: v.value for v in variables},
}))
"""


@pytest.mark.long
def test_four_processes_meet_in_the_order_of_their_places():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [2, 0, 3, 1]  # of the nodes as Slurm numbers them
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "XLA", "JAX", "NEURON", "TRAINFW"))}
    slurm = {"SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "trn[1-4]", "TRAINFW_COORDINATOR": f"127.0.0.1:{port}"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            env={
                **clean,
                **slurm,
                "SLURM_NODEID": str(node),
                "NEURON_GLOBAL_TOPOID": str(place),
                "NEURON_GLOBAL_TOPOID0_HOST": "trn2",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, place in enumerate(places)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * 4, outputs[0][1]
    for place, (output, _) in zip(places, outputs, strict=True):
        result = json.loads(output.splitlines()[-1])  # gloo prints above it
        assert (result["index"], result["count"]) == (place, 4)
        assert result["backend"] == "neuron (simulated on the CPU)"
        assert result["processes"] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert result["total"] == pytest.approx(11111111)
        variables = result["variables"]
        assert variables["NEURON_PJRT_PROCESS_INDEX"] == str(place)
        assert variables["NEURON_PJRT_PROCESSES_NUM_DEVICES"] == "64,64,64,64"
        assert variables["NEURON_RT_ROOT_COMM_ID"] == "127.0.0.1:41000"
