"""The controller, as the dispatcher knows it: the routing table it publishes, calls both ways, and what it gives up on.

Invariants: the table is whole or not there; whatever the bytes, nothing is raised; invocations go on while the
controller is away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from sllm_faas.dispatch.routes import RouteTable
from sllm_faas.errors import WireError
from sllm_faas.wire import codec
from sllm_faas.wire.bus import Parts, PeerBusy, PeerGone
from sllm_faas.wire.header import Type
from sllm_faas.wire.messages import TargetFailed
from sllm_gateway.rpc import Answers, Link, Rpc


class Control:
    """`on_known()` when it may know nothing of our demand, `on_routes()` when the table changed, `on_failed(body)`
    for a target that cannot be served. `drops` counts frames that were not believed."""

    def __init__(
        self,
        drops: Counter[str],
        on_known: Callable[[], None],
        on_routes: Callable[[], None],
        on_failed: Callable[[TargetFailed], None],
    ) -> None:
        self.routes = RouteTable()
        self.rpc = Rpc("controller")
        self.answers = Answers()
        self._drops = drops
        self._on_known = on_known
        self._on_routes = on_routes
        self._on_failed = on_failed
        self._link: Link | None = None

    def up(self, link: Link) -> None:
        """The controller has welcomed us: it is told all demand."""
        self._link = link
        self.rpc.up(link.send)
        self._on_known()

    def down(self) -> None:
        """Only what nobody but the controller knows is unavailable."""
        self._link = None
        self.rpc.down()

    def tell(self, parts: Parts) -> bool:
        """Whether it went out."""
        if self._link is None:
            return False
        try:
            self._link.send(parts)
        except (PeerGone, PeerBusy):
            return False
        return True

    def on_message(self, parts: Parts) -> bool:
        """Take in a frame. False: the table has a gap, say HELLO again."""
        try:
            frame = codec.decode(parts)
        except WireError:
            self._drops["bad_frame"] += 1
            return True
        body = frame.body
        match frame.header.type:
            case Type.ROUTES:
                self.routes.replace(body)
                self._on_routes()
                # The controller forgot our demand when we said HELLO, be it only for a gap.
                self._on_known()
            case Type.ROUTES_DELTA:
                if not self.routes.apply(body):
                    return False
                self._on_routes()
            case Type.TARGET_FAILED:
                self._on_failed(body)
            case Type.REPLY:
                if not self.rpc.on_reply(frame.header.id, body):
                    self._drops["unasked_reply"] += 1
            case Type.REQUEST:
                self.tell(self.answers.reply(frame.header, body))
            case Type.WELCOME | Type.HEARTBEAT | Type.BYE:
                pass  # the link's own business
            case _:
                self._drops["unexpected_type"] += 1
        return True
