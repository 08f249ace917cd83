"""An instance as its invoker sees it: frames in, the right executor, and an end.

    receive(parts)  ── INVOKE ──► Call ──► executor of its method
                    ── CREDIT, CANCEL ──► the call they name
                    ── HOLD, ACTIVATE ──► a call that comes from another instance
                    ── SNAPSHOT, PAUSE, CONTINUE ──► one that may leave for another
                    ── SHUTDOWN ──► drain: `on_drained` when no call is left

It runs no user code. `receive` is called on one thread (the link's) and never blocks. Invariants: every INVOKE
and every HOLD gets exactly one terminal frame, also when it cannot be understood; an unknown id that is cancelled
is answered CANCELLED, so whoever asks again is never left waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from sllm_faas.errors import Conflict, NotFound, SllmError, WireError, to_info
from sllm_faas.spec import FunctionSpec
from sllm_faas.wire.codec import decode_body, encode
from sllm_faas.wire.header import Header, Type, unpack
from sllm_faas.wire.messages import Activate, Failed, Invoke, Shutdown
from sllm_invoker.runner.call import Call, Link, Parts

GENERATING = ("chat", "complete")
"""Methods of a language model that can go on elsewhere."""


class Executor(Protocol):
    """Runs calls of one or more methods, each to its end."""

    @property
    def holds(self) -> bool:
        """It computes calls while they are held: they are submitted at HOLD, elsewhere at ACTIVATE."""

    def submit(self, call: Call) -> None: ...

    def cancel(self, call: Call) -> None:
        """`call.cancelled` is set: end it at once if it has not begun, else interrupt its code."""

    def ask(self, call: Call, kind: Type) -> None:
        """SNAPSHOT or PAUSE, to be answered by STATE; CONTINUE."""


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
        self._methods = {method.name: method for method in spec.methods}
        if spec.kind == "function":
            self._methods[""] = spec.methods[0]
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
            header = unpack(parts[0])
            kind = header.type
            body = decode_body(kind, parts[0])
        except WireError as error:
            self.bad_frames += 1
            self._refuse(parts, error)
            return
        if kind is Type.INVOKE:
            self._invoke(header, body, tuple(parts[1:]))
        elif kind is Type.SHUTDOWN:
            self._shutdown(body)
        elif kind is Type.CREDIT:
            call = self._calls.get(header.id)
            if call is not None and call.fence == header.fence:
                call.allow(header.credit)
        elif kind is Type.CANCEL:
            self._cancel(header)
        elif kind is Type.HOLD:
            self._hold(header, body, tuple(parts[1:]))
        elif kind is Type.ACTIVATE:
            self._activate(header, body)
        elif kind in (Type.SNAPSHOT, Type.PAUSE, Type.CONTINUE):
            call = self._calls.get(header.id)
            if call is not None and call.fence == header.fence and not call.held:
                self._executors[call.method].ask(call, kind)

    def _invoke(self, header: Header, invoke: Invoke, buffers: tuple[bytes, ...]) -> None:
        known = self._calls.get(header.id)
        if known is None:
            call = self._admit(header, invoke, buffers)
            if call is not None:
                self._executors[call.method].submit(call)
        elif known.fence != header.fence:
            self._fail(header, Conflict(f"invocation {header.id.hex()} runs here under fence {known.fence}."))

    def _hold(self, header: Header, invoke: Invoke, buffers: tuple[bytes, ...]) -> None:
        """Take up a call silently, or learn what was said of it elsewhere since."""
        call = self._calls.get(header.id)
        if call is not None and (call.fence != header.fence or not call.held):
            self._fail(header, Conflict(f"invocation {header.id.hex()} runs here under fence {call.fence}."))
            return
        if call is not None:
            call.extend(invoke.outputs, invoke.resume)
        elif (call := self._admit(header, invoke, buffers)) is not None and self._executors[call.method].holds:
            self._executors[call.method].submit(call)
        if call is not None and not self._executors[call.method].holds:
            call.tell_held(call.emitted)

    def _activate(self, header: Header, body: Activate) -> None:
        call = self._calls.get(header.id)
        if call is None or not call.held:
            if call is None or call.fence != header.fence:
                self._fail(header, Conflict(f"invocation {header.id.hex()} is not held here."))
            return
        call.activate(header, body.resume)
        executor = self._executors[call.method]
        if not executor.holds:
            executor.submit(call)

    def _admit(self, header: Header, invoke: Invoke, buffers: tuple[bytes, ...]) -> Call | None:
        """A new call; None when it cannot be served, which is answered."""
        method = self._methods.get(invoke.method)
        name = method.name if method is not None else invoke.method
        executor = self._executors.get(name)
        if executor is None:
            allowed = ", ".join(self._executors)
            error = NotFound(f"{self._spec.name!r} has no method {invoke.method!r}; it has {allowed}.", param="method")
            self._fail(header, error)
            return None
        call = Call(header, invoke, buffers, self._link, self._ended)
        call.method = name
        call.resumable = name in GENERATING if self._spec.kind == "llm" else method is not None and method.resumable
        with self._lock:
            self._calls[call.id] = call
        return call

    def _cancel(self, header: Header) -> None:
        call = self._calls.get(header.id)
        if call is None:
            self._link.send(encode(Header(Type.CANCELLED, header.id, header.fence)))
        elif header.fence >= call.fence:
            self._stop(call)

    def _stop(self, call: Call) -> None:
        if not call.cancel():
            return
        executor = self._executors[call.method]
        if call.held and not executor.holds:
            call.stopped()
        else:
            executor.cancel(call)

    def _shutdown(self, body: Shutdown) -> None:
        self._draining = True
        if body.drain is not None:
            timer = threading.Timer(body.drain, self.cancel_all)
            timer.daemon = True
            timer.start()
        self._check_drained()

    def cancel_all(self) -> None:
        for call in list(self._calls.values()):
            self._stop(call)

    def _ended(self, call: Call) -> None:
        with self._lock:
            self._calls.pop(call.id, None)
        if self._on_end is not None:
            self._on_end(call)
        if self._draining:
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
        if header.type in (Type.INVOKE, Type.HOLD):
            self._fail(header, error)

    def _fail(self, header: Header, error: SllmError) -> None:
        self._link.send(encode(Header(Type.FAILED, header.id, header.fence), Failed(to_info(error))))
