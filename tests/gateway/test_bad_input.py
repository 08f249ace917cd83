"""Mutated bodies and frames: no 5xx, no crash, no leaked slot; what is bad is counted."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import msgspec
import pytest

from sllm_faas.errors import WireError, WorkerLost, to_info
from sllm_faas.spec import FunctionSpec, MethodSpec, Target, Timeline
from sllm_faas.wire import codec
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import (
    Adopted,
    Done,
    Failed,
    FunctionRoute,
    Grant,
    Refused,
    Reply,
    Routes,
    RoutesDelta,
    TargetFailed,
    TokenEntry,
)
from tests.gateway.fakes import Rig
from tests.gateway.test_dispatcher import World

CHAT = {
    "model": "counting",
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "é"}]}],
    "temperature": 0.5,
    "n": 2,
    "stop": ["a"],
    "seed": 7,
    "stream": False,
    "logprobs": True,
    "top_logprobs": 2,
    "user": "me",
}
TEXT = {"model": "counting", "prompt": [[1, 2], [3]], "max_tokens": 3, "echo": True}
VECTORS = {"model": "counting", "input": ["a", "b"], "encoding_format": "base64"}
PACKED = msgspec.msgpack.encode({"args": [1, b"x"], "kwargs": {"k": [None]}})
BOX = "/v1/functions/app/Box.get?parameters=%7B%22size%22%3A3%7D"
BODIES: list[tuple[str, str, bytes]] = [
    ("/v1/chat/completions", "application/json", json.dumps(CHAT).encode()),
    ("/v1/completions", "application/json", json.dumps(TEXT).encode()),
    ("/v1/embeddings", "application/json", json.dumps(VECTORS).encode()),
    ("/v1/functions/app/echo", "application/json", b'{"a": [1, 2.5e3, null, true], "b": {"c": "\\u00e9\\n"}}'),
    ("/v1/functions/app/echo", "application/msgpack", PACKED),
    (BOX, "application/json", b"[1, 2, 3]"),
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three small changes: a byte replaced, removed, inserted, a piece repeated, the end cut."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out)) if out else 0
        match rng.randrange(5):
            case 0 if out:
                out[at] = rng.randrange(256)
            case 1 if out:
                del out[at]
            case 2:
                out.insert(at, rng.choice(b'{}[]",:0-9eE\\\x00\xff'))
            case 3:
                out[at:at] = out[at : at + rng.randrange(20)]
            case _:
                del out[at:]
    return bytes(out)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_thousand_mutated_bodies_are_never_a_5xx_and_leave_nothing_behind(gateway: Rig) -> None:
    rng = random.Random(20261121)
    statuses: dict[int, int] = {}

    async def post(path: str, kind: str, body: bytes) -> None:
        answer = await gateway.http.post(path, content=body, headers={"Content-Type": kind})
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (path, body, answer.text)
        if answer.status_code >= 400 and kind == "application/json":
            assert answer.json()["error"]["message"]

    jobs = [(path, kind, mutated(body, rng)) for path, kind, body in rng.choices(BODIES, k=1000)]
    for at in range(0, len(jobs), 20):
        await asyncio.gather(*(post(*job) for job in jobs[at : at + 20]))
    assert statuses[400] > 300, statuses
    assert statuses[200] > 30, statuses
    await gateway.settled()
    assert (await gateway.http.post("/v1/functions/app/echo", json={"a": 1})).json() == {"a": 1}


def frames(world: World, handle: Any) -> list[list[bytes]]:
    """One valid message of each kind an invoker sends."""
    identity, target = handle.inv.id, Target("app", "f", 1)
    return [
        codec.encode(Header(Type.OUTPUT, identity, 1, 1, handle.inv.wanted, 2), [b"a", b"b"]),
        codec.encode(Header(Type.DONE, identity, 1, 1), Done(b"1", 0.5, {"prompt_tokens": 1}, (("run", 0.0, 1.0),))),
        codec.encode(Header(Type.FAILED, identity, 1, 1), Failed(to_info(WorkerLost("gone")))),
        codec.encode(Header(Type.CANCELLED, identity, 1, 1)),
        codec.encode(Header(Type.REFUSED, identity, 1, 1), Refused("no_slot")),
        codec.encode(Header(Type.GRANT, route=1, seq=9), Grant("i-1", target, 2, 4, "n", "ready", Timeline())),
        codec.encode(Header(Type.ADOPTED, identity, 1), Adopted("unknown")),
        codec.encode(Header(Type.REPLY, identity), Reply(b"\x80")),
    ]


async def test_mutated_frames_of_an_invoker_are_dropped_and_counted_and_nothing_leaks() -> None:
    rng = random.Random(7)
    world = World()
    world.grant(2)
    for _ in range(5_000):
        if not world.dispatcher.slots.has_ready(Target("app", "f", 1)):
            world.grant(2, number=rng.randrange(1, 1000))
        handle = world.submit(stream=True)
        parts = rng.choice(frames(world, handle))
        bad = [mutated(parts[0], rng), *parts[1:]]
        drops, before = world.dispatcher.drops["bad_frame"], len(world.ended)
        try:
            codec.decode(bad)
            malformed = False
        except WireError:
            malformed = True
        world.dispatcher.on_invoker_message("n", bad)
        world.dispatcher.validate()
        if malformed:
            assert world.dispatcher.drops["bad_frame"] == drops + 1
            assert len(world.ended) == before, "a bad frame changes nothing"
        handle.cancel()
        for each in world.dispatcher.handles():
            if each.node:
                world.reply(each, Type.CANCELLED)
    assert world.dispatcher.drops["bad_frame"] > 500
    world.empty()
    world.dispatcher.close()


async def test_mutated_frames_of_the_controller_are_dropped_and_counted() -> None:
    rng = random.Random(11)
    world = World()
    route = FunctionRoute("app", 1, FunctionSpec("f", "function", "m", "f", (MethodSpec("f"),)))
    valid = [
        codec.encode(Header(Type.ROUTES), Routes(1, (route,), (), (TokenEntry("t", "ab", ("admin",)),))),
        codec.encode(Header(Type.ROUTES_DELTA), RoutesDelta(2, (route,))),
        codec.encode(Header(Type.TARGET_FAILED), TargetFailed(Target("app", "f", 1), to_info(WorkerLost("x")))),
        codec.encode(Header(Type.REPLY, b"i" * 16), Reply(b"\x80")),
    ]
    for _ in range(2_000):
        bad = [mutated(rng.choice(valid)[0], rng)]
        drops = world.dispatcher.drops["bad_frame"]
        try:
            codec.decode(bad)
            malformed = False
        except WireError:
            malformed = True
        world.dispatcher.on_controller_message(bad)
        world.dispatcher.validate()
        assert world.dispatcher.drops["bad_frame"] == drops + malformed
    world.dispatcher.close()
