"""What `benchmarks/peers.py` makes of arguments, of numbers and of processes. No peer is run here."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import peers
    finally:
        sys.path.remove(str(BENCHMARKS))
    return peers


@pytest.fixture
def run(peers, monkeypatch, capsys):
    """`run(records, *arguments)` -> (exit code, what was printed), where these would have been measured."""

    def run(seconds, *arguments, problems=None, products=None, **changes):
        from side_by_side.driver import Record
        from side_by_side.report import Results

        records = {}
        for name, value in seconds.items():
            record = Record(versions={"it": "1.0"}, parameters=58_073_600, first_step=9.5, memory=10**9)
            record.seconds, record.losses = [value] * 20, [10.4, 10.3, 9.9]
            records[name] = record
        for name, attributes in changes.items():
            vars(records[name.replace("_", "-")]).update(attributes)
        results = Results(2048, records, problems or {}, products or {})
        monkeypatch.setattr(peers, "measure", lambda chosen, say: results)
        code = peers.main(["--peers", ",".join([*seconds, *(problems or {})]), *arguments])
        return code, capsys.readouterr().out

    return run


GOOD = {"trainfw": 1.0, "trainfw-bf16": 0.9, "transformers": 1.05, "transformers-compile": 0.95, "maxtext": 2.5}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "transfomers"], "unknown peer 'transfomers'; did you mean 'transformers'?"),
        (["--peers", "trainfw,maxtxt-bf16"], "unknown peer 'maxtxt-bf16'; did you mean 'maxtext-bf16'?"),
        (["--peers", ","], "names none; one of: trainfw, transformers"),
        (["--steps", "0"], "--steps 0: expected a positive number"),
        (["--rounds", "-1"], "--rounds -1: expected a positive number"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--maxtext-python", "/no/such/python"], "--maxtext-python /no/such/python: no such file"),
        (["--json", "/no/such/directory/file"], "the directory does not exist"),
    ],
)
def test_bad_arguments_exit_2(peers, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        peers.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_names(peers):
    assert peers.parse([]).names == [*peers.PEERS, "trainfw-bf16"]
    assert peers.parse(["--peers", "trainfw", "--dtype", "both"]).names == ["trainfw", "trainfw-bf16"]
    assert peers.parse(["--dtype", "bfloat16"]).names == [f"{name}-bf16" for name in peers.PEERS]
    assert peers.parse(["--peers", "trainfw, transformers-bf16,trainfw"]).names == ["trainfw", "transformers-bf16"]


def test_all_is_well(run):
    idle = {"idle_wall": 50.0, "idle_cpu": 0.1}
    code, said = run(GOOD, products={("jax", ""): 0.8, ("torch", ""): 0.75}, maxtext=idle)
    assert code == 0
    assert "MISSED" not in said
    assert "ok: trainfw: tokens/s at least 2 times MaxText's: 2.50 (maxtext)" in said
    assert "ok: trainfw: tokens/s at least 0.9 times the fastest PyTorch form's: 0.95 (transformers-compile)" in said
    assert "ok: trainfw: bfloat16 no slower than float32: 0.90 s a step, 1.00 s" in said
    assert "products alone (jax, float32): 0.80 s a step; trainfw takes 1.25 times that" in said
    assert "largest relative difference: 0.0e+00" in said
    assert "none took more than 0.2% of a core (maxtext)" in said
    row = next(line for line in said.splitlines() if line.startswith("| maxtext "))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "maxtext", "2.50", "2.50–2.50", "819", "2.50x", "9.5", "1.00", "58,073,600",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "changes", "missed"),
    [
        ({"maxtext": 1.9}, {}, "trainfw: tokens/s at least 2 times MaxText's: 1.90 (maxtext)"),
        ({"transformers": 0.8}, {}, "trainfw: tokens/s at least 0.9 times the fastest PyTorch form's: 0.80"),
        ({"trainfw-bf16": 1.1}, {}, "trainfw: bfloat16 no slower than float32: 1.10 s a step, 1.00 s"),
        ({}, {"maxtext": {"memory": 9 * 10**8}}, "trainfw: peak RSS at most the smallest peer's: 1.00 GB, 0.90 GB"),
        ({}, {"transformers": {"losses": [10.4, 10.32, 9.9]}}, "losses agree within 0.001, relative: 1.9e-03"),
        ({}, {"trainfw": {"losses": [10.4, float("nan"), 9.9]}}, "losses agree within 0.001, relative: nan"),
    ],
)
def test_what_is_missed_exits_1(run, seconds, changes, missed):
    code, said = run(GOOD | seconds, **changes)
    assert code == 1
    assert [line for line in said.splitlines() if line.startswith("MISSED")] == [
        next(line for line in said.splitlines() if line.startswith(f"MISSED: {missed}") or missed in line)
    ]


def test_a_peer_that_did_not_run_is_said_and_exits_1(run):
    some = {name: seconds for name, seconds in GOOD.items() if name != "maxtext"}
    code, said = run(some, problems={"maxtext": "maxtext did not install: ERROR: no such release"})
    assert code == 1
    assert "maxtext did not run: maxtext did not install: ERROR: no such release" in said
    assert "CANNOT BE MADE: trainfw: tokens/s at least 2 times MaxText's (maxtext did not run)" in said


def test_what_was_not_asked_for_is_no_miss(run):
    code, said = run({"trainfw": 1.0, "transformers": 1.0})
    assert code == 0
    assert "not asked for: trainfw: tokens/s at least 2 times MaxText's" in said


def test_files(peers, run, tmp_path, monkeypatch):
    from benchmarks.report import page

    monkeypatch.setattr(peers, "RESULTS", tmp_path / "peers.json")
    run(GOOD, "--save", "--json", str(tmp_path / "other.json"), products={("jax", ""): 0.8})
    other = tmp_path / "other.json"
    assert other.read_text() == (tmp_path / "peers.json").read_text()
    told = json.loads(other.read_text())
    assert told["peers"]["maxtext"]["seconds_per_step"] == 2.5
    assert told["peers"]["maxtext"]["versions"] == {"it": "1.0"}
    other.unlink()
    text = page(tmp_path)
    assert "| maxtext " in text
    assert "trainfw: tokens/s at least 2 times MaxText's: 2.50 (maxtext)" in text
    assert "products alone (jax, float32): 0.80 s a step" in text


def test_percentiles(peers):
    from side_by_side.report import percentile

    assert [percentile([3.0, 1.0, 2.0], percent) for percent in (0, 50, 75, 100)] == [1.0, 2.0, 2.5, 3.0]
    assert percentile([4.0], 90) == 4.0


def test_the_error_of_a_log(peers):
    from side_by_side.environments import last_error

    assert last_error("Collecting x\nERROR: No matching distribution found for x\nWARNING: at last\n") == (
        "ERROR: No matching distribution found for x"
    )
    assert last_error("Traceback:\n  File 'x'\nValueError: it is 3\n") == "ValueError: it is 3"
    assert last_error("") == "no output"


def test_processes_take_turns_and_may_fail(peers, tmp_path):
    """Stand-ins that step in no time: one that goes on to the end, one that falls at its third step."""
    from side_by_side.driver import Worker, take_turns

    script = tmp_path / "stand_in.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            from turns import Turns

            turns, last = Turns(), int(sys.argv[1])
            print("noise of a library")
            turns.say("imported", versions={"it": "1.0"})
            turns.say("built", parameters=7)
            for step in range(1000):
                if step == last:
                    raise ValueError("it fell")
                turns.done(float(step))
        """)
    )
    environment = {"PYTHONPATH": str(BENCHMARKS / "side_by_side" / "workers")}
    good, bad = (
        Worker(name, [sys.executable, str(script), last], environment, tmp_path / f"{name}.log", 60)
        for name, last in (("good", "-1"), ("bad", "3"))
    )
    problems = take_turns([good, bad], 2, {"good": 3, "bad": 2}, lambda text: None)
    assert list(problems) == ["bad"]
    assert "its process ended: ValueError: it fell" in problems["bad"]
    record = good.record
    assert (len(record.seconds), record.losses) == (6, [float(step) for step in range(8)])
    assert (record.parameters, record.versions) == (7, {"it": "1.0"})
    assert record.memory > 1e6
    assert "noise of a library" in (tmp_path / "good.log").read_text()
