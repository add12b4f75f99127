"""Processes of UltraServers, numbered by where their hosts stand, whatever the launcher's order."""

from __future__ import annotations

import json
import logging
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from trainfw.backends.distributed import Wiring, check_port
from trainfw.backends.neuron.place import Place
from trainfw.errors import PeerError

_RETRY_SECONDS = 1.0


def number_by_place(wiring: Wiring, place: Place | None, timeout: float = 600.0) -> Wiring:
    """Number processes by (server_id, node_id); the wiring stays as it was where a host does not know its place.

    Neighbours in the mesh are then neighbours in the torus. All processes call, before jax is imported, which needs
    the answer: they meet at the launcher's process 0, at the port after the coordinator's.

    Raises PeerError where they have not met within `timeout` seconds, UserError where something else has the port.
    """
    deadline = time.monotonic() + timeout
    index, count = wiring.process_index, wiring.process_count
    if index == 0:
        check_port(wiring, wiring.coordinator_port + 1)
    mine = {"of": [wiring.head, count], "index": index, "place": place and [place.server_id, place.node_id]}
    try:
        order = _gather(wiring, mine, deadline) if index == 0 else _ask(wiring, mine, deadline)
    except (OSError, ValueError) as error:
        at = f"{wiring.head}:{wiring.coordinator_port + 1}"
        raise PeerError(
            f"process {index} of {count} ({wiring.launcher}): not all processes met at {at} within {timeout:g} s to be "
            f"numbered by their hosts' places: {error}"
        ) from error
    if order is None:
        return wiring
    head = order[0]["address"] or wiring.head
    numbers = [entry["index"] for entry in order]
    logging.getLogger("trainfw").info("numbered by the hosts' places: was %s, is %s", index, numbers.index(index))
    return replace(wiring, process_index=numbers.index(index), head=head, order="places")


def _gather(wiring: Wiring, mine: dict[str, Any], deadline: float) -> list[dict[str, Any]] | None:
    """Process 0: hear all places, and tell all the order."""
    entries = {0: {**mine, "address": None}}
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("", wiring.coordinator_port + 1), backlog=1024))
        waiting = []
        while len(entries) < wiring.process_count:
            listener.settimeout(_left(deadline))
            connection, (address, *_) = listener.accept()
            stack.enter_context(connection)
            connection.settimeout(10.0)
            try:
                said = json.loads(_line(connection))
                if said["of"] != mine["of"] or said["index"] not in range(1, wiring.process_count):
                    continue  # another job's
                entries[said["index"]] = {**said, "address": address}
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not one of us
            waiting.append(connection)
        known = all(entry["place"] is not None for entry in entries.values())
        # As places are sorted.
        order = sorted(entries.values(), key=lambda entry: (*entry["place"], entry["index"])) if known else None
        for connection in waiting:
            with suppress(OSError):  # it asked again
                connection.sendall(json.dumps(order).encode() + b"\n")
    return order


def _ask(wiring: Wiring, mine: dict[str, Any], deadline: float) -> list[dict[str, Any]] | None:
    while True:
        try:
            address = (wiring.head, wiring.coordinator_port + 1)
            with socket.create_connection(address, timeout=_left(deadline)) as connection:
                connection.sendall(json.dumps(mine).encode() + b"\n")
                connection.settimeout(_left(deadline))
                return json.loads(_line(connection))
        except (OSError, ValueError):  # it has not started, or its name is not known yet
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise
            time.sleep(_RETRY_SECONDS)


def _line(connection: socket.socket) -> str:
    with connection.makefile("r", encoding="utf-8") as file:
        line = file.readline()
    if not line.endswith("\n"):
        raise ConnectionError("the connection was closed")
    return line


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
