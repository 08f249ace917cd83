"""Executors for asynchronous functions: one asyncio task per call (or per batch) on the instance's loop.

    receiver ── submit(call) ──► inbox ──► loop: Task(run(call))
             ── cancel(call) ─────────────► loop: task.cancel()

At most `limit` tasks run at once; more wait in order. Tasks that user code made itself are not waited for.
Invariants: as for workers — nothing that user code raises reaches the loop; a call ends when its code has.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from sllm_faas.errors import SllmError, to_info
from sllm_invoker.runner.batch import Batch
from sllm_invoker.runner.call import Call
from sllm_invoker.runner.method import Arguments, Method, Raised
from sllm_invoker.runner.moving import Movable

TURN = 0.00025
"""Seconds after which a generator that never waits leaves the loop to others, and to the link that sends its output."""

Run = Callable[[Call], Coroutine[Any, Any, None]]


class Tasks(Movable):
    """Calls as tasks. `run(call)` serves one and ends it; it is cancelled when the call is."""

    def __init__(self, loop: asyncio.AbstractEventLoop, run: Run, limit: int) -> None:
        self._loop = loop
        self._run = run
        self._limit = limit
        self._inbox: deque[Call] = deque()
        self._scheduled = False
        # The loop's own:
        self._waiting: deque[Call] = deque()
        self._running: dict[Call, asyncio.Task[None]] = {}

    def submit(self, call: Call) -> None:
        if _is_here(self._loop):
            self._add(call)
            return
        self._inbox.append(call)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._drain)

    def cancel(self, call: Call) -> None:
        """`call` has been marked: end it if it waits, cancel its task if it runs."""
        _run_on(self._loop, self._cancel, call)

    def _drain(self) -> None:
        self._scheduled = False
        while self._inbox:
            self._add(self._inbox.popleft())

    def _add(self, call: Call) -> None:
        if len(self._running) < self._limit:
            self._begin(call)
        else:
            self._waiting.append(call)

    def _begin(self, call: Call) -> None:
        if call.cancelled:
            call.stopped()
        else:
            self._running[call] = self._loop.create_task(self._serve(call))

    def _advance(self) -> None:
        while self._waiting and len(self._running) < self._limit:
            self._begin(self._waiting.popleft())

    async def _serve(self, call: Call) -> None:
        call.begun = True
        try:
            if call.cancelled:
                call.stopped()
            else:
                await self._run(call)
        finally:
            del self._running[call]
            if self._waiting:
                self._advance()

    def _cancel(self, call: Call) -> None:
        task = self._running.get(call)
        if task is None:
            if call in self._waiting:
                self._waiting.remove(call)
                call.stopped()
        elif call.begun:  # a task cancelled before it began would never run at all
            task.cancel()


class Batches(Movable):
    """Calls of one asynchronous batched method, up to `size` to a batch. At most `limit` batches run at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop, method: Method, size: int, limit: int) -> None:
        assert method.spec.batching is not None
        self._loop = loop
        self._method = method
        self._size = size
        self._wait = method.spec.batching.wait_ms / 1000
        self._limit = limit
        # The loop's own:
        self._waiting: list[Call] = []
        self._timer: asyncio.TimerHandle | None = None
        self._due = False
        self._running: dict[asyncio.Task[None], list[Call]] = {}

    def submit(self, call: Call) -> None:
        _run_on(self._loop, self._add, call)

    def cancel(self, call: Call) -> None:
        _run_on(self._loop, self._cancel, call)

    def _add(self, call: Call) -> None:
        if call.cancelled:
            call.stopped()
            return
        self._waiting.append(call)
        if self._timer is None and not self._due:
            self._timer = self._loop.call_later(self._wait, self._ring)
        self._advance()

    def _ring(self) -> None:
        self._timer = None
        self._due = True
        self._advance()

    def _advance(self) -> None:
        size = self._size
        while self._waiting and len(self._running) < self._limit and (self._due or len(self._waiting) >= size):
            calls, self._waiting = self._waiting[:size], self._waiting[size:]
            task = self._loop.create_task(self._serve(calls))
            self._running[task] = calls
            task.add_done_callback(self._ended)
            self._due = False
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._waiting:
                self._timer = self._loop.call_later(self._wait, self._ring)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._advance()

    async def _serve(self, calls: list[Call]) -> None:
        for call in calls:
            call.begun = True
        with self._method.serving(calls[0]):
            batch = Batch(self._method, calls)
            if not batch.calls:
                return
            if batch.cancelled:
                batch.stopped()
                return
            try:
                batch.finish(await _user(self._method.function(**batch.columns)))
            except asyncio.CancelledError:
                batch.stopped()
            except Raised as raised:
                batch.fail(self._method.report(raised.error))

    def _cancel(self, call: Call) -> None:
        if call in self._waiting:
            self._waiting.remove(call)
            call.stopped()
            return
        for task, calls in self._running.items():
            if call in calls and call.begun and all(other.cancelled or other.ended for other in calls):
                task.cancel()


def _is_here(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the receiver is on the loop itself."""
    return asyncio._get_running_loop() is loop


def _run_on(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Call) -> None:
    if _is_here(loop):
        function(*args)
    else:
        loop.call_soon_threadsafe(function, *args)


async def run_method(method: Method, call: Call) -> None:
    """Serve a call of an async function or generator to its end."""
    with method.serving(call):
        arguments: Arguments | None = None
        try:
            args, kwargs = arguments = method.arguments(call)
            try:
                value = method.function(*args, **kwargs)
            except BaseException as error:
                raise Raised(error) from None
            arguments = None
            if method.spec.stream:
                await _stream(method, call, value)
                call.done()
                return
            try:  # as _user does, without a coroutine more for every call
                if hasattr(value, "__await__"):
                    value = await value
            except BaseException as error:
                raise _mark(error) from None
            call.done(method.encode(call, value))
        except asyncio.CancelledError:
            call.stopped()
        except Raised as raised:
            call.fail(method.report(raised.error, arguments))
        except SllmError as error:
            call.fail(to_info(error))


async def _stream(method: Method, call: Call, outputs: Any) -> None:
    turn = 0.0
    try:
        while True:
            try:
                value = await anext(outputs)
            except StopAsyncIteration:
                return
            except BaseException as error:
                raise _mark(error) from None
            payload = method.encode(call, value)
            while not call.output(payload):
                await call.wait_async()
            if time.monotonic() - turn > TURN:
                await asyncio.sleep(0)
                turn = time.monotonic()
    finally:
        # The generator's own clean-up, when it was not run to its end.
        if (close := getattr(outputs, "aclose", None)) is not None:
            await _user(close())


async def _user(awaitable: Any) -> Any:
    """Await user code. Raises Raised, or CancelledError when this task was cancelled."""
    if not hasattr(awaitable, "__await__"):
        return awaitable
    try:
        return await awaitable
    except BaseException as error:
        raise _mark(error) from None


def _mark(error: BaseException) -> BaseException:
    """What user code raised, marked as its own; a cancellation is ours only if it was asked for."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            return error
    return Raised(error)


def method_runner(methods: Mapping[str, Method]) -> Run:
    """What `Tasks` runs for user code."""
    return lambda call: run_method(methods[call.method], call)
