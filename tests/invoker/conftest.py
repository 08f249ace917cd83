"""Containers for tests: a runtime whose instances run `stub_runner`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sllm_invoker.containers import tree, zygote
from sllm_invoker.containers.base import ContainerSpec, Event, Exited, Output
from sllm_invoker.containers.process import ProcessHandle, ProcessRuntime
from sllm_invoker.runner.config import InstanceConfig, dumps

from sllm_faas.spec import CheckpointSpec, FunctionSpec, MethodSpec, Target

HERE = Path(__file__).parent


class Watched:
    """A container and what was heard of it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Event()
        self.handle: ProcessHandle

    def on_event(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()

    @property
    def text(self) -> str:
        return b"".join(event.data for event in self.events if isinstance(event, Output)).decode()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def says(self, text: str) -> str:
        await self.until(lambda: text in self.text)
        return self.text

    async def ends(self) -> Exited:
        await self.until(lambda: any(isinstance(event, Exited) for event in self.events))
        return next(event for event in self.events if isinstance(event, Exited))


class Containers:
    def __init__(self, runtime: ProcessRuntime, directory: Path) -> None:
        self.runtime = runtime
        self.directory = directory

    async def start(self, name: str, do: str = "", spec: FunctionSpec | None = None, object_dir: str = "") -> Watched:
        watched = Watched()
        code = FunctionSpec("f", module="m", qualname="f", methods=(MethodSpec("f"),))
        config = InstanceConfig(name, Target("app", "f", 1), (code,), source_dir=str(self.directory), env={"DO": do})
        watched.handle = await self.runtime.start(
            ContainerSpec(name, dumps(config), spec, object_dir), watched.on_event
        )
        return watched


@pytest.fixture
def llm() -> FunctionSpec:
    return FunctionSpec("m", kind="llm", checkpoint=CheckpointSpec("anything"))


@pytest.fixture
def options() -> dict[str, Any]:
    """Of the runtime; a test's own module may say others."""
    return {}


@pytest.fixture
async def containers(tmp_path: Path, options: dict[str, Any]) -> AsyncIterator[Containers]:
    zygote.become_subreaper()
    env: dict[str, Any] = {**os.environ}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), env.get("PYTHONPATH", ""))))
    runtime = ProcessRuntime("node-0", tree.Tree(tmp_path), env=env, entry="stub_runner:run", **options)
    yield Containers(runtime, tmp_path)
    await runtime.close()
    assert not [pid for pid in tree.children(os.getpid()) if tree.alive(pid) and _ours(pid, tmp_path)]


def _ours(pid: int, directory: Path) -> bool:
    try:
        return f"{tree.MARK}={directory}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
