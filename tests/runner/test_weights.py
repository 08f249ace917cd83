"""Where weights come from, and what is left when the store is gone. The store's end is played by the test."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sllm_invoker.checkpoints import channel
from sllm_invoker.checkpoints.object import Part
from sllm_invoker.runner.weights import Weights, from_file, from_store

from sllm_faas.errors import CheckpointCorrupt, CheckpointUnavailable, to_info

SLAB = 4096
SIZE = 300 * SLAB - 100  # more slabs than descriptors in one message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "part"
    found.write_bytes(os.urandom(SIZE))
    return found


@pytest.fixture
def part() -> Part:
    return Part("part", SIZE, 4096, "", (), (), ())


def slabs(data: bytes) -> list[int]:
    fds = []
    for start in range(0, len(data), SLAB):
        fds.append(os.memfd_create("slab"))
        os.ftruncate(fds[-1], SLAB)
        os.pwrite(fds[-1], data[start : start + SLAB], 0)
    return fds


def played(script: Callable[[socket.socket], None], path: Path, part: Part, end: int | None = None) -> Weights:
    """`from_store` and `wait` against a store that does what `script` says after the Attach."""
    ours, theirs = channel.pair()

    def store() -> None:
        with theirs:
            received = channel.receive(theirs)
            assert received is not None
            assert isinstance(received[0], channel.Attach)
            script(theirs)

    thread = threading.Thread(target=store)
    thread.start()
    try:
        weights = from_store(ours.detach(), path, part)
        weights.wait(end)
        return weights
    finally:
        thread.join()


def hand_out(sock: socket.socket, data: bytes) -> None:
    fds = slabs(data)
    layout = channel.Layout("slabs", SIZE, SLAB, len(fds))
    for message, some in channel.with_fds(layout, fds):
        channel.send(sock, message, some)
    channel.close_all(fds)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_slabs_are_one_contiguous_map(path, part):
    data = path.read_bytes()

    def script(sock):
        hand_out(sock, data)
        channel.send(sock, channel.Whole())

    before = open_fds()
    weights = played(script, path, part)
    assert bytes(weights.buffer) == data
    assert weights.tier == "dram"
    assert open_fds() == before + 1, "the channel alone stays open"


def test_a_part_of_it_can_be_waited_for(path, part):
    def script(sock):
        hand_out(sock, path.read_bytes())
        channel.send(sock, channel.Watermark(5 * SLAB))

    weights = played(script, path, part, 5 * SLAB)
    assert weights.ready == 5 * SLAB


def test_a_store_that_dies_while_it_reads_is_replaced_by_the_file_at_the_same_addresses(path, part):
    data = path.read_bytes()
    seen = []

    def script(sock):
        hand_out(sock, data[: SIZE // 2] + bytes(SIZE - SIZE // 2))
        channel.send(sock, channel.Watermark(SLAB))

    weights = played(script, path, part, SLAB)
    seen.append(memoryview(weights.buffer))
    weights.wait()
    assert bytes(seen[0]) == data


def test_a_store_that_is_gone_or_talks_nonsense_means_the_file(path, part):
    for script in (lambda _: None, lambda sock: sock.send(b"\xc1"), lambda sock: channel.send(sock, channel.Look(1))):
        assert bytes(played(script, path, part).buffer) == path.read_bytes()


def test_a_store_that_ends_while_it_hands_out_slabs_means_the_file(path, part):
    def script(sock):
        fds = slabs(b"x" * SLAB * 2)
        channel.send(sock, channel.Layout("slabs", SIZE, SLAB, 300), fds)
        channel.close_all(fds)

    before = open_fds()
    assert bytes(played(script, path, part).buffer) == path.read_bytes()
    assert open_fds() - before <= 1


def test_the_file_is_mapped_where_the_store_says_so(path, part):
    def script(sock):
        channel.send(sock, channel.Layout("file", SIZE))
        channel.send(sock, channel.Whole(0, "disk", 0.1))

    weights = played(script, path, part)
    assert bytes(weights.buffer) == path.read_bytes()
    assert weights.tier == "disk"


@pytest.mark.parametrize("late", [False, True])
def test_what_the_store_could_not_read_is_raised_here(path, part, late):
    def script(sock):
        if late:
            hand_out(sock, path.read_bytes())
        channel.send(sock, channel.NotLoaded(0, to_info(CheckpointCorrupt("chunk 7 has changed."))))

    with pytest.raises(CheckpointCorrupt, match="chunk 7"):
        played(script, path, part)


def test_a_layout_of_another_size_is_refused(path, part):
    with pytest.raises(CheckpointCorrupt, match="the store has 17 bytes"):
        played(lambda sock: channel.send(sock, channel.Layout("file", 17)), path, part)


def test_a_file_of_another_size_is_corrupt_and_none_is_unavailable(path, part):
    path.write_bytes(b"short")
    with pytest.raises(CheckpointCorrupt, match="5 bytes"):
        from_file(path, part)
    path.unlink()
    with pytest.raises(CheckpointUnavailable):
        from_file(path, part)


def test_a_write_to_the_map_does_not_reach_the_file(path, part):
    data = path.read_bytes()
    weights = from_file(path, part)
    memoryview(weights.buffer)[:4] = b"mine"
    assert path.read_bytes() == data
