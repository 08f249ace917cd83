"""The DRAM tier of a node, without its sockets: slabs, the book of who holds them, reader and policy together.

    open(digest, holder) ─► Load: in slabs when they have room, in the page cache otherwise
    done(load)           ─► whole or failed; told by the caller on its own thread when the reading has ended

Small checkpoints, those that do not fit, and all of them where the limit is 0 stay in the page cache; whoever
attaches cannot tell. Single-threaded but for the reader's and the pool's own threads, which only call `post`.
A promotion is a load that nobody waits for yet: it takes only room that is nobody's, is read when nothing else is, and
is cancelled when a load finds no room beside it. A loan is like it, but an ingest fills the slabs, and it lasts until
that hands them over (`take`) or ends. The limit may change at any time: over it, free slabs go first, then
promotions, then what may be evicted; what is leased or pinned stays.
Invariant: a load nobody waits for any more is cancelled; a residence is whole or its load is in `loads`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sllm_faas.errors import Cancelled, CheckpointError, SllmError, StorageFull
from sllm_invoker.checkpoints.eviction import CostAware, Policy, choose, may_promote
from sllm_invoker.checkpoints.object import CheckpointObject, Part, read_manifest
from sllm_invoker.checkpoints.page_cache import resident
from sllm_invoker.checkpoints.priority import Priority
from sllm_invoker.checkpoints.reader import Opener, Reader, Reading, ReadReport, open_direct
from sllm_invoker.checkpoints.slab_book import Residence, SlabBook
from sllm_invoker.checkpoints.slabs import SLAB_BYTES, Slab, SlabPool, fault

FIRST_GUESS = 1e9
"""Bytes per second that the disk is taken to read until it was measured."""
LEARNING = 0.3


@dataclass(slots=True, eq=False)
class Load:
    """A checkpoint on its way, or in the page cache (`residence` None) where nothing needed to be read (`reading`
    None). `holders` wait for it; `requests` is whoever else the caller wants to answer. `promotion`: nobody has asked
    for it yet."""

    digest: str
    directory: Path
    part: Part
    residence: Residence | None
    reading: Reading | None = None
    holders: set[str] = field(default_factory=set)
    requests: list[int] = field(default_factory=list)
    promotion: bool = False


Post = Callable[[Callable[[], None]], None]
"""Runs a function on the tier's thread; callable from any."""


class DramTier:
    """`limit` bytes of slabs at most. `on_progress` and `on_done` are called
    on the tier's thread; `on_drop(residence number)` when a residence is given up."""

    def __init__(
        self,
        limit: int,
        post: Post,
        *,
        slab_bytes: int = SLAB_BYTES,
        small: int = SLAB_BYTES // 2,
        pinned: Callable[[], set[str]] = set,
        policy: Policy | None = None,
        open_file: Opener = open_direct,
        on_progress: Callable[[Load, int], None] = lambda _load, _watermark: None,
        on_done: Callable[[Load, ReadReport | None, Exception | None], None] = lambda _load, _report, _error: None,
        on_drop: Callable[[int], None] = lambda _number: None,
    ) -> None:
        self._post = post
        self._small = small
        self._pinned = pinned
        self._on_progress = on_progress
        self._on_done = on_done
        self._on_drop = on_drop
        self.policy = policy or CostAware()
        self.book = SlabBook()
        self.pool = SlabPool(limit // slab_bytes, slab_bytes=slab_bytes)
        self._reader = Reader(piece=slab_bytes, open_file=open_file)
        self._parts: dict[str, Part] = {}
        self.loads: dict[str, Load] = {}
        self.lent: dict[str, Residence] = {}
        """By holder; they have no digest yet."""
        self.bandwidth = FIRST_GUESS
        self._ready = 0

    def close(self) -> None:
        self._reader.close()
        self.pool.close()

    def expect(self, size: int) -> None:
        """A checkpoint of `size` bytes may be opened: from now on have memory ready for one, as far as there is."""
        count = -(-size // self.pool.slab_bytes)
        if size >= self._small and count <= self.pool.limit:
            self._ready = max(self._ready, count)
            self._replenish()

    # -- open and let go -------------------------------------------------------------------------------------

    def open(self, digest: str, directory: Path, holder: str, priority: int = Priority.WAITED) -> Load | Residence:
        """Where `digest` is: whole already (a Residence in slabs), or a Load, under way or needless. The holder has a
        lease from now on. Raises CheckpointUnavailable, CheckpointCorrupt, BadSpec."""
        part = self._part(digest, directory)
        self.policy.used(digest, part.bytes, part.bytes / self.bandwidth)
        found = self.book.find(digest)
        if found is not None:
            self.book.lease(found.number, holder)
            if found.state == "full":
                return found
        load = self.loads.get(digest)
        if load is None:
            load = self._begin(digest, directory, part, priority)
            if load.residence is not None:
                self.book.lease(load.residence.number, holder)
        elif load.reading is not None:
            load.reading.hasten(priority)
        load.promotion = False
        load.holders.add(holder)
        self.expect(part.bytes)  # another one, after this has what there is
        return load

    def hasten(self, request: int, priority: int) -> None:
        """Whoever wanted `request` of a load is more urgent by now."""
        for load in self.loads.values():
            if request in load.requests and load.reading is not None:
                load.reading.hasten(priority)

    def promote(self, digest: str, directory: Path, holder: str) -> Load | None:
        """Have it read before anybody asks; None: it is here or under way, belongs into the page cache, or there is no
        room for it. Raises as `open` does."""
        part = self._part(digest, directory)
        if self._is_here(digest) or not self._has_place(part.bytes):
            return None
        load = self._begin(digest, directory, part, Priority.PROMOTION)
        load.promotion = True
        load.holders.add(holder)
        self._replenish()
        return load

    # -- filled by an ingest ---------------------------------------------------------------------------------

    def lend(self, holder: str, size: int) -> list[Slab]:
        """Slabs for the holder to fill with `size` bytes of a checkpoint yet to be named, in place of what it had; none
        where no room is nobody's, or it belongs into the page cache."""
        self.give_back(holder)
        self._drop()
        if not self._has_place(size):
            return []
        count, free = -(-size // self.pool.slab_bytes), self.book.free
        free.sort(key=self.pool.unsealed)  # what readers had can be mapped by no writer: it makes way for new ones
        missing = count - sum(map(self.pool.unsealed, free))
        self.book.shed(max(0, missing + self._excess()))
        self._drop()
        try:
            for _ in range(missing):
                made = self.pool.create()
                assert made is not None, "there was room"
                self.pool.warm(made)
                free.append(made.number)
        except StorageFull:
            return []
        found = self.lent[holder] = self.book.reserve(f"lent to {holder}", size, count)
        return self.slabs(found)

    def take(self, holder: str, digest: str, directory: Path, size: int) -> Residence:
        """What the holder was lent holds this object, and it does not map it any more. Raises as `open` does,
        CheckpointError when it cannot be, StorageFull when that is here meanwhile; the slabs are free again then."""
        lent = self.lent.get(holder)
        try:
            part = self._part(digest, directory)
            if lent is None or not size == lent.bytes == part.bytes:
                has = f"{lent.bytes} bytes were lent" if lent is not None else "nothing was lent"
                raise CheckpointError(f"{size} bytes are not checkpoint {digest[:12]} of {part.bytes} bytes, or {has}.")
            if self._is_here(digest):
                raise StorageFull(f"checkpoint {digest[:12]} is in memory already, or being read.")
        except SllmError:
            self.give_back(holder)
            raise
        del self.lent[holder]
        for number in lent.slabs:
            self.pool.seal(number)
        self.book.rename(lent.number, digest)
        self.book.filled(lent.number)
        self._settle()
        return lent

    def give_back(self, holder: str) -> None:
        """It fills nothing any more, and maps nothing of it."""
        lent = self.lent.pop(holder, None)
        if lent is not None:
            self.book.abandon(lent.number)
            self._settle()

    # -- limits ----------------------------------------------------------------------------------------------

    def limit(self, size: int) -> None:
        """From now on `size` bytes of slabs at most; what is leased, mapped or pinned goes over it when it must."""
        self.pool.limit = size // self.pool.slab_bytes
        self._settle()
        self._replenish()

    def release(self, holder: str) -> None:
        """It does not wait or use any more. It may still map what it was handed."""
        self.book.release(holder)
        self._forsake(holder)

    def gone(self, holder: str) -> None:
        """It is proved gone, with every map it had."""
        self.book.gone(holder)
        self._forsake(holder)
        self._settle()

    def forget(self, digest: str) -> None:
        """The object was removed: its memory is for others, unless it is used."""
        self._parts.pop(digest, None)
        found = self.book.find(digest)
        if found is not None and found.state == "full" and not found.leases:
            self._evict(found)

    def adopt(self, digest: str, size: int, fds: list[int], holders: set[str]) -> Residence:
        """Take over what an earlier life of the store had whole. The descriptors are the tier's from now on."""
        slabs = tuple(self.pool.adopt(fd).number for fd in fds)
        return self.book.adopt(digest, size, slabs, holders)

    def slabs(self, residence: Residence) -> list[Slab]:
        return [self.pool.slabs[number] for number in residence.slabs]

    # -- loads -----------------------------------------------------------------------------------------------

    def _part(self, digest: str, directory: Path) -> Part:
        part = self._parts.get(digest)
        if part is None:
            manifest = read_manifest(directory)
            if manifest.digest != digest:
                raise CheckpointError(f"{directory} holds checkpoint {manifest.digest[:12]}, not {digest[:12]}.")
            part = self._parts[digest] = CheckpointObject(directory, manifest).parts_of(None)[0]
        return part

    def _begin(self, digest: str, directory: Path, part: Part, priority: int) -> Load:
        path = directory / part.name
        residence = self._place(digest, part.bytes)
        load = self.loads[digest] = Load(digest, directory, part, residence)
        if residence is None and resident(path) == 1.0:
            self._post(lambda: self.done(load))
            return load
        memory = [slab.view for slab in self.slabs(residence)] if residence is not None else None

        def progress(watermark: int) -> None:
            self._post(lambda: self._on_progress(load, watermark))

        load.reading = self._reader.read(path, part, memory, priority=priority, on_progress=progress)
        load.reading.done.add_done_callback(lambda _: self._post(lambda: self.done(load)))
        return load

    def done(self, load: Load) -> None:
        """The reading of `load` has ended, one way or the other; nothing writes to its slabs any more."""
        forsaken = load.reading is not None and self.loads.get(load.digest) is not load
        if not forsaken:
            del self.loads[load.digest]
        report: ReadReport | None = None
        error: Exception | None = None
        if load.reading is not None:
            found = load.reading.done.exception()
            error = found if isinstance(found, Exception) else None
            report = None if found is not None else load.reading.done.result()
        if forsaken and error is None:  # it was over before it could be called back; its slabs are nobody's
            error, report = Cancelled(f"nobody waited for the read of checkpoint {load.digest[:12]} any more."), None
        if load.residence is not None:
            if error is None:
                self.book.filled(load.residence.number)
                for slab in self.slabs(load.residence):
                    self.pool.warm(slab)  # what the read itself had to fault is in small pages
            else:
                self.book.abandon(load.residence.number)
        if report is not None and report.seconds > 0:
            self.bandwidth += LEARNING * (report.bytes / report.seconds - self.bandwidth)
        self._on_done(load, report, error)
        self._settle()

    def _forsake(self, holder: str) -> None:
        for load in list(self.loads.values()):
            load.holders.discard(holder)
            if not load.holders:
                self._cancel(load)

    def _cancel(self, load: Load) -> None:
        """Whoever wants it from now on begins anew: this one cannot be called back."""
        if load.reading is not None:
            del self.loads[load.digest]
            if load.residence is not None:
                self.book.disown(load.residence.number)
            load.reading.cancel()

    def _cancel_promotions(self) -> None:
        """Their slabs come free when the calls under way have ended."""
        for load in [load for load in self.loads.values() if load.promotion]:
            self._cancel(load)

    # -- room ------------------------------------------------------------------------------------------------

    def _is_here(self, digest: str) -> bool:
        """Or under way."""
        return digest in self.loads or self.book.find(digest) is not None

    def _has_place(self, size: int) -> bool:
        """It is not too small for slabs, and there are or may be enough that are nobody's."""
        count, growth = -(-size // self.pool.slab_bytes), max(0, -self._excess())
        return size >= self._small and may_promote(count, len(self.book.free), growth)

    def _place(self, digest: str, size: int) -> Residence | None:
        """Slabs for `size` bytes, those that are faulted first; None: it belongs into the page cache."""
        count = -(-size // self.pool.slab_bytes)
        if size < self._small or count > self.pool.limit or not self._make_room(count):
            return None
        ready = min(count, len(self.book.free))
        fresh: list[Slab] = []
        try:
            while ready + len(fresh) < count:
                made = self.pool.create()
                if made is None:
                    break
                fresh.append(made)
        except StorageFull:
            pass
        for slab in fresh:
            self.book.add(slab.number)
        if len(self.book.free) < count:
            return None
        if fresh:
            # Beside the read, which starts with the slabs that are ready; whoever comes first to a page faults it.
            left = size - ready * self.pool.slab_bytes
            threading.Thread(target=_fault_all, args=(fresh, left), name="slab-fault-now", daemon=True).start()
        found = self.book.reserve(digest, size, count)
        for number in found.slabs:
            self.pool.seal(number)
        return found

    def _replenish(self) -> None:
        """Have as many slabs free as the largest checkpoint expected needs, as far as the limit lets us."""
        try:
            while len(self.book.free) < self._ready and (made := self.pool.create()) is not None:
                self.book.add(made.number)
                self.pool.warm(made)
        except StorageFull:
            pass

    def _make_room(self, count: int) -> bool:
        self._settle()
        missing = count - len(self.book.free) - (self.pool.limit - len(self.pool.slabs))
        if missing > 0:
            self.book.pins = self._pinned()
            chosen = choose(self.policy, self.book.evictable(), missing)
            if chosen is None:
                self._cancel_promotions()
                return False
            self._evict_all(chosen)
        return True

    def _evict_all(self, digests: list[str]) -> None:
        for digest in digests:
            found = self.book.find(digest)
            assert found is not None
            self._evict(found)

    def _evict(self, residence: Residence) -> None:
        self.book.retire(residence.number)
        self.policy.evicted(residence.digest)
        self._on_drop(residence.number)
        self._drop()

    def _settle(self) -> None:
        """Let go of the slabs that left the book, and of as many others as are beyond the limit."""
        self._drop()
        if self._excess() > 0:
            self._cancel_promotions()
            self.book.pins = self._pinned()
            evictable = self.book.evictable()
            chosen = choose(self.policy, evictable, self._excess())
            self._evict_all(self.policy.order(evictable) if chosen is None else chosen)

    def _drop(self) -> None:
        self.book.shed(max(0, self._excess()))
        while self.book.dropped:
            self.pool.drop(self.book.dropped.pop())

    def _excess(self) -> int:
        """Slabs beyond the limit."""
        return len(self.pool.slabs) - self.pool.limit - len(self.book.dropped)


def _fault_all(slabs: list[Slab], size: int) -> None:
    for index, slab in enumerate(slabs):
        length = len(slab.view)
        fault(slab, max(0, min(length, size - index * length)))
