"""Who is connected to the controller: identities of sockets to names, roles and lives. No protocol, no I/O of its own.

Invariant: of each (role, name) at most one life is known, and it is the last one that said HELLO.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sllm_faas.wire.bus import Parts, PeerBusy, PeerGone, Router
from sllm_faas.wire.liveness import INTERVAL, Liveness


@dataclass(frozen=True, slots=True, eq=False)
class Peer:
    role: str
    name: str
    life: str
    identity: bytes
    router: Router

    def send(self, parts: Parts) -> bool:
        """Whether it went out or waits to; a peer that does not read, or is gone, is found out by its silence."""
        try:
            self.router.send(self.identity, parts)
        except (PeerGone, PeerBusy):
            return False
        return True


@dataclass(slots=True)
class Peers:
    _by_address: dict[tuple[Router, bytes], Peer] = field(default_factory=dict)
    _by_name: dict[tuple[str, str], Peer] = field(default_factory=dict)
    _liveness: Liveness[Peer] = field(default_factory=Liveness)
    _heard: dict[Peer, float] = field(default_factory=dict)
    _beaten: float = 0.0

    def add(self, peer: Peer, now: float) -> Peer | None:
        """Know it from now on; the one of that role and name that it replaces, if there was one."""
        before = self._by_name.get((peer.role, peer.name))
        if before is not None:
            self.remove(before)
        self._by_address[peer.router, peer.identity] = peer
        self._by_name[peer.role, peer.name] = peer
        self._liveness.heard(peer, now)
        self._heard[peer] = now
        return before

    def remove(self, peer: Peer) -> None:
        self._by_address.pop((peer.router, peer.identity), None)
        if self._by_name.get((peer.role, peer.name)) is peer:
            del self._by_name[peer.role, peer.name]
        self._liveness.forget(peer)
        self._heard.pop(peer, None)

    def heard(self, router: Router, identity: bytes, now: float) -> Peer | None:
        """The peer at that address, None when it is not known."""
        peer = self._by_address.get((router, identity))
        if peer is not None:
            self._liveness.heard(peer, now)
            self._heard[peer] = now
        return peer

    def alive(self, peer: Peer, now: float) -> bool:
        """Whether it spoke so lately that another one of its name cannot be its next life."""
        return now - self._heard.get(peer, now) < 2 * INTERVAL

    def get(self, role: str, name: str) -> Peer | None:
        return self._by_name.get((role, name))

    def of_role(self, role: str) -> Iterator[Peer]:
        return (peer for peer in list(self._by_name.values()) if peer.role == role)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._by_name.values()))

    def expire(self, now: float) -> list[Peer]:
        """Called every INTERVAL: who fell silent. When we ourselves were stopped for a while, nobody is to blame for
        that: what they sent meanwhile has not been read yet."""
        asleep = self._beaten and now - self._beaten > 2 * INTERVAL
        self._beaten = now
        if asleep:
            for peer in self:
                self._liveness.heard(peer, now)
            return []
        return self._liveness.expire(now)
