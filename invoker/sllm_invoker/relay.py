"""The data plane of a node: gateways on one ROUTER, containers on another, `relay_core` between them.

Carries out what the core decides, keeps the heartbeat with the gateways, and hands what is not an invocation
(container READY, LOG …; gateway REQUEST) to its owner. Invariant: no frame, however bad, raises out of here, and no
invocation costs a task or a timer: one timer serves all of them, and grants are settled once per wake-up.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

from sllm_faas import logging
from sllm_faas.errors import WireError
from sllm_faas.spec import Timeline
from sllm_faas.wire.bus import CurveKeys, Parts, PeerBusy, PeerGone, Router
from sllm_faas.wire.codec import decode_body, encode
from sllm_faas.wire.header import Header, Type, unpack
from sllm_faas.wire.liveness import INTERVAL, Liveness
from sllm_faas.wire.messages import Hello, InstanceState, Reply, Request, Welcome
from sllm_invoker.relay_core import Action, Drain, Instance, Kill, RelayCore, Send

TICK = 0.2

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


class Relay:
    def __init__(
        self,
        core: RelayCore,
        endpoint: str,
        container_endpoint: str,
        events: RelayEvents,
        *,
        life: str,
        keys: CurveKeys | None = None,
    ) -> None:
        self.core = core
        self._events = events
        self._life = life
        self._log = logging.get("invoker").bind(node=core.node)
        self._loop = asyncio.get_running_loop()
        self._liveness: Liveness[bytes] = Liveness()
        self._settling = False
        self._outgoing: list[Send] = []
        self._beat = 0.0
        self._gateways = Router(endpoint, self._from_gateway, keys=keys)
        self._containers = Router(container_endpoint, self._from_container)
        self.endpoint = self._gateways.endpoint
        self.container_endpoint = self._containers.endpoint
        self._timer = self._loop.call_later(TICK, self._tick)

    def close(self) -> None:
        """Say goodbye to the gateways and close both sockets."""
        self._timer.cancel()
        for gateway in self._connected():
            self._send_gateway(gateway, [Header(Type.BYE).pack()])
        self._gateways.close()
        self._containers.close()

    # -- instances -------------------------------------------------------------------------------------------

    def add(self, instance: Instance) -> None:
        self.core.add(instance)
        self._settle_soon()

    def ready(self, number: int, timeline: Timeline) -> None:
        self.core.ready(number, timeline)
        self._settle_soon()

    def drain(self, number: int) -> None:
        self.core.drain(number)
        self._settle_soon()

    def cancel_all(self, number: int) -> None:
        self._perform(self.core.cancel_all(number, self._loop.time()))

    def gone(self, number: int, state: InstanceState, detail: str = "") -> None:
        """The container is dead. `detail` completes "the container of … ended"."""
        instance = self.core.instances.get(number)
        if instance is not None:
            self._containers.forget(instance.peer)
        self._perform(self.core.gone(number, state, self._loop.time(), detail))

    def send_container(self, peer: bytes, parts: Parts) -> bool:
        """False when the container is not connected or does not read."""
        self._flush()
        try:
            self._containers.send(peer, parts)
        except (PeerGone, PeerBusy):
            return False
        return True

    # -- gateways --------------------------------------------------------------------------------------------

    def _from_gateway(self, peer: bytes, parts: Parts) -> None:
        try:
            header = unpack(parts[0]) if parts else None
            if header is None:
                self.core.dropped["empty"] += 1
                return
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
        if kind is Type.WANT:
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
            self._flush()
            self._gateways.send(peer, encode(header._replace(type=Type.REPLY), reply))

        return answer

    def _joined(self, peer: bytes, parts: Parts) -> None:
        hello = decode_body(Type.HELLO, parts[0])
        if not isinstance(hello, Hello) or hello.role != "gateway":
            self.core.dropped["not_a_gateway"] += 1
            return
        now = self._loop.time()
        self._liveness.heard(peer, now)
        self._log.info("gateway_joined", gateway=peer.decode(errors="replace"))
        self._send_gateway(peer, encode(Header(Type.WELCOME), Welcome(self.core.node, self._life)))
        self._perform(self.core.gateway_joined(peer, now))

    def _lost(self, peer: bytes) -> None:
        self._liveness.forget(peer)
        self._gateways.forget(peer)
        self._log.warning("gateway_lost", gateway=peer.decode(errors="replace"))
        self._perform(self.core.gateway_lost(peer, self._loop.time()))
        self._settle_soon()

    def _connected(self) -> list[bytes]:
        return list(self.core.gateways)

    # -- containers ------------------------------------------------------------------------------------------

    def _from_container(self, peer: bytes, parts: Parts) -> None:
        try:
            header = unpack(parts[0]) if parts else None
            if header is None:
                self.core.dropped["empty"] += 1
            elif header.type in (Type.OUTPUT, Type.DONE, Type.FAILED, Type.CANCELLED):
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
                self._outgoing.append(action)
                self._settle_soon()
            elif isinstance(action, Kill):
                self._events.kill(action.instance, action.reason)
            elif isinstance(action, Drain):
                self._events.drain(action.instance, action.reason)

    def _send_gateway(self, peer: bytes, parts: Parts) -> None:
        self._flush()
        self._send_now(peer, parts)

    def _send_now(self, peer: bytes, parts: Parts) -> None:
        try:
            self._gateways.send(peer, parts)
        except (PeerGone, PeerBusy):
            if peer in self._liveness:
                self._lost(peer)

    def _send_instance(self, action: Send) -> None:
        try:
            self._containers.send(action.peer, action.parts)
        except PeerGone:
            pass  # its death is on the way, and ends what it had
        except PeerBusy:
            number = next((i.number for i in self.core.instances.values() if i.peer == action.peer), None)
            if number is not None:
                self._events.kill(number, "it does not read its messages")

    def _settle_soon(self) -> None:
        if not self._settling:
            self._settling = True
            self._loop.call_soon(self._settle)

    def _settle(self) -> None:
        self._settling = False
        self._perform(self.core.settle())
        self._flush()

    def _flush(self) -> None:
        """What was decided in one wake-up goes out together: waking ZeroMQ's own thread costs more than a message."""
        outgoing, self._outgoing = self._outgoing, []
        for action in outgoing:
            if action.to == "gateway":
                self._send_now(action.peer, action.parts)
            else:
                self._send_instance(action)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK, self._tick)
        now = self._loop.time()
        if now - self._beat >= INTERVAL:
            self._beat = now
            for peer in self._liveness.expire(now):
                self._lost(peer)
            beat = [Header(Type.HEARTBEAT).pack()]
            for peer in self._connected():
                self._send_gateway(peer, beat)
        self._perform(self.core.tick(now))
        self._settle_soon()


def life() -> str:
    """A name for this life of the process."""
    return os.urandom(8).hex()
