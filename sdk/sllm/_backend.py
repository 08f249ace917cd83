"""Where calls go: the `Backend` port, the one in use, and the event-loop thread that all of them run on.

`HttpBackend` (in `_http`) reaches a gateway and is the default; the platform in one process registers itself
with `use`. A backend sees bytes only: encoding, retries and ordering are done above it, once.

    caller's thread or loop ──► loop thread ──► backend.call(Call) -> bytes
                                                backend.stream(Call) -> bytes, bytes, …   aclose() cancels

Invariant: backend coroutines run on the SDK's loop thread only, so a backend may keep per-loop state in plain
attributes. The thread is made on first use and again in a forked child.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sllm_faas.spec import Phase

if TYPE_CHECKING:
    import asyncio
    import concurrent.futures

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One call as a backend gets it. `method` is empty for plain functions, `parameters` canonical JSON.

    `timeouts` are per-call limits in seconds (they can only lower the function's own). `caller` is the
    invocation that makes the call, or ''.
    """

    app: str
    function: str
    payload: bytes
    method: str = ""
    parameters: str = ""
    timeouts: tuple[tuple[Phase, float], ...] = ()
    caller: str = ""

    @property
    def label(self) -> str:
        return f"{self.app}/{self.function}" + (f".{self.method}" if self.method else "")


class Backend(Protocol):
    """Both raise errors of `sllm.errors`, or the remote exception itself. Payloads are MessagePack."""

    async def call(self, call: Call) -> bytes:
        """The result. Cancelling the task cancels the invocation."""

    def stream(self, call: Call) -> AsyncIterator[bytes]:
        """The outputs in order. An async generator: closing it early cancels the invocation."""

    async def close(self) -> None: ...


# -- the backend in use --------------------------------------------------------------------------------------

_used: list[Backend] = []
_default: Backend | None = None
_lock = threading.Lock()


def current() -> Backend:
    """The backend of the innermost `use`, else one HTTP backend for the process, made on first need."""
    global _default
    if _used:
        return _used[-1]
    with _lock:
        if _default is None:
            from sllm._http import HttpBackend
            from sllm._profile import load_profile

            _default = HttpBackend(load_profile())
        return _default


@contextmanager
def use(backend: Backend) -> Iterator[Backend]:
    """Calls made anywhere in this process go to `backend` within the block."""
    _used.append(backend)
    try:
        yield backend
    finally:
        _used.remove(backend)


# -- the loop thread -----------------------------------------------------------------------------------------


class LoopThread:
    """One daemon thread with one event loop."""

    def __init__(self) -> None:
        import asyncio

        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="sllm-sdk", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        import asyncio

        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        import asyncio

        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(2.0)
        if not self.thread.is_alive():
            self.loop.close()


_loop: LoopThread | None = None


def loop_thread() -> LoopThread:
    global _loop
    with _lock:
        if _loop is None:
            import atexit

            _loop = LoopThread()
            atexit.register(_shut_down, _loop)
        return _loop


def submit(coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Start `coroutine` on the loop thread."""
    return loop_thread().submit(coroutine)


def wait(future: concurrent.futures.Future[T]) -> T:
    """Block for the result; an interrupt of the caller (Ctrl-C, `Cancelled`) cancels the work."""
    if _loop is not None and threading.current_thread() is _loop.thread:
        future.cancel()
        raise RuntimeError("a blocking call inside the SDK's own event loop would wait for itself; use .aio(…)")
    try:
        return future.result()
    except BaseException:
        future.cancel()  # no effect on one that is done
        raise


async def wait_async(future: concurrent.futures.Future[T]) -> T:
    """The same from any event loop; cancelling the caller cancels the work."""
    import asyncio

    wrapped: asyncio.Future[T] = asyncio.wrap_future(future)
    return await wrapped


def _shut_down(thread: LoopThread) -> None:
    global _default
    backend, _default = _default, None
    if thread.thread.is_alive():
        if backend is not None:
            try:
                thread.submit(backend.close()).result(1.0)
            except Exception:  # noqa: S110 - the process is ending; sockets go with it
                pass
        thread.stop()


_inherited: list[object] = []
"""The parent's loop and connections, kept from being collected in a child: closing them would touch what the two
processes share."""


def _after_fork() -> None:
    """The child has neither the thread nor a use for the parent's connections."""
    global _loop, _default, _lock
    _inherited.append((_loop, _default))
    _loop, _default, _lock = None, None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
