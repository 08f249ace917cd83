"""The bus without sockets keeps the promises of the one with: order, waiting, and errors instead of silence."""

from __future__ import annotations

import asyncio

import pytest

from sllm_faas.errors import BadSpec
from sllm_faas.wire.bus import OUTBOX, PeerBusy, PeerGone
from sllm_faas.wire.memory import MemoryBus

Parts = list[bytes]
E = "memory://x"


async def rest() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_messages_arrive_in_order_after_the_sender_has_returned() -> None:
    bus, got = MemoryBus(), list[tuple[bytes, Parts]]()
    bus.router(E, lambda peer, parts: got.append((peer, parts)))
    dealer = bus.dealer(E, b"a", lambda parts: None)
    dealer.send([b"1"])
    dealer.send([b"2", b"x"])
    assert got == []
    await rest()
    assert got == [(b"a", [b"1"]), (b"a", [b"2", b"x"])]


async def test_a_router_answers_the_peer_that_asked() -> None:
    bus, got = MemoryBus(), list[Parts]()
    router = bus.router(E, lambda peer, parts: router.send(peer, parts))
    bus.dealer(E, b"other", lambda parts: pytest.fail("not for it"))
    bus.dealer(E, b"a", got.append).send([b"hello"])
    await rest()
    assert got == [[b"hello"]]


async def test_what_is_sent_before_anybody_listens_waits() -> None:
    bus, got = MemoryBus(), list[Parts]()
    dealer = bus.dealer(E, b"a", lambda parts: None)
    dealer.send([b"early"])
    bus.router(E, lambda peer, parts: got.append(parts))
    dealer.send([b"late"])
    await rest()
    assert got == [[b"early"], [b"late"]]


async def test_what_waits_is_bounded() -> None:
    dealer = MemoryBus().dealer(E, b"a", lambda parts: None)
    for _ in range(OUTBOX):
        dealer.send([b""])
    with pytest.raises(PeerBusy):
        dealer.send([b""])


async def test_an_unknown_or_closed_peer_is_gone() -> None:
    bus = MemoryBus()
    router = bus.router(E, lambda peer, parts: None)
    with pytest.raises(PeerGone):
        router.send(b"a", [b""])
    dealer = bus.dealer(E, b"a", lambda parts: None)
    router.send(b"a", [b""])
    dealer.close()
    dealer.close()
    with pytest.raises(PeerGone):
        router.send(b"a", [b""])
    with pytest.raises(PeerGone):
        dealer.send([b""])
    await rest()


async def test_a_dealer_of_a_known_identity_takes_its_place() -> None:
    bus, first, second = MemoryBus(), list[Parts](), list[Parts]()
    router = bus.router(E, lambda peer, parts: None)
    old = bus.dealer(E, b"a", first.append)
    bus.dealer(E, b"a", second.append)
    old.close()
    router.send(b"a", [b"x"])
    await rest()
    assert (first, second) == ([], [[b"x"]])


async def test_a_dealer_outlives_its_router_and_finds_the_next() -> None:
    bus, got = MemoryBus(), list[Parts]()
    router = bus.router(E, lambda peer, parts: None)
    with pytest.raises(BadSpec, match="in use"):
        bus.router(E, lambda peer, parts: None)
    dealer = bus.dealer(E, b"a", lambda parts: None)
    router.close()
    router.close()
    with pytest.raises(PeerGone):
        router.send(b"a", [b""])
    dealer.send([b"x"])
    bus.router(E, lambda peer, parts: got.append(parts))
    await rest()
    assert got == [[b"x"]]
