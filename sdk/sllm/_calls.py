"""Calls in flight: retries before the first output, streams across threads, maps with bounded concurrency.

Works on bytes and on any `Backend`; knows nothing of types or encodings. Everything here begins on the caller's
side and does its waiting on the SDK's loop thread (see `_backend`).

Invariant: what was started is finished or cancelled when the caller's iterator ends, is closed or dropped.
"""

from __future__ import annotations

import concurrent.futures
import os
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sllm import _backend
from sllm._backend import Backend, Call
from sllm._context import Cancelled, current_invocation
from sllm_faas.errors import QueueFull, SllmError, Unavailable
from sllm_faas.spec import RetryPolicy

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")
Future = concurrent.futures.Future
Sleep = Callable[[float], Awaitable[None]]

STREAM_WINDOW = 64
"""Outputs of a stream held between the loop thread and its consumer; beyond that the backend is not read."""


# -- in flight, by the invocation that caused it ---------------------------------------------------------------

_nested: dict[str, set[Future[Any]]] = {}
_nested_lock = threading.Lock()


def start(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Begin on the loop thread; remembered under the current invocation, if any, until done."""
    invocation = current_invocation()
    if invocation is None:
        return _backend.submit(coroutine)
    with _nested_lock:  # begun and remembered in one, or a cancellation in between would miss it
        future = _backend.submit(coroutine)
        _nested.setdefault(invocation.id, set()).add(future)
    future.add_done_callback(lambda done: _forget(invocation.id, done))
    return future


def _after_fork() -> None:
    """The parent's calls are not the child's, and another thread may have held the lock."""
    global _nested_lock
    _nested_lock = threading.Lock()
    _nested.clear()


os.register_at_fork(after_in_child=_after_fork)


def _forget(invocation: str, future: Future[Any]) -> None:
    with _nested_lock:
        mine = _nested.get(invocation, set())
        mine.discard(future)
        if not mine:
            _nested.pop(invocation, None)


def cancel_calls(invocation: str) -> int:
    """For runners: cancel the calls that a cancelled invocation still waits for, so that it can stop. Returns
    how many. The blocked code gets `Cancelled`."""
    with _nested_lock:
        futures = list(_nested.get(invocation, ()))
    for future in futures:
        future.cancel()
    return len(futures)


def wait(future: Future[T]) -> T:
    try:
        return _backend.wait(future)
    except concurrent.futures.CancelledError:
        raise Cancelled("the call was cancelled") from None


# -- retries ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Retrying:
    """Which failed calls are tried again, and when.

    A function's own policy is the gateway's to apply once it has the call; the caller applies it to calls that
    no gateway took (unreachable, queue full). With `lost` (a policy given with `with_options`) the caller also
    retries what came back as lost or without capacity: statuses 502 and 503.
    """

    policy: RetryPolicy
    lost: bool = False

    def pause(self, attempt: int, error: BaseException) -> float | None:
        """Seconds to wait before retry number `attempt` (from 1); None: do not. Never for an exception that the
        function itself raised, whatever its type."""
        refused = isinstance(error, Unavailable | QueueFull)
        lost = self.lost and isinstance(error, SllmError) and error.status in (502, 503)
        if attempt > self.policy.max_retries or not (refused or lost) or hasattr(error, "remote_traceback"):
            return None
        return max(self.policy.delay(attempt), getattr(error, "retry_after", None) or 0.0)


async def _sleep(seconds: float) -> None:
    import asyncio

    await asyncio.sleep(seconds)


async def call(backend: Backend, call: Call, retrying: Retrying, sleep: Sleep = _sleep) -> bytes:
    attempt = 0
    while True:
        try:
            return await backend.call(call)
        except SllmError as error:
            attempt += 1
            pause = retrying.pause(attempt, error)
            if pause is None:
                raise
        await sleep(pause)


async def stream(backend: Backend, call: Call, retrying: Retrying, sleep: Sleep = _sleep) -> AsyncGenerator[bytes]:
    """Retried until the first output, never after it."""
    attempt, begun = 0, False
    while True:
        outputs = backend.stream(call)
        try:
            async for output in outputs:
                begun = True
                yield output
            return
        except SllmError as error:
            attempt += 1
            pause = None if begun else retrying.pause(attempt, error)
            if pause is None:
                raise
        finally:
            await _close(outputs)
        await sleep(pause)


async def _close(outputs: AsyncIterator[Any]) -> None:
    aclose = getattr(outputs, "aclose", None)
    if aclose is not None:
        await aclose()


# -- streams across threads --------------------------------------------------------------------------------------

_Item = tuple[bytes | None, BaseException | None]
"""(output, None), (None, error) or (None, None) at the end."""


class _Pump:
    """Runs a stream on the loop thread and hands its outputs over, at most `STREAM_WINDOW` ahead of the consumer.

    The consumer gives room back in halves of the window: one wake-up of the loop thread per 32 outputs.
    """

    def __init__(self, outputs: AsyncGenerator[bytes], put: Callable[[_Item], None]) -> None:
        self._outputs = outputs
        self._put = put
        self._taken = 0
        self._room: asyncio.Semaphore | None = None
        self.future = start(self._run())
        # Also when it was cancelled before it began, the consumer must wake.
        self.future.add_done_callback(lambda done: put((None, Cancelled()) if done.cancelled() else (None, None)))

    async def _run(self) -> None:
        import asyncio

        self._room = asyncio.Semaphore(STREAM_WINDOW)
        try:
            async for output in self._outputs:
                await self._room.acquire()
                self._put((output, None))
        except Exception as error:
            self._put((None, error))
        finally:
            await self._outputs.aclose()

    def took(self) -> None:
        self._taken += 1
        if self._taken == STREAM_WINDOW // 2:
            self._taken = 0
            _backend.loop_thread().loop.call_soon_threadsafe(self._give_room)

    def _give_room(self) -> None:
        if self._room is not None:
            for _ in range(STREAM_WINDOW // 2):
                self._room.release()


def stream_sync(outputs: AsyncGenerator[bytes], decode: Callable[[bytes], T]) -> Generator[T]:
    """The outputs in the caller's thread. Closing or dropping it cancels the stream."""
    items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
    pump = _Pump(outputs, items.put)
    try:
        while True:
            output, error = items.get()
            if error is not None:
                raise error
            if output is None:
                return
            pump.took()
            yield decode(output)
    finally:
        pump.future.cancel()


async def stream_async(outputs: AsyncGenerator[bytes], decode: Callable[[bytes], T]) -> AsyncGenerator[T]:
    """The outputs in the caller's event loop. Closing it cancels the stream."""
    import asyncio

    loop, wake = asyncio.get_running_loop(), asyncio.Event()
    items: deque[_Item] = deque()

    def put(item: _Item) -> None:
        items.append(item)
        try:
            loop.call_soon_threadsafe(wake.set)
        except RuntimeError:  # the consumer's loop is closed; nobody waits
            pass

    pump = _Pump(outputs, put)
    try:
        while True:
            while not items:
                wake.clear()
                await wake.wait()
            output, error = items.popleft()
            if error is not None:
                raise error
            if output is None:
                return
            pump.took()
            yield decode(output)
    finally:
        pump.future.cancel()


# -- maps ----------------------------------------------------------------------------------------------------------


def map_sync(
    begin: Callable[[Any], Future[T]],
    inputs: Iterator[Any],
    *,
    ordered: bool,
    return_exceptions: bool,
    max_in_flight: int,
) -> Generator[T | Exception]:
    """`begin` is called for at most `max_in_flight` inputs whose results have not been yielded yet."""
    pending: dict[Future[T], None] = {}
    finished: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()
    more = True
    try:
        while True:
            while more and len(pending) < max_in_flight:
                try:
                    item = next(inputs)
                except StopIteration:
                    more = False
                    break
                future = _begin(begin, item)
                pending[future] = None
                if not ordered:
                    future.add_done_callback(finished.put)
            if not pending:
                return
            future = next(iter(pending)) if ordered else finished.get()
            del pending[future]
            try:
                result: T | Exception = wait(future)
            except Exception as error:
                if not return_exceptions:
                    raise
                result = error
            yield result
    finally:
        for future in pending:
            future.cancel()


async def map_async(
    begin: Callable[[Any], Future[T]],
    inputs: AsyncIterator[Any],
    *,
    ordered: bool,
    return_exceptions: bool,
    max_in_flight: int,
) -> AsyncGenerator[T | Exception]:
    """The same in an event loop."""
    import asyncio

    pending: dict[asyncio.Future[T], None] = {}
    more = True
    try:
        while True:
            while more and len(pending) < max_in_flight:
                try:
                    item = await anext(inputs)
                except StopAsyncIteration:
                    more = False
                    break
                pending[asyncio.wrap_future(_begin(begin, item))] = None
            if not pending:
                return
            if ordered:
                future = next(iter(pending))
            else:
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                future = next(one for one in pending if one in done)
            try:
                result: T | Exception = await future
            except Exception as error:
                if not return_exceptions:
                    raise
                result = error
            finally:
                del pending[future]
            yield result
    finally:
        for future in pending:
            future.cancel()


def _begin(begin: Callable[[Any], Future[T]], item: Any) -> Future[T]:
    """An input that cannot be sent fails as its own result, in its own place."""
    try:
        return begin(item)
    except Exception as error:
        failed: Future[T] = Future()
        failed.set_exception(error)
        return failed
