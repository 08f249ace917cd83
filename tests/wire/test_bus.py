"""Real sockets: what the bus promises about sends, peers and draining."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sllm_faas.errors import BadSpec
from sllm_faas.wire.bus import CurveKeys, Dealer, PeerGone, Router, check_endpoint


class Collector:
    """Gathers messages; `await take(n)` waits until n are there."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, ...]] = []
        self._event = asyncio.Event()

    def peer_message(self, peer: bytes, parts: list[bytes]) -> None:
        self.message([peer, *parts])

    def message(self, parts: list[bytes]) -> None:
        self.messages.append(tuple(parts))
        self._event.set()

    async def take(self, count: int) -> list[tuple[bytes, ...]]:
        async with asyncio.timeout(10):
            while len(self.messages) < count:
                self._event.clear()
                await self._event.wait()
        return self.messages


async def test_messages_arrive_whole_and_in_order(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    got = Collector()
    router = Router(endpoint, got.peer_message)
    dealer = Dealer(endpoint, b"me", lambda parts: None)
    sent = [[str(i).encode(), b"x" * i] for i in range(2000)]
    for parts in sent:
        dealer.send(parts)
    assert await got.take(2000) == [(b"me", *parts) for parts in sent]
    dealer.close()
    router.close()


async def test_a_reply_sent_from_within_the_callback_arrives(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    got = Collector()
    router: Router = Router(endpoint, lambda peer, parts: router.send(peer, parts))
    dealer = Dealer(endpoint, b"me", got.message)
    for i in range(500):
        dealer.send([str(i).encode()])
    assert len(await got.take(500)) == 500
    dealer.close()
    router.close()


async def test_sending_to_an_unknown_peer_says_so_and_keeps_nothing_from_the_others(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    gone: asyncio.Queue[bytes] = asyncio.Queue()
    seen, got = Collector(), Collector()
    router = Router(endpoint, seen.peer_message, on_gone=gone.put_nowait)
    dealer = Dealer(endpoint, b"me", got.message)
    dealer.send([b"hello"])
    await seen.take(1)
    for peer in (b"nobody", b"me"):
        router.send(peer, [b"x"])
    assert await asyncio.wait_for(gone.get(), 10) == b"nobody"
    assert await got.take(1) == [(b"x",)]
    dealer.close()
    router.close()
    with pytest.raises(PeerGone):
        router.send(b"nobody", [b"x"])


async def test_a_message_sent_before_the_other_end_is_up_arrives_later(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    got = Collector()
    dealer = Dealer(endpoint, b"early", lambda parts: None)
    dealer.send([b"hello"])
    router = Router(endpoint, got.peer_message)
    assert await got.take(1) == [(b"early", b"hello")]
    dealer.close()
    router.close()


async def test_a_second_binding_of_one_tcp_port_is_refused() -> None:
    keys = CurveKeys.generate()
    first = Router("tcp://127.0.0.1:0", lambda peer, parts: None, keys=keys)
    with pytest.raises(BadSpec, match="cannot listen"):
        Router(first.endpoint, lambda peer, parts: None, keys=keys)
    first.close()


def test_an_ipc_socket_is_private(tmp_path: Path) -> None:
    async def mode() -> int:
        router = Router(f"ipc://{tmp_path}/s", lambda peer, parts: None)
        try:
            return (tmp_path / "s").stat().st_mode & 0o777
        finally:
            router.close()

    assert asyncio.run(mode()) == 0o700


@pytest.mark.parametrize(
    ("endpoint", "curve", "message"),
    [
        ("tcp://127.0.0.1:1", False, "without keys"),
        ("inproc://x", False, "scheme"),
        ("ipc:///" + "x" * 120, False, "longer than 100"),
    ],
)
def test_endpoints_that_are_not_safe_are_refused(endpoint: str, curve: bool, message: str) -> None:
    with pytest.raises(BadSpec, match=message):
        check_endpoint(endpoint, curve)
