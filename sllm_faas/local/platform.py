"""`LocalPlatform`: start, deploy apps of this process, call them through the SDK, stop.

    with LocalPlatform() as platform:
        platform.deploy(app)
        square.remote(3)

Everything of it runs on the SDK's loop thread; user code runs in threads of its instances. Invariant: after the
block nothing is queued or running, exit hooks have run, and calls of the process go where they went before.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sllm import App, Cls, Llm, _backend
from sllm._runtime import Found
from sllm_gateway.dispatcher import Dispatcher
from sllm_gateway.handle import Handle

if TYPE_CHECKING:
    from sllm_faas.local.http import LocalHttp

from sllm_faas.config import Config
from sllm_faas.errors import CallerError, NotFound
from sllm_faas.local import control, node
from sllm_faas.local.backend import LocalBackend
from sllm_faas.local.control import Control
from sllm_faas.local.node import Code, LocalNode
from sllm_faas.modules import locate
from sllm_faas.spec import CheckpointSpec
from sllm_faas.wire.memory import MemoryBus
from sllm_faas.wire.messages import Start

GATEWAY = b"local"
STOP_LIMIT = 5.0
"""Seconds that instances get to end at the end; what ignores it is left to its thread."""
_NO_BUNDLE = "0" * 64


class LocalPlatform:
    """`checkpoints` is the directory of ingested checkpoints (default: that of the configured state directory, so
    that a model is converted once)."""

    def __init__(self, *, checkpoints: Path | None = None) -> None:
        self._checkpoints = checkpoints
        self._apps: dict[str, App] = {}
        self._stack = contextlib.ExitStack()
        self._http: LocalHttp | None = None
        self._url = ""

    def __enter__(self) -> Self:
        _run(self._start)
        self._stack.enter_context(_backend.use(self.backend))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()
        _backend.wait(_backend.submit(self._stop()))

    def deploy(self, app: App) -> int:
        """Serve `app` from now on; the version. Raises BadSpec, and what its checkpoints or first instances
        (`min_containers`) fail with."""
        self._apps[app.name] = app
        return _backend.wait(_backend.submit(self.control.deploy(app.spec(_NO_BUNDLE))))

    def delete(self, app: str) -> None:
        """Raises NotFound."""
        if self._apps.pop(app, None) is None:
            raise NotFound(f"there is no app {app!r}")
        _run(lambda: self.control.delete(app))

    def http(self) -> str:
        """Serve the HTTP interface too, until the end of the block; its URL. The way to call language models."""
        if not self._url:
            self._url = _backend.wait(_backend.submit(self._serve()))
        return self._url

    # -- on the loop -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        bus = MemoryBus()
        self.dispatcher = Dispatcher(name=GATEWAY.decode(), on_ended=self._ended)
        self.backend = LocalBackend(self.dispatcher)
        to_controller = bus.dealer(control.ENDPOINT, GATEWAY, self._from_controller)
        to_node = bus.dealer(node.ENDPOINT, GATEWAY, lambda parts: self.dispatcher.on_invoker_message(node.NAME, parts))
        self.dispatcher.controller_up(to_controller)
        self.dispatcher.node_up(node.NAME, to_node)
        self.node = LocalNode(bus, GATEWAY, self._find, lambda report: self.control.report(report))
        self.control = Control(bus, GATEWAY, node.NAME, self.node.start, self.node.stop, self._ingest)

    def _from_controller(self, parts: list[bytes]) -> None:
        taken = self.dispatcher.on_controller_message(parts)
        assert taken, "the memory bus loses nothing, so the routes have no gap"

    def _ended(self, handle: Handle) -> None:
        if self._http is not None:
            self._http.gateway.ended(handle)

    async def _serve(self) -> str:
        from sllm_faas.local.http import LocalHttp

        self._http = LocalHttp(self.dispatcher)
        return await self._http.start()

    async def _stop(self) -> None:
        for handle in self.dispatcher.handles():
            handle.cancel()
        for app in list(self.control.machine.state.apps):
            self.control.delete(app)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.node.empty.wait(), STOP_LIMIT)
        if self._http is not None:
            await self._http.stop()
        self.dispatcher.close()
        self.control.close()
        self.node.close()

    def _find(self, start: Start) -> Code:
        app = self._apps[start.target.app]
        found = app.registered[start.target.function]
        if isinstance(found, Llm):
            checkpoint = start.spec.checkpoint
            assert checkpoint is not None
            return Code(None, "", self.control.objects[checkpoint.digest])
        return Code(_found(found), str(_root(found)))

    def _ingest(self, name: str, checkpoint: CheckpointSpec, base: str) -> Path:
        """The object directory of a checkpoint, made on first need. Blocks for as long as that takes."""
        try:
            from sllm_invoker.checkpoints.ingest import ingest
            from sllm_invoker.checkpoints.store import CheckpointStore
        except ModuleNotFoundError as error:
            raise CallerError(
                f"models need {error.name!r}, which is not installed", hint="pip install 'sllm-faas[invoker]'"
            ) from None
        root = self._checkpoints or Config.load()[0].checkpoints_dir
        store = CheckpointStore(root)
        made = ingest(
            store,
            checkpoint.source,
            name,
            revision=checkpoint.revision,
            dtype=checkpoint.dtype,
            tensor_parallel=checkpoint.tensor_parallel,
            base=base,
        )
        self._stack.callback(store.use(made.digest).close)
        return store.path(made.digest)


def _found(handle: Any) -> Found:
    """The registered code, as a runner finds it by name. Not by name here: a script's module is `__main__`."""
    if isinstance(handle, Cls):
        codes = {name: method.code for name, method in handle.methods.items()}
        return Found(None, handle.raw_class, handle.enter_hooks, handle.exit_hooks, codes, handle)
    return Found(handle.raw, None, (), (), {handle.name: handle.code})


def _root(found: Any) -> Path:
    """The source directory of a registered function or class."""
    raw = getattr(found, "raw_class", None) or found.raw
    module = sys.modules.get(raw.__module__)
    file = getattr(module, "__file__", None) or inspect.getsourcefile(raw)
    return locate(Path(file))[0] if file else Path(tempfile.gettempdir())


def _run(what: Callable[[], object]) -> None:
    async def run() -> None:
        what()

    _backend.wait(_backend.submit(run()))
