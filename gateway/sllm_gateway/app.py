"""The gateway as an ASGI application: the table of operations, and the one place every request passes.

    request ──► Gateway.__call__ ──► hot path? ──► endpoint(exchange)
                 │ Host, Origin          └─ no ──► Starlette's router ──► endpoint(exchange)
                 └─ afterwards: error as HTTP, access log, metrics

There is no middleware: the two lists of hot paths skip the router, nothing else differs. Invariant: every request is
answered unless its client is gone, logged once and counted once, whatever the endpoint raised.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router

from sllm_faas import logging
from sllm_faas.errors import ErrorInfo, NotFound, SllmError
from sllm_faas.spec import MAX_PAYLOAD
from sllm_gateway.access import AccessLog
from sllm_gateway.admin import Admin
from sllm_gateway.adoption import Adoptions
from sllm_gateway.auth import Gate
from sllm_gateway.dispatcher import Dispatcher
from sllm_gateway.errors import info_of
from sllm_gateway.exchange import ClientGone, Exchange, Receive, Scope, Send, invocation_text
from sllm_gateway.handle import Handle
from sllm_gateway.invocations import Invocations, Recent
from sllm_gateway.invoke import Functions
from sllm_gateway.metrics import Metrics
from sllm_gateway.openai import OpenAI
from sllm_gateway.operations import Operation, openapi, page
from sllm_gateway.stream import Streams
from sllm_gateway.table import table

_FUNCTIONS = "/v1/functions/"
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Settings:
    """What the application needs of the configuration."""

    name: str = "gateway-0"
    host: str = "127.0.0.1"
    loopback: bool = True
    open_invoke: bool = True
    max_body: int = MAX_PAYLOAD


class _Endpoint:
    """An operation as the ASGI application that Starlette routes to."""

    def __init__(self, operation: Operation, run: Callable[[Exchange, Operation], Awaitable[None]]) -> None:
        self._operation = operation
        self._run = run

    async def __call__(self, scope: Scope, _receive: Receive, _send: Send) -> None:
        exchange: Exchange = scope["sllm"]
        exchange.params = {name: str(value) for name, value in scope["path_params"].items()}
        await self._run(exchange, self._operation)


class Gateway:
    """`dispatcher` is connected by whoever owns the links. `ready()` is what /readyz asks."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        settings: Settings,
        *,
        access: AccessLog | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.dispatcher = dispatcher
        self.settings = settings
        self.stopping = False
        self.access = access or AccessLog(None)
        self.metrics = metrics or Metrics()
        self.recent = Recent(settings.name)
        self.gate = Gate(
            lambda: dispatcher.routes.tokens if dispatcher.routes.known else None,
            open_invoke=settings.open_invoke,
            loopback=settings.loopback,
            host=settings.host,
        )
        self.streams = Streams(settings.max_body)
        self._log = logging.get("gateway")
        self.operations = table(
            Functions(dispatcher, self.gate, self.streams),
            OpenAI(dispatcher, self.gate, self.streams),
            Invocations(dispatcher, self.gate, self.streams, self.recent, Adoptions(dispatcher)),
            Admin(dispatcher, self.gate),
            self,
        )
        self._exact = {
            (each.method, each.path): each for each in self.operations if each.tag == "openai" and "{" not in each.path
        }
        self._function = next(each for each in self.operations if each.label == "POST /v1/functions/{app}/{function}")
        routes = [Route(each.path, _Endpoint(each, self._run), methods=[each.method]) for each in self.operations]
        self._router = Router(routes, redirect_slashes=False, default=_no_such_path)
        self._openapi = _encode(openapi(self.operations, release()))
        self._page = page(self.operations)

    def ended(self, handle: Handle) -> None:
        """Of every invocation: `Dispatcher(on_ended=…)`."""
        self.recent.add(handle)
        self.metrics.invocation(handle)

    def close(self) -> None:
        self.streams.close()
        self.access.flush()
        self.metrics.close()

    # -- every request ---------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send, self.settings.max_body)
        try:
            operation = self._hot(exchange)
            if operation is not None:
                await self._run(exchange, operation)
            else:
                await self._route(exchange)
        except ClientGone:
            exchange.code = "client_gone"
        except SllmError as error:
            await exchange.fail(info_of(error))
        except Exception as error:
            self._log.exception("request failed", request_id=exchange.request_id, route=exchange.route)
            await exchange.fail(info_of(error))
        finally:
            self._note(exchange)

    def _hot(self, exchange: Exchange) -> Operation | None:
        path = exchange.path
        if path.startswith(_FUNCTIONS) and exchange.method == "POST":
            app, slash, function = path[len(_FUNCTIONS) :].partition("/")
            if slash and app and function and "/" not in function:
                exchange.params = {"app": app, "function": function}
                return self._function
        return self._exact.get((exchange.method, path))

    async def _run(self, exchange: Exchange, operation: Operation) -> None:
        exchange.route = operation.label
        exchange.hint_in_message = operation.tag == "openai"
        if operation.checked:
            self.gate.check_browser(exchange)
        await operation.endpoint(exchange)

    async def _route(self, exchange: Exchange) -> None:
        scope = exchange.scope
        scope["app"] = self  # makes Starlette raise its 405 instead of answering it
        scope["sllm"] = exchange
        try:
            await self._router(scope, exchange.receive, exchange.send)
        except HTTPException as error:
            allowed = (error.headers or {}).get("Allow", "")
            info = ErrorInfo(
                "method_not_allowed", f"{exchange.method} is not allowed here.", f"Allowed: {allowed}.", status=405
            )
            await exchange.fail(info, [(b"allow", allowed.encode())])

    def _note(self, exchange: Exchange) -> None:
        self.metrics.request(exchange)
        fields: dict[str, Any] = {}
        handle = exchange.handle
        if exchange.app:
            fields["app"] = exchange.app
        if exchange.function:
            fields["function"] = exchange.function
        if handle is not None:
            fields["version"] = handle.inv.target.version
            if handle.slot is not None:
                fields["instance"] = handle.slot.instance
                fields["node"] = handle.slot.node
            fields["invocation"] = invocation_text(handle.inv.id)
        fields["method"] = exchange.method
        fields["route"] = exchange.route
        fields["status"] = exchange.status
        fields["ms"] = round((time.perf_counter() - exchange.started) * 1e3, 3)
        fields["request_id"] = exchange.request_id
        if exchange.code:
            fields["code"] = exchange.code
        if exchange.principal is not None:
            fields["by"] = exchange.principal.name
        trace = exchange.headers.get(b"traceparent")
        if trace is not None:
            found = _TRACEPARENT.fullmatch(trace)
            if found:
                fields["trace"] = found[1].decode()
        self.access.write(fields)

    # -- the gateway's own pages -----------------------------------------------------------------------------

    async def livez(self, exchange: Exchange) -> None:
        await exchange.respond(b'{"status":"alive"}')

    async def readyz(self, exchange: Exchange) -> None:
        dispatcher = self.dispatcher
        checks = {
            "routes": dispatcher.routes.known,
            "controller": dispatcher.controller.send is not None,
            "invokers": len(dispatcher.linked()),
            "stopping": self.stopping,
        }
        ready = dispatcher.routes.known and not self.stopping
        body = {"status": "ready" if ready else "not ready", **checks}
        await exchange.respond(_encode(body), 200 if ready else 503)

    async def metrics_page(self, exchange: Exchange) -> None:
        self.metrics.sync(self.dispatcher)
        body, content_type = self.metrics.text()
        await exchange.respond(body, 200, content_type)

    async def document(self, exchange: Exchange) -> None:
        await exchange.respond(self._openapi)

    async def docs(self, exchange: Exchange) -> None:
        await exchange.respond(self._page, 200, b"text/html; charset=utf-8")


async def _no_such_path(scope: Scope, _receive: Receive, _send: Send) -> None:
    raise NotFound(f"There is nothing at {scope['path'][:200]!r}.", hint="See /docs.")


def release() -> str:
    try:
        return version("sllm-faas")
    except PackageNotFoundError:
        return "0"
