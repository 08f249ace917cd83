"""The relay between real sockets, and under frames that are not what they should be."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from sllm_invoker.relay import Relay, RelayEvents
from sllm_invoker.relay_core import Instance, RelayCore

from sllm_faas.errors import WireError
from sllm_faas.spec import Target, Timeline
from sllm_faas.wire.bus import Dealer, Parts
from sllm_faas.wire.codec import decode_body, encode, pack
from sllm_faas.wire.header import NO_LIMIT, Header, Type, unpack
from sllm_faas.wire.messages import Done, Hello, Invoke, Request, Want
from sllm_faas.wire.stream import Stream

TARGET = Target("app", "f", 1)
GATEWAY = b"gateway-0:x"


class Peer:
    """One that remembers what it got."""

    def __init__(self) -> None:
        self.got: list[Parts] = []
        self._changed = asyncio.Event()

    def receive(self, parts: Parts) -> None:
        self.got.append(parts)
        self._changed.set()

    async def next(self, kind: Type) -> Parts:
        async with asyncio.timeout(10):
            while True:
                for parts in self.got:
                    if unpack(parts[0]).type is kind:
                        self.got.remove(parts)
                        return parts
                self._changed.clear()
                await self._changed.wait()


class Gateway(Peer):
    def __init__(self, relay: Relay) -> None:
        super().__init__()
        self.dealer = Dealer(relay.endpoint, GATEWAY, self.receive)


class Container(Peer):
    def __init__(self, relay: Relay) -> None:
        super().__init__()
        self.ended = asyncio.Event()
        self.stream = Stream(relay.link(b"ins-1"), self.receive, lambda _: self.ended.set())


def events() -> RelayEvents:
    return RelayEvents(
        container=lambda _peer, header, parts: decode_body(header.type, parts[0]),
        request=lambda *_: None,
        cancel=lambda _: False,
        kill=lambda *_: None,
        drain=lambda *_: None,
    )


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Relay]:
    core = RelayCore("node-0")
    made = Relay(core, f"ipc://{tmp_path}/g.sock", events(), life="1")
    made.add(Instance(1, "ins-1", b"ins-1", TARGET, 2, None, 5.0))
    made.ready(1, Timeline())
    yield made
    made.close()


async def test_an_invocation_goes_through_and_its_parts_with_it(relay: Relay) -> None:
    gateway = Gateway(relay)
    container = Container(relay)
    container.stream.send(encode(Header(Type.HELLO), Hello("container", "ins-1", "1")))
    gateway.dealer.send(encode(Header(Type.HELLO), Hello("gateway", "gateway-0", "x")))
    await gateway.next(Type.WELCOME)
    await gateway.next(Type.GRANT)
    sent = [*encode(Header(Type.INVOKE, bytes(16), 1, 1, credit=NO_LIMIT), Invoke("f")), b"large" * 1000]
    gateway.dealer.send(sent)
    assert await container.next(Type.INVOKE) == sent
    done = encode(Header(Type.DONE, bytes(16), 1), Done(b"result"))
    container.stream.send(done)
    assert await gateway.next(Type.DONE) == done
    gateway.dealer.close()
    container.stream.close()


async def test_what_a_container_said_before_it_died_counts(relay: Relay) -> None:
    gateway = Gateway(relay)
    container = Container(relay)
    gateway.dealer.send(encode(Header(Type.HELLO), Hello("gateway", "gateway-0", "x")))
    await gateway.next(Type.GRANT)
    for number in (1, 2):
        gateway.dealer.send(encode(Header(Type.INVOKE, bytes([number]) * 16, 1, 1, credit=NO_LIMIT), Invoke("f")))
        await container.next(Type.INVOKE)
    done = encode(Header(Type.DONE, bytes([1]) * 16, 1), Done(b"result"))
    container.stream.send(done)
    container.stream.close()
    relay.gone(1, "failed")
    assert await gateway.next(Type.DONE) == done
    assert unpack((await gateway.next(Type.FAILED))[0]).id == bytes([2]) * 16
    gateway.dealer.close()


async def test_a_container_without_its_link_is_killed(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm_invoker.relay.UNLINKED", 0.0)
    killed: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
    monkeypatch.setattr(relay, "_events", replace(events(), kill=lambda number, why: killed.put_nowait((number, why))))
    with relay.link(b"ins-1") as sock:
        sock.sendall(b"\xff" * 8)
        number, why = await asyncio.wait_for(killed.get(), 10)
    assert number == 1 and "its link broke" in why
    assert relay.core.dropped["bad_stream"] == 1


async def test_a_message_of_too_many_parts_is_dropped_before_it_takes_a_slot(relay: Relay) -> None:
    relay._from_gateway(GATEWAY, encode(Header(Type.HELLO), Hello("gateway", "gateway-0", "x")))
    header = Header(Type.INVOKE, bytes(16), 1, 1, credit=NO_LIMIT)
    relay._from_gateway(GATEWAY, [*encode(header, Invoke("f")), *[b""] * 65])
    assert relay.core.dropped["bad_frame"] == 1 and relay.core.running(1) == 0


async def test_a_gateway_that_was_never_welcomed_is_told_to_begin_anew(relay: Relay) -> None:
    gateway = Gateway(relay)
    gateway.dealer.send([Header(Type.HEARTBEAT).pack()])
    await gateway.next(Type.BYE)
    gateway.dealer.close()


async def test_the_heartbeat_comes_without_asking(relay: Relay) -> None:
    gateway = Gateway(relay)
    gateway.dealer.send(encode(Header(Type.HELLO), Hello("gateway", "gateway-0", "x")))
    await gateway.next(Type.HEARTBEAT)
    gateway.dealer.close()


async def test_ten_thousand_mutated_frames_are_dropped_counted_and_leak_no_slot(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay._entrances, "send", lambda *_: None)
    core, rng = relay.core, random.Random(20)
    hello = encode(Header(Type.HELLO), Hello("gateway", "gateway-0", "x"))
    relay._from_gateway(GATEWAY, hello)
    relay._settle()
    ids = [bytes([number]) * 16 for number in range(4)]
    good: list[tuple[bool, Parts]] = [
        (True, hello),
        (True, encode(Header(Type.WANT, route=1, seq=5), Want(1))),
        (True, encode(Header(Type.REQUEST, ids[0]), Request("logs.read", pack({})))),
    ]
    for identity in ids:
        good += [
            (True, encode(Header(Type.INVOKE, identity, 1, 1, credit=4), Invoke("f", payload=b"x" * 40))),
            (True, encode(Header(Type.CREDIT, identity, 1, credit=9))),
            (True, encode(Header(Type.CANCEL, identity, 1))),
            (True, encode(Header(Type.ADOPT, identity, 1))),
            (False, encode(Header(Type.OUTPUT, identity, 1, items=1), [b"x"])),
            (False, encode(Header(Type.DONE, identity, 1), Done(b"y"))),
        ]
    bad = 0
    for _ in range(10_000):
        from_gateway, parts = rng.choice(good)
        data = bytearray(parts[0])
        for _ in range(rng.randrange(3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        frame = bytes(data)
        try:
            kind = unpack(frame).type
            decodes = (Type.HELLO, Type.WANT, Type.REQUEST) if from_gateway else ()
            forwarded = (Type.OUTPUT, Type.DONE, Type.FAILED, Type.CANCELLED)
            known = not from_gateway or GATEWAY in core.gateways
            if (kind in decodes and (known or kind is Type.HELLO)) or (not from_gateway and kind not in forwarded):
                decode_body(kind, frame)
        except WireError:
            bad += 1
        if from_gateway:
            relay._from_gateway(GATEWAY, [frame])
            if GATEWAY not in core.gateways:
                relay._from_gateway(GATEWAY, hello)
        else:
            relay._from_container(b"ins-1", [frame])
        relay._settle()
        core.validate()
    assert core.dropped["bad_frame"] == bad > 1000
    for identity in list(core.flights):
        header = Header(Type.DONE, identity, core.flights[identity].fence)
        relay._from_container(b"ins-1", encode(header, Done()))
    assert core.running(1) == 0 and core.credits.running(1) == 0
