"""One instance in this process: the user's object, its executors, its link. What `runner.main` is for a process.

`open` and `close` run user code (constructor, hooks) and block: they are called on a thread of their own.
Everything the instance says comes out of `deliver`, on the platform's loop. The main thread is left alone, so
synchronous code is interrupted at its next bytecode, not inside a blocking call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from sllm._runtime import Found
from sllm_invoker.runner import loading
from sllm_invoker.runner.call import Parts
from sllm_invoker.runner.executors import Executors, LoopHost
from sllm_invoker.runner.instance import Executor, Instance
from sllm_invoker.runner.link import MemoryLink

from sllm_faas.errors import ErrorInfo, SllmError, to_info
from sllm_faas.spec import FunctionSpec, Span, Target, Timeline
from sllm_faas.wire.exceptions import exception_to_info


class _Loop(LoopHost):
    """A loop on a thread of its own that leaves nothing behind, because the process goes on after it."""

    def run(self) -> None:
        super().run()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


class LocalInstance:
    """`found` is the registered function or class (None for a language model), `root` its source directory,
    `object_dir` its checkpoint's object."""

    def __init__(
        self,
        name: str,
        target: Target,
        spec: FunctionSpec,
        found: Found | None,
        root: str,
        object_dir: Path | None,
        node: str,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[Parts], None],
        on_drained: Callable[[], None],
    ) -> None:
        self.name = name
        self.target = target
        self.spec = spec
        self._found = found
        self._root = root
        self._object_dir = object_dir
        self._node = node
        self._link = MemoryLink(deliver, loop.call_soon_threadsafe)
        self._on_drained = on_drained
        self._instance: Instance | None = None
        self._executors: Executors | None = None
        self._host: LoopHost | None = None
        self._user: loading.User | None = None
        self._model: Any = None

    def receive(self, parts: Parts) -> None:
        """A frame of the relay, on the platform's loop, after `open`."""
        assert self._instance is not None, f"{self.name} is not open"
        self._instance.receive(parts)

    def open(self) -> Timeline:
        """Make it ready. Raises whatever the user's code raises; `close` is for what was made before that."""
        began, clock = time.time(), time.perf_counter()
        by_method = self._open_model() if self.spec.kind == "llm" else self._open_code()
        self._instance = Instance(self.spec, by_method, self._link, on_drained=self._on_drained)
        name = "attach" if self.spec.kind == "llm" else "enter"
        return Timeline(began, (Span(name, 0.0, time.perf_counter() - clock),))

    def _open_code(self) -> Mapping[str, Executor]:
        assert self._found is not None
        user = loading.build(self._found, self.spec, self.target, self._root, self.name, self._node)
        self._executors = executors = Executors(self.spec, user.methods, own_process=False)
        if user.uses_loop:
            self._host = _Loop(threaded=True)
        for hook in user.enter:
            self._hook(hook)
        self._user = user  # only now: exit hooks follow a whole enter
        executors.start(self._host.loop if self._host is not None else None)
        return executors.by_method

    def _open_model(self) -> Mapping[str, Executor]:
        from sllm_invoker.runner import llm

        assert self._object_dir is not None
        self._host = _Loop(threaded=True)
        self._model = llm.open_model(self.spec, str(self._object_dir))
        made: Mapping[str, Executor] = llm.executors(self._model, self._host.loop, self.spec.concurrency)
        return made

    def cancel_all(self) -> None:
        if self._instance is not None:
            self._instance.cancel_all()

    def close(self) -> None:
        """Run the exit hooks and let the threads go. Raises what a hook raises, having run the others."""
        failed: list[Exception] = []
        for hook in self._user.exit if self._user is not None else ():
            try:
                self._hook(hook)
            except Exception as error:
                failed.append(error)
        if self._executors is not None:
            self._executors.close()
        if self._model is not None:
            self._model.close()
        if self._host is not None:
            self._host.stop()
        if failed:
            raise failed[0]

    def _hook(self, hook: Callable[[], Any]) -> None:
        result = hook()
        if self._host is not None and isinstance(result, Coroutine):
            self._host.complete(result)

    def start_error(self, error: BaseException) -> ErrorInfo:
        if isinstance(error, SllmError):
            return to_info(error)
        return exception_to_info(error, self._root)
