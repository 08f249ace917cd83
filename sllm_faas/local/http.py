"""The HTTP interface of a local platform, on a free port of loopback: for language models, and for tests of clients.

The gateway's own application over the platform's dispatcher, served by uvicorn on the same loop. Invocation is open,
as on loopback always; there are no tokens, so there is no administration.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn
from sllm_gateway.app import Gateway, Settings
from sllm_gateway.dispatcher import Dispatcher

from sllm_faas.errors import Unavailable


class LocalHttp:
    """`await start()` gives the URL; `await stop()` ends running answers with an error and closes the port."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.gateway = Gateway(dispatcher, Settings("local"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server = uvicorn.Server(
            uvicorn.Config(
                self.gateway,
                ws="none",
                lifespan="off",
                interface="asgi3",
                access_log=False,
                log_config=None,
                timeout_graceful_shutdown=1,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Raises Unavailable when the server ends instead of serving."""
        self._serving = asyncio.create_task(self._server.serve([self._listener]))
        while not self._server.started:  # uvicorn has no event for it; it listens already, so this is a turn or two
            if self._serving.done():
                raise Unavailable("the HTTP interface did not start")
            await asyncio.sleep(0)
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._serving is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._serving
        self.gateway.close()
        self._listener.close()
