"""Mutated frames of real peers: nothing crashes, every bad one is counted, and the controller serves on."""

from __future__ import annotations

import random

from sllm_faas.controller.service import Controller
from sllm_faas.errors import WireError
from sllm_faas.spec import Target
from sllm_faas.wire import codec
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import (
    BundleGet,
    Checked,
    Demand,
    Hello,
    Ingested,
    InstanceReport,
    NodeInfo,
    NodeStats,
    Progress,
    Reply,
    Request,
    TargetDemand,
)
from tests.controller.fakes import BUNDLE, Gateway, Invoker, app

F = Target("app", "f", 1)
REPORT = InstanceReport("ins-x-1", 1, F, "ready")
FRAMES = {
    "gateway": [
        (Type.HELLO, Hello("gateway", "gateway-0", "life-1")),
        (Type.DEMAND, Demand((TargetDemand(F, 1, 0),))),
        (Type.REQUEST, Request("status")),
        (Type.REQUEST, Request("app.deploy", codec.pack({"spec": app()}))),
        (Type.REQUEST, Request("token.create", codec.pack({"name": "t"}))),
        (Type.REPLY, Reply()),
        (Type.HEARTBEAT, None),
    ],
    "invoker": [
        (Type.HELLO, Hello("invoker", "node-0", "1", node=NodeInfo("node-0", "ipc:///x"), instances=(REPORT,))),
        (Type.INSTANCE, REPORT),
        (Type.CHECKED, Checked("app", 1)),
        (Type.INGESTED, Ingested("pull-1", "d" * 64, 5)),
        (Type.NODE, NodeStats(1, 2, 3)),
        (Type.PROGRESS, Progress("app@1", "x")),
        (Type.BUNDLE_GET, BundleGet(BUNDLE)),
    ],
}


def mutate(frame: bytes, rng: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind, at = rng.randrange(4), rng.randrange(len(data)) if data else 0
        if kind == 0 and data:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 8)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 8))
        else:
            data += data[at : at + 16]
    return bytes(data)


async def test_ten_thousand_mutated_frames_are_survived_and_counted(
    controller: Controller, gateway: Gateway, invoker: Invoker
):
    rng = random.Random(7)
    router = controller._routers[0]
    captured = [
        (peer.dealer._zmq.identity, codec.encode(Header(kind, bytes(16)), body)[0])
        for peer in (gateway, invoker)
        for kind, body in FRAMES[peer.role]
    ]
    bad = 0
    for _ in range(10_000):
        identity, frame = rng.choice(captured)
        parts = [mutate(frame, rng)]
        try:
            codec.decode(list(parts))
        except WireError:
            bad += 1
        before = sum(controller.dropped.values())
        controller._on_message(router, identity, parts)
        controller.machine.validate()
        assert sum(controller.dropped.values()) >= before
    assert bad > 5_000
    assert controller.dropped["error"] == 0
    assert sum(controller.dropped.values()) >= bad
    other = Gateway(controller.endpoints[0], "gateway", "gateway-9")
    await other.hello()
    status = await other.call("status")
    assert sum(status["dropped"].values()) >= bad
    other.close()
