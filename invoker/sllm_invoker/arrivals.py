"""Invocations that other nodes may move here: held in a container, silently, until a gateway activates them. Pure.

    source ── HOLD ──► a slot? ── HOLD ──► container ── HELD ──► source        gateway ── ACTIVATE ──► a flight

A held one takes a slot. Slots are leased to gateways, so one may have to be called back first; meanwhile the HOLD
waits. Its states are those of `dispatch.moves.Arrival`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sllm_faas.dispatch.credits import CreditBook
from sllm_faas.dispatch.moves import HOLD_GRACE, HOLD_LIMIT, Arrival, Destination
from sllm_faas.errors import IllegalTransition
from sllm_faas.wire.codec import encode
from sllm_faas.wire.header import SIZE, Header, Type, unpack
from sllm_faas.wire.messages import Refused
from sllm_invoker.flights import RESEND, Action, Flight, Instance, Parts, Send, size

Reason = Literal["no_slot", "unknown_instance", "draining", "stale_fence"]

SLOT_WAIT = 5.0
"""Seconds a HOLD waits for a slot."""


@dataclass(slots=True, eq=False)
class Hold:
    """`source` is the identity of the invoker that may yet move it here, None when that is lost."""

    id: bytes
    fence: int
    source: bytes | None
    where: Instance
    invoke: Parts
    """The first HOLD, as it came: the state in it is that after output `start`."""
    start: int
    heard: float
    state: Arrival = field(default_factory=Arrival)
    slot: bool = False
    resend: float = 0.0
    until: float | None = None
    window: deque[tuple[int, Parts]] = field(default_factory=deque)
    """What its source said, handed on; its last output is the last one there."""
    base: int | None = None

    def header(self, kind: Type) -> Header:
        return Header(kind, self.id, self.fence, self.where.number)


class Arrivals:
    def __init__(
        self, instances: Mapping[int, Instance], flights: Mapping[bytes, Flight], credits: CreditBook,
        dropped: Counter[str],
    ) -> None:  # fmt: skip
        self._instances = instances
        self._flights = flights
        self._credits = credits
        self._dropped = dropped
        self.holds: dict[bytes, Hold] = {}

    # -- from the source -------------------------------------------------------------------------------------

    def from_source(self, source: bytes, header: Header, parts: Parts, now: float) -> list[Action]:
        """A frame of an invoker that moves something here."""
        kind = header.type
        if kind is Type.HOLD:
            return self._hold(source, header, parts, now)
        hold = self.holds.get(header.id)
        if kind is Type.OUTPUT:
            self._said_there(hold, header, parts)
            return []
        mine = hold is not None and hold.fence == header.fence and hold.source in (source, None)
        if kind is Type.CANCEL:
            return self._release(hold, now) if hold is not None and mine else []
        if kind is Type.COMMITTED:
            if hold is not None and mine:
                self._awaits(hold, now)
            return []
        return self._drop("unexpected_type")

    def _hold(self, source: bytes, header: Header, parts: Parts, now: float) -> list[Action]:
        hold = self.holds.get(header.id)
        if hold is not None and hold.fence == header.fence and hold.source == source:
            hold.heard = now
            if hold.slot and hold.state.on("HOLD"):
                return [Send("container", hold.where.peer, parts)]
            return []
        instance = self._instances.get(header.route)
        if instance is None:
            return [_refused(source, header, "unknown_instance")]
        if hold is not None or header.id in self._flights:  # what is here under another fence has to end first
            return [_refused(source, header, "stale_fence")]
        if instance.state != "ready":
            return [_refused(source, header, "draining")]
        hold = self.holds[header.id] = Hold(header.id, header.fence, source, instance, parts, header.seq, now)
        hold.state.on("HOLD")
        return self._seat(hold)

    def _seat(self, hold: Hold) -> list[Action]:
        """Pass the HOLD on when there is a slot for it."""
        hold.slot = self._credits.reserve(hold.where.number, hold.id)
        return [Send("container", hold.where.peer, hold.invoke)] if hold.slot else []

    def _said_there(self, hold: Hold | None, header: Header, parts: Parts) -> None:
        """The source's replay window, the last frame first: before ACTIVATE it is kept, after it joins the flight's."""
        if hold is not None and hold.fence == header.fence:
            if hold.base is None or header.seq + header.items == hold.base:
                hold.window.appendleft((header.seq + header.items, parts))
                hold.base = header.seq
            return
        flight = self._flights.get(header.id)
        if flight is not None and flight.fence > header.fence and header.seq + header.items == flight.base:
            prepend(flight, flight.base, parts)

    # -- from the gateway ------------------------------------------------------------------------------------

    def activate(self, gateway: bytes, header: Header, parts: Parts, now: float) -> tuple[Flight | None, list[Action]]:
        """The flight that the hold becomes; None, and REFUSED, when it is not held here."""
        hold = self.holds.get(header.id)
        if hold is None or not hold.slot or header.fence <= hold.fence or not hold.state.on("ACTIVATE"):
            return None, [_refused(gateway, header, "unknown_instance")]
        del self.holds[hold.id]
        self._credits.adopt(hold.where.number, gateway)
        limit, instance = hold.where.execution, hold.where
        overdue = float("inf") if limit is None else now + limit + instance.cancel_grace
        flight = Flight(
            hold.id, header.fence, gateway, instance, hold.invoke, now, overdue, header.credit, hold.start, header.seq,
            header.seq,
        )  # fmt: skip
        if hold.window and hold.window[-1][0] == header.seq:
            while hold.window:
                end, said = hold.window.pop()
                prepend(flight, end, said)
        instance.flights.add(hold.id)
        return flight, [Send("container", instance.peer, parts)]

    def displace(self, key: bytes, now: float) -> list[Action] | None:
        """An INVOKE of an id that is held here: its gateway has given the move up. None: it is not held."""
        hold = self.holds.get(key)
        return None if hold is None else self._release(hold, now)

    # -- from the container ----------------------------------------------------------------------------------

    def from_container(self, hold: Hold, header: Header, parts: Parts) -> list[Action]:
        if hold.fence != header.fence:
            return self._drop("stale_fence")
        kind = header.type
        if kind is Type.HELD:
            try:
                hold.state.on("HELD")
            except IllegalTransition:
                return self._drop("unexpected_type")
            return self._answer(hold, parts) if hold.state.phase is Destination.HELD else []
        if kind is Type.DONE or kind is Type.FAILED or kind is Type.CANCELLED:
            told = hold.state.phase is Destination.LEAVING
            self._forget(hold)
            return [] if told else self._answer(hold, [header._replace(type=Type.FAILED).pack()])
        return self._drop("unexpected_type")

    # -- losses and time -------------------------------------------------------------------------------------

    def source_lost(self, source: bytes, now: float) -> None:
        """Its holds wait a while for a gateway that has heard of them."""
        for hold in self.holds.values():
            if hold.source == source:
                hold.source = None
                self._awaits(hold, now)

    def _awaits(self, hold: Hold, now: float) -> None:
        """Nothing more comes from its source: a gateway says ACTIVATE soon, or none does."""
        hold.state.on("COMMITTED")
        hold.until = now + HOLD_GRACE if hold.until is None else hold.until

    def drained(self, number: int, now: float) -> list[Action]:
        """The instance takes nothing new: nor what is held there."""
        return [
            action
            for hold in list(self.holds.values())
            if hold.where.number == number
            for action in (*self._refuse(hold, "draining"), *self._release(hold, now))
        ]

    def gone(self, number: int) -> list[Action]:
        """The container is dead."""
        actions: list[Action] = []
        for hold in [hold for hold in self.holds.values() if hold.where.number == number]:
            del self.holds[hold.id]
            actions += self._refuse(hold, "unknown_instance")
        return actions

    def settle(self) -> list[Action]:
        """Seat those that wait for a slot, as far as there are any."""
        return [action for hold in list(self.holds.values()) if not hold.slot for action in self._seat(hold)]

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for hold in list(self.holds.values()):
            leaving = hold.state.phase is Destination.LEAVING
            if leaving and now >= hold.resend:
                hold.resend = now + RESEND
                actions.append(Send("container", hold.where.peer, [hold.header(Type.CANCEL).pack()]))
            elif not hold.slot and now - hold.heard >= SLOT_WAIT:
                actions += self._refuse(hold, "no_slot")
                self._forget(hold)
            elif not leaving and (now - hold.heard >= HOLD_LIMIT or (hold.until is not None and hold.until <= now)):
                actions += self._release(hold, now)
        return actions

    def _release(self, hold: Hold, now: float) -> list[Action]:
        if not hold.slot:
            self._forget(hold)
            return []
        if not hold.state.on("CANCEL"):
            return []
        hold.resend = now + RESEND
        return [Send("container", hold.where.peer, [hold.header(Type.CANCEL).pack()])]

    def _forget(self, hold: Hold) -> None:
        del self.holds[hold.id]
        self._credits.unreserve(hold.where.number, hold.id, taken=hold.slot)

    def _refuse(self, hold: Hold, reason: Reason) -> list[Action]:
        return self._answer(hold, encode(hold.header(Type.REFUSED), Refused(reason)))

    def _answer(self, hold: Hold, parts: Parts) -> list[Action]:
        return [Send("gateway", hold.source, parts)] if hold.source is not None else []

    def _drop(self, reason: str) -> list[Action]:
        self._dropped[reason] += 1
        return []

    # -- look ------------------------------------------------------------------------------------------------

    def seated(self, number: int) -> int:
        """How many take a slot of the instance."""
        return sum(hold.slot and hold.where.number == number for hold in self.holds.values())


def prepend(flight: Flight, end: int, parts: Parts) -> None:
    """Put a frame of the source's window before those of the flight, to be replayed under the flight's fence."""
    header = unpack(parts[0])
    own = header._replace(fence=flight.fence, route=flight.where.number).pack() + parts[0][SIZE:]
    flight.window.appendleft((end, [own, *parts[1:]]))
    flight.base = header.seq
    flight.bytes += size(parts)


def _refused(peer: bytes, header: Header, reason: Reason) -> Send:
    head = Header(Type.REFUSED, header.id, header.fence, route=header.route)
    return Send("gateway", peer, encode(head, Refused(reason)))
