"""An instance as its invoker sees it: frames in, the right executor, and an end.

    receive(parts)  ── INVOKE ──► Call ──► executor of its method
                    ── CREDIT, CANCEL ──► the call they name
                    ── SHUTDOWN ──► drain: `on_drained` when no call is left

It runs no user code. `receive` is called on one thread (the link's) and never blocks. Invariants: every INVOKE
gets exactly one terminal frame, also when it cannot be understood; an unknown id that is cancelled is answered
CANCELLED, so whoever asks again is never left waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from sllm_faas.errors import Conflict, NotFound, SllmError, WireError, to_info
from sllm_faas.spec import FunctionSpec
from sllm_faas.wire.codec import decode, encode
from sllm_faas.wire.header import Header, Type, unpack
from sllm_faas.wire.messages import Failed, Invoke, Shutdown
from sllm_invoker.runner.call import Call, Link, Parts


class Executor(Protocol):
    """Runs calls of one or more methods, each to its end."""

    def submit(self, call: Call) -> None: ...

    def cancel(self, call: Call) -> None:
        """`call.cancelled` is set: end it at once if it has not begun, else interrupt its code."""


class Instance:
    """The calls of one function instance. `executors` are by method name.

    `on_end(call)` follows every call's terminal frame; `on_drained()` is called once, on any thread, when
    SHUTDOWN came and the last call has ended.
    """

    def __init__(
        self,
        spec: FunctionSpec,
        executors: Mapping[str, Executor],
        link: Link,
        *,
        on_end: Callable[[Call], None] | None = None,
        on_drained: Callable[[], None] | None = None,
    ) -> None:
        self._spec = spec
        self._executors = executors
        self._link = link
        self._on_end = on_end
        self._on_drained = on_drained
        self._calls: dict[bytes, Call] = {}
        self._lock = threading.Lock()
        self._draining = False
        self._drained = False
        self.bad_frames = 0

    @property
    def running(self) -> int:
        return len(self._calls)

    def receive(self, parts: Parts) -> None:
        try:
            frame = decode(parts)
        except WireError as error:
            self.bad_frames += 1
            self._refuse(parts, error)
            return
        header = frame.header
        if header.type is Type.INVOKE:
            self._invoke(header, frame.body, frame.buffers)
        elif header.type is Type.SHUTDOWN:
            self._shutdown(frame.body)
        elif header.type is Type.CREDIT:
            call = self._calls.get(header.id)
            if call is not None and call.fence == header.fence:
                call.allow(header.credit)
        elif header.type is Type.CANCEL:
            self._cancel(header)

    def _invoke(self, header: Header, invoke: Invoke, buffers: tuple[bytes, ...]) -> None:
        known = self._calls.get(header.id)
        if known is not None:
            if known.fence != header.fence:
                self._fail(header, Conflict(f"invocation {header.id.hex()} runs here under fence {known.fence}."))
            return
        method = self._spec.method(invoke.method)
        name = method.name if method is not None else invoke.method
        executor = self._executors.get(name)
        if executor is None:
            allowed = ", ".join(self._executors)
            error = NotFound(f"{self._spec.name!r} has no method {invoke.method!r}; it has {allowed}.", param="method")
            self._fail(header, error)
            return
        call = Call(header, invoke, buffers, self._link, self._ended)
        call.method = name
        with self._lock:
            self._calls[call.id] = call
        executor.submit(call)

    def _cancel(self, header: Header) -> None:
        call = self._calls.get(header.id)
        if call is None:
            self._link.send(encode(Header(Type.CANCELLED, header.id, header.fence)))
        elif header.fence >= call.fence and call.cancel():
            self._executors[call.method].cancel(call)

    def _shutdown(self, body: Shutdown) -> None:
        self._draining = True
        if body.drain is not None:
            timer = threading.Timer(body.drain, self.cancel_all)
            timer.daemon = True
            timer.start()
        self._check_drained()

    def cancel_all(self) -> None:
        for call in list(self._calls.values()):
            if call.cancel():
                self._executors[call.method].cancel(call)

    def _ended(self, call: Call) -> None:
        with self._lock:
            self._calls.pop(call.id, None)
        if self._on_end is not None:
            self._on_end(call)
        self._check_drained()

    def _check_drained(self) -> None:
        with self._lock:
            if not self._draining or self._drained or self._calls:
                return
            self._drained = True
        if self._on_drained is not None:
            self._on_drained()

    def _refuse(self, parts: Parts, error: WireError) -> None:
        """An INVOKE that cannot be read still holds a slot at the invoker: it must end."""
        try:
            header = unpack(parts[0] if parts else b"")
        except WireError:
            return
        if header.type is Type.INVOKE:
            self._fail(header, error)

    def _fail(self, header: Header, error: SllmError) -> None:
        self._link.send(encode(Header(Type.FAILED, header.id, header.fence), Failed(to_info(error))))
