"""Processes number themselves by the places of their hosts."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from trainfw.backends import Place, Wiring
from trainfw.backends.neuron.numbering import number_by_place
from trainfw.errors import PeerError
from trainfw.launch.local import _free_port


def wirings(count):
    port = _free_port()
    return [Wiring(i, count, "localhost", "Kubernetes", port - 1, "launcher's") for i in range(count)]


def meet(wirings, places):
    with ThreadPoolExecutor(len(wirings)) as pool:
        return list(pool.map(number_by_place, wirings, places, [30.0] * len(wirings)))


@pytest.mark.parametrize("seed", range(3))
def test_processes_follow_places(seed):
    places = [Place(server, node) for server in "AB" for node in range(4)]
    shuffled = random.Random(seed).sample(places, len(places))
    met = meet(wirings(8), shuffled)
    assert [shuffled[[w.process_index for w in met].index(i)] for i in range(8)] == places
    assert {w.order for w in met} == {"places"}
    [head] = {w.head for w in met}
    old_head_is_new_head = met[0].process_index == 0
    assert head == ("localhost" if old_head_is_new_head else "127.0.0.1")


def test_a_host_that_does_not_know_leaves_the_order():
    before = wirings(3)
    assert meet(before, [Place("A", 1), None, Place("A", 0)]) == before


def test_strangers_are_not_counted():
    before = wirings(2)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(number_by_place, before[0], Place("A", 1), 30.0)
        port = before[0].coordinator_port + 1
        other_job = json.dumps({"of": ["elsewhere", 2], "index": 1, "place": ["B", 0]}).encode() + b"\n"
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"", b"[1]\n", b'{"index": null}\n', other_job):
            say(port, said)
        second = pool.submit(number_by_place, before[1], Place("A", 0), 30.0)
        assert (first.result().process_index, second.result().process_index) == (1, 0)


def say(port, said):
    while True:
        try:
            with socket.create_connection(("localhost", port)) as stranger:
                return stranger.sendall(said)
        except ConnectionError:  # nobody listens yet, or process 0 has only looked whether the port is free
            continue


@pytest.mark.parametrize("index", [0, 1])
def test_nobody_waits_for_ever(index):
    with pytest.raises(PeerError, match=rf"process {index} of 2 \(Kubernetes\): not all processes met at localhost:"):
        number_by_place(wirings(2)[index], Place("A", index), timeout=1.5)
