"""Where gateways and other invokers connect to this one: one socket or two, seen as one.

    on the platform's machine    ipc   gateways, and the invokers beside this one
                                 tcp   invokers of other machines, if the platform listens for any
    on a joined machine          tcp   gateways
                                 tcp   invokers of other machines

Over TCP each socket has its own domain of admission (`curve.Admission`), so that a key opens only the one it was named
for. Invariant: who came in as an invoker of another machine is never taken for a gateway, whatever identity it uses.
"""

from __future__ import annotations

from collections.abc import Callable

from sllm_faas.wire.bus import CurveKeys, Parts, Router

GATEWAYS, INVOKERS = "gateways", "invokers"
"""Domains of admission."""
_FAR = b"/"
"""Before the identities of invokers of other machines; no name of ours holds it."""


class Entrances:
    """`on_message` and `on_gone` get peers by the names that `send` and `forget` take.

    Raises BadSpec when an endpoint cannot be listened on. `neighbours` may be empty."""

    def __init__(
        self,
        endpoint: str,
        neighbours: str,
        on_message: Callable[[bytes, Parts], None],
        on_gone: Callable[[bytes], None],
        *,
        keys: CurveKeys | None = None,
    ) -> None:
        self._near = Router(endpoint, on_message, on_gone=on_gone, keys=keys, domain=GATEWAYS)
        self._far: Router | None = None
        if neighbours:
            self._far = Router(
                neighbours,
                lambda peer, parts: on_message(_FAR + peer, parts),
                on_gone=lambda peer: on_gone(_FAR + peer),
                keys=keys,
                domain=INVOKERS,
            )
        self.endpoint = self._near.endpoint
        self.neighbour_endpoint = self._far.endpoint if self._far else ""

    def may_be(self, peer: bytes, role: str) -> bool:
        """Whether who came in there can be that."""
        if peer.startswith(_FAR):
            return role == "invoker"
        return role == "gateway" or (role == "invoker" and self.endpoint.startswith("ipc://"))

    def send(self, peer: bytes, parts: Parts) -> None:
        """Raises PeerBusy, PeerGone."""
        router, identity = self._way(peer)
        router.send(identity, parts)

    def forget(self, peer: bytes) -> None:
        """Drop what waits for a peer that is lost."""
        router, identity = self._way(peer)
        router.forget(identity)

    def close(self) -> None:
        self._near.close()
        if self._far is not None:
            self._far.close()

    def _way(self, peer: bytes) -> tuple[Router, bytes]:
        if self._far is not None and peer.startswith(_FAR):
            return self._far, peer[len(_FAR) :]
        return self._near, peer
