"""What happens to instances: reports taken in, starts timed and learned from, failures counted, the lost let go.

Part of the machine (`state.Machine`), which calls it; decisions on how many there should be are `scaling`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from sllm_faas.controller import autoscale, estimate, tables
from sllm_faas.controller.commands import (
    SendStop,
    StartEnded,
)
from sllm_faas.controller.deployments import Deployments
from sllm_faas.controller.ledger import Ledger
from sllm_faas.controller.model import Instance, InstanceState, Node, StartRecord
from sllm_faas.controller.scaling import Scaler
from sllm_faas.errors import ErrorInfo, StartFailed, to_info
from sllm_faas.layers import path
from sllm_faas.spec import Target
from sllm_faas.wire.messages import InstanceReport, Stop

RECORDS = 20
"""Starts remembered per function."""
FORGET_FAILURES = 120.0
"""Seconds after the last failure's back-off when the count starts anew."""
STARTING = ("requested", "starting")
UNKNOWN_MEMORY = 256
"""MiB charged for an adopted instance whose function is not known any more."""


class Instances:
    def __init__(self, ledger: Ledger, scaler: Scaler, deployments: Deployments) -> None:
        self.ledger = ledger
        self.scaler = scaler
        self.deployments = deployments
        self.state = ledger.state

    # -- reports ---------------------------------------------------------------------------------------------

    def take_reports(self, node: Node, reports: Sequence[InstanceReport]) -> None:
        """All instances of a node: ours that are not among them are gone."""
        there = {report.instance for report in reports}
        for instance in self.ledger.on_node(node.name):
            if instance.id not in there:
                self._end(instance, "lost", None)
        stopped = {instance.id: instance for instance in self.ledger.ending_on(node.name) if instance.stopping}
        for report in reports:
            self.take(node, report)
            if report.instance in stopped and report.state in ("starting", "ready"):
                self.scaler.stop_again(stopped[report.instance])  # the first one was lost with the link

    def take(self, node: Node, report: InstanceReport) -> None:
        instance = self.state.instances.get(report.instance)
        if instance is None:
            if report.state not in ("stopped", "failed"):
                self._adopt(node, report)
            return
        if instance.node != node.name:
            return  # an id of another node's instance: not its to speak for
        before = instance.state
        after = tables.move(tables.INSTANCE, f"instance {instance.id}", before, report.state)
        if after in ("stopped", "failed"):
            self._note(instance, report)
            self._end(instance, after, report.error, served=report.served)
            return
        if before in STARTING and after not in STARTING:
            self._part(node, instance)
        instance.state = cast(InstanceState, after)
        if after != before:
            self.ledger.note_state(instance)
        self._note(instance, report)
        if after == "ready" and before != "ready":
            self._became_ready(node, instance, report)
        self.ledger.touch(instance.target)

    def _part(self, node: Node, instance: Instance) -> None:
        """Its start is over: how long it had the company of those that still start on the machine, and they its."""
        now = self.ledger.now
        for name in self.ledger.where.beside(node):
            for other in self.ledger.loading_on(name):
                if other is not instance:
                    together = now - max(other.asked, instance.asked)
                    other.company += together
                    instance.company += together

    def _note(self, instance: Instance, report: InstanceReport) -> None:
        instance.number = report.number or instance.number
        instance.pid = report.pid or instance.pid
        instance.running = report.running
        instance.tokens = report.tokens
        instance.concurrency = report.concurrency
        if report.warmth != "cold" or report.timeline.spans:
            instance.warmth = report.warmth
        if report.timeline.spans:
            instance.timeline = report.timeline
        instance.tier = report.tier or instance.tier

    def _adopt(self, node: Node, report: InstanceReport) -> None:
        """It runs there and we did not know, because we or the link were down. What nobody wants is stopped."""
        state = tables.move(tables.INSTANCE, f"instance {report.instance}", "absent", report.state)
        spec = self.ledger.function(report.target)
        digest = spec.checkpoint.digest if spec and spec.checkpoint else ""
        self.state.created += 1
        instance = Instance(
            id=report.instance,
            seq=self.state.created,
            target=report.target,
            node=node.name,
            state=cast(InstanceState, state),
            asked=self.ledger.now,
            memory_mb=spec.memory_mb if spec else UNKNOWN_MEMORY,
            digest=digest,
            size=self.state.sizes.get(digest, 0),
            gpus=spec.gpus if spec else 0,
            why="found running",
            adopted=True,
            ready=self.ledger.now if state == "ready" else None,
            draining_since=self.ledger.now if state == "draining" else None,
        )
        self._note(instance, report)
        self.ledger.add_instance(instance)
        self._warm_layers(node, instance.target)
        if self.scaler.mode(report.target) == "gone" and state != "draining":
            instance.state = "draining"
            instance.stopping = "its version is gone"
            self.ledger.note_state(instance)
            self.ledger.emit(SendStop(node.name, Stop(instance.id, None, instance.stopping)))

    def _became_ready(self, node: Node, instance: Instance, report: InstanceReport) -> None:
        self.ledger.note_ready(instance)
        start = self.scaler.candidates.start(node, instance)
        record = self.ledger.target(instance.target)
        if record.error is not None:
            record.error, record.failures, record.retry_at = None, 0, 0.0
        self._warm_layers(node, instance.target)
        if instance.digest:
            self.ledger.where.note_checkpoint(node, instance.digest)
        self.scaler.migrations.instance_ready(instance)
        if instance.adopted:
            return
        actual = instance.actual = self.ledger.now - instance.asked
        if start is not None:
            beside = instance.company / actual if actual > 0 else 0.0
            finished = estimate.Finished(
                instance.timeline, report.read_bytes, report.read_seconds, instance.predicted, actual
            )
            if estimate.learn(self.state.book, replace(start, at_once=1.0 + beside), finished):
                self.scaler.candidates.forget_making()
            unknown = node.name not in self.ledger.where.resident(instance.digest) and instance.tier != "gpu"
            if instance.digest and unknown:
                full = self.ledger.crowded_out(node.name, instance.digest)
                estimate.learn_cached(self.state.book, node.name, instance.digest, full, instance.tier)
            self.ledger.where.renew(node.name)
        self._remember(instance, "ready", None)

    def _warm_layers(self, node: Node, target: Target) -> None:
        spec = self.ledger.function(target)
        if spec is not None:
            digest = spec.checkpoint.digest if spec.checkpoint else ""
            self.ledger.where.note_layers(node, (layer.key for layer in path(spec, digest)))

    # -- ends ------------------------------------------------------------------------------------------------

    def lose_all(self, node: Node) -> None:
        for instance in self.ledger.on_node(node.name):
            self._end(instance, "lost", None)

    def _end(self, instance: Instance, outcome: str, error: ErrorInfo | None, *, served: bool = False) -> None:
        before = instance.state
        tables.move(tables.INSTANCE, f"instance {instance.id}", before, outcome)
        if before in STARTING:
            self._part(self.state.nodes[instance.node], instance)
        self.scaler.migrations.instance_ended(instance)
        self.ledger.remove_instance(instance)
        if instance.ready is None and not instance.adopted:
            self._remember(instance, outcome, error)
        if before == "draining" or outcome == "lost":
            return
        if before in ("requested", "starting"):
            if error is None:
                error = to_info(StartFailed(f"the instance of {instance.target} {outcome} while it was starting"))
            self._count_start_failure(instance, error)
        elif outcome == "failed":
            self._count_crash(instance, served)

    def _count_start_failure(self, instance: Instance, error: ErrorInfo) -> None:
        record = self.ledger.target(instance.target)
        record.failures += 1
        record.error = error
        record.told = []
        self._hold_back(instance, autoscale.backoff(record.failures))
        self.deployments.start_failed(instance.target, error)

    def _count_crash(self, instance: Instance, served: bool) -> None:
        """It was ready and died. What had answered something is replaced at once, however young: it works, and those
        that it left behind wait. The first that had not, too; when it happens again the next start waits a little."""
        record = self.ledger.target(instance.target)
        young = instance.ready is not None and self.ledger.now - instance.ready < autoscale.CRASH_WINDOW
        record.failures = record.failures + 1 if young and not served else 0
        self._hold_back(instance, min(autoscale.CRASH_LIMIT, autoscale.backoff(record.failures - 1)))

    def _hold_back(self, instance: Instance, seconds: float) -> None:
        record = self.ledger.target(instance.target)
        record.retry_at = self.ledger.now + seconds
        record.forget_at = record.retry_at + FORGET_FAILURES
        if record.failures:
            self.ledger.wake_target(record, record.retry_at)

    def _remember(self, instance: Instance, outcome: str, error: ErrorInfo | None) -> None:
        actual = self.ledger.now - instance.asked
        function = f"{instance.target.app}/{instance.target.function}"
        entry = StartRecord(
            instance=instance.id,
            node=instance.node,
            version=instance.target.version,
            outcome=outcome,
            warmth=instance.warmth,
            tier=instance.tier,
            predicted=instance.predicted,
            actual=actual,
            why=instance.why,
            at=self.ledger.now,
            timeline=instance.timeline,
            error=error,
            margin=instance.margin,
        )
        self.state.history[function] = [entry, *self.state.history.get(function, [])][:RECORDS]
        self.ledger.emit(StartEnded(instance.id, instance.node, outcome, instance.predicted, actual))
