"""POST /v1/functions/{app}/{function}[.method]: call a function; its result, or its outputs as a stream.

    request    JSON object -> keyword arguments · JSON array -> positional · application/msgpack -> the SDK's encoding
    answer     the bare result in the same encoding; a generator's outputs as events (SSE), as the SDK's records, or
               collected into one JSON array (Accept: application/json)

Arguments are checked to be well-formed and are otherwise the function's business: they pass as bytes, both ways.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from sllm_faas.dispatch.resume import way_of
from sllm_faas.dispatch.routes import Resolved, RouteTable
from sllm_faas.errors import BadRequest, Unavailable
from sllm_faas.spec import Encoding, Timeouts
from sllm_gateway import note
from sllm_gateway.auth import Gate
from sllm_gateway.dispatcher import Dispatcher
from sllm_gateway.errors import JSON, MSGPACK
from sllm_gateway.exchange import Exchange
from sllm_gateway.handle import Call
from sllm_gateway.sse import EventWriter, RecordWriter
from sllm_gateway.stream import Streams
from sllm_gateway.timeline import server_timing

_json_check = msgspec.json.Decoder(dict[str, msgspec.Raw] | list[msgspec.Raw])
_msgpack_check = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_parameters = msgspec.json.Decoder(dict[str, Any])
_TIMEOUT_HEADERS = {
    b"x-sllm-timeout-queue": "queue",
    b"x-sllm-timeout-startup": "startup",
    b"x-sllm-timeout-first-output": "first_output",
    b"x-sllm-timeout-idle": "idle",
    b"x-sllm-timeout-execution": "execution",
}
_CALLER = re.compile(r"inv-[0-9a-f]{32}|")


class Functions:
    def __init__(self, dispatcher: Dispatcher, gate: Gate, streams: Streams) -> None:
        self._dispatcher = dispatcher
        self._gate = gate
        self._streams = streams

    async def __call__(self, exchange: Exchange) -> None:
        content_type = exchange.headers.get(b"content-type", b"").lower()
        exchange.msgpack = content_type.startswith(MSGPACK)
        encoding: Encoding = "msgpack" if exchange.msgpack else "json"
        app, name = exchange.params["app"], exchange.params["function"]
        self._gate.admit(exchange, "invoke", app)
        resolved = self._resolve(exchange, app, name)
        spec = resolved.route.spec
        exchange.app, exchange.function = app, spec.name
        payload = check_payload(await exchange.body(), encoding)
        caller = exchange.header(b"x-sllm-caller")
        if not _CALLER.fullmatch(caller):
            raise BadRequest("X-Sllm-Caller is not an invocation id.", param="X-Sllm-Caller")
        call = Call(
            exchange.identity,
            resolved.target,
            resolved.method.name,
            payload,
            encoding,
            resolved.method.stream,
            lowered(spec.timeouts, exchange.headers),
            spec.retries,
            spec.max_queue,
            resolved.route.weight,
            caller,
            note.FUNCTION,
            way_of(spec.kind, resolved.method.name, resolved.method),
        )
        await self._answer(exchange, call)

    def _resolve(self, exchange: Exchange, app: str, name: str) -> Resolved:
        routes = self._dispatcher.routes
        require_routes(routes)
        text = exchange.query().get("parameters")
        return routes.resolve(app, name, _parse_parameters(text) if text else None)

    async def _answer(self, exchange: Exchange, call: Call) -> None:
        records = exchange.accepts("application/x-sllm-stream")
        events = exchange.accepts("text/event-stream")
        if events and not records and call.encoding == "msgpack":
            raise BadRequest(
                "MessagePack outputs cannot be sent as text/event-stream.", hint="Accept application/x-sllm-stream."
            )
        collect = call.stream and not records and not events and exchange.accepts("application/json")
        records = records or (call.stream and call.encoding == "msgpack")
        handle = self._dispatcher.submit(call)
        if collect:
            parts: list[bytes] = []
            ended = await self._streams.collect(exchange, handle, parts.extend)
            body = b"[" + b",".join(parts) + b"]"
        elif call.stream or records or events:
            await self._streams.stream(exchange, handle, RecordWriter() if records else EventWriter())
            return
        else:
            ended = await self._streams.result(exchange, handle)
            body = ended.payload
        timing = [(b"server-timing", server_timing(handle))]
        if ended.error is not None:
            await exchange.fail(ended.error, timing)
        else:
            await exchange.respond(body, 200, JSON if call.encoding == "json" else MSGPACK, timing)


def require_routes(routes: RouteTable) -> None:
    """Raises Unavailable before the controller's first table: nothing can be said about any name."""
    if not routes.known:
        raise Unavailable("The gateway has just started.", hint="Try again shortly.", retry_after=1.0)


def check_payload(body: bytes, encoding: Encoding) -> bytes:
    """The arguments, well-formed and of the shape their encoding wants. Raises BadRequest.

    Only the outermost level is made into objects: the rest is scanned.
    """
    try:
        if encoding == "msgpack":
            fields = _msgpack_check.decode(body)
            if not fields.keys() <= {"args", "kwargs"}:
                raise BadRequest("The body is a map with other keys than 'args' and 'kwargs'.")
            return body
        if not body:
            return b"{}"
        body.decode()
        _json_check.decode(body)
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8.") from None
    except msgspec.ValidationError:
        raise BadRequest(
            "The body is neither a JSON object nor an array.",
            hint="An object gives keyword arguments, an array positional ones.",
        ) from None
    except (msgspec.DecodeError, ValueError) as error:
        raise BadRequest(f"The body is not {encoding.upper()}: {error}.") from None
    except RecursionError:
        raise BadRequest("The body is nested too deeply.") from None
    return body


def lowered(timeouts: Timeouts, headers: Mapping[bytes, bytes]) -> Timeouts:
    """The function's timeouts, lowered as the headers ask. Raises BadRequest for what is not seconds."""
    if b"x-sllm-timeout" not in b" ".join(headers):  # as nearly always
        return timeouts
    values = {name: getattr(timeouts, name) for name in _TIMEOUT_HEADERS.values()}
    for header, raw in headers.items():
        if not header.startswith(b"x-sllm-timeout"):
            continue
        name, text = _TIMEOUT_HEADERS.get(header), raw.decode("latin-1")
        shown = header.decode("latin-1")
        if name is None:
            raise BadRequest(f"There is no header {shown}.", param=shown)
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0.001 <= seconds <= 7 * 86400.0:
            raise BadRequest(f"{shown} is {text[:80]!r}; allowed: seconds from 0.001 to 604800.", param=shown)
        limit = values[name]
        values[name] = seconds if limit is None else min(seconds, limit)
    return Timeouts(**values)


def _parse_parameters(text: str) -> dict[str, Any]:
    try:
        return _parameters.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadRequest(f"The query's `parameters` are not a JSON object: {error}.", param="parameters") from None
