"""A server's plan, of its compiled functions, beside the formula that the chips' figures were fitted with."""

import json

import jax
import pytest

from trainfw.errors import UserError
from trainfw.hardware import load_topology
from trainfw.planning import Kept, decoder_held, decoder_quantities, fleet, plan_server
from trainfw.planning.predict.server_plan import held_by, read_run
from trainfw.serving import Serving, build_absent
from trainfw.serving.absent import config_to_serve, fill_layout

TOPOLOGY = "trn2.3xlarge"
SMALL = "llama3.2-1b"


@pytest.fixture(scope="module")
def topology():
    found = load_topology(TOPOLOGY, count=1, lnc=2)
    assert found.cores <= jax.device_count()
    return found


@pytest.fixture
def simulated(topology, monkeypatch):
    """As many devices as the topology has cores."""
    devices = jax.devices()[: topology.cores]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


def server(topology, slots=2, **options):
    options = {"length": 512, "chunk": 64, "layout": {"tensor": 4}} | options
    return build_absent(Serving(SMALL, slots=slots, **options), topology)


@pytest.mark.usefixtures("simulated")
def test_the_formula_counts_what_the_compiled_functions_hold(topology):
    built, config = server(topology), config_to_serve(SMALL)
    kept = Kept(tensor=4)
    for name, rows, tokens in (("prefill", 1, 64), ("decode", 2, 1)):
        formula = decoder_quantities(config, kept, rows=rows, tokens=tokens, attended=512, chunk=64)
        run = read_run(built, name, topology)
        found = run.quantities
        assert sum(found.weights.values()) == pytest.approx(sum(formula.weights.values()), rel=0.01)
        assert sum(found.flops.values()) == pytest.approx(sum(formula.flops.values()), rel=0.05)
        sent = {each.kind: each.bytes * each.times for each in found.transfers}
        expected = {each.kind: each.bytes * each.times for each in formula.transfers}
        assert sent["all-reduce"] == pytest.approx(expected["all-reduce"], rel=0.01)
        held = decoder_held(config, kept, length=512, chunk=64)
        assert held.slot == held_by(built).slot
        assert run.temporaries < 0.5 * held.weights  # no copy of the weights that the CPU's compiler widens


@pytest.mark.usefixtures("simulated")
def test_a_plan_by_slots(topology):
    made = plan_server(
        lambda count: server(topology, count), topology, model=SMALL, slots=[1, 4], prompt=200, output=100
    )
    few, many = made.estimates
    assert few.time_to_first_token_seconds == many.time_to_first_token_seconds == 4 * few.prefill.seconds
    assert few.time_per_token_seconds < many.time_per_token_seconds
    assert few.tokens_per_second < many.tokens_per_second
    assert json.loads(json.dumps(made.to_json()))["slots"][1]["slots"] == 4
    assert "A prediction" in str(made)
    units, _ = fleet(many, requests_per_second=1000.0)
    assert units * many.tokens_per_second * 0.7 >= 1000.0 * 100 > (units - 1) * many.tokens_per_second * 0.7
    with pytest.raises(UserError, match="expected 600 at least"):
        plan_server(lambda count: server(topology, count), topology, model="", slots=[1], prompt=500, output=100)


def test_layouts_fill_the_hardware(topology):
    config = config_to_serve(SMALL)
    assert fill_layout({}, config, topology) == {"tensor": 4}
    assert fill_layout({"tensor": 2}, config, topology) == {"tensor": 2, "data": 2}
    with pytest.raises(UserError, match=r"is of 3 cores; trn2\.3xlarge has 4"):
        fill_layout({"tensor": 3}, config, topology)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("llama3.2-1c", "did you mean 'llama3.2-1b'"),
        ("digits", "no text can be drawn"),
        ("no/such/model", "expected a path, a recipe or a preset"),
    ],
)
def test_models_that_cannot_serve(model, message):
    with pytest.raises(UserError, match=message):
        config_to_serve(model)
