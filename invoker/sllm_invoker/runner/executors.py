"""Which executor serves which method, and in which thread.

    sync, concurrency 1      the main thread, where a signal can interrupt even a sleep
    sync, concurrency n      n threads
    sync, batched            the same, over batches
    async                    the loop: in the main thread, or in a thread of its own when a worker has that

A platform that shares its process (`own_process` False) lends its loop, and its main thread is left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Mapping
from typing import Any

from sllm_faas.spec import Batching, FunctionSpec
from sllm_invoker.runner.instance import Executor
from sllm_invoker.runner.method import Method
from sllm_invoker.runner.tasks import Batches, Tasks, method_runner
from sllm_invoker.runner.workers import Workers


class Executors:
    """The executors of user code. `by_method` is what an Instance needs; `start` and `close` are a pair.

    `main`: the workers that want the main thread (see `Workers.run_here`), if any.
    """

    def __init__(self, spec: FunctionSpec, methods: Mapping[str, Method], *, own_process: bool) -> None:
        self.by_method: dict[str, Executor] = {}
        self.main: Workers | None = None
        self._spec = spec
        self._methods = methods
        self._own_process = own_process
        self._pools: list[Workers] = []
        sync = {name: method for name, method in methods.items() if not method.spec.is_async}
        if plain := {name: method for name, method in sync.items() if method.spec.batching is None}:
            self._pool(plain, spec.concurrency, 1)
        for name, method in sync.items():
            if method.spec.batching is not None:
                size, batches = self._batches(method.spec.batching)
                self._pool({name: method}, batches, size)

    def start(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """`loop` runs, or will, and is needed if any method is asynchronous."""
        for pool in self._pools:
            pool.start()
        if loop is None:
            return
        tasks = Tasks(loop, method_runner(self._methods), self._spec.concurrency)
        for name, method in self._methods.items():
            if method.spec.is_async:
                batching = method.spec.batching
                self.by_method[name] = Batches(loop, method, *self._batches(batching)) if batching else tasks

    @property
    def threads(self) -> bool:
        """Whether some of the code runs in workers; else all of it is on the loop."""
        return bool(self._pools)

    def close(self) -> None:
        """Workers leave when their calls have ended."""
        for pool in self._pools:
            pool.close()

    def _batches(self, batching: Batching) -> tuple[int, int]:
        """(size, how many at once). No more calls can meet than run at once: waiting for more would be vain."""
        size = min(batching.max_batch_size, self._spec.concurrency)
        return size, max(1, self._spec.concurrency // size)

    def _pool(self, methods: Mapping[str, Method], count: int, size: int) -> None:
        main = self._own_process and count == 1 and self.main is None
        pool = Workers(methods, count, main=main, size=size)
        if main:
            self.main = pool
        self._pools.append(pool)
        self.by_method.update(dict.fromkeys(methods, pool))


class LoopHost:
    """A loop for user code, in the calling (main) thread or in one of its own (`threaded`)."""

    def __init__(self, *, threaded: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self.threaded = threaded
        self._stopping = False
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self.run, name="sllm-loop", daemon=True)
            self._thread.start()
        else:
            asyncio.set_event_loop(self.loop)

    def complete(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run one coroutine to its end, while the loop is not otherwise run from this thread."""
        if self._thread is None:
            return self.loop.run_until_complete(work)
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def run(self) -> None:
        """Run until `stop`. A SystemExit in a task of user code ends that task, not the loop."""
        while not self._stopping:
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self.loop.run_forever()

    def stop(self) -> None:
        """From any thread."""
        self._stopping = True
        self.loop.call_soon_threadsafe(self.loop.stop)
