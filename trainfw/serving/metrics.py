"""Figures of a server in the form of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trainfw.serving.requests import Engine

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and times of one server, and its engine's counts."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self.requests = Counter("trainfw_requests", "Requests over HTTP.", ["route", "status"], registry=self._registry)
        self.answers = Counter("trainfw_answers", "Answers by how they ended.", ["finish"], registry=self._registry)
        self.first_token = Histogram(
            "trainfw_time_to_first_token_seconds", "From a request to its first token.", registry=self._registry,
            buckets=_FIRST,
        )  # fmt: skip
        self.each_token = Histogram(
            "trainfw_time_per_token_seconds", "Mean of an answer's tokens after its first.", registry=self._registry,
            buckets=_EACH,
        )  # fmt: skip
        self._registry.register(_Counts(engine))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Counts(Collector):
    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        counts = self._engine.counts()
        gauges = {"slots": counts.slots, "slots_used": counts.slots_used, "queue": counts.queue}
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"trainfw_{name}", f"{name.replace('_', ' ').capitalize()} now.", value=value)
        totals = {
            "engine_requests": counts.requests_total,
            "prompt_tokens": counts.prompt_tokens_total,
            "drawn_tokens": counts.drawn_tokens_total,
        }
        for name, value in totals.items():
            yield CounterMetricFamily(f"trainfw_{name}", f"{name.replace('_', ' ').capitalize()}.", value=value)
