"""The gateway's ZeroMQ links: one to the controller, one to each invoker of the routing table.

                      HELLO (every second) ──► WELCOME ──► up: heartbeats; any traffic counts
    node in ROUTES ──►                              silence of 3 s, BYE, or another `life` ──► down ──► HELLO again

It knows who is connected, not what is said: frames go to the dispatcher. Invariants: the dispatcher hears `up` and
`down` in turn for each peer; nothing is sent to a peer that has not welcomed us but HELLO.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable

from sllm_faas import logging
from sllm_faas.errors import SllmError, WireError
from sllm_faas.wire import codec
from sllm_faas.wire.bus import CurveKeys, Dealer, Parts, PeerBusy, PeerGone
from sllm_faas.wire.header import Header, Type, unpack
from sllm_faas.wire.liveness import INTERVAL, Liveness
from sllm_faas.wire.messages import Hello, NodeInfo, Welcome
from sllm_gateway.dispatcher import Dispatcher

_HEARTBEAT = [Header(Type.HEARTBEAT).pack()]
_BYE = [Header(Type.BYE).pack()]
CONTROLLER = ""
"""The controller's key among peers; nodes have names."""


class Peer:
    """A link and whether its other end has welcomed us, under which life.

    `on_busy` is called, on its own, when the other end does not read.
    """

    def __init__(self, dealer: Dealer, on_busy: Callable[[], None]) -> None:
        self.dealer = dealer
        self.life = ""
        self._on_busy = on_busy

    @property
    def up(self) -> bool:
        return bool(self.life)

    def send(self, parts: Parts) -> None:
        try:
            self.dealer.send(parts)
        except PeerBusy:
            asyncio.get_running_loop().call_soon(self._on_busy)
        except PeerGone:
            pass  # closed by us meanwhile


class Links:
    """`start` before anything else, `close` at the end; both on the event loop."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        name: str,
        controller_endpoint: str,
        *,
        clock: Callable[[], float],
        keys: CurveKeys | None = None,
    ) -> None:
        self.dispatcher = dispatcher
        self.name = name
        self.life = secrets.token_hex(4)
        self._endpoint = controller_endpoint
        self._clock = clock
        self._keys = keys
        self._peers: dict[str, Peer] = {}
        self._liveness: Liveness[str] = Liveness()
        self._timer: asyncio.TimerHandle | None = None
        self._log = logging.get("gateway")
        self._hello = codec.encode(Header(Type.HELLO), Hello("gateway", name, self.life, os.getpid()))

    def start(self) -> None:
        self._connect(CONTROLLER, self._endpoint, "")
        self._beat()

    def close(self) -> None:
        """Say BYE to everyone and leave."""
        if self._timer is not None:
            self._timer.cancel()
        for name in list(self._peers):
            self._disconnect(name)

    @property
    def controller_up(self) -> bool:
        peer = self._peers.get(CONTROLLER)
        return peer is not None and peer.up

    def sync_nodes(self, nodes: dict[str, NodeInfo]) -> None:
        """Connect to the nodes of the table, and leave those that are gone from it."""
        for name in [name for name in self._peers if name != CONTROLLER]:
            node = nodes.get(name)
            if node is None or node.endpoint != self._peers[name].dealer.endpoint:
                self._disconnect(name)
        for name, node in nodes.items():
            if name not in self._peers:
                try:
                    self._connect(name, node.endpoint, node.curve_key)
                except SllmError as error:
                    self._log.error("node not connected", node=name, error=str(error))

    # -- peers -----------------------------------------------------------------------------------------------

    def _connect(self, name: str, endpoint: str, server_key: str) -> None:
        identity = f"{self.name}:{self.life}".encode()
        keys = self._keys if server_key else None
        dealer = Dealer(
            endpoint, identity, lambda parts: self._on_message(name, parts), keys=keys, server_key=server_key
        )
        peer = self._peers[name] = Peer(dealer, lambda: self._down(name, peer))
        peer.send(self._hello)

    def _disconnect(self, name: str) -> None:
        peer = self._peers.pop(name)
        if peer.up:
            peer.send(_BYE)
        self._down(name, peer)
        # The close must not overtake what was just sent.
        asyncio.get_running_loop().call_later(0.05, peer.dealer.close)

    def _on_message(self, name: str, parts: Parts) -> None:
        peer = self._peers.get(name)
        if peer is None:
            return
        try:
            kind = unpack(parts[0]).type if parts else None
        except WireError:
            kind = None
        if kind is Type.WELCOME:
            self._welcomed(name, peer, parts)
            return
        if kind is Type.BYE:
            self._down(name, peer)
            peer.send(self._hello)
            return
        if not peer.up:
            return  # it speaks from before it knew us, or we thought it lost: its HELLO answer comes first
        self._liveness.heard(name, self._clock())
        if name == CONTROLLER:
            if not self.dispatcher.on_controller_message(parts):
                self._log.warning("routes have a gap")
                peer.send(self._hello)
        else:
            self.dispatcher.on_invoker_message(name, parts)

    def _welcomed(self, name: str, peer: Peer, parts: Parts) -> None:
        try:
            body = codec.decode(parts).body
        except WireError:
            self.dispatcher.drops["bad_frame"] += 1
            return
        assert isinstance(body, Welcome)
        self._liveness.heard(name, self._clock())
        if peer.life == body.life:
            return
        self._down(name, peer)
        peer.life = body.life
        self._liveness.heard(name, self._clock())
        self._log.info("link up", peer=name or "controller")
        if name == CONTROLLER:
            self.dispatcher.controller_up(peer)
        else:
            self.dispatcher.node_up(name, peer)

    def _down(self, name: str, peer: Peer) -> None:
        self._liveness.forget(name)
        if not peer.up:
            return
        peer.life = ""
        self._log.warning("link down", peer=name or "controller")
        if name == CONTROLLER:
            self.dispatcher.controller_down()
        else:
            self.dispatcher.node_down(name)

    def _beat(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._beat)
        for name in self._liveness.expire(self._clock()):
            if name in self._peers:
                self._down(name, self._peers[name])
        for peer in list(self._peers.values()):
            peer.send(_HEARTBEAT if peer.up else self._hello)
