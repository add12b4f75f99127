"""Utilisation and memory of Neuron cores, from neuron-monitor.

Its output: aws-neuron-sdk 2.32.0 tools/neuron-sys-tools/neuron-monitor-user-guide.rst.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading


class NeuronMonitor:
    """Runs neuron-monitor beside the training; without it, there are no metrics and nothing is said.

    One line of JSON every 5 s, for every process on this instance.
    """

    def __init__(self, command: str = "neuron-monitor") -> None:
        self._command = command
        self._latest: dict[str, float] = {}
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> NeuronMonitor:
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [self._command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
                start_new_session=True,  # a Ctrl-C is for the run, which saves before it stops the monitor
            )
            self._thread = threading.Thread(
                target=self._read, args=(self._process,), name="neuron-monitor", daemon=True
            )
            self._thread.start()
        return self

    def latest(self) -> dict[str, float]:
        """Return the newest `read_report`; empty before the first."""
        return dict(self._latest)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if process.stdout is not None:
            process.stdout.close()

    def _read(self, process: subprocess.Popen[str]) -> None:
        with contextlib.suppress(ValueError):  # closed while reading
            for line in process.stdout or ():
                self._latest = read_report(line) or self._latest


def read_report(line: str) -> dict[str, float]:
    """Read one line of neuron-monitor as metrics; empty where it is not such a line or no program runs.

    neuroncore_utilization (percent, mean over the cores in use), neuroncores_in_use, device_memory_bytes (of the
    fullest core) and execution_errors (since the line before).
    """
    try:
        report = json.loads(line)
    except ValueError:
        return {}
    utilization: list[float] = []
    memory: dict[str, float] = {}
    errors: list[float] = []
    for runtime in _values(_get(report, "neuron_runtime_data")):
        data = _get(runtime, "report")
        for core in _values(_get(data, "neuroncore_counters", "neuroncores_in_use")):
            utilization += _numbers(_get(core, "neuroncore_utilization"))
        usage = _get(data, "memory_used", "neuron_runtime_used_bytes", "usage_breakdown", "neuroncore_memory_usage")
        for core, parts in usage.items() if isinstance(usage, dict) else ():
            memory[core] = memory.get(core, 0.0) + sum(n for part in _values(parts) for n in _numbers(part))
        for count in _values(_get(data, "execution_stats", "error_summary")):
            errors += _numbers(count)
    metrics: dict[str, float] = {}
    if utilization:
        metrics["neuroncore_utilization"] = sum(utilization) / len(utilization)
        metrics["neuroncores_in_use"] = len(utilization)
    if memory:
        metrics["device_memory_bytes"] = max(memory.values())
    if errors:
        metrics["execution_errors"] = sum(errors)
    return metrics


def _get(tree: object, *keys: str) -> object:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _values(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _numbers(value: object) -> list[float]:
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
