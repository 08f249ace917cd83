"""One HTTP request and its answer, on raw ASGI: what endpoints are handed.

No framework object is made per request on the hot path: this is the framework object. Invariant: at most one answer
starts; `status` says which, and is 0 while there is none.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from sllm_faas.errors import BadRequest, ErrorInfo, TooLarge
from sllm_gateway.errors import JSON, Headers, render

if TYPE_CHECKING:
    from sllm_gateway.auth import Principal
    from sllm_gateway.handle import Handle

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

BODY_PATIENCE = 30.0
"""Seconds for which a client may send nothing of the body it announced."""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def _identities() -> Iterator[bytes]:
    """16 random bytes each; the kernel is asked for many at once, because asking costs as much as parsing a body."""
    while True:
        block = os.urandom(4096)
        for at in range(0, len(block), 16):
            yield block[at : at + 16]


_identity = _identities().__next__


class ClientGone(Exception):
    """The client closed before it had sent its request. Nobody is there to be answered."""


class Exchange:
    __slots__ = (
        "app",
        "body_limit",
        "code",
        "function",
        "handle",
        "headers",
        "hint_in_message",
        "identity",
        "method",
        "msgpack",
        "params",
        "path",
        "principal",
        "receive",
        "request_id",
        "route",
        "scope",
        "send",
        "started",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, body_limit: int) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.body_limit = body_limit
        self.started = time.perf_counter()
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.identity = _identity()
        """Becomes the id of the invocation, if the request makes one."""
        given = self.headers.get(b"x-request-id")
        self.request_id = given.decode() if given and _REQUEST_ID.fullmatch(given) else invocation_text(self.identity)
        self.status = 0
        self.code = ""
        """The error's, for log and metrics."""
        self.route = "other"
        self.app = ""
        self.function = ""
        self.params: dict[str, str] = {}
        self.principal: Principal | None = None
        self.handle: Handle | None = None
        self.msgpack = False
        """Errors are answered in the SDK's encoding."""
        self.hint_in_message = False
        """The client shows the message and nothing else."""

    # -- request ---------------------------------------------------------------------------------------------

    def header(self, name: bytes) -> str:
        return self.headers.get(name, b"").decode("latin-1")

    def accepts(self, media_type: str) -> bool:
        """Whether the client asks for that very type."""
        return media_type in self.header(b"accept").lower()

    def query(self) -> dict[str, str]:
        """The last value of each. Raises BadRequest when it is not text."""
        raw = self.scope.get("query_string", b"")
        if not raw:
            return {}
        try:
            parsed = parse_qs(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
        except (ValueError, UnicodeDecodeError) as error:
            raise BadRequest(f"The query string cannot be read: {error}") from None
        return {name: values[-1] for name, values in parsed.items()}

    async def body(self) -> bytes:
        """The whole body. Raises TooLarge before more than the limit was read, BadRequest for one that stalls."""
        length = self.headers.get(b"content-length")
        if length is not None and length.isdigit() and int(length) > self.body_limit:
            raise self._too_large(int(length))
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        data: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(data) > self.body_limit:
                raise self._too_large(len(data))
            return data
        chunks, size = [data], len(data)
        while message.get("more_body", False):
            try:
                async with asyncio.timeout(BODY_PATIENCE):
                    message = await self.receive()
            except TimeoutError:
                raise BadRequest(f"Nothing of the body came for {BODY_PATIENCE:g} s.") from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.body_limit:
                raise self._too_large(size)
        return b"".join(chunks)

    def _too_large(self, size: int) -> TooLarge:
        return TooLarge(
            f"The body has {size} bytes or more; allowed: {self.body_limit}.",
            hint="Pass large data by reference, or raise max_body.",
        )

    # -- answer ----------------------------------------------------------------------------------------------

    async def respond(
        self, body: bytes, status: int = 200, content_type: bytes = JSON, headers: Headers | None = None
    ) -> None:
        """The whole answer."""
        await self.start(status, content_type, headers, len(body))
        await self.send({"type": "http.response.body", "body": body})

    async def start(
        self, status: int, content_type: bytes, headers: Headers | None = None, length: int | None = None
    ) -> None:
        """Status and headers; `write` and `finish` follow, unless `respond` does it all."""
        assert not self.status, "an exchange is answered once"
        self.status = status
        lines: Headers = [(b"content-type", content_type), (b"x-request-id", self.request_id.encode())]
        if length is not None:
            lines.append((b"content-length", str(length).encode()))
        else:
            lines.append((b"cache-control", b"no-store"))
            lines.append((b"x-accel-buffering", b"no"))
        if self.handle is not None:
            lines.append((b"x-invocation-id", invocation_text(self.handle.inv.id).encode()))
        if headers:
            lines += headers
        await self.send({"type": "http.response.start", "status": status, "headers": lines})

    async def write(self, data: bytes) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes = b"") -> None:
        await self.send({"type": "http.response.body", "body": data})

    async def fail(self, info: ErrorInfo, headers: Headers | None = None) -> None:
        """Answer with an error. Nothing happens when an answer has started: a stream says it in its own way."""
        self.code = info.code
        if self.status:
            return
        rendered = render(self.shown(info), self.request_id, owner=self.owner, msgpack=self.msgpack)
        await self.respond(rendered.body, rendered.status, rendered.content_type, [*rendered.headers, *(headers or [])])

    def shown(self, info: ErrorInfo) -> ErrorInfo:
        """The error as this client is to see it."""
        if not self.hint_in_message or not info.hint:
            return info
        return replace(info, message=f"{info.message} {info.hint}")

    @property
    def owner(self) -> bool:
        """Whether the client may see tracebacks of user code."""
        return self.principal is not None and self.principal.owner


def invocation_text(identity: bytes) -> str:
    return "inv-" + identity.hex()


def invocation_id(text: str) -> bytes:
    """The id in `inv-` + 32 hex digits. Raises BadRequest."""
    try:
        identity = bytes.fromhex(text.removeprefix("inv-"))
    except ValueError:
        identity = b""
    if len(identity) != 16 or not text.startswith("inv-"):
        raise BadRequest(f"{text[:80]!r} is not an invocation id; allowed: inv- and 32 hex digits.")
    return identity
