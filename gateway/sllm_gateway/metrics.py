"""Prometheus metrics of a gateway. Labels are bounded: names that exist, error codes, phases; never an id.

With several gateway processes each writes its own files in `PROMETHEUS_MULTIPROC_DIR`, which must be set before this
module is imported (`__main__` does), and any of them answers for all. What every request counts is counted in plain
numbers and brought there by `sync`, once a second and before the page is made: of another gateway's requests the page
may lack those of the last second.
"""

from __future__ import annotations

import os
from bisect import bisect_left
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


class _Counted:
    """A counter's child, and what is to be added to it. `changed` gets it with the first of that."""

    __slots__ = ("_changed", "_child", "_count")

    def __init__(self, child: Any, changed: list[_Counted | _Observed]) -> None:
        self._child = child
        self._changed = changed
        self._count = 0

    def inc(self, count: int = 1) -> None:
        if not self._count and count:
            self._changed.append(self)
        self._count += count

    def sync(self) -> None:
        self._child.inc(self._count)
        self._count = 0


class _Observed:
    """A histogram's child, and what is to be added to it: as its `observe` would, but many at a time."""

    __slots__ = ("_changed", "_child", "_counts", "_sum")

    def __init__(self, child: Any, changed: list[_Counted | _Observed]) -> None:
        self._child = child
        self._changed = changed
        self._sum = 0.0
        self._counts: list[int] = []

    def observe(self, seconds: float) -> None:
        if not self._counts:
            self._counts = [0] * (len(_SECONDS) + 1)
            self._changed.append(self)
        self._sum += seconds
        self._counts[bisect_left(_SECONDS, seconds)] += 1

    def sync(self) -> None:
        self._child._sum.inc(self._sum)
        for bucket, count in zip(self._child._buckets, self._counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum, self._counts = 0.0, []


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
        self._moves = prometheus.Counter(
            "sllm_moves",
            "Offers of a move of a running invocation, by what came of them.",
            ("outcome",),
            registry=registry,
        )
        self._resumes = prometheus.Counter(
            "sllm_resumes",
            "Invocations that went on elsewhere after a loss, by its cause.",
            ("reason",),
            registry=registry,
        )
        self._gaps = prometheus.Histogram(
            "sllm_handover_gap_seconds",
            "Seconds between two outputs at a change of the instance: migration, resume.",
            ("kind",),
            buckets=_SECONDS,
            registry=registry,
        )
        gauges = {"registry": registry, "multiprocess_mode": "livesum"}
        self._waiting = prometheus.Gauge("sllm_waiting", "Invocations that wait for a slot.", **gauges)
        self._running = prometheus.Gauge("sllm_running", "Invocations in flight.", **gauges)
        self._links = prometheus.Gauge("sllm_invoker_links", "Invokers connected.", **gauges)
        self._changed: list[_Counted | _Observed] = []
        self._children: dict[tuple[Any, ...], Any] = {}
        self._calls: dict[tuple[str, str], tuple[Any, Any, Any]] = {}
        """(ok, queue, run) of a function: what nearly every call counts."""
        self._requested: dict[tuple[str, int], Any] = {}
        """By route and class of the status."""
        self._counted: Count[tuple[Any, str]] = Count()

    def request(self, exchange: Exchange) -> None:
        key = (exchange.route, exchange.status // 100)
        child = self._requested.get(key)
        if child is None:
            code = f"{key[1]}xx" if key[1] else "none"
            child = self._requested[key] = self._child(self._requests, exchange.route, code)
        child.inc()

    def invocation(self, handle: Handle) -> None:
        """It has ended, for its caller."""
        inv = handle.inv
        app, function = key = inv.target.app, inv.target.function
        calls = self._calls.get(key)
        if calls is None:
            calls = self._calls[key] = (
                self._child(self._invocations, app, function, "ok"),
                self._child(self._phases, app, function, "queue"),
                self._child(self._phases, app, function, "run"),
            )
        ok, queue, run = calls
        error = handle.ended.error if handle.ended is not None else None
        (ok if error is None else self._child(self._invocations, app, function, error.code)).inc()
        end = inv.dispatched or inv.ended or inv.submitted
        queue.observe(max(0.0, end - inv.submitted))
        if inv.dispatched:
            if inv.first_output:
                self._child(self._phases, app, function, "first_output").observe(inv.first_output - inv.dispatched)
                self._child(self._outputs, app, function).inc(inv.wanted)
            if inv.ended:
                run.observe(inv.ended - inv.dispatched)
        for handover in handle.handovers:
            if handover.ended:
                self._child(self._gaps, handover.kind).observe(handover.gap)

    def sync(self, dispatcher: Dispatcher) -> None:
        """Bring what is counted here and elsewhere up to date."""
        self._sync_own()
        waiting = dispatcher.waiting()
        self._waiting.set(waiting)
        self._running.set(len(dispatcher) - waiting)
        self._links.set(len(dispatcher.linked()))
        for metric, counts in (
            (self._drops, dispatcher.drops),
            (self._moves, dispatcher.moves),
            (self._resumes, dispatcher.resumes),
        ):
            for label, count in counts.items():
                new = count - self._counted[metric, label]
                if new:
                    metric.labels(label).inc(new)
                    self._counted[metric, label] = count

    def text(self) -> tuple[bytes, bytes]:
        """(body, content type) for a scraper: of all gateway processes when they share a directory."""
        registry = self._registry
        if self._shared:
            registry = prometheus.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return prometheus.generate_latest(registry), prometheus.CONTENT_TYPE_LATEST.encode()

    def close(self) -> None:
        self._sync_own()
        if self._shared:
            multiprocess.mark_process_dead(os.getpid())

    def _sync_own(self) -> None:
        for child in self._changed:
            child.sync()
        self._changed.clear()

    def _child(self, metric: Any, *labels: str) -> Any:
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            if len(self._children) >= MAX_SERIES:
                labels = ("other",) * len(labels)
            kind = _Observed if isinstance(metric, prometheus.Histogram) else _Counted
            child = self._children[key] = kind(metric.labels(*labels), self._changed)
        return child
