"""Invocations that are to leave this node: what `dispatch.moves.Departure` decides, made into frames. Pure.

A MIGRATE names an instance; what runs there leaves one after another, and orders for one destination wait for each
other, so that an activated one never waits behind another's recompute there. Invariant: every MIGRATE is answered by
exactly one Report, and an invocation takes part in one of them at a time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sllm_faas.dispatch.moves import (
    Continue,
    Departure,
    Hold,
    Offer,
    Over,
    Pause,
    Release,
    Snapshot,
    Step,
    Stop,
)
from sllm_faas.errors import IllegalTransition
from sllm_faas.wire.codec import decode_body, encode
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Invoke, Migrate, Migrated, Moved, MoveResult, ResumeState
from sllm_invoker.flights import Action, Flight, Instance, Report, Send

Cancel = Callable[[Flight, float], list[Action]]


@dataclass(slots=True, eq=False)
class _Migration:
    order: Migrate
    began: float
    waiting: deque[bytes]
    current: bytes | None = None
    held: bool = False
    """The destination has the arguments of the current one."""
    results: list[MoveResult] = field(default_factory=list)


class Departures:
    """`cancel(flight, now)` ends a flight whose fence was raised."""

    def __init__(self, flights: dict[bytes, Flight], cancel: Cancel, dropped: Counter[str]) -> None:
        self._flights = flights
        self._cancel = cancel
        self._dropped = dropped
        self._migrations: dict[bytes, _Migration] = {}
        """By the invocation that is on its way."""
        self._busy: set[bytes] = set()
        """Invocations of any migration."""
        self._queues: dict[str, deque[_Migration]] = {}
        """By destination instance, the order that is carried out and those that wait for it."""

    # -- the controller's order ------------------------------------------------------------------------------

    def begin(self, order: Migrate, instance: Instance | None, now: float) -> list[Action]:
        wanted = {bytes.fromhex(text) for text in order.invocations} if order.invocations else None
        migration = _Migration(order, now, deque())
        for key in sorted(instance.flights if instance is not None else ()):
            if wanted is not None and key not in wanted:
                continue
            if key in self._busy:
                migration.results.append(MoveResult(key.hex(), "kept", "it is being moved already"))
            else:
                migration.waiting.append(key)
                self._busy.add(key)
        for key in sorted((wanted or set()) - (instance.flights if instance is not None else set())):
            migration.results.append(MoveResult(key.hex(), "ended"))
        queue = self._queues.setdefault(order.to, deque())
        queue.append(migration)
        return self._advance(migration, now) if len(queue) == 1 else []

    def _advance(self, migration: _Migration, now: float) -> list[Action]:
        while migration.waiting:
            key = migration.waiting.popleft()
            flight = self._flights.get(key)
            if flight is None or flight.cancelled is not None:
                self._busy.discard(key)
                migration.results.append(MoveResult(key.hex(), "ended", total=now - migration.began))
                continue
            migration.current, migration.held = key, False
            self._migrations[key] = migration
            flight.move = Departure(now)
            return self._carry_out(flight, flight.move.begin(), now)
        order, queue = migration.order, self._queues[migration.order.to]
        queue.popleft()
        done: list[Action] = [Report(Migrated(order.migration, order.instance, tuple(migration.results)))]
        if queue:
            return done + self._advance(queue[0], now)
        del self._queues[order.to]
        return done

    # -- what is heard ---------------------------------------------------------------------------------------

    def told(self, flight: Flight, header: Header, body: ResumeState, now: float) -> list[Action]:
        """STATE of the container."""
        move = flight.move
        if move is None or header.seq > flight.next:
            return self._drop("unexpected_type")
        try:
            steps = move.state(
                header.seq, body.resume, body.tokens, possible=body.possible, paused=body.paused, now=now
            )
        except IllegalTransition:
            return self._drop("unexpected_type")
        return self._carry_out(flight, steps, now)

    def from_node(self, node: str, header: Header, now: float) -> list[Action]:
        """HELD, or that it cannot be held, of the destination."""
        flight, migration = self._flights.get(header.id), self._migrations.get(header.id)
        if flight is None or flight.move is None or migration is None or flight.fence != header.fence:
            return []
        if migration.order.node != node:
            return []
        if header.type is Type.HELD:
            return self._carry_out(flight, flight.move.held(header.seq, flight.next, now), now)
        if header.type in (Type.REFUSED, Type.FAILED):
            return self._carry_out(flight, flight.move.failed(f"{node} could not hold it", now), now)
        return []

    def answered(self, flight: Flight, kind: Type, now: float) -> list[Action]:
        """COMMITTED or KEPT of the gateway."""
        move = flight.move
        if move is None:
            return self._drop("unexpected_type")
        steps = move.committed(now) if kind is Type.COMMITTED else move.kept(now)
        return self._carry_out(flight, steps, now)

    def ended(self, flight: Flight, now: float) -> list[Action]:
        """The flight is over."""
        return self._carry_out(flight, flight.move.ended(now), now) if flight.move is not None else []

    def node_lost(self, node: str, now: float) -> list[Action]:
        for migration in (each for queue in self._queues.values() for each in queue if each.order.node == node):
            while migration.waiting:
                key = migration.waiting.popleft()
                self._busy.discard(key)
                migration.results.append(MoveResult(key.hex(), "kept", f"{node} was lost"))
        lost = [key for key, migration in self._migrations.items() if migration.order.node == node]
        return [action for key in lost for action in self._fail(key, f"{node} was lost", now)]

    def gateway_lost(self, gateway: bytes, now: float) -> list[Action]:
        """Nobody is left who could commit what it owned."""
        keys = [key for key in self._migrations if self._flights[key].owner == gateway]
        return [action for key in keys for action in self._fail(key, "its gateway was lost", now)]

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for key in list(self._migrations):
            flight = self._flights.get(key)
            if flight is not None and flight.move is not None:
                actions += self._carry_out(flight, flight.move.tick(now), now)
        return actions

    def _fail(self, key: bytes, why: str, now: float) -> list[Action]:
        flight = self._flights.get(key)
        if flight is None or flight.move is None:
            return []
        return self._carry_out(flight, flight.move.failed(why, now), now)

    # -- carry out -------------------------------------------------------------------------------------------

    def _carry_out(self, flight: Flight, steps: list[Step], now: float) -> list[Action]:
        actions: list[Action] = []
        for step in steps:
            match step:
                case Snapshot():
                    actions.append(self._ask(flight, Type.SNAPSHOT))
                case Pause():
                    actions.append(self._ask(flight, Type.PAUSE))
                case Continue():
                    actions.append(self._ask(flight, Type.CONTINUE))
                case Hold(seq, resume):
                    actions.append(self._hold(flight, seq, resume))
                case Offer(seq):
                    actions += self._offer(flight, seq)
                case Release():
                    actions += self._to_node(flight, [flight.header(Type.CANCEL).pack()])
                case Stop():
                    actions += self._hand_over(flight, now)
                case Over():
                    actions += self._over(flight, now)
        return actions

    def _ask(self, flight: Flight, kind: Type) -> Action:
        return Send("container", flight.where.peer, [flight.header(kind).pack()])

    def _hold(self, flight: Flight, seq: int, resume: bytes) -> Action:
        migration = self._migrations[flight.id]
        invoke: Invoke = decode_body(Type.INVOKE, flight.invoke[0])
        buffers = flight.invoke[1:2] if not invoke.payload else []
        if migration.held:  # the container has the arguments
            invoke, buffers = replace(invoke, payload=b""), []
        migration.held = True
        header = Header(Type.HOLD, flight.id, flight.fence, migration.order.number, seq)
        parts = encode(header, replace(invoke, resume=resume, outputs=seq), *buffers)
        return Send("node", migration.order.node.encode(), parts)

    def _offer(self, flight: Flight, seq: int) -> list[Action]:
        order = self._migrations[flight.id].order
        if flight.owner is None:
            return []
        header = flight.header(Type.MOVED)._replace(seq=seq)
        return [Send("gateway", flight.owner, encode(header, Moved(order.node, order.to, order.number)))]

    def _hand_over(self, flight: Flight, now: float) -> list[Action]:
        """The fence is raised: end it here; the other side may need what was said to replay it."""
        actions: list[Action] = []
        for _, parts in reversed(flight.window):
            actions += self._to_node(flight, parts)
        actions += self._to_node(flight, [flight.header(Type.COMMITTED).pack()])
        return [*actions, *self._cancel(flight, now)]

    def _to_node(self, flight: Flight, parts: list[bytes]) -> list[Action]:
        migration = self._migrations.get(flight.id)
        return [Send("node", migration.order.node.encode(), parts)] if migration is not None else []

    def _over(self, flight: Flight, now: float) -> list[Action]:
        migration, move = self._migrations.pop(flight.id), flight.move
        assert move is not None
        self._busy.discard(flight.id)
        outcome = {"MOVED": "moved", "KEPT": "kept", "ENDED": "ended"}[move.phase]
        result = MoveResult(
            flight.id.hex(), "kept", move.why, now - migration.began, move.paused, move.rounds, move.tokens, move.sent
        )
        migration.results.append(replace(result, outcome=outcome))  # type: ignore[arg-type]
        return self._advance(migration, now)

    def _drop(self, reason: str) -> list[Action]:
        self._dropped[reason] += 1
        return []

    # -- look ------------------------------------------------------------------------------------------------

    def nodes(self) -> set[str]:
        """The nodes that something is being moved to."""
        return {migration.order.node for migration in self._migrations.values()}

    def validate(self) -> None:
        """Raises AssertionError when moves and flights disagree."""
        for key, migration in self._migrations.items():
            move = self._flights[key].move
            assert migration.current == key and move is not None and not move.over, (key, move)
            move.validate()
        assert set(self._migrations) <= self._busy
        assert {queue[0].current for queue in self._queues.values()} == set(self._migrations)
