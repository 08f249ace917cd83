"""The DRAM tier without its process: what is read, shared, evicted and given up."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sllm_invoker.checkpoints.dram import DramTier, Load
from sllm_invoker.checkpoints.object import CHUNK_BYTES, CheckpointObject
from sllm_invoker.checkpoints.priority import Priority
from sllm_invoker.checkpoints.reader import DirectFile
from sllm_invoker.checkpoints.slab_book import Residence

from sllm_faas.errors import (
    Cancelled,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointUnavailable,
    StorageFull,
)
from tests.checkpoints.objects import make_object

SLAB = CHUNK_BYTES


class Tier:
    """A tier whose thread is the test's: `until` runs what it posts."""

    def __init__(self, slabs: int, gated: bool = False) -> None:
        self.posted: queue.Queue[Callable[[], None]] = queue.Queue()
        self.ended: list[tuple[Load, Exception | None]] = []
        self.dropped: list[int] = []
        self.pins: set[str] = set()
        self.gate = threading.Semaphore(0 if gated else 10**6)
        self.opened: list[str] = []
        self.tier = DramTier(
            slabs * SLAB,
            self.posted.put,
            slab_bytes=SLAB,
            small=1 << 20,
            pinned=lambda: self.pins,
            open_file=self._open,
            on_done=lambda load, _report, error: self.ended.append((load, error)),
            on_drop=self.dropped.append,
        )

    def _open(self, path: Path) -> DirectFile:
        self.opened.append(path.parent.name)
        tier = self

        class Gated(DirectFile):
            def read(self, view: memoryview, offset: int) -> int:
                tier.gate.acquire()
                return super().read(view, offset)

        return Gated(path)

    def open(self, checkpoint: CheckpointObject, holder: str, priority: int = Priority.WAITED) -> Load | Residence:
        return self.tier.open(checkpoint.digest, checkpoint.directory, holder, priority)

    def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self.posted.get(timeout=30)()

    def have(self, checkpoint: CheckpointObject, holder: str) -> Load | Residence:
        found = self.open(checkpoint, holder)
        self.until(lambda: checkpoint.digest not in self.tier.loads)
        return found

    def bytes_of(self, checkpoint: CheckpointObject) -> bytes:
        residence = self.tier.book.find(checkpoint.digest)
        assert residence is not None
        return b"".join(slab.view for slab in self.tier.slabs(residence))[: checkpoint.manifest.total_bytes]


@pytest.fixture
def make() -> Iterator[Callable[..., Tier]]:
    made: list[Tier] = []

    def build(slabs: int, gated: bool = False) -> Tier:
        made.append(Tier(slabs, gated))
        return made[-1]

    yield build
    for tier in made:
        tier.gate.release(10**6)
        tier.tier.close()


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[CheckpointObject]:
    root = tmp_path_factory.mktemp("root")
    return [make_object(root, seed, 20 << 20) for seed in range(3)]  # two slabs each


def test_a_checkpoint_is_read_once_and_then_found(make, objects):
    tier, a = make(4), objects[0]
    assert isinstance(tier.have(a, "1"), Load)
    assert tier.bytes_of(a) == a.part_path().read_bytes()
    assert isinstance(tier.open(a, "2"), Residence)
    assert tier.opened == [a.digest]


def test_slabs_that_a_read_had_to_fault_are_made_ready_behind_it(make, objects, monkeypatch):
    tier, a = make(4), objects[0]
    warmed: list[int] = []
    monkeypatch.setattr(tier.tier.pool, "warm", lambda slab: warmed.append(slab.number))
    tier.have(a, "1")
    residence = tier.tier.book.find(a.digest)
    assert residence is not None
    assert set(residence.slabs) <= set(warmed)


def test_those_who_ask_while_it_is_read_share_the_read(make, objects):
    tier, a = make(4, gated=True), objects[0]
    assert tier.open(a, "1") is tier.open(a, "2", priority=7)
    assert tier.tier.loads[a.digest].reading.priority == 7
    tier.gate.release(2)
    tier.until(lambda: tier.ended)
    assert tier.opened == [a.digest]


def test_a_read_that_nobody_waits_for_any_more_is_cancelled(make, objects):
    tier, a = make(4, gated=True), objects[0]
    tier.open(a, "1")
    tier.open(a, "2")
    tier.tier.gone("1")
    tier.tier.gone("2")
    tier.gate.release(2)
    tier.until(lambda: tier.ended)
    assert isinstance(tier.ended[0][1], Cancelled)
    assert tier.tier.book.held == 0


def test_who_wants_it_again_while_the_read_is_being_cancelled_gets_a_read_of_its_own(make, objects):
    tier, a = make(4, gated=True), objects[0]
    first = tier.open(a, "1")
    tier.tier.gone("1")
    second = tier.open(a, "2")
    assert second is not first
    tier.gate.release(4)
    tier.until(lambda: len(tier.ended) == 2)
    ends = {id(load): error for load, error in tier.ended}
    assert isinstance(ends[id(first)], Cancelled)
    assert ends[id(second)] is None
    assert tier.bytes_of(a) == a.part_path().read_bytes()


def test_a_read_that_ends_as_the_last_who_waited_leaves_keeps_no_memory(make, objects):
    tier, (a, b, _) = make(2), objects
    load = tier.open(a, "1")
    load.reading.done.result(timeout=30)  # and the tier has not heard of it yet
    tier.tier.gone("1")
    tier.until(lambda: tier.ended)
    assert isinstance(tier.ended[0][1], Cancelled)
    assert tier.tier.book.held == 0
    tier.have(b, "2")
    assert tier.bytes_of(b) == b.part_path().read_bytes()


def test_one_of_two_who_wait_may_leave(make, objects):
    tier, a = make(4, gated=True), objects[0]
    tier.open(a, "1")
    tier.open(a, "2")
    tier.tier.gone("1")
    tier.gate.release(2)
    tier.until(lambda: tier.ended)
    assert tier.ended[0][1] is None


def test_room_is_made_by_evicting_what_nobody_uses(make, objects):
    tier, (a, b, _) = make(2), objects
    first = tier.have(a, "1")
    tier.tier.gone("1")
    tier.have(b, "2")
    assert tier.bytes_of(b) == b.part_path().read_bytes()
    assert tier.dropped == [first.residence.number]
    assert tier.tier.book.find(a.digest) is None


def test_without_room_the_page_cache_serves(make, objects):
    """What is leased or pinned is not evicted for it, and whoever asked gets its checkpoint all the same."""
    tier, (a, b, c) = make(2), objects
    tier.have(a, "1")
    load = tier.have(b, "2")
    assert isinstance(load, Load)
    assert load.residence is None
    assert tier.ended[-1] == (load, None)
    tier.tier.gone("1")
    tier.pins = {a.digest}
    assert tier.have(c, "3").residence is None


def test_with_no_memory_at_all_the_page_cache_serves(make, objects):
    tier = make(0)
    assert tier.have(objects[0], "1").residence is None


def test_slabs_still_mapped_by_someone_are_not_written_to(make, objects):
    tier, (a, b, _) = make(2), objects
    load = tier.have(a, "1")
    tier.tier.book.map(load.residence.number, "1")
    tier.tier.release("1")
    assert tier.have(b, "2").residence is None
    tier.tier.gone("1")
    tier.tier.gone("2")
    assert tier.have(b, "3").residence is not None


def test_a_corrupt_checkpoint_leaves_nothing_behind_and_harms_no_other(make, objects, tmp_path):
    tier, bad = make(4), make_object(tmp_path, 77, 20 << 20)
    data = bytearray(bad.part_path().read_bytes())
    data[-1] ^= 1
    bad.part_path().write_bytes(data)
    tier.open(bad, "1")
    tier.open(objects[0], "2")
    tier.until(lambda: len(tier.ended) == 2)
    errors = {load.digest: error for load, error in tier.ended}
    assert isinstance(errors[bad.digest], CheckpointCorrupt)
    assert errors[objects[0].digest] is None
    assert tier.tier.book.find(bad.digest) is None
    assert tier.tier.book.held == 2


def test_an_object_that_is_not_there_is_unavailable(make, tmp_path):
    with pytest.raises(CheckpointUnavailable):
        make(2).tier.open("f" * 64, tmp_path / "nothing", "1")


def test_memory_is_prepared_for_the_largest_checkpoint_expected(make):
    tier = make(4)
    tier.tier.expect(3 * SLAB - 5)
    assert len(tier.tier.book.free) == 3
    tier.tier.expect(9 * SLAB)  # can never fit: nothing is made ready for it
    assert len(tier.tier.pool.slabs) == 3


def test_a_removed_object_gives_its_memory_back(make, objects):
    tier, a = make(2), objects[0]
    tier.have(a, "1")
    tier.tier.forget(a.digest)
    assert tier.tier.book.find(a.digest) is not None, "it is in use"
    tier.tier.gone("1")
    tier.tier.forget(a.digest)
    assert len(tier.tier.book.free) == 2


# -- before anybody asks ---------------------------------------------------------------------------------------


def promote(tier: Tier, checkpoint: CheckpointObject) -> Load | None:
    return tier.tier.promote(checkpoint.digest, checkpoint.directory, "promotion")


def test_a_promoted_checkpoint_is_in_memory_when_it_is_asked_for(make, objects):
    tier, a = make(2), objects[0]
    assert promote(tier, a) is not None
    tier.until(lambda: tier.ended)
    assert isinstance(tier.open(a, "1"), Residence)
    assert tier.bytes_of(a) == a.part_path().read_bytes()
    assert tier.opened == [a.digest]


def test_a_promotion_takes_no_room_that_another_has(make, objects):
    tier, (a, b, _) = make(2), objects
    tier.have(a, "1")
    tier.tier.gone("1")
    assert promote(tier, b) is None
    assert tier.bytes_of(a) == a.part_path().read_bytes()


def test_what_was_promoted_and_never_asked_for_leaves_first(make, objects):
    tier, (a, b, c) = make(4), objects
    tier.have(a, "1")
    tier.tier.gone("1")
    promote(tier, b)
    tier.until(lambda: len(tier.ended) == 2)
    tier.tier.gone("promotion")
    tier.have(c, "2")
    assert tier.tier.book.find(a.digest) is not None
    assert tier.tier.book.find(b.digest) is None


def test_what_somebody_waits_for_is_read_before_what_is_ahead_of_need_and_promotions_last(make, objects):
    tier, (a, b, c) = make(6, gated=True), objects
    promoted = promote(tier, a)
    ahead = tier.open(b, "1", Priority.AHEAD)
    waited = tier.open(c, "2", Priority.WAITED)
    assert promoted.reading.priority < ahead.reading.priority < waited.reading.priority
    tier.open(a, "3", Priority.AHEAD)
    assert promoted.reading.priority == ahead.reading.priority, "an instance starts with it now"
    tier.open(a, "4", Priority.WAITED)
    assert promoted.reading.priority == waited.reading.priority, "somebody waits for it now"
    tier.open(a, "5", Priority.AHEAD)
    assert promoted.reading.priority == waited.reading.priority, "still"


def test_a_read_is_hastened_by_the_request_it_was_begun_for(make, objects):
    tier, (a, b, _) = make(4, gated=True), objects
    reads = [tier.open(each, "1", Priority.AHEAD) for each in (a, b)]
    for number, load in enumerate(reads):
        load.requests.append(number)
    tier.tier.hasten(1, Priority.WAITED)
    tier.tier.hasten(2, Priority.WAITED)
    assert [load.reading.priority for load in reads] == [Priority.AHEAD, Priority.WAITED]


def test_a_load_that_finds_no_room_beside_a_promotion_cancels_it(make, objects):
    tier, (a, b, c) = make(2, gated=True), objects
    promote(tier, a)
    tier.open(b, "1")  # through the page cache: the memory is being written to
    tier.gate.release(10**6)
    tier.until(lambda: len(tier.ended) == 2)
    assert {load.digest: type(error) for load, error in tier.ended} == {a.digest: Cancelled, b.digest: type(None)}
    tier.have(c, "2")
    assert tier.bytes_of(c) == c.part_path().read_bytes()


# -- filled by an ingest ---------------------------------------------------------------------------------------


def lend(tier: Tier, slabs: int, holder: str = "ingest") -> bool:
    return bool(tier.tier.lend(holder, slabs * SLAB))


def write(tier: Tier, checkpoint: CheckpointObject) -> Residence:
    """Do as an ingest does."""
    content = checkpoint.part_path().read_bytes()
    for index, slab in enumerate(tier.tier.lend("ingest", len(content))):
        piece = content[index * SLAB : (index + 1) * SLAB]
        slab.view[: len(piece)] = piece
    return tier.tier.take("ingest", checkpoint.digest, checkpoint.directory, len(content))


def test_what_an_ingest_wrote_is_found_without_a_read(make, objects):
    tier, a = make(2), objects[0]
    write(tier, a)
    assert isinstance(tier.open(a, "1"), Residence)
    assert tier.bytes_of(a) == a.part_path().read_bytes()
    assert tier.opened == []


def test_what_an_ingest_wrote_and_nobody_asked_for_leaves_first_and_its_memory_is_used_again(make, objects):
    tier, (a, b, c) = make(4), objects
    tier.have(b, "1")
    tier.tier.gone("1")
    slabs = set(write(tier, a).slabs)
    tier.have(c, "2")
    assert tier.tier.book.find(a.digest) is None
    assert tier.tier.book.find(b.digest) is not None
    assert set(tier.tier.book.find(c.digest).slabs) == slabs
    assert tier.bytes_of(c) == c.part_path().read_bytes()


def test_slabs_are_lent_only_where_they_are_nobodys(make, objects):
    tier, (a, b, _) = make(4), objects
    tier.have(a, "1")
    assert not lend(tier, 3)
    assert lend(tier, 2)
    assert not lend(tier, 1, "another")
    assert promote(tier, b) is None
    assert lend(tier, 1), "in place of what it had"
    tier.tier.give_back("ingest")
    assert promote(tier, b) is not None


def test_slabs_that_readers_had_make_way_for_new_ones_before_any_is_lent(make, objects):
    tier, (a, b, _) = make(2), objects
    tier.have(a, "1")
    had = set(tier.tier.pool.slabs)
    tier.tier.gone("1")
    tier.tier.forget(a.digest)
    assert len(tier.tier.book.free) == 2
    write(tier, b)
    assert had.isdisjoint(tier.tier.pool.slabs), "they are sealed: no other process could map them to write"
    assert len(tier.tier.pool.slabs) == 2


def test_slabs_that_were_made_ready_are_the_first_to_be_lent(make):
    tier = make(4)
    tier.tier.expect(2 * SLAB)
    ready = set(tier.tier.book.free)
    assert {slab.number for slab in tier.tier.lend("ingest", 2 * SLAB)} == ready


def test_what_is_not_the_objects_size_is_not_taken_and_its_slabs_are_free(make, objects):
    tier, a = make(4), objects[0]
    size = a.manifest.total_bytes
    for lent, said in ((size, size - 1), (size - 1, size), (size - 1, size - 1), (size + SLAB, size + SLAB), (0, size)):
        tier.tier.lend("ingest", lent)
        with pytest.raises(CheckpointError, match="are not checkpoint"):
            tier.tier.take("ingest", a.digest, a.directory, said)
        assert tier.tier.book.held == 0


def test_what_was_read_meanwhile_is_not_taken(make, objects):
    tier, a = make(4), objects[0]
    assert tier.tier.lend("ingest", a.manifest.total_bytes)
    tier.have(a, "1")
    with pytest.raises(StorageFull, match="already"):
        tier.tier.take("ingest", a.digest, a.directory, a.manifest.total_bytes)
    assert tier.tier.book.held == 2


def test_what_was_written_while_the_limit_fell_leaves_at_once(make, objects):
    tier, a = make(2), objects[0]
    assert tier.tier.lend("ingest", a.manifest.total_bytes)
    tier.tier.limit(0)
    assert len(tier.tier.pool.slabs) == 2, "somebody writes to them"
    tier.tier.take("ingest", a.digest, a.directory, a.manifest.total_bytes)
    assert not tier.tier.pool.slabs


# -- a limit that changes --------------------------------------------------------------------------------------


def test_under_a_lower_limit_what_nobody_uses_gives_its_memory_back(make, objects):
    tier, (a, b, _) = make(4), objects
    tier.have(a, "1")
    tier.have(b, "2")
    tier.tier.gone("1")
    tier.tier.limit(2 * SLAB)
    assert (tier.tier.book.find(a.digest), len(tier.tier.pool.slabs)) == (None, 2)
    assert tier.bytes_of(b) == b.part_path().read_bytes()


def test_what_is_used_stays_over_the_limit_until_it_is_not_used(make, objects):
    tier, a = make(4), objects[0]
    tier.have(a, "1")
    tier.tier.limit(0)
    assert len(tier.tier.pool.slabs) == 2
    assert tier.bytes_of(a) == a.part_path().read_bytes()
    tier.tier.gone("1")
    assert not tier.tier.pool.slabs


def test_a_pinned_checkpoint_stays_over_the_limit(make, objects):
    tier, a = make(4), objects[0]
    tier.have(a, "1")
    tier.pins.add(a.digest)
    tier.tier.gone("1")
    tier.tier.limit(0)
    assert tier.bytes_of(a) == a.part_path().read_bytes()


def test_under_a_higher_limit_there_is_room_again(make, objects):
    tier, a = make(4), objects[0]
    tier.tier.limit(0)
    load = tier.have(a, "1")
    assert load.residence is None
    tier.tier.limit(4 * SLAB)
    tier.tier.gone("1")
    assert tier.have(a, "2").residence is not None
