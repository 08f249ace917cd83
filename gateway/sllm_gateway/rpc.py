"""Calls over a link that have one answer, or several: REQUEST out, REPLY back, matched by id.

Not for invocations. Invariant: every pending call ends — answered, timed out, or failed with the link.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import msgspec

from sllm_faas.errors import DeadlineExceeded, NotFound, SllmError, Unavailable, WireError, from_info, to_info
from sllm_faas.wire import codec
from sllm_faas.wire.bus import Parts
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Reply, Request

TIMEOUT = 30.0


class Link(Protocol):
    """A way to a peer. `send` raises PeerGone or PeerBusy."""

    def send(self, parts: Parts) -> None: ...


class Rpc:
    """The calling side of one link. `send` None: the link is down."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.send: Callable[[Parts], None] | None = None
        self._pending: dict[bytes, asyncio.Queue[Reply | SllmError]] = {}

    async def call(self, op: str, body: dict[str, Any], *buffers: bytes, patience: float | None = TIMEOUT) -> Any:
        """The final answer. Raises the error answered, Unavailable, or DeadlineExceeded."""
        answer = None
        async for _, each in self.stream(op, body, *buffers, patience=patience):
            answer = each
        return answer

    async def stream(
        self, op: str, body: dict[str, Any], *buffers: bytes, patience: float | None = TIMEOUT
    ) -> AsyncIterator[tuple[bool, Any]]:
        """(final, answer) of each answer. `patience` is for the time between two of them, in seconds."""
        if self.send is None:
            raise Unavailable(f"The {self.peer} is not reachable now.", hint="Try again shortly.", retry_after=1.0)
        identity = os.urandom(16)
        answers: asyncio.Queue[Reply | SllmError] = asyncio.Queue()
        self._pending[identity] = answers
        final = False
        try:
            self.send(codec.encode(Header(Type.REQUEST, identity), Request(op, codec.pack(body)), *buffers))
            while True:
                try:
                    async with asyncio.timeout(patience):
                        reply = await answers.get()
                except TimeoutError:
                    raise DeadlineExceeded(
                        f"The {self.peer} did not answer {op} within {patience:g} s.", phase="execution"
                    ) from None
                if isinstance(reply, SllmError):
                    raise reply
                final = not reply.more
                if reply.error is not None:
                    raise from_info(reply.error)
                yield final, _body(reply.body)
                if final:
                    return
        finally:
            del self._pending[identity]
            if not final:
                self._stop(identity)

    def _stop(self, identity: bytes) -> None:
        """Nobody reads the answers any more; what follows logs should know."""
        if self.send is not None:
            try:
                self.send([Header(Type.CANCEL, identity).pack()])
            except SllmError:
                pass

    def on_reply(self, identity: bytes, reply: Reply) -> bool:
        """Whether somebody waited for it."""
        answers = self._pending.get(identity)
        if answers is None:
            return False
        answers.put_nowait(reply)
        return True

    def up(self, send: Callable[[Parts], None]) -> None:
        self.send = send

    def down(self) -> None:
        """The link is gone, and with it every answer not yet here."""
        self.send = None
        for answers in self._pending.values():
            answers.put_nowait(Unavailable(f"The {self.peer} went away.", hint="Try again shortly.", retry_after=1.0))


class Answers:
    """The answering side: what this gateway says when the controller asks. `operations` by op."""

    def __init__(self) -> None:
        self.operations: dict[str, Callable[[dict[str, Any]], Any]] = {}

    def reply(self, header: Header, request: Request) -> Parts:
        """The REPLY to a REQUEST. Whatever goes wrong is the answer."""
        operation = self.operations.get(request.op)
        try:
            if operation is None:
                raise NotFound(f"a gateway has no operation {request.op!r}")
            body = msgspec.msgpack.decode(request.body, type=dict[str, Any]) if request.body else {}
            reply = Reply(codec.pack(operation(body)))
        except Exception as error:
            reply = Reply(error=to_info(error))
        return codec.encode(Header(Type.REPLY, header.id), reply)


def _body(data: bytes) -> Any:
    if not data:
        return None
    try:
        return msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"an answer that is not MessagePack: {error}") from None
