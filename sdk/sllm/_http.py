"""The backend that reaches a gateway over HTTP.

A call is `POST /v1/functions/{app}/{function}[.method]` with a MessagePack body. A stream answers with records,
`[u32 length][MessagePack map]`: output (with its ordinal), ping, then exactly one of done and error; a stream that
ends otherwise was cut: its gateway may be lost, and another one is asked for the rest of it with Last-Event-ID. Leaving
a stream early closes its connection, which cancels it.

Foreign exceptions are mapped here, once: what the network did is `Unavailable` with param "server", what the
function raised is its own type (see `wire.exceptions`), everything else the error of our tree that its code names.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import quote

import httpx
import msgpack

from sllm._backend import Call
from sllm._profile import Profile
from sllm_faas.errors import Conflict, ErrorInfo, PlatformError, SllmError, TooLarge, Unavailable, WireError
from sllm_faas.spec import MAX_PAYLOAD
from sllm_faas.wire.exceptions import info_to_exception

MSGPACK = "application/msgpack"
RECORDS = "application/x-sllm-stream"
MAX_RECORD = MAX_PAYLOAD + 64 * 1024

CONNECT = 10.0
SILENCE = 60.0
"""Seconds without a byte after which a stream's connection is given up: the server pings every 15."""

REATTACH = 10.0
"""Seconds for which a stream that broke is asked for again: as long as invokers keep what a lost gateway left."""
AGAIN = 0.25
_STREAM_TIMEOUT = httpx.Timeout(None, connect=CONNECT, read=SILENCE)

_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]
"""A call may rightly take hours in silence; the kernel notices when the server's machine is gone."""


_NOT_YET = (Conflict, Unavailable)
"""Answers of a gateway that does not have the stream yet: its invoker thinks that the lost one lives."""


async def _pause(seconds: float) -> None:
    import asyncio

    await asyncio.sleep(seconds)


@dataclass(slots=True)
class _Reading:
    """How far a stream was read. `invocation` is empty until its gateway has said which it is."""

    invocation: str = ""
    wanted: int = 0


class HttpBackend:
    """`transport` replaces the network in tests, `sleep` the pauses between attempts."""

    def __init__(
        self,
        profile: Profile,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = _pause,
    ) -> None:
        self._sleep = sleep
        self.server = profile.server
        headers = {"Authorization": f"Bearer {profile.token}"} if profile.token else {}
        secure = profile.server.startswith("https:")  # else no certificates are loaded, which takes 20 ms
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self._http = httpx.AsyncClient(
            base_url=profile.server,
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT),
            transport=transport or httpx.AsyncHTTPTransport(verify=secure, limits=limits, socket_options=_KEEPALIVE),
        )

    async def call(self, call: Call) -> bytes:
        with self._reached():
            answer = await self._http.post(
                _path(call), content=call.payload, params=_query(call), headers=_headers(call, MSGPACK)
            )
        if not answer.is_success:  # redirects are not followed: they would carry the token away
            raise error_of(answer.status_code, answer.headers, answer.content)
        return answer.content

    async def stream(self, call: Call) -> AsyncGenerator[bytes, None]:
        """Each output once. When the connection breaks after the invocation's id is known, its gateway may be lost
        and another one have the stream: it is asked for what is missing, for `REATTACH` seconds."""
        reading = _Reading()
        request = self._http.build_request(
            "POST",
            _path(call),
            content=call.payload,
            params=_query(call),
            headers=_headers(call, RECORDS),
            timeout=_STREAM_TIMEOUT,
        )
        broken: Exception | None = None
        deadline = 0.0
        while True:
            try:
                with self._reached():
                    async with contextlib.aclosing(self._read(request, reading)) as outputs:
                        async for output in outputs:
                            deadline = 0.0
                            yield output
                return
            except Unavailable as error:
                if not reading.invocation:
                    raise
                broken = broken or error
            except SllmError as error:
                if broken is None:
                    raise
                if not isinstance(error, _NOT_YET):
                    raise broken from error
            deadline = deadline or time.monotonic() + REATTACH
            if time.monotonic() >= deadline:
                assert broken is not None
                raise broken
            await self._sleep(AGAIN)
            request = self._again(reading)

    async def _read(self, request: httpx.Request, reading: _Reading) -> AsyncGenerator[bytes, None]:
        """The outputs of one connection, from the one that `reading` wants next."""
        answer = await self._http.send(request, stream=True)
        try:
            if not answer.is_success:
                raise error_of(answer.status_code, answer.headers, await answer.aread())
            reading.invocation = answer.headers.get("x-invocation-id", "")
            async for record in _records(answer.aiter_raw()):
                kind = record.get("t")
                if kind == "output":
                    if record.get("seq") != reading.wanted:
                        raise WireError(f"the stream jumped to output {record.get('seq')}, after {reading.wanted - 1}.")
                    reading.wanted += 1
                    yield record["data"]
                elif kind == "done":
                    return
                elif kind == "error":
                    raise info_to_exception(_info(record.get("error")))
            raise Unavailable(f"{self.server} closed the stream before its end.", param="server")
        finally:
            await answer.aclose()

    def _again(self, reading: _Reading) -> httpx.Request:
        """The request for what is missing of a stream that broke."""
        headers = {"Accept": RECORDS}
        if reading.wanted:
            headers["Last-Event-ID"] = str(reading.wanted - 1)
        path = f"/v1/invocations/{reading.invocation}/events"
        return self._http.build_request("GET", path, headers=headers, timeout=_STREAM_TIMEOUT)

    async def close(self) -> None:
        await self._http.aclose()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException:
            raise Unavailable(f"{self.server} did not answer in time.", param="server") from None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise Unavailable(
                f"cannot reach {self.server}: {error or type(error).__name__}.",
                hint="Is it running? Start one with `sllm up`, or set SLLM_SERVER.",
                param="server",
            ) from None


def _path(call: Call) -> str:
    name = quote(call.function, safe="") + (f".{quote(call.method, safe='')}" if call.method else "")
    return f"/v1/functions/{quote(call.app, safe='')}/{name}"


def _query(call: Call) -> dict[str, str]:
    return {"parameters": call.parameters} if call.parameters else {}


def _headers(call: Call, accept: str) -> dict[str, str]:
    if len(call.payload) > MAX_PAYLOAD:
        raise TooLarge(
            f"the arguments of {call.label} are {len(call.payload)} bytes; allowed: {MAX_PAYLOAD}.",
            hint="Pass a path or a URL instead of the data.",
        )
    headers = {"Content-Type": MSGPACK, "Accept": accept}
    for phase, seconds in call.timeouts:
        headers[f"X-Sllm-Timeout-{phase.replace('_', '-').title()}"] = f"{seconds:g}"
    if call.caller:
        headers["X-Sllm-Caller"] = call.caller
    return headers


async def _records(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Raises WireError for what is no record."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start >= 4:
            size = int.from_bytes(buffer[start : start + 4], "big")
            if size > MAX_RECORD:
                raise WireError(f"a stream record claims {size} bytes; allowed: {MAX_RECORD}.")
            if len(buffer) - start - 4 < size:
                break
            try:
                record = msgpack.unpackb(memoryview(buffer)[start + 4 : start + 4 + size])
            except (ValueError, msgpack.UnpackException) as error:
                raise WireError(f"a stream record is not MessagePack: {error}.") from None
            if not isinstance(record, dict):
                raise WireError("a stream record is not a map.")
            start += 4 + size
            yield record
        del buffer[:start]


def _info(value: object) -> ErrorInfo:
    """An ErrorInfo from its map; fields of another version are ignored, wrong ones too."""
    if not isinstance(value, dict):
        return ErrorInfo("internal", "the server sent an error without a description")
    known = {
        field.name: value[field.name]
        for field in fields(ErrorInfo)
        if field.name in value and (field.name == "retry_after" or isinstance(value[field.name], _TYPES[field.name]))
    }
    return ErrorInfo(**{"code": "internal", "message": "no message", **known})


_TYPES: dict[str, type] = dict.fromkeys(("code", "message", "hint", "param", "type", "traceback"), str)
_TYPES |= {"status": int, "args": bytes}


def error_of(status: int, headers: httpx.Headers, body: bytes) -> Exception:
    """The exception that an error answer stands for: MessagePack ErrorInfo, or the OpenAI-shaped JSON."""
    kind = headers.get("content-type", "")
    try:
        if kind.startswith(MSGPACK):
            return info_to_exception(_info(msgpack.unpackb(body)))
        error = json.loads(body)["error"]
        retry_after = headers.get("retry-after", "")
        info = {
            **{name: error.get(name) or "" for name in ("code", "message", "hint", "param", "traceback")},
            "status": status,
            "retry_after": float(retry_after) if retry_after.isdigit() else None,
        }
        return info_to_exception(_info(info))
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException):
        unavailable = status in (502, 503)  # a proxy in between, most likely
        return (Unavailable if unavailable else PlatformError)(f"the server answered {status} without a description.")
