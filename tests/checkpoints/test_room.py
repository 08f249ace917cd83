"""Room on a full disk: what leaves for the next checkpoint, what stays, and that nothing partial is seen meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sllm_invoker.checkpoints import usage
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.room import Evicted, Room, stays
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.ingests import listing

from sllm_faas.errors import Conflict, SllmError, StorageFull
from tests.checkpoints.forks import Forks


def objects(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in (store.root / "objects").iterdir())


def leftovers(store: CheckpointStore) -> list[Path]:
    return [*(store.root / "tmp").iterdir(), *(store.root / "rooms").iterdir()]


def test_a_disk_that_may_hold_one_makes_room_for_the_next(store, model, size):
    told: list[Evicted] = []
    first = ingest(store, str(model("a")), "a", limit=size * 3 // 2, evicted=told.append).digest
    second = ingest(store, str(model("b")), "b", limit=size * 3 // 2, evicted=told.append).digest
    assert objects(store) == [second]
    assert [each.digest for each in told] == [first]
    assert told[0].bytes == pytest.approx(size, abs=100), "the manifest says its source"
    assert told[0].why.startswith("room for b")
    assert leftovers(store) == []
    with pytest.raises(SllmError, match="known names: b"):
        store.resolve("a")
    store.verify("b")


def test_nothing_leaves_when_all_together_would_not_be_enough(store, model, size):
    first = ingest(store, str(model("a")), "a").digest
    with pytest.raises(StorageFull, match=f"for b: it takes .* checkpoints may take {size // 2}"):
        ingest(store, str(model("b")), "b", limit=size // 2)
    assert objects(store) == [first]
    assert leftovers(store) == []


def test_nothing_leaves_for_what_is_brought_ahead_of_need(store, model, size):
    first, other = ingest(store, str(model("a")), "a", ahead=True).digest, str(model("b"))
    with pytest.raises(StorageFull, match="for b: it takes"):
        ingest(store, other, "b", limit=size * 3 // 2, ahead=True)
    assert objects(store) == [first]
    assert leftovers(store) == []
    second = ingest(store, other, "b", limit=size * 5 // 2, ahead=True).digest
    assert objects(store) == sorted([first, second])


def test_a_full_file_system_has_others_leave_too(store, model, size, monkeypatch):
    first = ingest(store, str(model("a")), "a").digest
    disk = shutil.disk_usage(store.root)

    def usage_of(_: object) -> object:
        return disk._replace(total=1000, free=size // 4 if first in objects(store) else 2 * size)

    monkeypatch.setattr(shutil, "disk_usage", usage_of)
    assert objects(store) == [first]
    second = ingest(store, str(model("b")), "b").digest
    assert objects(store) == [second]


def test_the_one_worth_least_leaves_and_that_is_known_after_a_restart(store, model, size):
    kept = ingest(store, str(model("a")), "a").digest
    left = ingest(store, str(model("b")), "b").digest
    asked = usage.read(store).records[kept].asked[0]
    for _ in range(50):
        usage.used(store, kept, size, asked)
    again = CheckpointStore(store.root)
    last = ingest(again, str(model("c")), "c", limit=size * 5 // 2).digest
    assert left not in objects(store)
    assert objects(store) == sorted([kept, last])


# -- what stays ----------------------------------------------------------------------------------------------


def _adapter(directory: Path) -> Path:
    directory.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.ones(2, 32), name.format("B"): torch.ones(32, 2)}
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return directory


def test_a_base_whose_adapter_is_in_use_stays_and_an_idle_one_does_not(store, model, size, tmp_path):
    base = ingest(store, str(model("a")), "a").digest
    adapter = ingest(store, str(_adapter(tmp_path / "adapter")), "adapter", base="a").digest
    with contextlib.closing(store.use(adapter)):
        with pytest.raises(StorageFull, match="the base of an adapter in use"):
            ingest(store, str(model("b")), "b", limit=size * 3 // 2)
        assert objects(store) == sorted([base, adapter])
    second = ingest(store, str(model("c")), "c", limit=size * 3 // 2).digest
    assert second in objects(store)
    assert base not in objects(store)


def _pinned(store: CheckpointStore, _source: Path) -> None:
    store.pin("a")


def _gone(_store: CheckpointStore, source: Path) -> None:
    shutil.rmtree(source)


def _touched(_store: CheckpointStore, source: Path) -> None:
    (source / "config.json").write_text((source / "config.json").read_text() + " ")


def _one_of_two_sources_gone(store: CheckpointStore, source: Path) -> None:
    other = Path(shutil.copytree(source, source.with_name("copy")))
    ingest(store, str(other), "copy")
    shutil.rmtree(other)


def _unrecorded(store: CheckpointStore, _source: Path) -> None:
    (store.root / "usage.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_pinned, "pinned"),
        (_gone, "is not there any more"),
        (_touched, "has changed"),
        (_one_of_two_sources_gone, "copy is not there any more"),
        (_unrecorded, "its source is not recorded"),
    ],
)
def test_what_may_not_leave_is_named_with_its_reason(store, model, size, change, why):
    source = model("a")
    first = ingest(store, str(source), "a").digest
    change(store, source)
    with pytest.raises(StorageFull, match=why):
        ingest(store, str(model("b")), "b", limit=size * 3 // 2)
    assert objects(store) == [first]
    (listed,) = listing(store)
    assert why in listed["stays"]


def test_what_another_version_of_transformers_made_stays(store, model, monkeypatch):
    digest = ingest(store, str(model("a")), "a").digest
    assert stays(store) == {}
    monkeypatch.setattr("sllm_invoker.checkpoints.room.version", lambda _: "0.1")
    assert "transformers" in stays(store)[digest]


def test_what_is_in_use_stays_and_is_not_removed_either_until_the_last_has_gone(store, model, size):
    first, second = model("a"), model("b")
    digest = ingest(store, str(first), "a").digest
    leases = [store.use(digest), CheckpointStore(store.root).use(digest)]
    for lease in leases:
        with pytest.raises(StorageFull, match="in use"):
            ingest(store, str(second), "b", limit=size * 3 // 2)
        with pytest.raises(Conflict, match="in use"):
            store.remove("a")
        lease.close()
    ingest(store, str(second), "b", limit=size * 3 // 2)
    assert digest not in objects(store)


# -- under way -----------------------------------------------------------------------------------------------


def test_what_others_were_promised_counts_until_they_have_ended(store, model, size):
    source = model("a")
    with Room(store, "other", limit=size * 3 // 2) as other:
        other.make(size)
        with pytest.raises(StorageFull):
            ingest(store, str(source), "a", limit=size * 3 // 2)
    (store.root / "rooms" / "dead").write_text(f"{size} \n")
    ingest(store, str(source), "a", limit=size * 3 // 2)
    assert leftovers(store) == []


def test_what_a_broken_fetch_left_goes_before_any_object(store, model, size):
    first = ingest(store, str(model("a")), "a").digest
    left = store.root / "downloads" / "left"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(bytes(size))
    second = ingest(store, str(model("b")), "b", limit=size * 5 // 2).digest
    assert objects(store) == sorted([first, second])
    assert not left.exists()


def test_an_ingest_that_meets_a_full_disk_makes_room_and_goes_on(store, model, monkeypatch):
    from sllm_invoker.checkpoints.part import _HashingWriter

    write, failed = _HashingWriter.write, []

    def once(self: _HashingWriter, data: memoryview) -> None:
        if not failed:
            failed.append(True)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(_HashingWriter, "write", once)
    ingest(store, str(model("a")), "a")
    store.verify("a")
    assert failed
    assert leftovers(store) == []


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.close()


@pytest.mark.e2e
async def test_an_ingest_killed_while_it_makes_room_shows_nothing_partial(forks, store, model, size):
    sources = [model("a"), model("b")]
    limit, chance = size * 3 // 2, random.Random(5)

    async def run(source: Path, die: int = 0) -> str | None:
        return await forks.run("ingest", root=store.root, source=source, name=source.name, die=die, limit=limit)

    await run(sources[0])
    counted = await run(sources[1])
    assert counted is not None
    for turn in range(8):
        source = sources[turn % 2]
        assert await run(source, chance.randint(1, int(counted.split()[1]) - 1)) is None, "it was to be killed"
        for digest in objects(store):
            store.verify(digest)
        again = await run(source)
        assert again is not None
        assert objects(store) == [again.split()[0]]
        with Room(store, "next") as room:
            room.make(0)
        assert leftovers(store) == []
