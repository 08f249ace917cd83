"""Fakes of the controller's peers over real ipc sockets, and specs to deploy."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from sllm_faas.errors import from_info
from sllm_faas.spec import AppSpec, CheckpointSpec, FunctionSpec, MethodSpec, Scaling, Target, digest
from sllm_faas.wire import codec
from sllm_faas.wire.bus import Dealer, Parts
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import (
    Checked,
    Demand,
    Hello,
    InstanceReport,
    NodeInfo,
    Reply,
    Request,
    Start,
    TargetDemand,
)

WAIT = 10.0
ARCHIVE = b"an archive"
BUNDLE = digest(ARCHIVE)


def function(name: str = "f", **values: Any) -> FunctionSpec:
    scaling = {k: values.pop(k) for k in list(values) if k in Scaling.__dataclass_fields__}
    return FunctionSpec(
        name, module="m", qualname=name, methods=(MethodSpec(name),), scaling=Scaling(**scaling), **values
    )


def llm(name: str = "chat", source: str = "org/model", **values: Any) -> FunctionSpec:
    return FunctionSpec(name, kind="llm", checkpoint=CheckpointSpec(source), **values)


def app(*functions: FunctionSpec, name: str = "app", **values: Any) -> AppSpec:
    return AppSpec(name, functions or (function(),), bundle=values.pop("bundle", BUNDLE), **values)


class Peer:
    """A gateway or an invoker as the controller sees one."""

    def __init__(self, endpoint: str, role: str, name: str, life: str = "life-1", **link: Any) -> None:
        self.role, self.name, self.life = role, name, life
        self.frames: asyncio.Queue[codec.Frame] = asyncio.Queue()
        self.replies: dict[bytes, asyncio.Queue[Reply]] = {}
        self.asked = 0
        self.dealer = Dealer(endpoint, f"{name}:{life}".encode(), self._on_message, **link)
        self.seen: list[Type] = []

    def _on_message(self, parts: Parts) -> None:
        frame = codec.decode(parts)
        if frame.header.type is Type.HEARTBEAT:
            self.send(Type.HEARTBEAT)
        elif frame.header.type is Type.REPLY:
            self.replies[frame.header.id].put_nowait(frame.body)
        else:
            self.seen.append(frame.header.type)
            self.frames.put_nowait(frame)

    def send(self, kind: Type, body: Any = None, *buffers: bytes, identity: bytes = bytes(16)) -> None:
        self.dealer.send(codec.encode(Header(kind, identity), body, *buffers))

    async def expect(self, kind: Type) -> codec.Frame:
        """The next frame of that type; others before it are passed over."""
        async with asyncio.timeout(WAIT):
            while True:
                frame = await self.frames.get()
                if frame.header.type is kind:
                    return frame

    async def call(self, op: str, *buffers: bytes, **body: Any) -> Any:
        """The final answer of an operation; its error is raised. Progress is in `self.progress`."""
        self.asked += 1
        identity = self.asked.to_bytes(16, "big")
        replies = self.replies[identity] = asyncio.Queue()
        self.progress: list[Any] = []
        self.send(Type.REQUEST, Request(op, codec.pack(body)), *buffers, identity=identity)
        while True:
            async with asyncio.timeout(WAIT):
                reply = await replies.get()
            if reply.error is not None:
                raise from_info(reply.error)
            value = msgspec.msgpack.decode(reply.body)
            if not reply.more:
                return value
            self.progress.append(value)

    def close(self) -> None:
        self.dealer.close()


class Gateway(Peer):
    async def hello(self) -> Any:
        self.send(Type.HELLO, Hello("gateway", self.name, self.life))
        await self.expect(Type.WELCOME)
        return (await self.expect(Type.ROUTES)).body

    def demand(self, target: Target, waiting: int, running: int) -> None:
        self.send(Type.DEMAND, Demand((TargetDemand(target, waiting, running),)))

    async def deploy(self, spec: AppSpec) -> Any:
        if spec.bundle:
            await self.call("bundle.put", ARCHIVE, digest=spec.bundle)
        return await self.call("app.deploy", spec=spec)


class Invoker(Peer):
    memory_mb = 4096

    async def hello(self, *reports: InstanceReport, joined: bool = False) -> None:
        endpoint = f"tcp://{self.name}:1" if joined else f"ipc:///run/{self.name}.sock"
        info = NodeInfo(self.name, endpoint, memory_mb=self.memory_mb)
        self.send(Type.HELLO, Hello("invoker", self.name, self.life, node=info, instances=reports))
        await self.expect(Type.WELCOME)

    async def check(self, **answer: Any) -> Any:
        body = (await self.expect(Type.CHECK)).body
        self.send(Type.CHECKED, Checked(body.app.name, body.version, **answer))
        return body

    async def start(self) -> Start:
        """Take the next start and report it ready."""
        body: Start = (await self.expect(Type.START)).body
        self.report(body, "starting")
        self.report(body, "ready")
        return body

    def report(self, start: Start, state: Any, **values: Any) -> None:
        self.send(Type.INSTANCE, InstanceReport(start.instance, 1, start.target, state, **values))
