"""Prometheus metrics of the controller: starts and moves, what was predicted of them, what there is now.

Written to `PROMETHEUS_MULTIPROC_DIR`, which must be set before this module is imported (`__main__` does); any gateway
answers `/metrics` for all. Labels are few fixed words: no app, function, node or id.
"""

from __future__ import annotations

from collections import Counter as Count

import prometheus_client as prometheus

from sllm_faas.controller.commands import StartEnded
from sllm_faas.controller.model import State
from sllm_faas.wire.messages import MoveResult

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
STATES = ("requested", "starting", "ready", "draining")


class Metrics:
    def __init__(self) -> None:
        registry = prometheus.CollectorRegistry()
        self._starts = prometheus.Counter(
            "sllm_starts", "Starts of instances that ended, by outcome.", ("outcome",), registry=registry
        )
        self._seconds = prometheus.Histogram(
            "sllm_start_seconds", "From the command to ready.", buckets=_SECONDS, registry=registry
        )
        self._error = prometheus.Histogram(
            "sllm_start_error_seconds", "Predicted minus actual, absolute.", buckets=_SECONDS, registry=registry
        )
        self._moves = prometheus.Counter(
            "sllm_migrations", "Invocations that were to move, by outcome.", ("outcome",), registry=registry
        )
        self._move_seconds = prometheus.Histogram(
            "sllm_migration_seconds", "From MIGRATE to the commit.", buckets=_SECONDS, registry=registry
        )
        self._move_error = prometheus.Histogram(
            "sllm_migration_error_seconds", "Predicted minus actual, absolute.", buckets=_SECONDS, registry=registry
        )
        self._dropped = prometheus.Counter(
            "sllm_controller_frames_dropped", "Frames the controller did not believe.", ("type",), registry=registry
        )
        # Of the last controller that wrote: one that was killed left its files behind.
        self._instances = prometheus.Gauge(
            "sllm_instances", "Instances by state.", ("state",), registry=registry, multiprocess_mode="mostrecent"
        )
        self._nodes = prometheus.Gauge(
            "sllm_nodes", "Nodes by state.", ("state",), registry=registry, multiprocess_mode="mostrecent"
        )
        self._counted: Count[str] = Count()

    def start_ended(self, start: StartEnded) -> None:
        self._starts.labels(start.outcome).inc()
        if start.outcome == "ready":
            self._seconds.observe(start.actual)
            self._error.observe(abs(start.predicted - start.actual))

    def move_ended(self, result: MoveResult, predicted: float) -> None:
        self._moves.labels(result.outcome).inc()
        if result.outcome == "moved":
            self._move_seconds.observe(result.total)
            self._move_error.observe(abs(predicted - result.total))

    def observe(self, state: State, dropped: Count[str]) -> None:
        """What there is at this moment; called every second."""
        instances: Count[str] = Count(instance.state for instance in state.instances.values())
        for name in STATES:
            self._instances.labels(name).set(instances[name])
        nodes: Count[str] = Count(node.state for node in state.nodes.values())
        for name in ("up", "lost"):
            self._nodes.labels(name).set(nodes[name])
        for kind, count in dropped.items():
            if count > self._counted[kind]:
                self._dropped.labels(kind).inc(count - self._counted[kind])
                self._counted[kind] = count
