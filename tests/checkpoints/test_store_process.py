"""The store as a process: real descriptors, real readers, real deaths."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sllm_invoker.checkpoints import channel
from sllm_invoker.checkpoints.channel import Resident
from sllm_invoker.checkpoints.dram import DramTier
from sllm_invoker.checkpoints.object import CheckpointObject
from sllm_invoker.checkpoints.priority import Priority
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.checkpoints.store_process import Store
from sllm_invoker.containers.tree import Tree
from sllm_invoker.logs import LogBook
from sllm_invoker.memory_tier import MemoryTier, Opening
from sllm_invoker.requests import Requests

from sllm_faas.errors import CheckpointCorrupt, StorageFull
from sllm_faas.wire.codec import pack, unpack_as
from sllm_faas.wire.messages import Reply, Request
from tests.checkpoints.objects import checksum, make_object

READER = """
import mmap, os, sys, xxhash
from pathlib import Path
from sllm_invoker.checkpoints.object import open_object
from sllm_invoker.runner.weights import from_store
from sllm_faas.errors import SllmError

found = open_object(Path(sys.argv[2]))
try:
    weights = from_store(int(sys.argv[1]), found.part_path(), found.manifest.parts[0])
    at_once = weights.arrived
    weights.wait()
except SllmError as error:
    print("error", error.code, flush=True)
    sys.exit()
maps = Path("/proc/self/maps").read_text()
how = "at once" if at_once else "as it came"
print("attached", weights.tier, "slabs" if "sllm-slab" in maps else "file", flush=True)
for line in sys.stdin:
    match line.strip():
        case "sum":
            print(xxhash.xxh3_64_hexdigest(memoryview(weights.buffer)), flush=True)
        case "how":
            print(how, flush=True)
        case "close":
            os.closerange(3, 256)
            print("closed", flush=True)
        case "fork":
            print("forked", os.fork() or sys.stdin.read(), flush=True)
        case "write":
            memoryview(weights.buffer).cast("B")[5000:5004] = b"mine"
            print("written", flush=True)
"""


class Reader:
    """A process that attaches a checkpoint, as a container would."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pid = process.pid

    async def hear(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 30)).decode().strip()

    async def say(self, what: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n".encode())
        return await self.hear()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


class Node:
    def __init__(self, tier: MemoryTier) -> None:
        self.tier = tier
        self.readers: list[Reader] = []

    def open(self, checkpoint: CheckpointObject) -> Opening:
        return self.tier.open(checkpoint.digest, checkpoint.directory)

    async def attach(self, checkpoint: CheckpointObject) -> Reader:
        opening = self.open(checkpoint)
        try:
            return await self.reader(opening, checkpoint)
        finally:
            opening.close()

    async def reader(self, opening: Opening, checkpoint: CheckpointObject) -> Reader:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", READER, str(opening.channel), str(checkpoint.directory),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, pass_fds=(opening.channel,),
        )  # fmt: skip
        self.readers.append(Reader(process))
        return self.readers[-1]

    async def residents(self) -> dict[str, Resident]:
        return {each.digest: each for each in (await self.tier.look()).residents}

    async def until(self, holds: Callable[[dict[str, Resident]], bool]) -> None:
        """The store learns of deaths on its own: ask until it has."""
        async with asyncio.timeout(30):
            while not holds(await self.residents()):
                await asyncio.sleep(0)

    async def until_leases(self, checkpoint: CheckpointObject, count: int) -> None:
        await self.until(lambda residents: residents[checkpoint.digest].leases == count)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """Room for two slabs of 16 MiB."""
    options = ("--slab-mb", "16", "--small-mb", "1")
    readers: list[Reader] = []
    tier = MemoryTier(tmp_path, 32, Tree(tmp_path), users=lambda _: [reader.pid for reader in readers], options=options)
    tier.start()
    made = Node(tier)
    made.readers = readers
    yield made
    for reader in readers:
        await reader.kill()
    await tier.close()


@pytest.fixture
def a(tmp_path: Path) -> CheckpointObject:
    return make_object(tmp_path, 1, 20 << 20)


@pytest.fixture
def b(tmp_path: Path) -> CheckpointObject:
    return make_object(tmp_path, 2, 20 << 20)


async def test_a_reader_gets_the_checkpoint_from_disk_and_the_next_from_memory(node, a):
    opening = node.open(a)
    first = await node.reader(opening, a)
    loaded = await opening.loaded
    opening.close()
    assert (loaded.tier, loaded.bytes) == ("disk", a.manifest.total_bytes)
    assert (await first.hear()).startswith("attached")
    again = node.open(a)
    second = await node.reader(again, a)
    assert (await again.loaded).tier == "dram"
    again.close()
    assert await second.hear() == "attached dram slabs"
    assert await second.say("how") == "at once", "nothing of it has to be waited for while it is computed with"
    for reader in (first, second):
        assert await reader.say("sum") == checksum(a)


async def test_a_write_of_one_reader_is_not_seen_by_another(node, a):
    first, second = await node.attach(a), await node.attach(a)
    await first.hear()
    await second.hear()
    await first.say("write")
    assert await first.say("sum") != checksum(a)
    assert await second.say("sum") == checksum(a)


async def test_a_lease_ends_with_its_process(node, a):
    reader = await node.attach(a)
    await reader.hear()
    assert (await node.residents())[a.digest].leases == 1
    await reader.kill()
    await node.until_leases(a, 0)


async def test_a_channel_that_nobody_ever_used_holds_nothing(node, a):
    opening = node.open(a)
    await opening.loaded
    opening.close()
    await node.until_leases(a, 0)


async def test_memory_under_a_live_reader_is_not_reused_though_it_dropped_its_channel(node, a, b):
    reader = await node.attach(a)
    await reader.hear()
    await reader.say("close")
    await node.until_leases(a, 0)
    other = await node.attach(b)
    assert (await other.hear()).endswith("file"), "there is no memory that nobody maps"
    assert await other.say("sum") == checksum(b)
    assert await reader.say("sum") == checksum(a)


async def test_a_child_that_a_reader_forked_counts_like_the_reader(node, a, b):
    reader = await node.attach(a)
    await reader.hear()
    child = int((await reader.say("fork")).split()[1])
    os.kill(reader.pid, signal.SIGKILL)
    try:
        assert (await node.residents())[a.digest].leases == 1
        other = await node.attach(b)
        assert (await other.hear()).endswith("file")
        await other.kill()
        assert (await node.residents())[a.digest].leases == 1
    finally:
        os.kill(child, signal.SIGKILL)
    await node.until_leases(a, 0)
    assert (await (await node.attach(b)).hear()).endswith("slabs")


async def test_killing_the_store_harms_no_reader_and_loses_no_memory(node, a, b):
    reader = await node.attach(a)
    await reader.hear()
    await node.tier.look()  # by now the invoker keeps the slabs
    first = node.tier.pid
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(30):
        while node.tier.pid in (first, 0):
            await asyncio.sleep(0)
    assert await reader.say("sum") == checksum(a)
    assert (await node.residents())[a.digest].leases == 1, "the new life does not know its reader"
    again = await node.attach(a)
    assert await again.hear() == "attached dram slabs"
    assert await again.say("sum") == checksum(a)
    await again.kill()
    await reader.kill()
    await node.until_leases(a, 0)
    other = await node.attach(b)  # takes the place of what was adopted
    assert (await other.hear()).endswith("slabs")
    assert await other.say("sum") == checksum(b)


async def test_a_store_killed_while_it_reads_leaves_the_reader_the_file(node, a):
    opening = node.open(a)
    os.kill(node.tier.pid, signal.SIGKILL)
    reader = await node.reader(opening, a)
    opening.close()
    assert (await reader.hear()).endswith("file")
    assert await reader.say("sum") == checksum(a)


async def test_a_changed_byte_is_refused_before_it_is_used_and_others_are_served(node, a, b):
    data = bytearray(a.part_path().read_bytes())
    data[12_345_678] ^= 4
    a.part_path().write_bytes(data)
    opening = node.open(a)
    reader = await node.reader(opening, a)
    with pytest.raises(CheckpointCorrupt, match="chunk 0"):
        await opening.loaded
    opening.close()
    assert await reader.hear() == "error checkpoint_corrupt"
    await reader.kill()
    await node.until(lambda residents: a.digest not in residents)  # it knows that nobody maps it any more
    assert (await (await node.attach(b)).hear()).endswith("slabs")
    assert a.digest not in await node.residents()


async def test_a_prefetch_leaves_it_in_memory_and_unleased(node, a):
    opening = node.tier.open(a.digest, a.directory, prefetch=True)
    assert (await opening.loaded).tier == "disk"
    assert (await node.residents())[a.digest].leases == 0
    assert await (await node.attach(a)).hear() == "attached dram slabs"


async def test_a_pinned_checkpoint_stays(node, a, b, tmp_path):
    await node.tier.open(a.digest, a.directory, prefetch=True).loaded
    (tmp_path / "pins").mkdir()
    (tmp_path / "pins" / a.digest).touch()
    assert (await (await node.attach(b)).hear()).endswith("file")
    assert a.digest in await node.residents()


async def test_the_node_tells_what_is_whole_in_memory_and_what_has_left_it(node, a, b):
    opening = node.tier.open(a.digest, a.directory, prefetch=True)
    assert node.tier.resident() == ()
    await opening.loaded
    await node.tier.look()
    assert node.tier.resident() == (a.digest,)
    await node.tier.open(b.digest, b.directory, prefetch=True).loaded
    await node.tier.look()
    assert node.tier.resident() == (b.digest,)


async def test_a_listing_tells_what_is_in_memory_and_removing_frees_it(node, a, b, tmp_path):
    store = CheckpointStore(tmp_path)
    on_gpu: list[str] = []
    requests = Requests(
        LogBook(tmp_path / "logs", "n"),
        store,
        node.tier,
        lambda: node.tier.forget(a.digest),
        lambda: None,
        lambda: on_gpu,
    )

    async def ask(op: str, body: dict[str, str]) -> dict[str, Any]:
        answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        requests.on_request(b"gateway", Request(op, pack(body)), answered.set_result)
        return unpack_as(dict[str, Any], (await answered).body)

    reader = await node.attach(a)
    await reader.hear()
    await node.tier.look()
    listed = {item["digest"]: item for item in (await ask("checkpoint.list", {}))["checkpoints"]}
    size = a.manifest.total_bytes
    assert [listed[a.digest][key] for key in ("tier", "leases", "loaded", "bytes")] == ["dram", 1, size, size]
    assert [listed[b.digest][key] for key in ("tier", "leases", "loaded")] == ["disk", 0, 0]
    on_gpu.append(a.digest)
    listed = {item["digest"]: item for item in (await ask("checkpoint.list", {}))["checkpoints"]}
    assert [(listed[each.digest]["tier"], listed[each.digest]["loaded"]) for each in (a, b)] == [
        ("gpu", size),
        ("disk", 0),
    ]
    await reader.kill()
    await node.until_leases(a, 0)
    await ask("checkpoint.rm", {"ref": a.digest})
    await node.tier.look()
    assert node.tier.resident() == ()
    assert [item["digest"] for item in (await ask("checkpoint.list", {}))["checkpoints"]] == [b.digest]
    requests.close()


async def test_memory_that_is_not_granted_is_given_back_and_not_taken_again_by_a_new_life(node, a):
    opening = node.tier.open(a.digest, a.directory, prefetch=True)
    await opening.loaded
    node.tier.grant(0)
    assert (await node.tier.look()).slabs == 0
    os.kill(node.tier.pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        while not node.tier.pid or node.tier.resident():
            await asyncio.sleep(0)
    reader = await node.attach(a)
    assert (await reader.hear()).endswith("file")


async def test_the_store_is_told_that_somebody_waits_for_what_it_reads(node, a, monkeypatch, tmp_path):
    told: queue.Queue[tuple[int, int]] = queue.Queue()
    monkeypatch.setattr(DramTier, "hasten", lambda _, request, priority: told.put((request, priority)))
    ours, theirs = channel.pair()
    serving = threading.Thread(target=Store(theirs, tmp_path, 0).run)
    serving.start()
    channel.send(ours, channel.Hasten(7, Priority.WAITED))
    assert await asyncio.to_thread(told.get, timeout=30) == (7, 1)
    ours.close()
    await asyncio.to_thread(serving.join, 30)


async def test_a_promotion_is_told_whether_it_came_into_memory(node, a, b):
    loaded = await node.tier.promote(a.digest, a.directory).loaded
    assert (loaded.tier, loaded.bytes) == ("disk", a.manifest.total_bytes)
    with pytest.raises(StorageFull):
        await node.tier.promote(b.digest, b.directory).loaded
    assert (await node.residents())[a.digest].leases == 0
