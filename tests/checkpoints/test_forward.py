"""What an ingest writes is in memory when it is on disk: forwarded in the same pass, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sllm_invoker.checkpoints.forward import Forward
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.object import CheckpointObject
from sllm_invoker.checkpoints.store import CheckpointStore

from sllm_faas.errors import StorageFull
from tests.checkpoints.faults import PAGE_CACHE, SLABS, Node, node
from tests.checkpoints.forks import Forks
from tests.checkpoints.objects import checksum, make_object

SLAB = 16 << 20


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks(models=False)
    yield made
    made.close()


@pytest.fixture
async def here(forks: Forks, tmp_path: Path) -> AsyncIterator[Node]:
    """Room for three slabs of 16 MiB."""
    async with node(tmp_path / "store", forks, 48, SLABS) as made:
        yield made


@pytest.fixture
def a(store: CheckpointStore) -> CheckpointObject:
    return make_object(store.root, 1, 20 << 20)


@pytest.fixture
def b(store: CheckpointStore) -> CheckpointObject:
    return make_object(store.root, 2, 40 << 20)


def feed(here: Node) -> Forward:
    end = here.tier.feed()
    assert end is not None
    return Forward(end)


def fill(forward: Forward, checkpoint: CheckpointObject) -> bool:
    """Do as the writer of this object does; False where it is not forwarded."""
    content = checkpoint.part_path().read_bytes()
    views = forward.memory(len(content))
    for index, view in enumerate(views):
        piece = content[index * SLAB : (index + 1) * SLAB]
        view[: len(piece)] = piece
    return bool(views)


def write(here: Node, checkpoint: CheckpointObject, *, size: int = 0) -> bool:
    """All of what an ingest says to the store; whether that took it."""
    with feed(here) as forward:
        forward.expect(checkpoint.manifest.total_bytes)
        fill(forward, checkpoint)
        size = size or checkpoint.manifest.total_bytes
        return forward.hand_over(checkpoint.digest, checkpoint.directory, size)


async def written(here: Node, checkpoint: CheckpointObject, *, size: int = 0) -> bool:
    return await asyncio.to_thread(write, here, checkpoint, size=size)


async def seen_by_a_reader(here: Node, checkpoint: CheckpointObject) -> tuple[str | None, str | None]:
    """Where it is mapped from, and the checksum of what is there."""
    reader = await here.start("attach", checkpoint)
    return await reader.hear(), await reader.ask("sum")


async def test_what_is_handed_over_is_attached_without_a_read(here, a):
    assert await written(here, a)
    loaded = await here.tier.open(a.digest, a.directory, prefetch=True).loaded
    assert (loaded.tier, loaded.bytes) == ("dram", 0)
    assert await seen_by_a_reader(here, a) == ("slabs", checksum(a))


async def test_what_was_handed_over_outlives_the_store_process(here, a):
    assert await written(here, a)
    await here.tier.look()  # by now the invoker keeps the slabs
    os.kill(here.tier.pid, signal.SIGKILL)
    await here.residents()
    assert await seen_by_a_reader(here, a) == ("slabs", checksum(a))


async def test_the_writer_maps_nothing_of_it_any_more(here, a):
    with feed(here) as forward:
        await asyncio.to_thread(forward.expect, a.manifest.total_bytes)
        assert "sllm-slab" in Path("/proc/self/maps").read_text()
        fill(forward, a)
        assert await asyncio.to_thread(forward.hand_over, a.digest, a.directory, a.manifest.total_bytes)
        assert "sllm-slab" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("off", [-4096, -SLAB, 1, SLAB])
async def test_another_size_than_the_objects_is_refused_and_the_disk_is_read(here, a, off):
    assert not await written(here, a, size=a.manifest.total_bytes + off)
    assert await here.residents() == {}
    loaded = await here.tier.open(a.digest, a.directory, prefetch=True).loaded
    assert (loaded.tier, loaded.bytes) == ("disk", a.manifest.total_bytes)


async def test_nothing_is_evicted_for_it(here, a, b):
    await here.tier.open(a.digest, a.directory, prefetch=True).loaded
    assert not await written(here, b), "two of three slabs are taken, and it needs three"
    assert set(await here.residents()) == {a.digest}


async def test_a_load_that_finds_no_room_beside_it_goes_through_the_page_cache(here, a, b):
    with feed(here) as forward:
        await asyncio.to_thread(forward.expect, b.manifest.total_bytes)
        fill(forward, b)
        await here.tier.open(a.digest, a.directory, prefetch=True).loaded
        assert await asyncio.to_thread(forward.hand_over, b.digest, b.directory, b.manifest.total_bytes)
    assert set(await here.residents()) == {b.digest}
    assert await seen_by_a_reader(here, b) == ("slabs", checksum(b))


async def test_what_is_lent_is_not_taken_by_a_promotion_and_comes_back_with_the_channel(here, a, b):
    with feed(here) as forward:
        await asyncio.to_thread(forward.expect, b.manifest.total_bytes)
        assert fill(forward, b)
        with pytest.raises(StorageFull):
            await here.tier.promote(a.digest, a.directory).loaded
    await until_promoted(here, a)


async def test_slabs_that_wait_to_be_used_are_those_that_are_written_to(here, a, b):
    here.tier.expect(a.manifest.total_bytes)
    assert (await here.tier.look()).free == 2
    with feed(here) as forward:
        await asyncio.to_thread(forward.expect, b.manifest.total_bytes)
        seen = await here.tier.look()
        assert (seen.slabs, seen.free, seen.residents) == (3, 0, ())


async def test_more_than_was_expected_is_asked_for_again(here, b):
    with feed(here) as forward:
        await asyncio.to_thread(forward.expect, 1)
        assert await asyncio.to_thread(fill, forward, b)
        assert await asyncio.to_thread(forward.hand_over, b.digest, b.directory, b.manifest.total_bytes)


@pytest.mark.parametrize(("limit", "options"), [(0, SLABS), (48, PAGE_CACHE)])
async def test_where_checkpoints_stay_in_the_page_cache_nothing_is_forwarded(forks, tmp_path, a, limit, options):
    async with node(tmp_path / "other", forks, limit, options) as here:
        assert not await written(here, a)
        assert (await here.tier.look()).slabs == 0


async def test_a_store_that_dies_meanwhile_ends_the_forwarding_and_nothing_else(here, a):
    with feed(here) as forward:
        await asyncio.to_thread(forward.expect, a.manifest.total_bytes)
        os.kill(here.tier.pid, signal.SIGKILL)
        assert fill(forward, a)
        assert not await asyncio.to_thread(forward.hand_over, a.digest, a.directory, a.manifest.total_bytes)
        assert forward.memory(1) == []
    assert await here.residents() == {}


async def until_promoted(here: Node, checkpoint: CheckpointObject) -> None:
    """The store learns of ends on its own: ask until it has."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(StorageFull):
                await here.tier.promote(checkpoint.digest, checkpoint.directory).loaded
                return


# -- ingests -------------------------------------------------------------------------------------------------


async def test_an_ingest_forwards_what_it_writes(here, store, source):
    with feed(here) as forward:
        digest = (await asyncio.to_thread(ingest, store, str(source), "tiny", forward=forward)).digest
    tiny = store.verify(digest)
    loaded = await here.tier.open(digest, tiny.directory, prefetch=True).loaded
    assert (loaded.tier, loaded.bytes) == ("dram", 0)
    assert await seen_by_a_reader(here, tiny) == ("slabs", checksum(tiny))


async def test_a_known_source_is_forwarded_by_nobody(here, store, source):
    ingest(store, str(source), "tiny")
    with feed(here) as forward:
        assert (await asyncio.to_thread(ingest, store, str(source), "again", forward=forward)).known
    assert await here.residents() == {}


def test_what_lies_in_memory_is_the_file_across_slabs_and_chunks(store, source, monkeypatch):
    for module in ("object", "part"):
        monkeypatch.setattr(f"sllm_invoker.checkpoints.{module}.CHUNK_BYTES", 4096)
    monkeypatch.setattr("sllm_invoker.checkpoints.object.chunks_of.__defaults__", (4096,))
    slabs: list[bytearray] = []

    class Memory:
        def expect(self, size: int) -> None:
            assert size == (source / "model.safetensors").stat().st_size

        def memory(self, size: int) -> list[memoryview]:
            slabs.extend(bytearray(8192) for _ in range(-(-size // 8192)))
            return [memoryview(slab) for slab in slabs]

        def hand_over(self, digest: str, directory: Path, size: int) -> bool:
            assert (directory, size) == (store.path(digest), store.get(digest).manifest.total_bytes)
            return True

    found = store.verify(ingest(store, str(source), "tiny", forward=Memory()).digest)
    assert len(slabs) > 10
    assert b"".join(slabs)[: found.manifest.total_bytes] == found.part_path().read_bytes()


@pytest.mark.e2e
async def test_an_ingest_killed_anywhere_leaves_nothing_in_memory_that_is_not_whole_on_disk(store, source, tmp_path, b):
    chance, models = random.Random(1), Forks()
    try:
        async with node(tmp_path / "node", models, 48, SLABS) as here:

            async def run(die: int = 0) -> str | None:
                end = here.tier.feed()
                assert end is not None
                with end:
                    return await models.run(
                        "ingest", root=store.root, source=source, name="tiny", die=die, channel=end.fileno()
                    )

            whole = await run()
            assert whole is not None
            digest, events = whole.split()
            for _ in range(5):
                assert set(await here.residents()) == {digest}
                here.tier.forget(digest)
                store.remove(digest)
                assert await run(chance.randint(1, int(events) - 1)) is None, "it was to be killed"
                for resident in await here.residents():
                    store.verify(resident)
                here.tier.forget(digest)
                await until_promoted(here, b)  # all the room there is: none is lent any more
                here.tier.forget(b.digest)
                if store.path(digest).exists():
                    store.remove(digest)
                assert await run() is not None
            tiny = store.get(digest)
            assert await seen_by_a_reader(here, tiny) == ("slabs", checksum(tiny))
    finally:
        models.close()
