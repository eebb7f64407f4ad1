"""What a Prometheus server may ask: jobs, queue, seconds, boot, memory. One registry for each server.

Counts come from the lifecycle when they are asked for; only the durations are collected here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.serve.record import Record, State

if TYPE_CHECKING:
    from app.serve.lifecycle import Lifecycle
    from app.serve.local import BootState

BUCKETS: Final = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)  # seconds


class Metrics:
    """The figures of one server."""

    def __init__(self, lifecycle: Lifecycle, boot: BootState) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Now(lifecycle, boot))
        ProcessCollector(registry=self._registry)  # memory, open files, CPU; where there is /proc
        self._waited = self._histogram("seedpod_job_wait_seconds", "Seconds that ended jobs had waited.")
        self._ran = self._histogram("seedpod_job_run_seconds", "Seconds that ended jobs had run.")

    def observe(self, record: Record) -> None:
        """Count the durations of a job that has ended."""
        if record.delay_ms is not None:
            self._waited.observe(record.delay_ms / 1000)
        if record.execution_ms is not None:
            self._ran.observe(record.execution_ms / 1000)

    def text(self) -> bytes:
        """All figures, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, buckets=BUCKETS, registry=self._registry)


class _Now(Collector):
    """What is known at the moment that it is asked."""

    def __init__(self, lifecycle: Lifecycle, boot: BootState) -> None:
        self._lifecycle, self._boot = lifecycle, boot

    def collect(self) -> Iterable[Metric]:
        counts = self._lifecycle.counts()
        ended = CounterMetricFamily("seedpod_jobs", "Jobs that ended, by final state.", labels=["state"])
        for state in State:
            if state.final:
                ended.add_metric([state.value], counts[state])
        yield ended
        yield GaugeMetricFamily("seedpod_jobs_waiting", "Jobs in the queue.", counts[State.IN_QUEUE])
        yield GaugeMetricFamily("seedpod_jobs_running", "Jobs that run.", counts[State.IN_PROGRESS])
        ready = float(self._boot.state == "ready")
        yield GaugeMetricFamily("seedpod_ready", "1 when the worker is booted.", ready)
        workers = GaugeMetricFamily("seedpod_workers", "Processes that do jobs, by state.", labels=["state"])
        for name in ("booting", "ready", "failed"):
            workers.add_metric([name], self._boot.workers.get(name, 0))
        yield workers
        yield GaugeMetricFamily(
            "seedpod_boot_seconds", "Seconds that the boot took, or has taken so far.", self._boot.seconds
        )
