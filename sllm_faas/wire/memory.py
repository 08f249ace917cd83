"""Both ends of the bus without sockets: the twins of `bus.Router` and `bus.Dealer` within one event loop.

Not for threads, and nothing is encoded: the parts are handed over as they are. The same promises as with sockets:
a message arrives after the sender has returned, never inside its call; messages of a link arrive in order; a dealer
may connect before anybody listens, and what it sends then waits; a send goes out, waits, or raises.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from sllm_faas.errors import BadSpec
from sllm_faas.wire.bus import OUTBOX, Parts, PeerBusy, PeerGone


class MemoryBus:
    """A namespace of endpoints."""

    def __init__(self) -> None:
        self._routers: dict[str, MemoryRouter] = {}
        self._dealers: dict[str, list[MemoryDealer]] = {}

    def router(self, endpoint: str, on_message: Callable[[bytes, Parts], None]) -> MemoryRouter:
        """Raises BadSpec when somebody listens there."""
        if endpoint in self._routers:
            raise BadSpec(f"cannot listen on {endpoint}: it is in use")
        router = self._routers[endpoint] = MemoryRouter(self, endpoint, on_message)
        for dealer in self._dealers.get(endpoint, ()):
            router.connect(dealer)
        return router

    def dealer(self, endpoint: str, identity: bytes, on_message: Callable[[Parts], None]) -> MemoryDealer:
        dealer = MemoryDealer(self, endpoint, identity, on_message)
        self._dealers.setdefault(endpoint, []).append(dealer)
        router = self._routers.get(endpoint)
        if router is not None:
            router.connect(dealer)
        return dealer

    def drop_router(self, router: MemoryRouter) -> None:
        self._routers.pop(router.endpoint, None)

    def drop_dealer(self, dealer: MemoryDealer) -> None:
        self._dealers[dealer.endpoint].remove(dealer)


class MemoryRouter:
    """The listening end. Peers are named by the identity they connected with."""

    def __init__(self, bus: MemoryBus, endpoint: str, on_message: Callable[[bytes, Parts], None]) -> None:
        self.endpoint = endpoint
        self._bus = bus
        self._on_message = on_message
        self._peers: dict[bytes, MemoryDealer] = {}
        self._closed = False

    def connect(self, dealer: MemoryDealer) -> None:
        """A dealer of an identity that is known takes its place."""
        self._peers[dealer.identity] = dealer
        dealer.connected(self)

    def disconnect(self, dealer: MemoryDealer) -> None:
        if self._peers.get(dealer.identity) is dealer:
            del self._peers[dealer.identity]

    def send(self, peer: bytes, parts: Parts) -> None:
        """Raises PeerGone for an unknown peer."""
        dealer = self._peers.get(peer)
        if self._closed or dealer is None:
            raise PeerGone(f"no peer {peer!r} at {self.endpoint}")
        asyncio.get_running_loop().call_soon(dealer.deliver, parts)

    def deliver(self, peer: bytes, parts: Parts) -> None:
        if not self._closed:
            self._on_message(peer, parts)

    def close(self) -> None:
        """Idempotent. Dealers wait for another router on the endpoint."""
        if self._closed:
            return
        self._closed = True
        self._bus.drop_router(self)
        for dealer in self._peers.values():
            dealer.connected(None)
        self._peers.clear()


class MemoryDealer:
    """The connecting end."""

    def __init__(self, bus: MemoryBus, endpoint: str, identity: bytes, on_message: Callable[[Parts], None]) -> None:
        self.endpoint = endpoint
        self.identity = identity
        self._bus = bus
        self._on_message = on_message
        self._router: MemoryRouter | None = None
        self._outbox: deque[Parts] = deque()
        self._closed = False

    def connected(self, router: MemoryRouter | None) -> None:
        self._router = router
        while router is not None and self._outbox:
            self._hand_over(router, self._outbox.popleft())

    def send(self, parts: Parts) -> None:
        """Raises PeerBusy when too much waits for a listener, PeerGone after close()."""
        if self._closed:
            raise PeerGone(f"link to {self.endpoint} is closed")
        if self._router is not None:
            self._hand_over(self._router, parts)
        elif len(self._outbox) >= OUTBOX:
            raise PeerBusy(f"nobody listens on {self.endpoint}: {OUTBOX} messages wait")
        else:
            self._outbox.append(parts)

    def _hand_over(self, router: MemoryRouter, parts: Parts) -> None:
        asyncio.get_running_loop().call_soon(router.deliver, self.identity, parts)

    def deliver(self, parts: Parts) -> None:
        if not self._closed:
            self._on_message(parts)

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._outbox.clear()
        self._bus.drop_dealer(self)
        if self._router is not None:
            self._router.disconnect(self)
