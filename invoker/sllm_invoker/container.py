"""One container as the agent sees it: a process tree, its link's frames, its log. Common to instances and checks."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

from sllm_faas.errors import ErrorInfo, StartFailed, to_info
from sllm_faas.spec import FunctionSpec, Target, Timeline
from sllm_faas.wire.bus import Parts
from sllm_faas.wire.codec import decode_body
from sllm_faas.wire.header import Header, Type
from sllm_invoker.bundles import Bundles
from sllm_invoker.containers.base import ContainerSpec, Event, Exited, Handle, Output, Runtime
from sllm_invoker.ingests import Ingests
from sllm_invoker.logs import LogBook, Source
from sllm_invoker.memory_tier import MemoryTier


@dataclass(frozen=True, slots=True)
class Place:
    """What every instance of the node shares."""

    node: str
    directory: Path
    secrets_dir: Path
    runtime: Runtime
    bundles: Bundles
    ingests: Ingests
    tier: MemoryTier
    book: LogBook
    memory_mb: int
    """MiB of the node for all instances; one may at most use that."""


class Container:
    """One process tree and what its link says: the common part of instances and checks.

    `started` resolves at READY, or raises what kept it from being ready."""

    def __init__(self, place: Place, name: str, target: Target) -> None:
        self.place = place
        self.name = name
        self.log: Source = place.book.source(name, target)
        self.handle: Handle | None = None
        self.ended: asyncio.Future[Exited] = asyncio.get_running_loop().create_future()
        self.ready: asyncio.Future[Timeline] = asyncio.get_running_loop().create_future()
        self.tokens = 0
        """In the contexts of what runs in it, when it last told."""
        self.scratch = place.directory / "scratch" / name

    async def start(self, spec: ContainerSpec) -> Handle:
        self.scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.handle = await self.place.runtime.start(spec, self._on_event)
        return self.handle

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Output):
            self.log.feed(event.stream, event.data)
            return
        self.log.close()
        shutil.rmtree(self.scratch, ignore_errors=True)
        if not self.ready.done():
            self.fail(to_info(StartFailed(f"the container ended {event} before it was ready.")))
        if not self.ended.done():
            self.ended.set_result(event)

    def fail(self, error: ErrorInfo, timeline: Timeline | None = None) -> None:
        if not self.ready.done():
            self.ready.set_exception(NotReady(error, timeline or Timeline()))
            self.ready.exception()  # whoever awaits it gets it; nobody need

    def on_frame(self, header: Header, parts: Parts) -> None:
        """A frame of its link that is not of an invocation. Raises WireError."""
        body = decode_body(header.type, parts[0])
        match header.type:
            case Type.LOG:
                self.log.records(body.records)
            case Type.READY:
                if not self.ready.done():
                    self.ready.set_result(body.timeline)
            case Type.START_FAILED:
                self.fail(body.error, body.timeline)
            case Type.CONTEXT:
                self.tokens = header.seq
            case _:
                pass  # HELLO, BYE: the process is watched by its pidfd

    async def stop(self, grace: float = 0.0) -> None:
        if self.handle is not None:
            await self.handle.stop(grace)


class NotReady(Exception):
    """A container did not start; `error` says why."""

    def __init__(self, error: ErrorInfo, timeline: Timeline) -> None:
        super().__init__(error.message)
        self.error = error
        self.timeline = timeline


def code_of(specs: tuple[FunctionSpec, ...]) -> tuple[FunctionSpec, ...]:
    """Those that have code to import."""
    return tuple(spec for spec in specs if spec.kind != "llm")
