"""What the relay knows and decides: invocations in flight between gateways and containers. Pure.

    gateway ──INVOKE──►┐  flights: id -> owner, instance, fence, window   ┌──► container
            ◄─OUTPUT───┘                                                  └◄──

Frames in, frames out: every method returns `Send`s (and now and then a `Kill` or `Drain`) for the shell to carry
out; nothing here touches a socket, a clock or a body. A frame is forwarded as it came: only its fixed header is read.

Life of a flight:  running ─► ended, by the container's terminal frame or its death, and nothing else.
  An owner that is lost makes it an orphan; any gateway may adopt it within `orphan_grace`, after that it is
  cancelled. An ended flight stays readable for an adopter for a while: streams a few seconds (their gateway may
  be dead already without anybody knowing), orphans for their grace.

Invariants: a slot is taken exactly while a flight runs; a container speaks only for its own flights; a bad frame
is counted by reason and dropped.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from sllm_faas.dispatch.credits import CreditBook
from sllm_faas.errors import WorkerLost, to_info
from sllm_faas.spec import Timeline
from sllm_faas.wire.codec import decode_body, encode
from sllm_faas.wire.header import NO_LIMIT, SIZE, Header, Type
from sllm_faas.wire.messages import Adopted, Failed, Grant, InstanceState, Migrate, Refused, ResumeState
from sllm_invoker.arrivals import Arrivals
from sllm_invoker.departures import Departures
from sllm_invoker.flights import RESEND, Action, Drain, Flight, Instance, Kill, Parts, Report, Send, size

__all__ = ["Action", "Drain", "Flight", "Instance", "Kill", "Parts", "RelayCore", "Report", "Send"]

LINGER = 5.0
"""Seconds an ended stream stays readable: longer than it takes to notice that its gateway died."""
WINDOW_BYTES = 4 * 1024 * 1024
LINGER_BYTES = 64 * 1024 * 1024


class RelayCore:
    def __init__(self, node: str, *, stream_window: int = 1024, orphan_grace: float = 10.0) -> None:
        self.node = node
        self.credits = CreditBook()
        self.instances: dict[int, Instance] = {}
        self.flights: dict[bytes, Flight] = {}
        self.dropped: Counter[str] = Counter()
        """Bad frames, by reason."""
        self._window = stream_window
        self._grace = orphan_grace
        self.gateways: set[bytes] = set()
        self._granted: dict[bytes, int] = {}
        """By gateway the last grant, until it has acknowledged it."""
        self._cancelling: dict[bytes, Flight] = {}
        self._orphans: dict[bytes, Flight] = {}
        self._ended: dict[bytes, Flight] = {}
        self._ended_bytes = 0
        self.departures = Departures(self.flights, self._cancel, self.dropped)
        self.arrivals = Arrivals(self.instances, self.flights, self.credits, self.dropped)

    # -- instances -------------------------------------------------------------------------------------------

    def add(self, instance: Instance) -> None:
        """An instance is starting. Its number is never used again."""
        self.instances[instance.number] = instance
        self.credits.open(instance.number, 0)

    def ready(self, number: int, timeline: Timeline) -> None:
        instance = self.instances[number]
        instance.state = "ready"
        instance.timeline = timeline
        self.credits.open(number, instance.concurrency)

    def drain(self, number: int, now: float) -> list[Action]:
        """Take nothing new; what runs goes on. Idempotent."""
        instance = self.instances.get(number)
        if instance is not None and instance.state in ("starting", "ready"):
            instance.state = "draining"
            self.credits.close(number)
            return self.arrivals.drained(number, now)
        return []

    def cancel_all(self, number: int, now: float) -> list[Action]:
        """Cancel everything that runs on an instance."""
        instance = self.instances.get(number)
        if instance is None:
            return []
        return [action for key in list(instance.flights) for action in self._cancel(self.flights[key], now)]

    def gone(self, number: int, state: InstanceState, now: float, detail: str = "") -> list[Action]:
        """The container is dead: what ran there ends, cancelled if that was wanted, else lost."""
        instance = self.instances.get(number)
        if instance is None:
            return []
        actions: list[Action] = []
        for key in list(instance.flights):
            flight = self.flights[key]
            if flight.cancelled is not None:
                parts = [flight.header(Type.CANCELLED).pack()]
            else:
                error = to_info(WorkerLost(f"the container of {instance.target} ended{detail} during the invocation."))
                parts = encode(flight.header(Type.FAILED), Failed(error))
            actions += self._end(flight, parts, now)
        actions += self.arrivals.gone(number)
        instance.state = state
        for gateway in self.gateways:
            seq = self._granted[gateway] = self.credits.ordinal()
            actions.append(Send("gateway", gateway, self._grant(instance, seq, 0)))
        del self.instances[number]
        self.credits.forget(number)
        return actions

    # -- gateways --------------------------------------------------------------------------------------------

    def gateway_joined(self, gateway: bytes, now: float) -> list[Action]:
        """A gateway said hello, perhaps again: everything it had is an orphan until it adopts it."""
        actions = self.gateway_lost(gateway, now)
        self.gateways.add(gateway)
        self.credits.connect(gateway)
        return actions

    def gateway_lost(self, gateway: bytes, now: float) -> list[Action]:
        if gateway not in self.gateways:
            return []
        self.gateways.discard(gateway)
        self._granted.pop(gateway, None)
        self.credits.disconnect(gateway)
        actions = self.departures.gateway_lost(gateway, now)
        for flight in self.flights.values():
            if flight.owner == gateway:
                self._orphan(flight, now)
        for flight in self._ended.values():
            if flight.owner == gateway:
                flight.owner = None
                flight.until = now + self._grace
        return actions

    def gateway_left(self, gateway: bytes, now: float) -> list[Action]:
        """An orderly leave: nobody will ask for what it left running."""
        owned = [flight for flight in self.flights.values() if flight.owner == gateway]
        actions = self.gateway_lost(gateway, now)
        return actions + [action for flight in owned for action in self._cancel(flight, now)]

    def from_gateway(self, gateway: bytes, header: Header, parts: Parts, now: float) -> list[Action]:
        kind = header.type
        if gateway not in self.gateways:
            return self._drop("no_hello")
        if kind is Type.INVOKE:
            return self._invoke(gateway, header, parts, now)
        if kind is Type.ADOPT:
            return self._adopt(gateway, header)
        if kind is Type.ACTIVATE:
            return self._activate(gateway, header, parts, now)
        flight = self.flights.get(header.id)
        if flight is None:
            if kind is Type.CANCEL:
                return [Send("gateway", gateway, [Header(Type.CANCELLED, header.id, header.fence).pack()])]
            return [] if kind in (Type.CREDIT, Type.COMMITTED, Type.KEPT) else self._drop("unexpected_type")
        if kind is Type.CANCEL and header.fence < flight.fence:  # that attempt is over here
            return [Send("gateway", gateway, [Header(Type.CANCELLED, header.id, header.fence).pack()])]
        if flight.owner != gateway and not (kind is Type.CANCEL and flight.owner is None):
            return self._drop("not_owner")
        if flight.fence != header.fence:
            return self._drop("stale_fence")
        if kind is Type.CREDIT:
            if header.credit <= flight.credit:
                return []
            flight.credit = header.credit
            return [Send("container", flight.where.peer, parts)]
        if kind is Type.CANCEL:
            return self._cancel(flight, now)
        if kind is Type.COMMITTED or kind is Type.KEPT:
            return self.departures.answered(flight, kind, now)
        return self._drop("unexpected_type")

    def _activate(self, gateway: bytes, header: Header, parts: Parts, now: float) -> list[Action]:
        known = self.flights.get(header.id)
        if known is not None and known.fence == header.fence and known.owner == gateway:
            return self._drop("repeated")
        flight, actions = self.arrivals.activate(gateway, header, parts, now)
        if flight is not None:
            self._forget(flight.id)
            self.flights[flight.id] = flight
        return actions

    def _invoke(self, gateway: bytes, header: Header, parts: Parts, now: float) -> list[Action]:
        instance = self.instances.get(header.route)
        if instance is None:
            return [self._refuse(gateway, header, "unknown_instance")]
        if instance.state != "ready":
            return [self._refuse(gateway, header, "draining" if instance.state == "draining" else "no_slot")]
        known = self.flights.get(header.id)
        if known is not None:
            if header.fence <= known.fence:
                return [self._refuse(gateway, header, "stale_fence")]
            # One id runs once per node: the superseded one has to end first.
            return [*self._cancel(known, now), self._refuse(gateway, header, "no_slot")]
        if (displaced := self.arrivals.displace(header.id, now)) is not None:
            return [*displaced, self._refuse(gateway, header, "no_slot")]
        if not self.credits.take(header.route, gateway):
            return [self._refuse(gateway, header, "no_slot")]
        limit = instance.execution
        overdue = float("inf") if limit is None else now + limit + instance.cancel_grace
        self._forget(header.id)
        self.flights[header.id] = Flight(
            header.id, header.fence, gateway, instance, parts, now, overdue, header.credit, *(header.seq,) * 3
        )
        instance.flights.add(header.id)
        return [Send("container", instance.peer, parts)]

    def _refuse(
        self,
        gateway: bytes,
        header: Header,
        reason: Literal["no_slot", "unknown_instance", "draining", "stale_fence"],
    ) -> Send:
        head = Header(Type.REFUSED, header.id, header.fence, route=header.route)
        return Send("gateway", gateway, encode(head, Refused(reason)))

    def _adopt(self, gateway: bytes, header: Header) -> list[Action]:
        flight = self.flights.get(header.id) or self._ended.get(header.id)
        if flight is None:
            return [self._adopted(gateway, header, Adopted("unknown"))]
        if flight.owner is not None and flight.owner != gateway:
            return [self._adopted(gateway, header._replace(fence=flight.fence), Adopted("owned"))]
        if not flight.base <= header.seq <= flight.next:
            return [self._adopted(gateway, header, Adopted("gone"))]
        if flight.owner is None and flight.terminal is None:
            self.credits.adopt(flight.where.number, gateway)
        flight.owner = gateway
        flight.until = None
        self._orphans.pop(flight.id, None)
        found = Adopted("found", flight.invoke[0][SIZE:], flight.where.target, flight.where.name)
        # All of it, if it is still here: with that the adopter can resume it elsewhere, should this instance be lost.
        first = flight.start if flight.base <= flight.start <= header.seq else header.seq
        head = header._replace(fence=flight.fence, route=flight.where.number, seq=first)
        actions: list[Action] = [self._adopted(gateway, head, found, *flight.invoke[1:])]
        actions += [Send("gateway", gateway, parts) for end, parts in flight.window if end > first]
        if flight.terminal is not None:
            actions.append(Send("gateway", gateway, flight.terminal))
            self._forget(flight.id)
        elif header.credit > flight.credit:
            flight.credit = header.credit
            more = flight.header(Type.CREDIT)._replace(credit=header.credit)
            actions.append(Send("container", flight.where.peer, [more.pack()]))
        return actions

    def _adopted(self, gateway: bytes, header: Header, body: Adopted, *buffers: bytes) -> Send:
        return Send("gateway", gateway, encode(header._replace(type=Type.ADOPTED), body, *buffers))

    # -- containers ------------------------------------------------------------------------------------------

    def from_container(self, peer: bytes, header: Header, parts: Parts, now: float) -> list[Action]:
        flight = self.flights.get(header.id)
        hold = self.arrivals.holds.get(header.id)
        if hold is not None and hold.where.peer == peer:
            return self.arrivals.from_container(hold, header, parts)
        if flight is None:
            return self._drop("unknown_invocation")
        if flight.where.peer != peer:
            return self._drop("not_its_invocation")
        if flight.fence != header.fence:
            return self._drop("stale_fence")
        kind = header.type
        if kind is Type.OUTPUT:
            return self._output(flight, header, parts)
        if kind is Type.DONE or kind is Type.FAILED or kind is Type.CANCELLED:
            flight.where.answered |= kind is Type.DONE or flight.spoke
            return self._end(flight, parts, now)
        if kind is Type.STATE:
            body: ResumeState = decode_body(kind, parts[0])
            return self.departures.told(flight, header, body, now)
        return self._drop("unexpected_type")

    # -- other nodes -----------------------------------------------------------------------------------------

    def migrate(self, order: Migrate, now: float) -> list[Action]:
        """MIGRATE of the controller."""
        instance = next((one for one in self.instances.values() if one.name == order.instance), None)
        return self.departures.begin(order, instance, now)

    def from_node(self, node: str, header: Header, now: float) -> list[Action]:
        """What the node that something is moved to says of it."""
        return self.departures.from_node(node, header, now)

    def node_lost(self, node: str, now: float) -> list[Action]:
        return self.departures.node_lost(node, now)

    def from_source(self, source: bytes, header: Header, parts: Parts, now: float) -> list[Action]:
        """A frame of an invoker that moves something here."""
        return self.arrivals.from_source(source, header, parts, now)

    def source_lost(self, source: bytes, now: float) -> None:
        self.arrivals.source_lost(source, now)

    # -- outputs and ends ------------------------------------------------------------------------------------

    def _output(self, flight: Flight, header: Header, parts: Parts) -> list[Action]:
        end = header.seq + header.items
        if not header.items or header.seq != flight.next:
            return self._drop("out_of_order")
        if end > flight.credit:
            return self._drop("beyond_credit")
        flight.next = end
        window = flight.window
        window.append((end, parts))
        flight.bytes += size(parts)
        while window and (end - flight.base > self._window or flight.bytes > WINDOW_BYTES):
            flight.base, old = window.popleft()
            flight.bytes -= size(old)
        return [Send("gateway", flight.owner, parts)] if flight.owner is not None else []

    def _end(self, flight: Flight, parts: Parts, now: float) -> list[Action]:
        instance = flight.where
        del self.flights[flight.id]
        instance.flights.discard(flight.id)
        self._cancelling.pop(flight.id, None)
        self._orphans.pop(flight.id, None)
        self.credits.give(flight.where.number, flight.owner)
        actions = self.departures.ended(flight, now)
        if flight.owner is not None:
            actions.append(Send("gateway", flight.owner, parts))
        if flight.owner is None or flight.credit != NO_LIMIT:
            flight.terminal = parts
            flight.until = now + (LINGER if flight.owner is not None else self._grace)
            self._ended[flight.id] = flight
            self._ended_bytes += flight.bytes + size(parts)
            while self._ended_bytes > LINGER_BYTES:
                self._forget(next(iter(self._ended)))
        if instance.doomed:
            actions += self._doom(instance, instance.doomed, now)
        return actions

    def _forget(self, key: bytes) -> None:
        flight = self._ended.pop(key, None)
        if flight is not None and flight.terminal is not None:
            self._ended_bytes -= flight.bytes + size(flight.terminal)

    # -- cancellation and time -------------------------------------------------------------------------------

    def _orphan(self, flight: Flight, now: float) -> None:
        flight.owner = None
        flight.until = now + self._grace
        self._orphans[flight.id] = flight

    def _cancel(self, flight: Flight, now: float) -> list[Action]:
        if flight.cancelled is not None:
            return []
        flight.cancelled = now
        flight.resend = now + RESEND
        self._cancelling[flight.id] = flight
        return [self._send_cancel(flight)]

    def _send_cancel(self, flight: Flight) -> Send:
        return Send("container", flight.where.peer, [flight.header(Type.CANCEL).pack()])

    def _doom(self, instance: Instance, reason: str, now: float) -> list[Action]:
        """The container has to go, as soon as nothing runs there that may still go on."""
        first = not instance.doomed
        actions: list[Action] = []
        if first:
            instance.doomed = reason
            actions = self.drain(instance.number, now)
        if not instance.killed and all(self._hopeless(self.flights[key], instance, now) for key in instance.flights):
            instance.killed = True
            return [*actions, Kill(instance.number, instance.doomed)]
        return [*actions, Drain(instance.number, instance.doomed)] if first else []

    def _hopeless(self, flight: Flight, instance: Instance, now: float) -> bool:
        return flight.cancelled is not None and now - flight.cancelled >= instance.cancel_grace

    def tick(self, now: float) -> list[Action]:
        """What time brings: repeated cancels, graces that passed, the execution backstop. Call a few times a second."""
        actions = [*self.departures.tick(now), *self.arrivals.tick(now)]
        for flight in [flight for flight in self._orphans.values() if flight.until is not None and flight.until <= now]:
            del self._orphans[flight.id]
            actions += self._cancel(flight, now)
        for flight in [flight for flight in self.flights.values() if flight.overdue <= now]:
            actions += self._cancel(flight, now)
        for flight in list(self._cancelling.values()):
            instance = flight.where
            if self._hopeless(flight, instance, now):
                reason = f"an invocation ignored its cancellation for {instance.cancel_grace:g} s"
                actions += self._doom(instance, reason, now)
            elif now >= flight.resend:
                flight.resend = now + RESEND
                actions.append(self._send_cancel(flight))
        for key in [key for key, flight in self._ended.items() if flight.until is not None and flight.until <= now]:
            self._forget(key)
        return actions

    # -- grants ----------------------------------------------------------------------------------------------

    def want(self, gateway: bytes, header: Header, slots: int) -> None:
        if header.seq >= self._granted.get(gateway, 0):
            self._granted.pop(gateway, None)
        self.credits.want(header.route, gateway, header.seq, slots)

    @property
    def quiet(self) -> bool:
        """Nothing runs, and no gateway may still dispatch on a grant that it does not know to be lowered."""
        return not self.flights and not self._granted

    def settle(self) -> list[Action]:
        """GRANTs that are due. Call once per wake-up, after everything that arrived was handled."""
        actions = self.arrivals.settle()
        grants = self.credits.settle()
        self._granted.update((grant.gateway, grant.seq) for grant in grants)
        return actions + [
            Send("gateway", grant.gateway, self._grant(self.instances[grant.instance], grant.seq, grant.limit))
            for grant in grants
        ]

    def _grant(self, instance: Instance, seq: int, limit: int) -> Parts:
        body = Grant(
            instance.name, instance.target, limit, instance.concurrency, self.node, instance.state, instance.timeline,
            instance.why,
        )  # fmt: skip
        return encode(Header(Type.GRANT, route=instance.number, seq=seq), body)

    def _drop(self, reason: str) -> list[Action]:
        self.dropped[reason] += 1
        return []

    # -- look ------------------------------------------------------------------------------------------------

    def running(self, number: int) -> int:
        instance = self.instances.get(number)
        return len(instance.flights) + self.arrivals.seated(number) if instance else 0

    def served(self, number: int) -> bool:
        """Whether the instance has answered anything yet, if only in part."""
        instance = self.instances.get(number)
        return instance is not None and (instance.answered or any(self.flights[key].spoke for key in instance.flights))

    def validate(self) -> None:
        """Raises AssertionError when slots and flights disagree."""
        self.credits.validate()
        for instance in self.instances.values():
            assert self.credits.running(instance.number) == self.running(instance.number), instance
        assert set(self.flights) == {key for instance in self.instances.values() for key in instance.flights}
        assert all(flight.owner is None for flight in self._orphans.values())
        assert all(flight.owner is None or flight.owner in self.gateways for flight in self.flights.values())
        assert not set(self.arrivals.holds) & set(self.flights)
        self.departures.validate()
        assert set(self._cancelling) <= set(self.flights) and set(self._orphans) <= set(self.flights)
