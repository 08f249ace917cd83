"""A dispatcher between recorded links, on a clock of its own."""

from __future__ import annotations

from typing import Any

from sllm_gateway.dispatcher import Dispatcher
from sllm_gateway.handle import Call, Handle

from sllm_faas.spec import FunctionSpec, MethodSpec, Target, Timeline
from sllm_faas.wire import codec
from sllm_faas.wire.bus import Parts, PeerGone
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Done, FunctionRoute, Grant, Routes, TargetDemand

T = Target("app", "f", 1)


class Wire:
    """A link that keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[codec.Frame] = []
        self.broken = False

    def send(self, parts: Parts) -> None:
        if self.broken:
            raise PeerGone("broken")
        self.sent.append(codec.decode(parts))

    def of(self, kind: Type) -> list[codec.Frame]:
        return [frame for frame in self.sent if frame.header.type is kind]


class World:
    def __init__(self, **options: Any) -> None:
        self.now = 1000.0
        self.ended: list[Handle] = []
        self.dispatcher = Dispatcher(clock=lambda: self.now, on_ended=self.ended.append, **options)
        self.node, self.controller = Wire(), Wire()
        self.nodes = {"n": self.node}
        self.dispatcher.node_up("n", self.node)
        self.dispatcher.controller_up(self.controller)
        spec = FunctionSpec("f", "function", "m", "f", (MethodSpec("f"),))
        table = Routes(1, tuple(FunctionRoute(app, 1, spec) for app in ("app", "other")))
        self.dispatcher.on_controller_message(codec.encode(Header(Type.ROUTES), table))
        self.calls = 0
        self.seq = 0

    def join(self, node: str) -> Wire:
        """The node's invoker welcomes us, for the first time or again."""
        wire = self.nodes[node] = Wire()
        self.dispatcher.node_up(node, wire)
        return wire

    def grant(
        self,
        limit: int = 1,
        number: int = 1,
        *,
        target: Target = T,
        state: Any = "ready",
        concurrency: int = 4,
        node: str = "n",
    ) -> None:
        self.seq += 1
        body = Grant(f"i-{number}", target, limit, concurrency, node, state, Timeline())
        self.receive(Header(Type.GRANT, route=number, seq=self.seq), body, node)

    def submit(self, *, target: Target = T, **more: Any) -> Handle:
        self.calls += 1
        return self.dispatcher.submit(Call(self.calls.to_bytes(16, "big"), target, "f", b"{}", **more))

    def receive(self, header: Header, body: Any = None, node: str = "n", *buffers: bytes) -> None:
        self.dispatcher.on_invoker_message(node, codec.encode(header, body, *buffers))
        self.dispatcher.validate()

    def reply(self, handle: Handle, kind: Type, body: Any = None, node: str = "", **header: Any) -> None:
        """A frame about it from the node where it is, unless said otherwise."""
        header.setdefault("fence", handle.inv.fence)
        self.receive(Header(kind, handle.inv.id, **header), body, node or handle.node or "n")

    def done(self, handle: Handle, payload: bytes = b"1") -> None:
        self.reply(handle, Type.DONE, Done(payload))

    def output(self, handle: Handle, seq: int, *payloads: bytes, **header: Any) -> None:
        self.reply(handle, Type.OUTPUT, list(payloads), seq=seq, items=len(payloads), **header)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.dispatcher.tick()
        self.dispatcher.validate()

    def invoked(self) -> list[bytes]:
        return [frame.header.id for frame in self.node.of(Type.INVOKE)]

    def demand(self) -> list[TargetDemand]:
        return [item for frame in self.controller.of(Type.DEMAND) for item in frame.body.items]

    def empty(self) -> None:
        self.dispatcher.validate()
        assert len(self.dispatcher) == 0
        assert self.dispatcher.slots.in_flight() == 0
        assert all(handle.ended is not None for handle in self.ended)
        assert len(self.ended) == len({handle.inv.id for handle in self.ended})
