"""One invocation inside an instance: its outputs, its credit, its one terminal frame.

    executor ── output(), done(), fail(), stopped() ──► Call ── take() ──► link
             ◄── room(), wait(), wait_async() ────────      ◄── allow(), cancel(), pause() … ── receiver

An executor's thread produces, the link's thread consumes; neither waits for the other except in `wait`, which
is flow control. It is not an executor and knows no socket. Invariants: outputs leave in order and before the
terminal frame; there is exactly one terminal frame; what is pending is bounded by the caller's credit and by
`MAX_PENDING` bytes; a STATE follows the outputs that it stands for, and while it is paused nothing follows it.

A held call came by HOLD: it says nothing but HELD until ACTIVATE makes it one like any other.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

from sllm_faas.errors import ErrorInfo
from sllm_faas.wire.codec import encode, pack
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import INLINE_LIMIT, Done, Failed, Invoke, LogRecord, ResumeState

MAX_PENDING = 8 * 1024 * 1024
"""Bytes of outputs that may wait for the link before their producer does."""

MAX_BATCH_BYTES = 256 * 1024
MAX_BATCH_ITEMS = 1024

Parts = list[bytes]


class Link(Protocol):
    """Where an instance's frames go. Every method may be called on any thread and never blocks."""

    def send(self, parts: Parts) -> None: ...

    def flush(self, call: Call) -> None:
        """`call` has something to take."""

    def log(self, record: LogRecord) -> None: ...


class Call:
    """An invocation from its arrival to its terminal frame."""

    __slots__ = (
        "_ended",
        "_given_bytes",
        "_last",
        "_lock",
        "_on_end",
        "_pending",
        "_taken",
        "_taken_bytes",
        "_terminal",
        "_waiter",
        "arrived",
        "begun",
        "cancelled",
        "credit",
        "emitted",
        "fence",
        "held",
        "id",
        "interrupted",
        "invoke",
        "link",
        "method",
        "news",
        "paused",
        "payload",
        "queued",
        "resumable",
        "resume",
    )

    def __init__(
        self, header: Header, invoke: Invoke, buffers: tuple[bytes, ...], link: Link, on_end: Callable[[Call], None]
    ) -> None:
        self.id = header.id
        self.fence = header.fence
        self.invoke = invoke
        self.method = invoke.method
        self.payload = invoke.payload
        self.resume = invoke.resume
        if buffers:
            rest = iter(buffers)
            self.payload = self.payload or next(rest)
            self.resume = self.resume or next(rest, b"")
        self.link = link
        self.held = header.type is Type.HOLD
        self.paused = False
        self.resumable = False
        """It can go on elsewhere."""
        self.news: Callable[[], None] | None = None
        """Called on any thread when a held call was extended or activated (set by an executor that computes it)."""
        self.credit = header.credit
        self.emitted = invoke.outputs
        self.arrived = time.monotonic()
        self.cancelled = False
        self.begun = False
        """Its executor has taken it up (owned by the executor)."""
        self.interrupted = False
        """`Cancelled` has been raised in its code: done once, so that its clean-up is not interrupted too."""
        self.queued = False
        """The link holds it in its queue (owned by the link)."""
        self._on_end = on_end
        self._lock = threading.Lock()
        self._last: bytes | None = None
        self._pending: deque[bytes] | None = None  # made with the first output: most calls have none
        self._given_bytes = 0  # written by the producer only
        self._taken_bytes = 0  # written by the link only
        self._taken = invoke.outputs
        self._terminal: Parts | None = None
        self._ended = False
        self._waiter: Callable[[], object] | None = None

    def __repr__(self) -> str:
        state = "ended" if self._ended else "cancelled" if self.cancelled else "running"
        return f"<Call {self.id.hex()} {self.invoke.method} {state} {self.emitted}/{self.credit}>"

    # -- executor's side ---------------------------------------------------------------------------------------

    def room(self) -> bool:
        """Whether the next output may be given now."""
        return (
            self.emitted < self.credit
            and not self.paused
            and not self.held
            and self._given_bytes - self._taken_bytes < MAX_PENDING
        )

    def wait(self) -> bool:
        """Block until there is room. False when the call was cancelled instead."""
        while not self.room() and not self.cancelled:
            event = threading.Event()
            self._waiter = event.set
            if not self.room() and not self.cancelled:
                event.wait()
        return not self.cancelled

    async def wait_async(self) -> None:
        """Wait until there is room; cancelling the task ends it."""
        loop = asyncio.get_running_loop()
        while not self.room():
            event = asyncio.Event()
            self._waiter = partial(loop.call_soon_threadsafe, event.set)
            if not self.room():
                await event.wait()

    def output(self, payload: bytes) -> bool:
        """Give one output. False, and it was not taken, when there is no room (any more)."""
        with self._lock:
            if not self.room():
                return False
            if self._pending is None:
                self._pending = deque()
            self._pending.append(payload)
            self._last = payload
            self._given_bytes += len(payload)
            self.emitted += 1
        self.link.flush(self)
        return True

    def done(
        self,
        payload: bytes = b"",
        *,
        usage: dict[str, int] | None = None,
        spans: tuple[tuple[str, float, float], ...] = (),
    ) -> None:
        inline = len(payload) <= INLINE_LIMIT
        body = Done(payload if inline else b"", self.seconds, usage or {}, spans)
        self._end(encode(self._header(Type.DONE), body, *(() if inline else (payload,))))

    def fail(self, error: ErrorInfo) -> None:
        self._end(encode(self._header(Type.FAILED), Failed(error, self.seconds)))

    def stopped(self) -> None:
        """It was cancelled, and its code has ended."""
        self._end(encode(self._header(Type.CANCELLED)))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.arrived

    @property
    def ended(self) -> bool:
        return self._ended

    # -- moving ------------------------------------------------------------------------------------------------

    def state(self) -> None:
        """Tell the resume state of a generator: its last output."""
        with self._lock:
            last, seq = self._last, self.emitted
        self.tell(seq, self.resume if last is None else pack(last))

    def tell(self, seq: int, resume: bytes, tokens: int = 0) -> None:
        """STATE: `resume` is what another instance needs after output `seq`. Nothing, once it has ended."""
        if self._ended:
            return
        body = ResumeState(resume if self.resumable else b"", self.resumable, self.paused, tokens)
        self.link.flush(self)  # the outputs come first
        self.link.send(encode(Header(Type.STATE, self.id, self.fence, seq=seq), body))

    def tell_held(self, seq: int) -> None:
        if not self._ended:
            self.link.send(encode(Header(Type.HELD, self.id, self.fence, seq=seq)))

    def position(self) -> tuple[bool, int, bytes]:
        """(held, outputs said in all, the resume state it came with or was last extended by), of one moment."""
        with self._lock:
            return self.held, self.emitted, self.resume

    def pause(self) -> None:
        """No output is taken any more, until `proceed`."""
        with self._lock:
            self.paused = True

    def proceed(self) -> None:
        self.paused = False
        self._wake()

    def extend(self, outputs: int, resume: bytes) -> None:
        """What was said elsewhere meanwhile, unless that is known; only while it is held."""
        with self._lock:
            if outputs > self.emitted:
                self.emitted = self._taken = outputs
                self.resume = resume
        if self.news is not None:
            self.news()

    def activate(self, header: Header, resume: bytes) -> None:
        """From here on it speaks, under the fence of `header`, output header.seq first."""
        with self._lock:
            self.fence, self.credit = header.fence, header.credit
            self.emitted = self._taken = header.seq
            self.resume = resume
            self.arrived = time.monotonic()
            self.held = False
        if self.news is not None:
            self.news()
        self._wake()

    # -- receiver's side ---------------------------------------------------------------------------------------

    def allow(self, credit: int) -> None:
        """Raise the credit to `credit` (absolute; an older, lower one changes nothing)."""
        if credit > self.credit:
            self.credit = credit
            self._wake()

    def cancel(self) -> bool:
        """Mark it cancelled. False when it was already."""
        if self.cancelled:
            return False
        self.cancelled = True
        self._wake()
        return True

    # -- link's side -------------------------------------------------------------------------------------------

    def take(self) -> Iterator[Parts]:
        """The frames that are due: pending outputs, many to a frame, then perhaps the terminal frame."""
        # The terminal frame is read first: what is pending then is all there will be before it.
        terminal = self._terminal
        while self._pending:
            yield self._batch()
        if terminal is not None:
            self._terminal = None
            yield terminal

    def _batch(self) -> Parts:
        pending, size = self._pending, 0
        assert pending is not None
        items: list[bytes] = []
        buffers: list[bytes] = []
        while pending and len(items) < MAX_BATCH_ITEMS:
            payload = pending[0]
            if items and size + len(payload) > MAX_BATCH_BYTES:
                break
            pending.popleft()
            size += len(payload)
            if len(payload) > INLINE_LIMIT:
                buffers.append(payload)
                payload = b""
            items.append(payload)
        self._taken_bytes += size
        first = self._taken
        self._taken += len(items)
        header = Header(Type.OUTPUT, self.id, self.fence, seq=first, items=len(items))
        parts = encode(header, items, *buffers)
        self._wake()
        return parts

    # ----------------------------------------------------------------------------------------------------------

    def _header(self, kind: Type) -> Header:
        return Header(kind, self.id, self.fence, seq=self.emitted)

    def _end(self, parts: Parts) -> None:
        if self._ended:
            return
        self._ended = True
        if self._pending or self.queued:
            self._terminal = parts
            self.link.flush(self)
        else:
            self.link.send(parts)
        self._on_end(self)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter()
