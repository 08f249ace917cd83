"""The invoker's link to the controller: HELLO with everything it knows, heartbeats, HELLO again after a silence.

    down ── HELLO (every second) ──► WELCOME ──► up ── silence of 3 s, BYE, another life ──► down

What changes while the link is down is not queued: the next HELLO says how things are. Running instances never notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sllm_faas import logging
from sllm_faas.errors import WireError
from sllm_faas.wire import codec
from sllm_faas.wire.bus import CurveKeys, Dealer, Parts, PeerBusy, PeerGone
from sllm_faas.wire.codec import Frame
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.liveness import INTERVAL, Liveness
from sllm_faas.wire.messages import Hello, Welcome

_HEARTBEAT = [Header(Type.HEARTBEAT).pack()]
_PEER = "controller"


class Uplink:
    """`hello()` gives the HELLO of this moment; `on_frame` gets what the controller commands."""

    def __init__(
        self,
        endpoint: str,
        name: str,
        life: str,
        hello: Callable[[], Hello],
        on_frame: Callable[[Frame], None],
        on_welcome: Callable[[], None],
        *,
        keys: CurveKeys | None = None,
        server_key: str = "",
    ) -> None:
        self._hello = hello
        self._on_frame = on_frame
        self._on_welcome = on_welcome
        self._loop = asyncio.get_running_loop()
        self._liveness: Liveness[str] = Liveness()
        self._log = logging.get("invoker").bind(node=name)
        self._controller = ""
        """The controller's life while the link is up."""
        self.dropped = 0
        self.first = asyncio.Event()
        """The controller has welcomed us once."""
        self._dealer = Dealer(endpoint, f"{name}:{life}".encode(), self._receive, keys=keys, server_key=server_key)
        self._timer = self._loop.call_soon(self._beat)

    @property
    def up(self) -> bool:
        return bool(self._controller)

    def send(self, header: Header, body: Any = None) -> bool:
        """False while the link is down: the next HELLO tells."""
        return self.up and self._send(codec.encode(header, body))

    def close(self) -> None:
        """Say BYE and leave; the socket closes when that is out."""
        self._timer.cancel()
        if self.up:
            self._send([Header(Type.BYE).pack()])
        self._controller = ""
        self._loop.call_later(0.05, self._dealer.close)

    def _send(self, parts: Parts) -> bool:
        try:
            self._dealer.send(parts)
        except (PeerGone, PeerBusy):
            return False
        return True

    def _receive(self, parts: Parts) -> None:
        try:
            frame = codec.decode(parts)
        except WireError as error:
            self.dropped += 1
            self._log.warning("bad_frame", error=error.message)
            return
        kind = frame.header.type
        if kind is Type.WELCOME:
            self._welcome(frame.body)
        elif kind is Type.BYE:
            self._down()
            self._send(codec.encode(Header(Type.HELLO), self._hello()))
        elif self.up:
            self._liveness.heard(_PEER, self._loop.time())
            if kind is not Type.HEARTBEAT:
                self._on_frame(frame)

    def _welcome(self, welcome: Welcome) -> None:
        self._liveness.heard(_PEER, self._loop.time())
        if not self.up:
            self._log.info("controller_up", life=welcome.life)
        self._controller = welcome.life
        self.first.set()
        self._on_welcome()

    def _down(self) -> None:
        if self.up:
            self._controller = ""
            self._log.warning("controller_lost")
        self._liveness.forget(_PEER)

    def _beat(self) -> None:
        self._timer = self._loop.call_later(INTERVAL, self._beat)
        if self._liveness.expire(self._loop.time()):
            self._down()
        self._send(_HEARTBEAT if self.up else codec.encode(Header(Type.HELLO), self._hello()))
