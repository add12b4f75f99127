from __future__ import annotations

import contextlib
import json
import sys

from trainfw.backends import NeuronMonitor
from trainfw.backends.neuron.monitor import read_report

MEMORY = {"constants": 100, "model_code": 20, "model_shared_scratchpad": 3, "runtime_memory": 0, "tensors": 1000}


def report(utilization=(40.0, 60.0), tensors=(1000, 5000), errors=0) -> dict:
    """As neuron-monitor-user-guide.rst prints it."""
    return {
        "neuron_runtime_data": [
            {
                "pid": 1234,
                "neuron_runtime_tag": "1234",
                "error": "",
                "report": {
                    "neuroncore_counters": {
                        "period": 5.0,
                        "neuroncores_in_use": {
                            str(i): {"neuroncore_utilization": u, "flops": 10**12, "v3d": {}}
                            for i, u in enumerate(utilization)
                        },
                        "error": "",
                    },
                    "execution_stats": {"error_summary": {"generic": errors, "numerical": 0, "hardware": 0}},
                    "memory_used": {
                        "neuron_runtime_used_bytes": {
                            "host": 6997643264,
                            "neuron_device": 12519788544,
                            "usage_breakdown": {
                                "neuroncore_memory_usage": {
                                    str(i): {**MEMORY, "tensors": t} for i, t in enumerate(tensors)
                                }
                            },
                        },
                        "error": "",
                    },
                },
            }
        ],
        "system_data": {},
        "neuron_hardware_info": {"neuron_device_type": "trainium2", "error": ""},
    }


def fake(tmp_path, body: str) -> str:
    path = tmp_path / "neuron-monitor"
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_report():
    assert read_report(json.dumps(report(errors=2))) == {
        "neuroncore_utilization": 50.0,
        "neuroncores_in_use": 2,
        "device_memory_bytes": 5123,
        "execution_errors": 2,
    }


def test_lines_that_are_no_report_say_nothing():
    for line in ("", "not json", "[]", "null", "{}", '{"neuron_runtime_data": null}', '{"neuron_runtime_data": [1]}'):
        assert read_report(line) == {}
    broken = report()
    broken["neuron_runtime_data"][0]["report"]["memory_used"] = "out of order"
    broken["neuron_runtime_data"][0]["report"]["neuroncore_counters"]["neuroncores_in_use"]["1"] = None
    assert read_report(json.dumps(broken)) == {
        "neuroncore_utilization": 40.0,
        "neuroncores_in_use": 1,
        "execution_errors": 0,
    }


def test_the_newest_good_line_counts(tmp_path):
    lines = [json.dumps(report()), "{truncated", json.dumps(report(utilization=(80.0, 90.0))), "\udcff oops", "{}"]
    body = "\n".join(
        f"sys.stdout.buffer.write({line.encode('utf-8', 'surrogateescape') + bytes([10])!r})" for line in lines
    )
    monitor = NeuronMonitor(fake(tmp_path, body)).start()
    monitor._thread.join(timeout=20)
    assert monitor.latest()["neuroncore_utilization"] == 85.0
    monitor.close()
    assert monitor.latest()["neuroncore_utilization"] == 85.0


def test_without_neuron_monitor_there_are_no_metrics(tmp_path, capfd):
    with contextlib.closing(NeuronMonitor(str(tmp_path / "neuron-monitor")).start()) as monitor:
        assert monitor.latest() == {}
    assert capfd.readouterr() == ("", "")


def test_it_stops_what_it_started(tmp_path):
    monitor = NeuronMonitor(fake(tmp_path, "time.sleep(600)")).start()
    process, thread = monitor._process, monitor._thread
    assert process.poll() is None
    monitor.close()
    assert process.poll() is not None
    assert not thread.is_alive()
    monitor.close()
