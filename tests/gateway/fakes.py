"""The gateway's peers over real sockets, scripted: a controller, an invoker with instances, and a served gateway.

An invoker runs a *script* per method: a function of (invoker, running) that sends frames. Whatever a test wants an
instance to do is one such function; `SCRIPTS` has the usual ones.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
from sllm_gateway.server import Service

from benchmarks.common import free_port
from sllm_faas.config import Config
from sllm_faas.errors import ErrorInfo
from sllm_faas.spec import CheckpointSpec, FunctionSpec, MethodSpec, ParameterSpec, Target, Timeline, Timeouts
from sllm_faas.wire import codec, llm
from sllm_faas.wire.bus import Parts, Router
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import (
    Adopted,
    Demand,
    Done,
    Failed,
    FunctionRoute,
    Grant,
    Invoke,
    NodeInfo,
    Reply,
    Request,
    Routes,
    RoutesDelta,
    TokenEntry,
    Welcome,
)

TOKENS = {
    "root": ("admin",),
    "ci": ("deploy",),
    "caller": ("invoke",),
    "viewer": ("read",),
}


def token(name: str) -> str:
    return f"sllm_{name}"


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(name)}"}


def function(name: str, *, stream: bool = False, **more: Any) -> FunctionSpec:
    return FunctionSpec(name, "function", "mod", name, (MethodSpec(name, stream=stream),), **more)


FUNCTIONS = (
    function("echo", concurrency=64),
    function("count", stream=True, concurrency=64),
    function("flood", stream=True, concurrency=64),
    function("fails", concurrency=64),
    function("hangs", concurrency=64),
    function("cold", max_queue=2, timeouts=Timeouts(queue=30.0, startup=30.0)),
    FunctionSpec(
        "Box",
        "class",
        "mod",
        "Box",
        (MethodSpec("get"), MethodSpec("each", stream=True)),
        (ParameterSpec("size", "int", required=False, default=3),),
    ),
    FunctionSpec("counting", "llm", concurrency=64, checkpoint=CheckpointSpec("counting", digest="d" * 64)),
)


@dataclass
class Running:
    """One INVOKE the invoker got."""

    peer: bytes
    header: Header
    invoke: Invoke
    payload: bytes
    credit: int
    sent: int = 0
    cancelled: bool = False


Script = Callable[["FakeInvoker", Running], None]


class FakeInvoker:
    def __init__(self, name: str, endpoint: str) -> None:
        self.name = name
        self.router = Router(endpoint, self._on_message)
        self.life = "life-1"
        self.scripts: dict[str, Script] = dict(SCRIPTS)
        self.gateways: list[bytes] = []
        self.running: dict[bytes, Running] = {}
        self.got: dict[Type, list[codec.Frame]] = defaultdict(list)
        self.instances: dict[int, Grant] = {}
        self.operations: dict[str, Callable[[dict[str, Any]], list[Any]]] = {}
        self.orphans: dict[bytes, tuple[Running, list[bytes]]] = {}
        self.answer_cancel = True
        self.seq = 0
        self.changed = asyncio.Event()

    def grant(self, function: str, number: int, limit: int = 64, concurrency: int = 64, **more: Any) -> None:
        """Add or change an instance, and tell every gateway."""
        target = more.pop("target", None) or Target("app", function, 1)
        more.setdefault("timeline", Timeline())
        self.instances[number] = Grant(f"{function}-{number}", target, limit, concurrency, self.name, **more)
        for peer in self.gateways:
            self._grant(peer, number)

    async def granted(self) -> None:
        """Every grant so far was taken in."""
        await self.until(lambda: any(frame.header.seq == self.seq for frame in self.got[Type.WANT]))

    def _grant(self, peer: bytes, number: int) -> None:
        self.seq += 1
        self.router.send(peer, codec.encode(Header(Type.GRANT, route=number, seq=self.seq), self.instances[number]))

    def _on_message(self, peer: bytes, parts: Parts) -> None:
        frame = codec.decode(parts)
        header, body = frame.header, frame.body
        self.got[header.type].append(frame)
        if header.type is Type.HELLO:
            if peer not in self.gateways:
                self.gateways.append(peer)
            self.router.send(peer, codec.encode(Header(Type.WELCOME), Welcome(self.name, self.life)))
            for number in self.instances:
                self._grant(peer, number)
        elif header.type is Type.HEARTBEAT:
            self.router.send(peer, [Header(Type.HEARTBEAT).pack()])
        elif header.type is Type.INVOKE:
            payload = frame.buffers[0] if frame.buffers else body.payload
            running = Running(peer, header, body, payload, header.credit)
            self.running[header.id] = running
            self.scripts[body.method](self, running)
        elif header.type is Type.CREDIT:
            if header.id in self.running:
                self.running[header.id].credit = header.credit
        elif header.type is Type.CANCEL:
            running = self.running.get(header.id)
            if running is None:
                self.router.send(peer, [header._replace(type=Type.CANCELLED).pack()])
            else:
                running.cancelled = True
                if self.answer_cancel:
                    self.end(running, Type.CANCELLED)
        elif header.type is Type.ADOPT:
            self._adopt(peer, header)
        elif header.type is Type.REQUEST:
            self._answer(peer, header, body)
        self.changed.set()
        self.changed = asyncio.Event()

    def _adopt(self, peer: bytes, header: Header) -> None:
        reply = header._replace(type=Type.ADOPTED)
        found = self.orphans.get(header.id)
        if found is None:
            self.router.send(peer, codec.encode(reply, Adopted("unknown")))
            return
        running, outputs = found
        body = Adopted("found", codec.pack(running.invoke), Target("app", running.invoke.method, 1), "count-2")
        self.router.send(peer, codec.encode(reply._replace(fence=running.header.fence), body))
        running.peer, running.sent, running.credit = peer, header.seq, header.credit
        self.running[header.id] = running
        self.output(running, *outputs[header.seq :])
        self.end(running, Type.DONE, Done())

    def _answer(self, peer: bytes, header: Header, request: Request) -> None:
        answers = self.operations[request.op](msgspec.msgpack.decode(request.body))
        for at, answer in enumerate(answers):
            reply = Reply(codec.pack(answer), more=at < len(answers) - 1)
            self.router.send(peer, codec.encode(header._replace(type=Type.REPLY), reply))

    # -- what scripts do -------------------------------------------------------------------------------------

    def output(self, running: Running, *payloads: bytes) -> None:
        header = running.header._replace(type=Type.OUTPUT, seq=running.sent, items=len(payloads))
        running.sent += len(payloads)
        self.router.send(running.peer, codec.encode(header, list(payloads)))

    def end(self, running: Running, kind: Type, body: Any = None) -> None:
        header = running.header._replace(type=kind, seq=running.sent, items=0)
        self.router.send(running.peer, codec.encode(header, body))
        self.running.pop(running.header.id, None)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a message that makes `condition` true."""
        async with asyncio.timeout(10):
            while not condition():
                await self.changed.wait()


def _echo(invoker: FakeInvoker, running: Running) -> None:
    invoker.end(running, Type.DONE, Done(running.payload, 0.001))


def _count(invoker: FakeInvoker, running: Running) -> None:
    n = json.loads(running.payload)["n"]
    invoker.output(running, *(str(each).encode() for each in range(n)))
    invoker.end(running, Type.DONE, Done(seconds=0.5))


def _flood(invoker: FakeInvoker, running: Running) -> None:
    """Keep sending, one by one, as far as credit goes; ends after 100 outputs."""

    def go_on() -> None:
        if running.header.id not in invoker.running:
            return
        while running.sent < min(running.credit, 100):
            invoker.output(running, b"%d" % running.sent)
        if running.sent == 100:
            invoker.end(running, Type.DONE, Done())
        else:
            asyncio.get_running_loop().call_later(0.001, go_on)

    go_on()


def _fails(invoker: FakeInvoker, running: Running) -> None:
    wanted = json.loads(running.payload) if running.invoke.encoding == "json" else {}
    error = ErrorInfo(
        wanted.get("code", "function_error"),
        "ValueError: no luck",
        status=wanted.get("status", 500),
        type="builtins:ValueError",
        args=b"\x91\xa7no luck",
        traceback="Traceback: line 1",
    )
    invoker.end(running, Type.FAILED, Failed(error))


def _hangs(invoker: FakeInvoker, running: Running) -> None:
    pass


def _chat(invoker: FakeInvoker, running: Running) -> None:
    """Answers "one two" in two pieces for each choice, with logprobs when they are wanted."""
    request = msgspec.msgpack.decode(running.payload, type=llm.LlmRequest)
    choices = request.n * max(1, len(request.prompts))
    logprob = (llm.LlmLogprob("one", -0.25, (111, 110, 101), (("one", -0.25, (111, 110, 101)),)),)
    for choice in range(choices):
        wanted = logprob if request.logprobs is not None else ()
        invoker.output(running, llm.encode(llm.LlmOutput(choice, (1,), "one", wanted)))
        invoker.output(running, llm.encode(llm.LlmOutput(choice, (2,), " two", (), "length")))
    invoker.end(running, Type.DONE, Done(usage={"prompt_tokens": 3, "completion_tokens": 2 * choices}))


def _embed(invoker: FakeInvoker, running: Running) -> None:
    request = msgspec.msgpack.decode(running.payload, type=llm.LlmRequest)
    vector = b"\x00\x00\x80\x3f\x00\x00\x00\x00"  # 1.0, 0.0
    body = llm.LlmEmbeddings(tuple(vector for _ in request.prompts), llm.LlmUsage(4))
    invoker.end(running, Type.DONE, Done(llm.encode(body)))


SCRIPTS: dict[str, Script] = {
    "echo": _echo,
    "get": _echo,
    "cold": _echo,
    "count": _count,
    "each": _count,
    "flood": _flood,
    "fails": _fails,
    "hangs": _hangs,
    "chat": _chat,
    "complete": _chat,
    "embed": _embed,
}


class FakeController:
    def __init__(self, endpoint: str, nodes: list[NodeInfo]) -> None:
        self.router = Router(endpoint, self._on_message)
        self.functions = [FunctionRoute("app", 1, spec, created=1_700_000_000.0) for spec in FUNCTIONS]
        self.nodes = nodes
        self.tokens = [
            TokenEntry(name, hashlib.sha256(token(name).encode()).hexdigest(), scopes)
            for name, scopes in TOKENS.items()
        ]
        self.peers: list[bytes] = []
        self.demand: list[Demand] = []
        self.asked: list[tuple[str, dict[str, Any], tuple[bytes, ...]]] = []
        self.answers: dict[str, Any] = {}
        """op -> an answer, a list of answers (progress), or an ErrorInfo."""
        self.seq = 1
        self.changed = asyncio.Event()

    def _on_message(self, peer: bytes, parts: Parts) -> None:
        frame = codec.decode(parts)
        match frame.header.type:
            case Type.HELLO:
                if peer not in self.peers:
                    self.peers.append(peer)
                self.router.send(peer, codec.encode(Header(Type.WELCOME), Welcome("controller", "c-1")))
                routes = Routes(self.seq, tuple(self.functions), tuple(self.nodes), tuple(self.tokens))
                self.router.send(peer, codec.encode(Header(Type.ROUTES), routes))
            case Type.HEARTBEAT:
                self.router.send(peer, [Header(Type.HEARTBEAT).pack()])
            case Type.DEMAND:
                self.demand.append(frame.body)
            case Type.REQUEST:
                self._answer(peer, frame)
            case _:
                pass
        self.changed.set()
        self.changed = asyncio.Event()

    def _answer(self, peer: bytes, frame: codec.Frame) -> None:
        self.asked.append((frame.body.op, msgspec.msgpack.decode(frame.body.body), frame.buffers))
        answer = self.answers.get(frame.body.op, {})
        header = frame.header._replace(type=Type.REPLY)
        if isinstance(answer, ErrorInfo):
            self.router.send(peer, codec.encode(header, Reply(error=answer)))
            return
        answers = answer if isinstance(answer, list) else [answer]
        for at, each in enumerate(answers):
            error = each if isinstance(each, ErrorInfo) else None
            body = b"" if error else codec.pack(each)
            reply = Reply(body, error=error, more=at < len(answers) - 1)
            self.router.send(peer, codec.encode(header, reply))

    def delta(self, seq: int | None = None, **changes: Any) -> None:
        self.seq = self.seq + 1 if seq is None else seq
        for peer in self.peers:
            self.router.send(peer, codec.encode(Header(Type.ROUTES_DELTA), RoutesDelta(self.seq, **changes)))

    def send(self, kind: Type, body: Any) -> None:
        for peer in self.peers:
            self.router.send(peer, codec.encode(Header(kind), body))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await self.changed.wait()


@dataclass
class Rig:
    """A served gateway between fakes."""

    config: Config
    service: Service
    controller: FakeController
    invoker: FakeInvoker
    http: httpx.AsyncClient
    url: str

    async def settled(self) -> None:
        """Everything that was under way in the gateway has ended; its invariants hold."""
        dispatcher = self.service.dispatcher
        async with asyncio.timeout(10):
            while len(dispatcher):
                await asyncio.sleep(0)
        dispatcher.validate()
        assert not dispatcher.waiting()
        assert not dispatcher.slots.in_flight()


@asynccontextmanager
async def rig(directory: Path, *, grants: bool = True, **settings: Any) -> AsyncIterator[Rig]:
    """`directory` must have a short path: sockets are in it."""
    config = replace(Config(), state_dir=directory, port=free_port(), shutdown_grace=2.0, **settings)
    config.prepare()
    node = NodeInfo("node-0", config.node_endpoint("node-0"))
    controller = FakeController(config.controller_endpoint, [node])
    invoker = FakeInvoker("node-0", node.endpoint)
    if grants:
        for number, spec in enumerate(FUNCTIONS):
            if spec.name not in ("cold", "Box"):
                invoker.grant(spec.name, number + 1)
        invoker.grant("Box", 50)
    service = Service(config, "gateway-0", access_fd=None)
    serving = asyncio.ensure_future(service.run())
    url = f"http://127.0.0.1:{config.port}"
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        try:
            await invoker.until(lambda: len(invoker.got[Type.WANT]) >= len(invoker.instances))
            made = Rig(config, service, controller, invoker, http, url)
            yield made
            controller = made.controller
        finally:
            if not serving.done():
                service.stop()
                if len(service.dispatcher):
                    service.stop()
            await serving
            controller.router.close()
            invoker.router.close()
