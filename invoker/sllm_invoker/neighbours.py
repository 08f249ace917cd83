"""Links to other invokers that something is moved to: opened by a MIGRATE, kept a while, used again.

    closed ── open ──► HELLO ── WELCOME, any traffic ──► up ── 3 s of silence, BYE ──► lost (told once), closed

Invariants: what is sent before WELCOME waits in the socket; after `lost` nothing comes from that link any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from sllm_faas.errors import WireError
from sllm_faas.wire.bus import CurveKeys, Dealer, Parts, PeerBusy, PeerGone
from sllm_faas.wire.codec import encode
from sllm_faas.wire.header import Header, Type, unpack
from sllm_faas.wire.liveness import Liveness
from sllm_faas.wire.messages import Hello

IDLE = 60.0
"""Seconds an unused link stays open."""


@dataclass(slots=True)
class _Link:
    dealer: Dealer
    endpoint: str
    used: float


class Neighbours:
    """`on_frame(node, header)` gets what they say, `on_lost(node)` that one is gone. `beat` is to be called every
    second."""

    def __init__(
        self,
        name: str,
        life: str,
        on_frame: Callable[[str, Header], None],
        on_lost: Callable[[str], None],
        *,
        keys: CurveKeys | None = None,
    ) -> None:
        self._name = name
        self._life = life
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._keys = keys
        self._loop = asyncio.get_running_loop()
        self._liveness: Liveness[str] = Liveness()
        self._links: dict[str, _Link] = {}

    def open(self, node: str, endpoint: str, server_key: str) -> None:
        """Idempotent. Raises BadSpec for an endpoint that is none."""
        known = self._links.get(node)
        if known is not None and known.endpoint == endpoint:
            known.used = self._loop.time()
            return
        if known is not None:
            self._lose(node)
        identity = f"{self._name}:{self._life}".encode()

        def receive(parts: Parts) -> None:
            if self._links.get(node) is link:
                self._receive(node, parts)

        dealer = Dealer(endpoint, identity, receive, keys=self._keys, server_key=server_key)
        link = self._links[node] = _Link(dealer, endpoint, self._loop.time())
        self._liveness.heard(node, self._loop.time())
        self.send(node, encode(Header(Type.HELLO), Hello("invoker", self._name, self._life)))

    def send(self, node: str, parts: Parts) -> None:
        """To a link that is open; what is sent to another is lost, as with a node that died."""
        link = self._links.get(node)
        if link is None:
            return
        link.used = self._loop.time()
        try:
            link.dealer.send(parts)
        except (PeerGone, PeerBusy):
            self._lose(node)

    def beat(self, now: float) -> None:
        for node in self._liveness.expire(now):
            self._lose(node)
        for node, link in list(self._links.items()):
            if now - link.used >= IDLE:
                link.dealer.send([Header(Type.BYE).pack()])
                self._drop(node)
            else:
                link.dealer.send([Header(Type.HEARTBEAT).pack()])

    def close(self) -> None:
        for node in list(self._links):
            self._drop(node)

    def _receive(self, node: str, parts: Parts) -> None:
        try:
            header = unpack(parts[0]) if parts else Header(Type.HEARTBEAT)
        except WireError:
            return
        if header.type is Type.BYE:
            self._lose(node)
            return
        self._liveness.heard(node, self._loop.time())
        if header.type not in (Type.HEARTBEAT, Type.WELCOME):
            self._on_frame(node, header)

    def _lose(self, node: str) -> None:
        if node in self._links:
            self._drop(node)
            self._on_lost(node)

    def _drop(self, node: str) -> None:
        self._liveness.forget(node)
        link = self._links.pop(node)
        self._loop.call_soon(link.dealer.close)
