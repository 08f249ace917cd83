"""Event streams over HTTP: the text of server-sent events, the records of the SDK's streams, and keeping them alive.

    id: 17                      u32 big-endian length, then msgpack
    event: output               {"t": "output", "seq": 17, "data": …} | {"t": "ping"}
    data: {"n": 1}              {"t": "done", …} | {"t": "error", "error": ErrorInfo}

Invariants: a stream that has begun ends with a terminal event, whatever happens; it is never silent for more than
`QUIET` seconds, not even before its first output; many events of one wake-up are one write.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Protocol

import msgspec

from sllm_faas.errors import ErrorInfo
from sllm_gateway.errors import for_owner, shape
from sllm_gateway.exchange import Exchange, Message, Receive
from sllm_gateway.handle import Ended, Handle

EVENT_STREAM = b"text/event-stream; charset=utf-8"
RECORD_STREAM = b"application/x-sllm-stream"
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
QUIET = 15.0
HOLD = 0.25
"""Seconds after dispatch for which the status line waits for a first output, or an error with a status of its own."""

_encode_json = msgspec.json.Encoder().encode
_encode_msgpack = msgspec.msgpack.Encoder().encode
_length = struct.Struct(">I")


def event(data: bytes, *, name: bytes = b"", ordinal: int | None = None) -> bytes:
    """One event. Line breaks inside `data` (there are none in compact JSON) become several data lines."""
    head = b"" if ordinal is None else b"id: %d\n" % ordinal
    if name:
        head += b"event: " + name + b"\n"
    if b"\n" in data or b"\r" in data:
        data = b"\ndata: ".join(data.splitlines())
    return head + b"data: " + data + b"\n\n"


def json_event(value: Any, *, name: bytes = b"", ordinal: int | None = None) -> bytes:
    return event(_encode_json(value), name=name, ordinal=ordinal)


def comment(text: str) -> bytes:
    """A line for people; clients pass over it."""
    return b": " + text.encode() + b"\n\n"


def record(value: dict[str, Any]) -> bytes:
    body = _encode_msgpack(value)
    return _length.pack(len(body)) + body


class Writer(Protocol):
    """How outputs become bytes."""

    content_type: bytes
    ping: bytes

    def outputs(self, first: int, outputs: list[bytes]) -> bytes:
        """`first` is the ordinal of the first one."""

    def done(self, ended: Ended) -> bytes: ...

    def error(self, info: ErrorInfo, exchange: Exchange) -> bytes: ...


class EventWriter:
    """Outputs are JSON already: `event: output` with their ordinal as id, then `done` or `error`."""

    content_type = EVENT_STREAM
    ping = PING

    def outputs(self, first: int, outputs: list[bytes]) -> bytes:
        return b"".join([event(data, name=b"output", ordinal=first + at) for at, data in enumerate(outputs)])

    def done(self, ended: Ended) -> bytes:
        return json_event({"seconds": round(ended.seconds, 6)}, name=b"done")

    def error(self, info: ErrorInfo, exchange: Exchange) -> bytes:
        return json_event(shape(info, exchange.request_id, owner=exchange.owner), name=b"error")


class RecordWriter:
    """Outputs stay MessagePack, byte for byte."""

    content_type = RECORD_STREAM
    ping = record({"t": "ping"})

    def outputs(self, first: int, outputs: list[bytes]) -> bytes:
        return b"".join([record({"t": "output", "seq": first + at, "data": data}) for at, data in enumerate(outputs)])

    def done(self, ended: Ended) -> bytes:
        return record({"t": "done", "seconds": ended.seconds})

    def error(self, info: ErrorInfo, exchange: Exchange) -> bytes:
        return record({"t": "error", "error": for_owner(info, owner=exchange.owner)})


class Pulse:
    """Wakes streams that were silent for long, so that they can ping. One timer for all of them.

    A stream that has not begun is also woken `HOLD` seconds after its dispatch: its client shall know the id of what
    runs for it, to re-attach if this gateway dies.
    """

    def __init__(self, quiet: float = QUIET) -> None:
        self._quiet = quiet
        self._last: dict[Handle, float] = {}
        self._held: set[Handle] = set()
        self._timer: asyncio.TimerHandle | None = None

    def hold(self, handle: Handle) -> None:
        """It waits for its first output before anything is written."""
        self._held.add(handle)
        self.wrote(handle)

    def wrote(self, handle: Handle) -> None:
        loop = asyncio.get_running_loop()
        self._last[handle] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(HOLD / 2, self._beat)

    def begun(self, handle: Handle) -> None:
        self._held.discard(handle)

    def remove(self, handle: Handle) -> None:
        self._last.pop(handle, None)
        self._held.discard(handle)

    def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(HOLD / 2, self._beat) if self._last else None
        limit = loop.time() - self._quiet + HOLD
        for handle, last in self._last.items():
            if last <= limit or (handle in self._held and handle.running_for() >= HOLD):
                handle.nudge()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Watch:
    """One request whose client may leave."""

    __slots__ = ("handle", "receive", "task")

    def __init__(self, receive: Receive, handle: Handle) -> None:
        self.receive = receive
        self.handle = handle
        self.task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._listen())

    async def _listen(self) -> None:
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await self.receive()
        self.handle.cancel()


class Watches:
    """Cancels the invocations of clients that leave.

    Listening takes a task, and most calls are over before their client could leave: only those that outlive a sweep
    (at most 2 × `interval` seconds) get one. Streams get theirs at once.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self._interval = interval
        self._young: set[Watch] = set()
        self._next: set[Watch] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, receive: Receive, handle: Handle, *, now: bool = False) -> Watch:
        watch = Watch(receive, handle)
        if now:
            watch.begin()
        else:
            self._next.add(watch)
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self._interval, self._sweep)
        return watch

    def remove(self, watch: Watch) -> None:
        if watch.task is not None:
            watch.task.cancel()
        else:
            self._next.discard(watch)
            self._young.discard(watch)

    def _sweep(self) -> None:
        for watch in self._young:
            watch.begin()
        self._young, self._next = self._next, set()
        busy = bool(self._young)
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._sweep) if busy else None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
