"""The data plane of a node: gateways and other invokers at its entrances, each container on a socket of its own,
`relay_core` between them.

Carries out what the core decides, keeps the heartbeat with the gateways, and hands what is not an invocation
(container READY, LOG …; gateway REQUEST) to its owner. Invariant: no frame, however bad, raises out of here, and no
invocation costs a task or a timer: one timer serves all of them, and grants are settled once per wake-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sllm_faas import logging
from sllm_faas.errors import SllmError, WireError
from sllm_faas.spec import Timeline
from sllm_faas.wire.bus import CurveKeys, Parts, PeerBusy, PeerGone
from sllm_faas.wire.codec import decode_body, encode
from sllm_faas.wire.header import Header, Type, unpack
from sllm_faas.wire.liveness import INTERVAL, Liveness
from sllm_faas.wire.messages import InstanceState, Migrate, Migrated, MoveResult, Reply, Request, Welcome
from sllm_faas.wire.stream import BadStream, Stream, fits
from sllm_invoker.entrances import Entrances
from sllm_invoker.neighbours import Neighbours
from sllm_invoker.relay_core import Action, Drain, Instance, Kill, RelayCore, Report, Send

TICK = 0.2
UNLINKED = 1.0
"""Seconds a container lives on without its link: usually it is dying."""

_OF_INVOCATIONS = frozenset({Type.OUTPUT, Type.DONE, Type.FAILED, Type.CANCELLED, Type.STATE, Type.HELD})

Answer = Callable[[Reply], None]
"""Sends one reply; raises PeerGone when the asker is gone."""


@dataclass(frozen=True, slots=True)
class RelayEvents:
    """What the relay tells its owner. All are called on the loop and must not block."""

    container: Callable[[bytes, Header, Parts], None]
    """A frame of a container that is not of an invocation: HELLO, READY, START_FAILED, LOG."""
    request: Callable[[bytes, Request, Answer], None]
    """(id, request, answer) of a REQUEST."""
    cancel: Callable[[bytes], bool]
    """CANCEL of something that is no invocation; False when it is no request either."""
    kill: Callable[[int, str], None]
    drain: Callable[[int, str], None]
    migrated: Callable[[Migrated], None] = lambda _: None
    """A MIGRATE has been carried out."""


class Relay:
    def __init__(
        self,
        core: RelayCore,
        endpoint: str,
        events: RelayEvents,
        *,
        life: str,
        neighbours: str = "",
        keys: CurveKeys | None = None,
    ) -> None:
        """Gateways connect to `endpoint`, invokers of other machines to `neighbours`, if it is not empty."""
        self.core = core
        self._events = events
        self._life = life
        self._log = logging.get("invoker").bind(node=core.node)
        self._loop = asyncio.get_running_loop()
        self._liveness: Liveness[bytes] = Liveness()
        self._settling = False
        self._parted = False
        self._quiet: asyncio.Event | None = None
        """Somebody waits until the core is quiet."""
        self._beat = 0.0
        self._entrances = Entrances(endpoint, neighbours, self._from_gateway, self._gone, keys=keys)
        self._neighbours = Neighbours(core.node, life, self._from_node, self._node_lost, keys=keys)
        self._sources: set[bytes] = set()
        """Invokers that move something here."""
        self._containers: dict[bytes, Stream] = {}
        self.endpoint = self._entrances.endpoint
        self.neighbour_endpoint = self._entrances.neighbour_endpoint
        self._timer = self._loop.call_later(TICK, self._tick)

    async def quiesce(self, seconds: float) -> None:
        """Called when no instance is left: what gateways sent before they knew is refused, so that nothing is lost
        with the link. Returns when they know, or the time is up."""
        self._quiet = asyncio.Event()
        self._settle_soon()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._quiet.wait()

    def part(self) -> None:
        """Say goodbye to the gateways and listen no more. `close` too soon after it would drop what was just said."""
        if not self._parted:
            self._parted = True
            for gateway in self._connected():
                self._send_gateway(gateway, [Header(Type.BYE).pack()])

    def close(self) -> None:
        """Part, and close all sockets."""
        self._timer.cancel()
        self.part()
        self._entrances.close()
        self._neighbours.close()
        for stream in self._containers.values():
            stream.close()

    # -- instances -------------------------------------------------------------------------------------------

    def add(self, instance: Instance) -> None:
        self.core.add(instance)
        self._settle_soon()

    def ready(self, number: int, timeline: Timeline) -> None:
        self.core.ready(number, timeline)
        self._settle_soon()

    def drain(self, number: int) -> None:
        self._perform(self.core.drain(number, self._loop.time()))
        self._settle_soon()

    def cancel_all(self, number: int) -> None:
        self._perform(self.core.cancel_all(number, self._loop.time()))

    def gone(self, number: int, state: InstanceState, detail: str = "") -> None:
        """The container is dead. `detail` completes "the container of … ended"."""
        instance = self.core.instances.get(number)
        if instance is not None:
            self.unlink(instance.peer)
        self._perform(self.core.gone(number, state, self._loop.time(), detail))

    def migrate(self, order: Migrate) -> None:
        """MIGRATE of the controller; `migrated` follows."""
        try:
            self._neighbours.open(order.node, order.endpoint, order.curve_key)
        except SllmError as error:
            self._log.warning("migrate_refused", node=order.node, error=error.message)
            kept = (MoveResult(key, "kept", error.message) for key in order.invocations)
            self._events.migrated(Migrated(order.migration, order.instance, tuple(kept)))
            return
        self._perform(self.core.migrate(order, self._loop.time()))

    def link(self, peer: bytes) -> socket.socket:
        """A socket for the container `peer`, to be handed to its process and closed here: whoever has it is `peer`."""
        ours, theirs = socket.socketpair()
        self._containers[peer] = Stream(ours, partial(self._from_container, peer), partial(self._unlinked, peer))
        return theirs

    def unlink(self, peer: bytes) -> None:
        """The container is dead. What it said before still counts."""
        stream = self._containers.pop(peer, None)
        if stream is not None:
            stream.drain()
            stream.close()

    def send_container(self, peer: bytes, parts: Parts) -> bool:
        """False when the container is not connected or does not read."""
        stream = self._containers.get(peer)
        try:
            if stream is not None:
                stream.send(parts)
        except (PeerGone, PeerBusy):
            return False
        return stream is not None

    # -- gateways --------------------------------------------------------------------------------------------

    def _from_gateway(self, peer: bytes, parts: Parts) -> None:
        if self._parted:
            return
        try:
            header = unpack(parts[0]) if parts else None
            if header is None:
                self.core.dropped["empty"] += 1
                return
            if not fits(parts):
                raise WireError(f"a message of {len(parts)} parts that no container would take")
            kind = header.type
            if kind is Type.HELLO:
                self._joined(peer, parts)
            elif peer not in self._liveness:
                # We lost it and it did not notice: make it begin anew.
                self.core.dropped["no_hello"] += 1
                if kind is not Type.BYE:
                    self._send_gateway(peer, [Header(Type.BYE).pack()])
            else:
                self._liveness.heard(peer, self._loop.time())
                self._handle(peer, header, parts)
        except WireError:
            self.core.dropped["bad_frame"] += 1
        self._settle_soon()

    def _handle(self, peer: bytes, header: Header, parts: Parts) -> None:
        kind = header.type
        if kind is Type.HEARTBEAT:
            return
        if peer in self._sources:
            if kind is Type.BYE:
                self._source_lost(peer)
            else:
                self._perform(self.core.from_source(peer, header, parts, self._loop.time()))
        elif kind is Type.WANT:
            self.core.want(peer, header, max(0, decode_body(kind, parts[0]).slots))
        elif kind is Type.CANCEL and header.id not in self.core.flights and self._events.cancel(header.id):
            return
        elif kind is Type.BYE:
            self._liveness.forget(peer)
            self._perform(self.core.gateway_left(peer, self._loop.time()))
        elif kind is Type.REQUEST:
            self._events.request(header.id, decode_body(kind, parts[0]), self._answer(peer, header))
        else:
            self._perform(self.core.from_gateway(peer, header, parts, self._loop.time()))

    def _answer(self, peer: bytes, header: Header) -> Answer:
        def answer(reply: Reply) -> None:
            if peer not in self._liveness:
                raise PeerGone(f"gateway {peer.decode(errors='replace')} is gone")
            self._entrances.send(peer, encode(header._replace(type=Type.REPLY), reply))

        return answer

    def _joined(self, peer: bytes, parts: Parts) -> None:
        hello = decode_body(Type.HELLO, parts[0])
        if not self._entrances.may_be(peer, hello.role):
            self.core.dropped["not_a_gateway"] += 1
            return
        now = self._loop.time()
        if hello.role == "invoker":
            self.core.source_lost(peer, now)
            self._liveness.heard(peer, now)
            self._sources.add(peer)
            self._send_gateway(peer, encode(Header(Type.WELCOME), Welcome(self.core.node, self._life)))
            return
        self._liveness.heard(peer, now)
        self._log.info("gateway_joined", gateway=peer.decode(errors="replace"))
        self._send_gateway(peer, encode(Header(Type.WELCOME), Welcome(self.core.node, self._life)))
        self._perform(self.core.gateway_joined(peer, now))

    def _source_lost(self, peer: bytes) -> None:
        self._sources.discard(peer)
        self._liveness.forget(peer)
        self._entrances.forget(peer)
        self.core.source_lost(peer, self._loop.time())

    def _lost(self, peer: bytes) -> None:
        if peer in self._sources:
            self._source_lost(peer)
            return
        self._liveness.forget(peer)
        self._entrances.forget(peer)
        self._log.warning("gateway_lost", gateway=peer.decode(errors="replace"))
        self._perform(self.core.gateway_lost(peer, self._loop.time()))
        self._settle_soon()

    def _connected(self) -> list[bytes]:
        return [*self.core.gateways, *self._sources]

    # -- other invokers --------------------------------------------------------------------------------------

    def _from_node(self, node: str, header: Header) -> None:
        self._perform(self.core.from_node(node, header, self._loop.time()))

    def _node_lost(self, node: str) -> None:
        self._log.warning("node_lost", peer=node)
        self._perform(self.core.node_lost(node, self._loop.time()))

    # -- containers ------------------------------------------------------------------------------------------

    def _from_container(self, peer: bytes, parts: Parts) -> None:
        try:
            header = unpack(parts[0]) if parts else None
            if header is None:
                self.core.dropped["empty"] += 1
            elif header.type in _OF_INVOCATIONS:
                self._perform(self.core.from_container(peer, header, parts, self._loop.time()))
            else:
                self._events.container(peer, header, parts)
        except WireError:
            self.core.dropped["bad_frame"] += 1
        self._settle_soon()

    # -- carry out -------------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                if action.to == "container":
                    self._send_instance(action.peer, action.parts)
                elif action.to == "node":
                    self._neighbours.send(action.peer.decode(), action.parts)
                else:
                    self._send_gateway(action.peer, action.parts)
            elif isinstance(action, Kill):
                self._events.kill(action.instance, action.reason)
            elif isinstance(action, Drain):
                self._events.drain(action.instance, action.reason)
            elif isinstance(action, Report):
                self._events.migrated(action.migrated)

    def _send_gateway(self, peer: bytes, parts: Parts) -> None:
        try:
            self._entrances.send(peer, parts)
        except (PeerGone, PeerBusy):
            self._gone(peer)

    def _gone(self, peer: bytes) -> None:
        if peer in self._liveness:
            self._lost(peer)

    def _send_instance(self, peer: bytes, parts: Parts) -> None:
        stream = self._containers.get(peer)
        if stream is None:
            return  # its death is on the way, and ends what it had
        try:
            stream.send(parts)
        except PeerGone:
            pass  # likewise
        except PeerBusy:
            self._kill(peer, "it does not read its messages")

    def _unlinked(self, peer: bytes, error: BadStream | None) -> None:
        if error is not None:
            self.core.dropped[error.code] += 1
        why = "it closed its link" if error is None else f"its link broke: {error.message}"
        self._loop.call_later(UNLINKED, self._kill, peer, why)

    def _kill(self, peer: bytes, reason: str) -> None:
        for instance in self.core.instances.values():
            if instance.peer == peer:
                self._events.kill(instance.number, reason)

    def _settle_soon(self) -> None:
        if not self._settling:
            self._settling = True
            self._loop.call_soon(self._settle)

    def _settle(self) -> None:
        self._settling = False
        self._perform(self.core.settle())
        if self._quiet is not None and self.core.quiet:
            self._quiet.set()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK, self._tick)
        now = self._loop.time()
        if now - self._beat >= INTERVAL:
            self._beat = now
            for peer in self._liveness.expire(now):
                self._lost(peer)
            self._neighbours.beat(now)
            beat = [Header(Type.HEARTBEAT).pack()]
            for peer in self._connected():
                self._send_gateway(peer, beat)
        self._perform(self.core.tick(now))
        self._settle_soon()


def life() -> str:
    """A name for this life of the process."""
    return os.urandom(8).hex()
