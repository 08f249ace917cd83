"""Messages over a stream socket: whole, in order, bounded, and never a crash."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.wire import stream
from sllm_faas.wire.messages import MAX_FRAME
from sllm_faas.wire.peers import Parts, PeerBusy, PeerGone
from sllm_faas.wire.stream import MAX_PARTS, BadStream, Outgoing, Splitter, Stream, fits

MESSAGES = st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=5), max_size=8)


def encoded(messages: list[Parts]) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outgoing = Outgoing()
        for parts in messages:
            outgoing.add(parts)
        size = outgoing.size
        assert outgoing.write(ours) and outgoing.size == 0
        ours.close()
        data = b""
        while chunk := theirs.recv(1 << 20):
            data += chunk
        assert len(data) == size
        return data


@given(MESSAGES, st.lists(st.integers(1, 50)))
def test_messages_come_whole_and_in_order_however_the_bytes_are_cut(messages: list[Parts], cuts: list[int]) -> None:
    data, splitter, got = encoded(messages), Splitter(), []
    for size in [*cuts, len(data)]:
        piece, data = data[:size], data[size:]
        got += splitter.feed(piece)
    assert got == messages
    assert splitter.between


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_any_bytes_are_messages_or_one_typed_error(pieces: list[bytes]) -> None:
    splitter = Splitter()
    try:
        for piece in pieces:
            for parts in splitter.feed(piece):
                assert fits(parts)
    except BadStream as error:
        assert error.code == "bad_stream"


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", MAX_FRAME + 1),
        b"\xff\xff\xff\xff",
        struct.pack(">I", 0x8000_0000) * (MAX_PARTS + 1),
        (struct.pack(">I", 0x8000_0000 | 4) + b"part") * MAX_PARTS + struct.pack(">I", 0),
    ],
)
def test_what_is_too_large_is_refused_by_its_prefix_alone(data: bytes) -> None:
    with pytest.raises(BadStream, match="allowed"):
        list(Splitter().feed(data))


def test_fits_says_what_a_splitter_takes() -> None:
    assert fits([b""]) and fits([b"x"] * MAX_PARTS)
    assert not fits([]) and not fits([b"x"] * (MAX_PARTS + 1))


class End:
    """One end that remembers what it got."""

    def __init__(self, sock: socket.socket) -> None:
        self.got: list[Parts] = []
        self.ends: list[BadStream | None] = []
        self._changed = asyncio.Event()
        self.stream = Stream(sock, self._message, self._end)

    def _message(self, parts: Parts) -> None:
        self.got.append(parts)
        self._changed.set()

    def _end(self, error: BadStream | None) -> None:
        self.ends.append(error)
        self._changed.set()

    async def until(self, messages: int = 0, ends: int = 0) -> None:
        async with asyncio.timeout(10):
            while len(self.got) < messages or len(self.ends) < ends:
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
async def pair() -> AsyncIterator[tuple[End, End]]:
    a, b = map(End, socket.socketpair())
    yield a, b
    a.stream.close()
    b.stream.close()


async def test_both_ways_with_parts_larger_than_the_socket_takes_at_once(pair: tuple[End, End]) -> None:
    a, b = pair
    large = bytes(range(256)) * 20_000
    a.stream.send([b"head", large, b""])
    a.stream.send([b"next"])
    b.stream.send([b"answer"])
    await b.until(2)
    await a.until(1)
    assert b.got == [[b"head", large, b""], [b"next"]]
    assert a.got == [[b"answer"]]


async def test_an_end_is_told_once_and_sending_after_it_raises(pair: tuple[End, End]) -> None:
    a, b = pair
    a.stream.send([b"last words"])
    a.stream.close()
    await b.until(1, 1)
    assert b.got == [[b"last words"]] and b.ends == [None]
    assert a.ends == []
    with pytest.raises(PeerGone):
        b.stream.send([b"x"])


async def test_garbage_ends_the_stream_with_its_error_and_what_came_before_counts(pair: tuple[End, End]) -> None:
    a, b = pair
    a.stream._sock.send(encoded([[b"good"]]) + b"\xff" * 4)
    await b.until(1, 1)
    assert b.got == [[b"good"]] and isinstance(b.ends[0], BadStream)


async def test_a_stream_cut_within_a_message_says_so(pair: tuple[End, End]) -> None:
    a, b = pair
    a.stream._sock.send(struct.pack(">I", 10) + b"half")
    a.stream.close()
    await b.until(0, 1)
    assert isinstance(b.ends[0], BadStream) and "within a message" in b.ends[0].message


async def test_a_peer_that_does_not_read_is_busy_and_memory_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_WAITING", 1 << 20)
    ours, theirs = socket.socketpair()
    with theirs:
        end = End(ours)
        with pytest.raises(PeerBusy, match="does not read"):
            for _ in range(100):
                end.stream.send([bytes(1 << 16)])
                await asyncio.sleep(0)
        end.stream.close()


async def test_what_a_dead_peer_said_is_read_without_waiting_for_the_loop() -> None:
    ours, theirs = socket.socketpair()
    end = End(ours)
    theirs.sendall(encoded([[b"done"], [b"bye"]]))
    theirs.close()
    end.stream.drain()
    assert end.got == [[b"done"], [b"bye"]] and end.ends == [None]
