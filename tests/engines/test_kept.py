"""Weights that stay on a device between instances: the next one starts from what the last one left, and no more."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading

import pytest
from sllm_invoker.containers.gpu_memory import GpuMemory
from sllm_invoker.containers.residency import GRAIN, grains
from sllm_invoker.runner import device_weights, kept
from sllm_invoker.runner.device_weights import DeviceWeights, Stage
from sllm_invoker.runner.kept import Have, Kept, Want, Whole
from sllm_invoker.runner.weights import Weights, from_file

from sllm_faas.errors import CheckpointCorrupt, WireError

from .fake_device import FakeDevice

PIECE = 1000
EMPTY = 1 << 30


class Untouchable(Weights):
    """A source of which nothing may be needed."""

    def __init__(self, part):
        super().__init__(bytearray(part.bytes), part, ready=0)

    def wait(self, end=None):
        raise AssertionError(f"{end} bytes were waited for")


@pytest.fixture
def part(case):
    return case("llama").checkpoint.manifest.parts[0]


@pytest.fixture
def source(case, part):
    return from_file(case("llama").checkpoint.part_path(), part)


@pytest.fixture
async def memory():
    """What a node keeps of its one GPU."""
    found = GpuMemory(lambda _uuid: EMPTY - found.used("GPU-0"))
    found.add("GPU-0", EMPTY)
    yield found
    found.close()
    assert found._memory == {}


async def instance(memory, source, *, checkpoint="a", room=0, device=None):
    """The weights of an instance, all of them there."""
    end = memory.lease("GPU-0", checkpoint)
    device = device or FakeDevice()

    def live():
        found = DeviceWeights(source, Stage(device, piece=PIECE, group=1), Kept(end, room))
        found.wait()
        for thread in [each for each in threading.enumerate() if each.name == "to-device"]:
            thread.join()
        return found

    return await asyncio.to_thread(live), device


def content(weights):
    return [(group.start, group.memory.numpy().tobytes()) for group in weights.groups]


async def test_the_next_instance_copies_nothing_and_waits_for_no_bytes(memory, source, part):
    first, device = await instance(memory, source)
    assert (first.tier, device.copied > 0) == ("disk", True)
    memory.end("GPU-0")
    assert memory.resident(["GPU-0"]) == ("a",)
    second, device = await instance(memory, Untouchable(part))
    assert (second.tier, second.arrived, device.copied, device.held) == ("gpu", True, 0, [])
    assert content(second) == content(first)
    assert not [call for call in device.calls if call[0] in ("share", "allocate")]


async def test_only_what_is_missing_is_copied_and_it_is_the_last_layers(memory, source):
    first, _ = await instance(memory, source)
    memory.end("GPU-0")
    ranges = [(group.start, group.end) for group in first.groups]
    other = FakeDevice()
    end = memory.lease("GPU-0", "b")
    device_free = EMPTY - memory.used("GPU-0")
    channel = Kept(end, device_free + grains(ranges[-1]) + 1)
    found, freed = await asyncio.to_thread(channel.want, [(0, 5)])
    channel.close()
    assert (found, freed) == ({}, grains(ranges[-1]) + grains(ranges[-2]))
    memory.end("GPU-0")
    second, other = await instance(memory, source, device=other)
    assert [group.whole for group in second.groups] == [True] * (len(ranges) - 2) + [False] * 2
    assert content(second) == content(first)
    assert sum(size for call, size in ((c[0], c[-1]) for c in other.calls) if call == "copy") == sum(
        end - start for start, end in ranges[-2:]
    )
    assert memory.resident(["GPU-0"]) == ("a",)


async def test_weights_that_turn_out_bad_leave_nothing_behind(memory, part, source):
    class Bad(Weights):
        def wait(self, end=None):
            if end is None:
                raise CheckpointCorrupt("the last chunk has changed.")

    weights, device = await instance(memory, Bad(source.buffer, part, ready=0))
    assert device.copied > 0
    assert not weights.arrived
    memory.end("GPU-0")
    assert memory.used("GPU-0") == 0


async def test_a_device_without_shared_memory_works_as_ever_and_keeps_nothing(memory, source):
    weights, _ = await instance(memory, source, device=FakeDevice(shares=False))
    assert weights.tier == "disk"
    memory.end("GPU-0")
    assert memory.used("GPU-0") == 0


async def test_memory_that_cannot_be_opened_is_copied_again(memory, source):
    class Refusing(FakeDevice):
        def open(self, descriptor, size):
            return super().open(os.memfd_create("empty"), size)

    first, _ = await instance(memory, source)
    memory.end("GPU-0")
    second, _ = await instance(memory, source, device=Refusing())
    assert content(second) == content(first)
    memory.end("GPU-0")


async def test_an_instance_waits_a_moment_for_what_others_let_go_of(memory, source, monkeypatch):
    monkeypatch.setattr(device_weights, "PATIENCE", 30.0)
    await instance(memory, source)
    memory.end("GPU-0")
    device, looks = FakeDevice(), []

    def look():
        looks.append(device.free)
        if len(looks) == 3:
            device.free += EMPTY
        return FakeDevice.memory(device)

    device.memory = look
    await instance(memory, source, checkpoint="b", room=2 * EMPTY, device=device)
    assert len(looks) >= 3
    assert memory.held("GPU-0", "a") == 0


async def test_without_an_invoker_at_the_other_end_everything_is_copied(source):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    weights = DeviceWeights(source, Stage(FakeDevice(), piece=PIECE, group=1), Kept(ours.detach(), 0))
    weights.wait()
    assert weights.tier in ("disk", "dram")


# -- the channel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "fds"),
    [
        (Have(()), 0),
        (Whole(0, 10), 0),
        (Whole(0, 10), 1),
        (Want(((5, 2),), 0), 0),
        (Want((), 0), 1),
        (b"\xc1", 0),
    ],
    ids=["an answer", "no memory", "of no lease", "out of order", "memory too many", "no message"],
)
async def test_nonsense_ends_the_channel_and_keeps_nothing(memory, message, fds):
    sock = socket.socket(fileno=memory.lease("GPU-0", "a"))
    descriptor = os.memfd_create("x")
    with sock:
        if isinstance(message, bytes):
            sock.send(message)
        else:
            kept.send(sock, message, [descriptor] * fds)
        memory._readable("GPU-0")
        assert sock.recv(100) == b""
    os.close(descriptor)
    assert memory.used("GPU-0") == 0


async def test_an_instance_that_does_not_take_its_answer_goes_without(memory, monkeypatch):
    def full(*_):
        raise BlockingIOError

    send = kept.send
    with socket.socket(fileno=memory.lease("GPU-0", "a")) as sock:
        monkeypatch.setattr(kept, "send", full)
        send(sock, Want(((0, 10),), 0))
        memory._readable("GPU-0")
        assert sock.recv(100) == b""


async def test_many_groups_travel_in_several_messages_and_no_descriptor_is_left(memory):
    before = len(os.listdir("/proc/self/fd"))
    ranges = [(number * 10, number * 10 + 10) for number in range(2 * kept.MAX_FDS + 3)]
    descriptor = os.memfd_create("x")

    def life(end):
        channel = Kept(end, 0)
        found, _ = channel.want(ranges)
        for each in ranges:
            if each not in found:
                channel.whole(each, descriptor)
        for fd in found.values():
            os.close(fd)
        channel.close()
        return list(found)

    assert await asyncio.to_thread(life, memory.lease("GPU-0", "a")) == []
    memory.end("GPU-0")
    assert await asyncio.to_thread(life, memory.lease("GPU-0", "a")) == ranges
    memory.end("GPU-0")
    os.close(descriptor)
    memory.clear("GPU-0")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_instances_do_what_they_are_given_is_their_checkpoints(seed):
    """Real descriptors that say what they hold; instances that die anywhere, do over what they have, and need room."""
    chance, used = random.Random(seed), 0
    memory = GpuMemory(lambda _uuid: 16 * GRAIN - used)
    memory.add("GPU-0", 16 * GRAIN)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(60):
        name = chance.choice("abc")
        step = chance.choice((1, 2)) * GRAIN
        ranges = tuple((start, start + step) for start in range(0, 6 * GRAIN, step))
        used = memory.used("GPU-0")
        with socket.socket(fileno=memory.lease("GPU-0", name)) as sock:
            kept.send(sock, Want(ranges, chance.choice((0, 8, 20)) * GRAIN))
            memory._readable("GPU-0")
            have, fds = kept.receive(sock)
            for (start, end), fd in zip(have.ranges, fds, strict=True):
                assert os.pread(fd, 100, 0) == f"{name} {start} {end}".encode()
                os.close(fd)
            for start, end in ranges[: chance.randint(0, len(ranges))]:
                if (start, end) not in have.ranges or chance.random() < 0.1:
                    made = os.memfd_create("device")
                    os.write(made, f"{name} {start} {end}".encode())
                    kept.send(sock, Whole(start, end), [made])
                    os.close(made)
        memory.end("GPU-0")
        assert memory.used("GPU-0") <= 0.85 * 16 * GRAIN
        assert len(os.listdir("/proc/self/fd")) - before == len(memory._memory)
        if chance.random() < 0.05:
            memory.clear("GPU-0")
    memory.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_message_with_another_number_of_descriptors_is_an_error():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        kept.send(ours, Have(((0, 1), (1, 2))), [0])
        with pytest.raises(WireError, match="1 descriptors; expected: 2"):
            kept.receive(theirs)
