"""Prometheus metrics of a gateway. Labels are bounded: names that exist, error codes, phases; never an id.

With several gateway processes each writes its own files in `PROMETHEUS_MULTIPROC_DIR`, which must be set before this
module is imported (`__main__` does), and any of them answers for all.
"""

from __future__ import annotations

import os
from collections import Counter as Count
from typing import Any

import prometheus_client as prometheus
from prometheus_client import multiprocess, values

from sllm_gateway.dispatcher import Dispatcher
from sllm_gateway.exchange import Exchange
from sllm_gateway.handle import Handle

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
MAX_SERIES = 5_000
"""Children of one metric; further functions are counted together as `other`."""


class Metrics:
    def __init__(self, registry: Any = None) -> None:
        self._shared = bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
        if self._shared:
            # A gateway never forks: asking the kernel for its pid at every increment would be most of their cost.
            pid = os.getpid()
            values.ValueClass = values.MultiProcessValue(lambda: pid)
        self._registry = registry or prometheus.CollectorRegistry()
        registry = self._registry
        self._requests = prometheus.Counter(
            "sllm_http_requests", "HTTP requests by route and status class.", ("route", "code"), registry=registry
        )
        self._invocations = prometheus.Counter(
            "sllm_invocations", "Invocations by outcome.", ("app", "function", "code"), registry=registry
        )
        self._phases = prometheus.Histogram(
            "sllm_invocation_seconds",
            "Seconds of an invocation by phase: queue, first_output, run.",
            ("app", "function", "phase"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._outputs = prometheus.Counter(
            "sllm_outputs", "Outputs of streams received.", ("app", "function"), registry=registry
        )
        self._drops = prometheus.Counter(
            "sllm_frames_dropped", "Frames that were not believed, by reason.", ("reason",), registry=registry
        )
        gauges = {"registry": registry, "multiprocess_mode": "livesum"}
        self._waiting = prometheus.Gauge("sllm_waiting", "Invocations that wait for a slot.", **gauges)
        self._running = prometheus.Gauge("sllm_running", "Invocations in flight.", **gauges)
        self._links = prometheus.Gauge("sllm_invoker_links", "Invokers connected.", **gauges)
        self._children: dict[tuple[Any, ...], Any] = {}
        self._counted: Count[str] = Count()

    def request(self, exchange: Exchange) -> None:
        code = f"{exchange.status // 100}xx" if exchange.status else "none"
        self._child(self._requests, exchange.route, code).inc()

    def invocation(self, handle: Handle) -> None:
        """It has ended, for its caller."""
        inv = handle.inv
        app, function = inv.target.app, inv.target.function
        error = handle.ended.error if handle.ended is not None else None
        self._child(self._invocations, app, function, error.code if error is not None else "ok").inc()
        end = inv.dispatched or inv.ended or inv.submitted
        self._child(self._phases, app, function, "queue").observe(max(0.0, end - inv.submitted))
        if inv.dispatched:
            if inv.first_output:
                self._child(self._phases, app, function, "first_output").observe(inv.first_output - inv.dispatched)
                self._child(self._outputs, app, function).inc(inv.wanted)
            if inv.ended:
                self._child(self._phases, app, function, "run").observe(inv.ended - inv.dispatched)

    def sync(self, dispatcher: Dispatcher) -> None:
        """Bring what is counted elsewhere up to date."""
        waiting = dispatcher.waiting()
        self._waiting.set(waiting)
        self._running.set(len(dispatcher) - waiting)
        self._links.set(len(dispatcher.linked()))
        for reason, count in dispatcher.drops.items():
            new = count - self._counted[reason]
            if new:
                self._drops.labels(reason).inc(new)
                self._counted[reason] = count

    def text(self) -> tuple[bytes, bytes]:
        """(body, content type) for a scraper: of all gateway processes when they share a directory."""
        registry = self._registry
        if self._shared:
            registry = prometheus.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return prometheus.generate_latest(registry), prometheus.CONTENT_TYPE_LATEST.encode()

    def close(self) -> None:
        if self._shared:
            multiprocess.mark_process_dead(os.getpid())

    def _child(self, metric: Any, *labels: str) -> Any:
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            if len(self._children) >= MAX_SERIES:
                labels = ("other",) * len(labels)
            child = self._children[key] = metric.labels(*labels)
        return child
