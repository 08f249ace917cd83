"""Executors for synchronous functions: threads that take calls from one inbox.

    receiver ── submit(call) ──► inbox ──► Worker (1 … n threads, or the main thread)
             ── cancel(call) ──► the interrupter of the worker that runs it

A worker runs one call, or one batch, at a time, to its real end. Invariants: whatever user code raises —
SystemExit and KeyboardInterrupt too — ends its call and never its worker; a call ends when its code has.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from sllm._runtime import Cancelled, cancel_calls

from sllm_faas.errors import SllmError, to_info
from sllm_invoker.runner.batch import Batch
from sllm_invoker.runner.call import Call
from sllm_invoker.runner.interrupt import Interrupter, Job, SignalInterrupter, ThreadInterrupter
from sllm_invoker.runner.method import Arguments, Method, Raised
from sllm_invoker.runner.moving import Movable

T = TypeVar("T")
_END: Any = object()


class Workers(Movable):
    """`count` worker threads over one inbox, or one worker in the main thread (`main`: `run_here` serves).

    With `size` above 1, calls — all of one batched method then — are gathered into batches of up to so many.
    """

    def __init__(self, methods: Mapping[str, Method], count: int, *, main: bool = False, size: int = 1) -> None:
        self.methods = methods
        self._size = size
        self._inbox: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._gathering = threading.Lock()
        self._main = main
        self._workers = [Worker(self, _interrupter(main)) for _ in range(count)]

    def start(self) -> None:
        if not self._main:
            for index, worker in enumerate(self._workers):
                threading.Thread(target=worker.run, name=f"sllm-worker-{index}", daemon=True).start()

    def run_here(self) -> None:
        """Serve in the main thread until `close`."""
        self._workers[0].run()

    def close(self) -> None:
        """Workers leave when the inbox is empty."""
        for _ in self._workers:
            self._inbox.put(None)

    def submit(self, call: Call) -> None:
        self._inbox.put(call)

    def cancel(self, call: Call) -> None:
        """`call` has been marked: end it if it waits, interrupt it if it runs."""
        with self._lock:
            waiting = not call.begun
        if waiting:
            call.stopped()
        else:
            for worker in self._workers:
                worker.interrupt(call)
            # An exception cannot end a thread's wait for another function's result; its cancellation can.
            cancel_calls(f"inv-{call.id.hex()}")

    # -- for its workers ---------------------------------------------------------------------------------------

    def take(self) -> list[Call] | None:
        """The next call, or the next batch; None to leave."""
        if self._size == 1:
            return self._gather()
        with self._gathering:  # one batch at a time: two that wait to be filled would take each other's calls
            return self._gather()

    def _gather(self) -> list[Call] | None:
        calls: list[Call] = []
        until = 0.0
        while len(calls) < self._size:
            try:
                call = self._inbox.get(timeout=max(0.0, until - time.monotonic()) if calls else None)
            except queue.Empty:
                break
            if call is None:
                if not calls:
                    return None
                self._inbox.put(None)
                break
            if self._begin(call):
                if not calls:
                    until = time.monotonic() + self._wait(call)
                calls.append(call)
        return calls

    def _wait(self, call: Call) -> float:
        batching = self.methods[call.method].spec.batching
        return batching.wait_ms / 1000 if batching is not None else 0.0

    def _begin(self, call: Call) -> bool:
        with self._lock:
            call.begun = not call.cancelled
        return call.begun


class Worker:
    """One thread's work."""

    def __init__(self, pool: Workers, interrupter: Interrupter) -> None:
        self._pool = pool
        self._interrupter = interrupter
        self._batch: Batch | None = None

    def run(self) -> None:
        while (calls := self._pool.take()) is not None:
            method = self._pool.methods[calls[0].method]
            with method.serving(calls[0]):
                if method.spec.batching is not None:
                    self._serve_batch(method, calls)
                else:
                    self._serve(method, calls[0])

    def interrupt(self, call: Call) -> None:
        batch = self._batch
        self._interrupter.interrupt(batch if batch is not None and call in batch.calls else call)

    def _serve(self, method: Method, call: Call) -> None:
        arguments: Arguments | None = None
        try:
            args, kwargs = arguments = method.arguments(call)
            value = self._run(call, lambda: method.function(*args, **kwargs))
            if method.spec.stream:
                arguments = None
                self._stream(method, call, iter(value))
                call.done()
            else:
                call.done(method.encode(call, value))
        except Cancelled:
            call.stopped()
        except Raised as raised:
            call.fail(method.report(raised.error, arguments))
        except SllmError as error:
            call.fail(to_info(error))

    def _stream(self, method: Method, call: Call, iterator: Iterator[Any]) -> None:
        try:
            while (value := self._run(call, lambda: next(iterator, _END))) is not _END:
                payload = method.encode(call, value)
                while not call.cancelled and not call.output(payload):
                    call.wait()
                if call.cancelled:
                    self._throw(call, iterator)
        finally:
            # The generator's own clean-up, when it was not run to its end.
            if (close := getattr(iterator, "close", None)) is not None:
                self._close(call, close)

    def _close(self, call: Call, close: Callable[[], object]) -> None:
        try:
            _user(close)
        except Raised as raised:
            # Python's word for a generator that yields on. Cancelled between two outputs it may, and is over anyway.
            if not (call.interrupted and isinstance(raised.error, RuntimeError)):
                raise

    def _throw(self, call: Call, iterator: Iterator[Any]) -> None:
        """Raise Cancelled where the generator yielded: it was cancelled while its code did not run."""
        if not call.interrupted and (throw := getattr(iterator, "throw", None)) is not None:
            call.interrupted = True
            try:
                _user(lambda: throw(Cancelled()))
            except Raised as raised:
                if not isinstance(raised.error, StopIteration):
                    raise
        raise Cancelled

    def _serve_batch(self, method: Method, calls: list[Call]) -> None:
        batch = Batch(method, calls)
        if not batch.calls:
            return
        self._batch = batch
        try:
            batch.finish(self._run(batch, lambda: method.function(**batch.columns)))
        except Cancelled:
            batch.stopped()
        except Raised as raised:
            batch.fail(method.report(raised.error))
        finally:
            self._batch = None

    def _run(self, job: Job, code: Callable[[], T]) -> T:
        """Run user code so that it can be interrupted, and nothing else can. Raises Cancelled or Raised."""
        try:
            try:
                self._interrupter.enter(job)
                return _user(code)
            finally:
                self._interrupter.leave()
        except Cancelled:
            self._interrupter.leave()  # the interruption may have come inside the first one
            raise


def _user(code: Callable[[], T]) -> T:
    try:
        return code()
    except Cancelled:
        raise
    except BaseException as error:
        raise Raised(error) from None


def _interrupter(main: bool) -> Interrupter:
    if not main:
        return ThreadInterrupter()
    interrupter = SignalInterrupter()
    interrupter.install()
    return interrupter
