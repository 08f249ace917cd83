"""Serving the application: sockets, uvicorn, the process's life.

    start: links, listen ── SIGTERM ──► /readyz 503, no new connections, streams go on ── shutdown_grace ──►
    what is left ends with an error event ──► BYE, exit 0.   A second signal: at once.

uvicorn does the HTTP; ours are the shared port, and a limit on how long a client may take over its headers. Invariant:
a client that had an answer begun gets its end, unless it is gone itself or somebody insists.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sllm_faas import logging
from sllm_faas.config import Config
from sllm_faas.errors import BadSpec, Conflict, Unavailable
from sllm_faas.wire.curve import load_or_create
from sllm_gateway.access import AccessLog
from sllm_gateway.app import Gateway, Settings
from sllm_gateway.dispatcher import Dispatcher
from sllm_gateway.links import Links
from sllm_gateway.metrics import Metrics

KEEP_ALIVE = 75
HEADER_PATIENCE = 20.0
"""Seconds for a request's headers to arrive, from the connection or from their first byte."""
SWEEP = 5.0
SYNC = 1.0
LAST_WORDS = 2.0
"""Seconds to write what ended at the end of the grace."""


class _Corked:
    """A transport whose writes of one wake-up leave as one: uvicorn writes head and body of an answer apart, and the
    second system call costs more than anything else the gateway does for it."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._call_soon = asyncio.get_running_loop().call_soon
        self._pieces: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._pieces:
            self._call_soon(self._flush)
        self._pieces.append(data)

    def _flush(self) -> None:
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._transport.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def close(self) -> None:
        self._flush()
        self._transport.close()


class _Protocol(HttpToolsProtocol):
    """Notes since when it waits for headers; 0 while it does not."""

    waiting_since = 0.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(_Corked(transport))  # type: ignore[arg-type]
        self.waiting_since = time.monotonic()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.waiting_since = time.monotonic()

    def on_headers_complete(self) -> None:
        self.waiting_since = 0.0
        super().on_headers_complete()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: ours do more. `on_started` is called when it listens."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()

    def drop_slow(self) -> None:
        """Close connections whose headers do not come."""
        limit = time.monotonic() - HEADER_PATIENCE
        for connection in list(self.server_state.connections):
            if isinstance(connection, _Protocol) and 0 < connection.waiting_since < limit:
                connection.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that other gateways of this user may share. Raises Conflict when somebody else has the port."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror):
            raise BadSpec(f"host {host!r} is not an address of this machine: {error}", param="host") from None
        raise Conflict(
            f"cannot listen on {host}:{port}: {error.strerror}",
            hint="Another program has the port; use --port.",
            param="port",
        ) from None
    listener.setblocking(False)
    return listener


class Service:
    """One gateway process."""

    def __init__(self, config: Config, name: str, *, access_fd: int | None = 1) -> None:
        self.config = config
        settings = Settings(name, config.host, config.loopback, config.invocation_open, config.max_body)
        self.dispatcher = Dispatcher(
            name=name,
            window=config.stream_window,
            on_ended=lambda handle: self.gateway.ended(handle),
            on_routes=lambda table: self.links.sync_nodes(table.nodes),
        )
        self.gateway = Gateway(self.dispatcher, settings, access=AccessLog(access_fd), metrics=Metrics())
        # Nodes of other machines let in who proves the platform's gateway key.
        keys = load_or_create(config.keys_dir, "gateway") if config.listen else None
        self.links = Links(self.dispatcher, name, config.controller_endpoint, clock=time.monotonic, keys=keys)
        self._log = logging.get("gateway")
        self._grace: asyncio.TimerHandle | None = None
        self._server = _Server(
            uvicorn.Config(
                self.gateway,
                http=_Protocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(config.shutdown_grace + LAST_WORDS) + 1,
            ),
            self._announce,
        )

    async def run(self) -> None:
        """Serve until told to stop. Raises Conflict when the port is not to be had."""
        loop = asyncio.get_running_loop()
        listener = listen(self.config.host, self.config.port)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        self.links.start()
        housekeeping = loop.create_task(self._housekeep())
        try:
            await self._server.serve([listener])
        finally:
            housekeeping.cancel()
            if self._grace is not None:
                self._grace.cancel()
            self.links.close()
            self.gateway.close()
            self.dispatcher.close()
            listener.close()
            await asyncio.sleep(0.1)  # the BYEs leave
        self._log.info("stopped")

    def stop(self) -> None:
        """Orderly at first; at once when asked again."""
        if self._server.should_exit:
            self._server.force_exit = True
            return
        self._log.info("stopping", grace=self.config.shutdown_grace, running=len(self.dispatcher))
        self.gateway.stopping = True
        self._server.should_exit = True
        loop = asyncio.get_running_loop()
        self._grace = loop.call_later(self.config.shutdown_grace, self._give_up)

    def _give_up(self) -> None:
        self.dispatcher.abandon(
            Unavailable("The gateway was stopped before the invocation ended.", hint="Call it again.", retry_after=1.0)
        )

    def _announce(self) -> None:
        config = self.config
        self._log.ready(host=config.host, port=config.port, gateway=self.gateway.settings.name, life=self.links.life)

    async def _housekeep(self) -> None:
        rounds = 0
        while True:
            await asyncio.sleep(SYNC)
            rounds += 1
            self.gateway.metrics.sync(self.dispatcher)
            if rounds % int(SWEEP / SYNC) == 0:
                self._server.drop_slow()
