"""The controller's machine: `handle(event, now) -> [command]`. The only writer of desired state.

Pure: no clock, no randomness, no sockets, no SQL; the same events at the same times give the same commands and, byte
for byte, the same `snapshot()`. `service` feeds it and carries out what it commands; `scaling` brings targets to
their numbers, `placement` picks nodes, `estimate` predicts, `ledger` keeps the records and their indexes.

Theory of operation. Every event changes records and marks targets dirty; before `handle` returns, each dirty target
is reconciled, of those that wait first whose app holds least for its weight (`shares`), then the oldest. Time comes in
as `Tick` at `next_deadline()`. What the world reports may be late, doubled or missing: reports are taken by the tables
below, where a state that maps to itself means "known already"; HELLO carries all instances of a node, so what is not in
it is gone and what is unknown is adopted. An event that a table does not allow is an IllegalTransition and changes
nothing.

A version (`absent` = not known; failed and ready ones stay as history). `(event)` changes nothing:

    absent   | added->checking
    checking | passed->warming  failed  superseded->failed  unchanged->absent
    warming  | activated->ready  failed  superseded->failed
    ready    | (activated)

An instance, by its node's reports, our `stop`, and `lost` with its node (stopped, failed, lost: forgotten):

    absent    | placed->requested  starting  ready  draining
    requested | starting  ready  draining  stop->draining  stopped  failed  lost
    starting  | (starting)  ready  draining  stop->draining  stopped  failed  lost
    ready     | (starting)  (ready)  draining  stop->draining  stopped  failed  lost
    draining  | (starting)  (ready)  (draining)  (stop)  stopped  failed  lost

A node (a lost one is kept for FORGET_NODE seconds, because gateways may still reach it):

    absent | restored->lost  hello->up
    up     | (hello)  silent->lost  bye->absent
    lost   | hello->up  bye->absent  expire->absent

The move of what runs in an instance (`migration`; over: nothing is to be done about it any more):

    absent  | asked->waiting
    waiting | (asked)  sent->moving  over->absent
    moving  | (asked)  late->resting  kept->resting  over->absent
    resting | (asked)  sent->moving  over->absent

A further copy of a checkpoint that serves (`copies`; over: it is in enough places, or nothing wants it any more):

    absent  | short->waiting
    waiting | sent->coming  deferred->resting  over->absent
    coming  | brought->waiting  failed->resting  over->absent
    resting | (deferred)  again->waiting  over->absent
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import Any, cast

import msgspec

from sllm_faas.controller import estimate, service_times, tables
from sllm_faas.controller import events as ev
from sllm_faas.controller.commands import (
    Command,
    PublishNode,
    WithdrawNode,
)
from sllm_faas.controller.copies import PATIENCE, Copies
from sllm_faas.controller.deployments import Deployments
from sllm_faas.controller.instances import Instances
from sllm_faas.controller.ledger import Ledger
from sllm_faas.controller.model import App, Gateway, Node, NodeState, State, Version, VersionState
from sllm_faas.controller.placement import Cheapest, Policy
from sllm_faas.controller.scaling import Scaler
from sllm_faas.errors import IllegalTransition
from sllm_faas.wire.messages import FunctionRoute

FORGET_NODE = 60.0
SETTLE = 3.0
"""Seconds after a restart in which nodes that were there may report before anything starts in their stead."""


class Machine:
    def __init__(
        self,
        life: str,
        state: State | None = None,
        policy: Policy | None = None,
        *,
        migrate: bool = False,
        copies: int = 0,
    ) -> None:
        """`life` names this controller's life and goes into the ids it gives. `policy` places; `migrate`: busy
        instances may be moved, because the nodes know how to; `copies`: places that are to have each checkpoint of what
        serves, 0: it is brought nowhere but where it is checked or started."""
        self.state = state or State(life)
        self.ledger = Ledger(self.state)
        self.scaler = Scaler(self.ledger, policy or Cheapest(), migrate)
        self.deployments = Deployments(self.ledger)
        self.instances = Instances(self.ledger, self.scaler, self.deployments)
        self.copies = Copies(self.ledger, self.scaler.candidates, copies)
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.Restored: self._restored,
            ev.VersionAdded: self._version_added,
            ev.VersionChecked: self._version_checked,
            ev.VersionActivated: self._version_activated,
            ev.VersionRefused: self._version_refused,
            ev.AppDeleted: self._app_deleted,
            ev.GatewayUp: self._gateway_up,
            ev.GatewayLost: self._gateway_lost,
            ev.DemandSeen: self._demand_seen,
            ev.NodeUp: self._node_up,
            ev.NodeLost: self._node_lost,
            ev.NodeLeft: self._node_left,
            ev.NodeCordoned: self._node_cordoned,
            ev.NodeDrained: self._node_drained,
            ev.NodeLeaving: self._node_leaving,
            ev.NodeStatsSeen: self._node_stats,
            ev.CheckpointPulled: self._checkpoint_pulled,
            ev.InstanceSeen: self._instance_seen,
            ev.InstanceStopAsked: self._instance_stop_asked,
            ev.MigrationAsked: self._migration_asked,
            ev.MigrationEnded: self._migration_ended,
            ev.Tick: self._tick,
        }

    # -- the machine -----------------------------------------------------------------------------------------

    def handle(self, event: ev.Event, now: float) -> list[Command]:
        """Take a fact in; what is to be done about it. Raises IllegalTransition, having changed nothing."""
        self.ledger.begin(float(now))
        self._handlers[type(event)](event)
        self._wake_due()
        self._settle()
        self.scaler.restate()
        self.scaler.candidates.keep_up()
        return self.ledger.end()

    def next_deadline(self) -> float | None:
        """When a Tick is due; None: never, as things are."""
        return self.state.alarms[0][0] if self.state.alarms else None

    def snapshot(self) -> bytes:
        """The whole state, the same bytes for the same state."""
        return msgspec.json.encode(msgspec.to_builtins(self.state, str_keys=True, order="deterministic"))

    @classmethod
    def restore(
        cls, snapshot: bytes, policy: Policy | None = None, *, migrate: bool = False, copies: int = 0
    ) -> Machine:
        """The machine that gave the snapshot, as far as any event can tell."""
        state = msgspec.json.decode(snapshot, type=State)
        return cls(state.life, state, policy, migrate=migrate, copies=copies)

    def validate(self) -> None:
        """Raises AssertionError when an invariant does not hold."""
        assert not self.ledger.dirty, f"not reconciled: {self.ledger.dirty}"
        self.ledger.validate()
        self.scaler.migrations.validate()
        self.copies.validate()

    def _settle(self) -> None:
        """Reconcile until nothing is dirty: a start or stop makes its target dirty again, which then rests."""
        for _ in range(100):
            if not self.ledger.dirty:
                return
            dirty, self.ledger.dirty = self.ledger.dirty, set()
            waiting = [key for key in dirty if self._waits(key)] if len(dirty) > 1 else ()
            if len(waiting) > 1:
                self._in_turn(waiting)
                dirty.difference_update(waiting)
            elif waiting:
                self._look_after(waiting[0])
                dirty.remove(waiting[0])
            for key in sorted(dirty) if len(dirty) > 1 else dirty:
                self._look_after(key)
        raise AssertionError("reconciliation does not settle")

    def _look_after(self, key: str, most: int | None = None) -> bool:
        more = self.scaler.reconcile(key, most)
        self.deployments.check_warm(key)
        return more

    def _waits(self, key: str) -> bool:
        """For an instance, as far as is known."""
        record = self.state.targets.get(key)
        return record is not None and (record.blocked != "" or self.ledger.load(key)[0] > 0)

    def _in_turn(self, keys: Sequence[str]) -> None:
        """Each of these that wait, one start at a time: that may make it another's turn."""
        queue = [self._turn(key) for key in keys]
        heapq.heapify(queue)
        while queue:
            turn = heapq.heappop(queue)
            key = turn[-1]
            if queue and (now := self._turn(key)) > turn:
                heapq.heappush(queue, now)  # its app has got something since
            elif self._look_after(key, 1 if queue else None):
                heapq.heappush(queue, self._turn(key))

    def _turn(self, key: str) -> tuple[float, float, str]:
        """Of the app that holds least for its weight, then the oldest, then by name."""
        record = self.state.targets.get(key)
        if record is None:
            return (inf, inf, key)
        since = record.waiting_since
        return (self.ledger.shares.of(record.target.app), inf if since is None else since, key)

    # -- time ------------------------------------------------------------------------------------------------

    def _tick(self, _event: ev.Tick) -> None:
        """Nothing by itself: whatever is due is woken after every event."""

    def _wake_due(self) -> None:
        for what in self.ledger.due():
            kind, _, name = what.partition("|")
            if kind == "target":
                record = self.state.targets.get(name)
                if record is not None:
                    record.alarm = None
                    self.ledger.dirty.add(name)
            elif kind == "node":
                node = self.state.nodes.get(name)
                if node is not None and node.state == "lost" and node.since + FORGET_NODE <= self.ledger.now:
                    self._move_node(node, "expire")
                    self._remove_node(node)
                    self.copies.node_gone(node)
                    estimate.forget(self.state.book, name)
            elif kind == "move":
                self.scaler.migrations.due(name)
            elif kind == "copy":
                self.copies.due(name)
            elif kind == "check":
                app, _, number = name.rpartition("|")
                version = self.ledger.version(app, int(number))
                if version is not None and version.state == "checking" and version.deadline <= self.ledger.now:
                    self.deployments.give_up(version)
            else:
                self.ledger.room_changed()

    # -- restart ---------------------------------------------------------------------------------------------

    def _restored(self, event: ev.Restored) -> None:
        if self.state.apps or self.state.nodes or self.state.instances:
            raise IllegalTransition("the controller has state already: event 'Restored' is only possible first")
        self.state.sizes = dict(event.sizes)
        self.state.book = dict(event.calibration)
        for stored in event.versions:
            app = self.state.apps.setdefault(stored.app, App(stored.app))
            version_state: VersionState = "ready" if stored.ready else "failed"
            app.versions[stored.number] = Version(
                stored.app,
                stored.number,
                stored.spec,
                version_state,
                stored.created,
                stored.error,
                dict(stored.digests),
            )
            if stored.active:
                app.active = stored.number
        for known in event.nodes:
            if known.info is not None:
                tables.move(tables.NODE, f"node {known.name}", "absent", "restored")
                node = Node(known.name, "lost", self.ledger.now, known.info, cordoned=known.cordoned)
                node.checkpoints = sorted(known.info.checkpoints)
                self.state.nodes[known.name] = node
                self.ledger.where.add(node)
                self.ledger.wake(self.ledger.now + FORGET_NODE, f"node|{known.name}")
                self.state.settle_until = self.ledger.now + SETTLE
        if self.state.settle_until:
            self.ledger.wake(self.state.settle_until, "settled|")
        for app in self.state.apps.values():
            if app.active:
                self.deployments.keep_minimum(app.versions[app.active])
                self.copies.serves(app.name, PATIENCE)

    # -- deployments -----------------------------------------------------------------------------------------

    def _version_added(self, event: ev.VersionAdded) -> None:
        self.deployments.add(event)

    def _version_checked(self, event: ev.VersionChecked) -> None:
        self.deployments.take_check(event)
        digests = event.result.checkpoints.values()
        self.copies.seen(digests)
        self.copies.deployed(digests)

    def _version_activated(self, event: ev.VersionActivated) -> None:
        self.deployments.activate(event.app, event.number)
        self.copies.serves(event.app)

    def _version_refused(self, event: ev.VersionRefused) -> None:
        self.deployments.refuse(event.app, event.number, event.error)

    def _app_deleted(self, event: ev.AppDeleted) -> None:
        self.deployments.delete(event.app)
        self.copies.serves(event.app)

    def routes(self, app: App) -> tuple[FunctionRoute, ...]:
        """What gateways are told of the app: its active version's functions."""
        return self.deployments.routes(app)

    # -- gateways --------------------------------------------------------------------------------------------

    def _gateway_up(self, event: ev.GatewayUp) -> None:
        known = self.state.gateways.get(event.name)
        if known is not None:
            self.ledger.drop_gateway(known)
        self.state.gateways[event.name] = Gateway(event.name, event.life)
        if known is None:
            self.deployments.share_out()

    def _gateway_lost(self, event: ev.GatewayLost) -> None:
        known = self.state.gateways.get(event.name)
        if known is not None and known.life == event.life:
            self.ledger.drop_gateway(known)
            self.deployments.share_out()

    def _demand_seen(self, event: ev.DemandSeen) -> None:
        gateway = self.state.gateways.get(event.gateway)
        if gateway is None:
            raise IllegalTransition(f"gateway {event.gateway} is absent: event 'DemandSeen' is not possible")
        for item in event.items:
            self.ledger.set_demand(gateway, item)
            if item.served:
                function = f"{item.target.app}/{item.target.function}"
                service_times.learn(self.state.book, function, item.served, item.busy_seconds)

    # -- nodes -----------------------------------------------------------------------------------------------

    def _node_up(self, event: ev.NodeUp) -> None:
        info = event.info
        node = self.state.nodes.get(info.name)
        before = node.state if node else "absent"
        state = cast(NodeState, tables.move(tables.NODE, f"node {info.name}", before, "hello"))
        changed = node is None or node.info != info
        had, anew = (node.checkpoints, node.life != event.life) if node else (None, True)
        if node is None:
            node = self.state.nodes[info.name] = Node(info.name, state, self.ledger.now, info, cordoned=event.cordoned)
        else:
            self.ledger.where.remove(node)
        if node.life != event.life:
            node.layers, node.draining, node.cordoned = [], False, event.cordoned
        if before != "up":
            node.since = self.ledger.now
        node.state, node.info, node.life = state, info, event.life
        self.ledger.shares.nodes_changed()
        node.checkpoints = sorted(info.checkpoints)
        self.ledger.where.add(node)
        if changed:
            self.ledger.emit(PublishNode(info))
        self.instances.take_reports(node, event.reports)
        # Its checks were running in vain when it is new; when it only missed us, asking twice does no harm.
        self.deployments.reassign_checks(info.name)
        self.deployments.reassign_checks(None)
        if all(known.state == "up" for known in self.state.nodes.values()):
            self.state.settle_until = 0.0
        self.copies.node_up(node, had, anew)
        self._room()

    def _room(self) -> None:
        """There may be room where there was none."""
        for key in self.state.blocked:
            record = self.state.targets[key]
            if record.error is not None and record.error.code == "no_capacity":
                record.error, record.retry_at = None, 0.0
        self.ledger.room_changed()

    def _node_lost(self, event: ev.NodeLost) -> None:
        node = self._node(event.name, "silent")
        self._move_node(node, "silent")
        self.ledger.where.touch(node.name)
        node.since = self.ledger.now
        self.ledger.wake(self.ledger.now + FORGET_NODE, f"node|{node.name}")
        self.instances.lose_all(node)
        self.ledger.room_changed()
        self.deployments.reassign_checks(node.name)
        self.copies.node_closed(node)

    def _node_left(self, event: ev.NodeLeft) -> None:
        node = self._node(event.name, "bye")
        self._move_node(node, "bye")
        self.instances.lose_all(node)
        self._remove_node(node)
        self.ledger.room_changed()
        self.deployments.reassign_checks(node.name)
        self.copies.node_closed(node)
        self.copies.node_gone(node, PATIENCE)

    def _remove_node(self, node: Node) -> None:
        self.ledger.where.remove(node)
        del self.state.nodes[node.name]
        self.ledger.shares.nodes_changed()
        self.ledger.emit(WithdrawNode(node.name))

    def _node_cordoned(self, event: ev.NodeCordoned) -> None:
        node = self._node(event.name, "cordoned")
        node.cordoned = event.cordoned
        self.ledger.where.touch(node.name)
        if event.cordoned:
            self.ledger.room_changed()
            self.copies.node_closed(node)
        else:
            node.draining = False
            self.copies.offer(node)
            self._room()

    def _node_drained(self, event: ev.NodeDrained) -> None:
        node = self._node(event.name, "drained")
        node.cordoned = node.draining = True
        self._empty(node, "is drained")

    def _node_leaving(self, event: ev.NodeLeaving) -> None:
        node = self._node(event.name, "leaving")
        node.cordoned = node.draining = True
        self._empty(node, "leaves")

    def _empty(self, node: Node, why: str) -> None:
        self.ledger.where.touch(node.name)
        self.ledger.room_changed()
        self.copies.node_closed(node)
        for instance in self.ledger.on_node(node.name):
            self.scaler.migrations.empty(instance, f"node {node.name} {why}")

    def _node_stats(self, event: ev.NodeStatsSeen) -> None:
        node = self._node(event.name, "stats")
        self.ledger.where.remove(node)
        if self.ledger.pinned(node.name) != event.stats.pinned:
            self.ledger.where.touch(node.name)
            self.ledger.room_changed()
        before, node.stats = node.stats, event.stats
        if event.stats.bandwidth and event.stats.bandwidth != node.info.bandwidth:
            node.info = replace(node.info, bandwidth=event.stats.bandwidth)
        if event.stats.layers is not None:
            node.layers = sorted(event.stats.layers)
        had = node.checkpoints
        if event.stats.checkpoints is not None:
            node.checkpoints = sorted(event.stats.checkpoints)
        self.ledger.where.add(node)
        if node.checkpoints != had:
            self.copies.told(node, had)
        self.copies.stats_seen(node, before)

    def _checkpoint_pulled(self, event: ev.CheckpointPulled) -> None:
        node, result = self._node(event.node, "checkpoint"), event.result
        if result.digest:
            self.ledger.where.note_checkpoint(node, result.digest)
            self.ledger.note_size(result.digest, result.bytes)
            self.copies.seen((result.digest,))
        self.copies.answered(node, result)

    def _move_node(self, node: Node, event: str) -> None:
        after = tables.move(tables.NODE, f"node {node.name}", node.state, event)
        self.ledger.shares.nodes_changed()
        if after != "absent":
            node.state = cast(NodeState, after)

    def _node(self, name: str, event: str) -> Node:
        node = self.state.nodes.get(name)
        if node is None:
            raise IllegalTransition(f"node {name} is absent: event {event!r} is not possible")
        return node

    # -- instances -------------------------------------------------------------------------------------------

    def _instance_seen(self, event: ev.InstanceSeen) -> None:
        node = self._node(event.node, f"instance {event.report.state}")
        if node.state != "up":
            raise IllegalTransition(f"node {node.name} is {node.state}: event 'instance report' is not possible")
        had = len(node.checkpoints)
        self.instances.take(node, event.report)
        if len(node.checkpoints) > had:  # its start brought one
            self.copies.seen((self.state.instances[event.report.instance].digest,))

    def _instance_stop_asked(self, event: ev.InstanceStopAsked) -> None:
        instance = self.state.instances.get(event.instance)
        if instance is None:
            raise IllegalTransition(f"instance {event.instance} is absent: event 'stop' is not possible")
        self.scaler.stop(instance, "asked for", event.drain)

    # -- moves -----------------------------------------------------------------------------------------------

    def _migration_asked(self, event: ev.MigrationAsked) -> None:
        self.scaler.migrations.ask(event.instance, event.node, event.invocations, event.request)

    def _migration_ended(self, event: ev.MigrationEnded) -> None:
        self._node(event.node, "MIGRATED")
        self.scaler.migrations.answered(event.node, event.result)
