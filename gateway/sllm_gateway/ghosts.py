"""Attempts that this gateway left behind: nothing they say is believed, and they are told to stop until they have.

An attempt becomes a ghost when its invocation goes on elsewhere while it may still run: its node fell silent, it fell
silent itself, its stream broke, or it was moved. It is told at once (a link that seems lost may be half so, and what
only sleeps reads its messages when it wakes), again when its node is back, and every second until a terminal frame
under its fence comes; an invoker answers CANCELLED for what it does not have.

Invariant: a slot that a ghost was granted is free when that frame has come or its node is lost, and not before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sllm_faas.dispatch.invocation import CANCEL_INTERVAL
from sllm_faas.dispatch.slots import Instance
from sllm_faas.wire.bus import Parts, PeerBusy, PeerGone
from sllm_faas.wire.header import Header, Type
from sllm_gateway.rpc import Link

MAX_GHOSTS = 10_000
"""More than that are forgotten, oldest first: their invokers end them as orphans."""
_TERMINAL = (Type.DONE, Type.FAILED, Type.CANCELLED, Type.REFUSED)
Key = tuple[str, bytes, int]
"""(node, invocation, fence)."""


@dataclass(slots=True)
class Ghost:
    route: int
    slot: Instance | None
    """A slot of our grants that it still takes."""
    moved: bool
    """It was left by a move: it may ask again whether that was committed."""


class Ghosts:
    """`send` reaches a node if it is linked; `release` is given the slots that became free."""

    def __init__(self, send: Callable[[str, Parts], None], release: Callable[[Instance], None]) -> None:
        self._send = send
        self._release = release
        self._ghosts: dict[Key, Ghost] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._ghosts)

    def add(self, key: Key, route: int, slot: Instance | None = None, *, moved: bool = False) -> None:
        """Leave an attempt behind; tell it so."""
        self._ghosts[key] = Ghost(route, slot, moved)
        if len(self._ghosts) > MAX_GHOSTS:
            self._end(next(iter(self._ghosts)))
        self._say(Type.COMMITTED if moved else Type.CANCEL, key, route)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(CANCEL_INTERVAL, self._again)

    def heard(self, node: str, header: Header) -> None:
        """A frame that is not believed: under an earlier fence, or of what is not there any more."""
        key = (node, header.id, header.fence)
        ghost = self._ghosts.get(key)
        if header.type in _TERMINAL:
            if ghost is not None:
                self._end(key)
        elif header.type is Type.MOVED and ghost is not None and ghost.moved:
            self._say(Type.COMMITTED, key, header.route)
        elif ghost is None:
            self._say(Type.CANCEL, key, header.route)

    def node_up(self, node: str) -> None:
        for key, ghost in self._ghosts.items():
            if key[0] == node:
                self._say(Type.CANCEL, key, ghost.route)

    def node_down(self, node: str, link: Link) -> None:
        """Its slots are gone; what runs there may be met again. What is said over the lost `link` may still arrive:
        perhaps only the other direction is lost, or the node sleeps."""
        mine = [key for key in self._ghosts if key[0] == node]
        for key in mine:
            self._ghosts[key].slot = None
        with contextlib.suppress(PeerGone, PeerBusy):
            for key in mine:
                link.send(_frame(Type.CANCEL, key, self._ghosts[key].route))

    def keep(self, nodes: Collection[str]) -> None:
        """Nodes other than these are gone for good."""
        for key in [key for key in self._ghosts if key[0] not in nodes]:
            self._end(key)

    def held(self) -> int:
        """Slots that ghosts take."""
        return sum(ghost.slot is not None for ghost in self._ghosts.values())

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _again(self) -> None:
        self._timer = None
        if self._ghosts:
            self._timer = asyncio.get_running_loop().call_later(CANCEL_INTERVAL, self._again)
        for key, ghost in list(self._ghosts.items()):
            self._say(Type.CANCEL, key, ghost.route)

    def _say(self, kind: Type, key: Key, route: int) -> None:
        self._send(key[0], _frame(kind, key, route))

    def _end(self, key: Key) -> None:
        ghost = self._ghosts.pop(key)
        if ghost.slot is not None:
            self._release(ghost.slot)


def _frame(kind: Type, key: Key, route: int) -> Parts:
    _, identity, fence = key
    return [Header(kind, identity, fence, route).pack()]
