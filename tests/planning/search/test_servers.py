"""The search for a server's layout: what is judged without the compiler is as the compiler has it."""

import json

import jax
import pytest

from trainfw.errors import UserError
from trainfw.hardware import load_topology
from trainfw.planning import search_servers
from trainfw.planning.predict.server_plan import estimate_server, read_run
from trainfw.serving import Serving, build_absent

SMALL, TOKENS = {"length": 512, "chunk": 64, "layout": {}}, {"prompt": 200, "output": 100}


@pytest.fixture(scope="module")
def topology():
    return load_topology("inf2.8xlarge", count=1)


@pytest.fixture(autouse=True)
def _simulated(topology, monkeypatch):
    devices = jax.devices()[: topology.cores]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


def search(topology, model="llama3.2-1b", slots=(1, 4), **more):
    return search_servers(Serving(model, **SMALL), topology, list(slots), **TOKENS | more)


def test_the_front_is_of_what_fits(topology):
    said = []
    found = search(topology, progress=said.append)
    assert (found.layouts, found.refused.total(), found.too_large) == (3, 0, 0)
    assert found.skipped == 2  # fsdp=2, where data=2 fits
    assert {(server.option, server.estimate.load.slots) for server in found.planned} == {
        *(("data=2", 2), ("data=2", 8), ("tensor=2", 1), ("tensor=2", 4)),
    }
    fastest, cheapest = found.pareto[0], found.pareto[-1]
    assert fastest.option == "tensor=2"
    assert cheapest is found.planned[0]
    for front in found.fronts.values():
        prices = [server.estimate.dollars_per_million_tokens for server in front]
        assert prices == sorted(prices, reverse=True)
    told = json.loads(json.dumps(found.to_json()))
    assert told["servers"][0]["pareto"][0] == "time_per_token"
    lines = str(found).splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.endswith("layout")) :]
    assert max(map(len, table[:5])) <= 80
    assert any("compiling" in text for text in said)


def test_what_is_not_compiled_would_lose(topology):
    def server(count, **layout):
        return build_absent(Serving("llama3.2-1b", slots=count, **SMALL | {"layout": layout}), topology)

    def estimate(built):
        return estimate_server(built, 200, 100, *(read_run(built, name, topology) for name in ("prefill", "decode")))

    whole, parts = estimate(server(1, data=2)), estimate(server(1, fsdp=2))
    assert parts.load.slots == whole.load.slots
    assert parts.time_per_token_seconds > whole.time_per_token_seconds
    assert parts.time_to_first_token_seconds > whole.time_to_first_token_seconds
    few, many = (read_run(server(count, tensor=2), "prefill", topology) for count in (1, 4))
    assert few.quantities == many.quantities  # a prompt is read alike beside any number of slots
    assert 0 <= many.temporaries - few.temporaries < 0.1 * many.temporaries


def test_fsdp_where_nothing_less_fits(topology):
    found = search(topology, "qwen3-8b", slots=[1])
    assert found.too_large == 1  # data=2: 15.3 GiB of weights
    assert {server.option for server in found.planned} == {"fsdp=2", "tensor=2"}
    assert [server.option for server in found.pareto] == ["tensor=2"]
    late = search(topology, "qwen3-8b", slots=[1], limit=-1)
    assert (late.out_of_time, late.planned) == (2, ())


def test_nothing_fits(topology):
    found = search(topology, "llama3.1-70b")
    assert not found.planned
    assert "try --weights int8" in str(found)
    with pytest.raises(UserError, match="expected 600 at least"):
        search(topology, prompt=500)
