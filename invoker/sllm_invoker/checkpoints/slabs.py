"""The memory of the DRAM tier: slabs, each a memfd of fixed size, mapped here once and faulted ahead of use.

First touch of fresh memory costs about a CPU-second per GiB, so one thread of low priority faults those that
will be needed (`warm`); what is missing then is faulted by whoever needs it. Nobody can change a slab's size, and one
that readers see is sealed: they can map it private only (F_SEAL_FUTURE_WRITE). Before that, an ingest may have it to
fill. What is faulted ahead is in huge pages
wherever the kernel can make them, whatever its defaults say: readers then map 2 MiB at a time. What was filled before
that is made of them afterwards, with what is in it, also under its readers. Not here: who holds a slab (`slab_book`).
Invariant: no more than `limit` slabs are made.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from sllm_faas.errors import StorageFull
from sllm_invoker.checkpoints.mapping import (
    HUGE_PAGE,
    MADV_COLLAPSE,
    MADV_HUGEPAGE,
    MADV_POPULATE_WRITE,
    Mapping,
    advise,
    map_shared,
)

SLAB_BYTES = 64 * 1024 * 1024
STEP = 4 * 1024 * 1024
"""Bytes faulted at a time: the address space is locked that long against the threads that load."""
HUGE_STEP = 16 * 1024 * 1024
"""Bytes made into huge pages at a time: the kernel settles its books of pages once for each call."""
_F_ADD_SEALS = 1033
_SEAL, _SHRINK, _GROW, _FUTURE_WRITE = 1, 2, 4, 16
_LOWEST = 19


@dataclass(frozen=True, slots=True, eq=False)
class Slab:
    """`view` is writable in this process. `adopted`: made by an earlier life, here only to be handed on."""

    number: int
    fd: int
    map: Mapping | None

    @property
    def view(self) -> memoryview:
        assert self.map is not None, "an adopted slab is never written"
        return memoryview(self.map.buffer).cast("B")

    @property
    def adopted(self) -> bool:
        return self.map is None


class SlabPool:
    """Makes slabs and lets go of them. `warm` may be called for those that will be needed soon."""

    def __init__(self, limit: int, *, slab_bytes: int = SLAB_BYTES) -> None:
        self.slab_bytes = slab_bytes
        self.limit = limit
        self.slabs: dict[int, Slab] = {}
        self._numbers = 0
        self._cold: deque[Slab] = deque()
        self._large: set[int] = set()
        """In huge pages from end to end."""
        self._unsealed: set[int] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="slab-fault", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<{len(self.slabs)} of {self.limit} slabs of {self.slab_bytes} bytes>"

    def warm(self, slab: Slab) -> None:
        """Fault it and have it in huge pages, in the background. It may be used meanwhile: whoever comes first to a
        page faults it, and its bytes stay what they are."""
        with self._changed:
            if slab.number not in self._large and slab not in self._cold:
                self._cold.append(slab)
                self._changed.notify()

    def create(self) -> Slab | None:
        """A new slab, not faulted; None at the limit. Raises StorageFull when the system has no memory for it."""
        if len(self.slabs) >= self.limit:
            return None
        fd = os.memfd_create("sllm-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self.slab_bytes)
            memory = map_shared(fd, self.slab_bytes)
        except OSError as error:
            os.close(fd)
            raise StorageFull(f"no memory for a slab of {self.slab_bytes} bytes: {error.strerror}.") from error
        advise(memory.address, self.slab_bytes, MADV_HUGEPAGE)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SHRINK | _GROW)
        slab = self._keep(fd, memory)
        self._unsealed.add(slab.number)
        return slab

    def seal(self, number: int) -> None:
        """Before readers get it: from now on only maps that exist can write to it, and they are ours."""
        if number in self._unsealed:
            self._unsealed.remove(number)
            with contextlib.suppress(OSError):  # before Linux 5.1: readers are trusted not to map it writable
                fcntl.fcntl(self.slabs[number].fd, _F_ADD_SEALS, _SEAL | _FUTURE_WRITE)

    def unsealed(self, number: int) -> bool:
        """Another process could still map it to fill it."""
        return number in self._unsealed

    def adopt(self, fd: int) -> Slab:
        """Take over a slab of an earlier life; it may exceed the limit, which then keeps new ones from being made."""
        return self._keep(fd, None)

    def drop(self, number: int) -> None:
        """Let go of a slab, which nobody reads or writes here any more; its memory returns to the system with the last
        process that maps it."""
        slab = self.slabs.pop(number)
        self._unsealed.discard(number)
        with self._changed:
            self._large.discard(number)
            if slab in self._cold:
                self._cold.remove(slab)
        os.close(slab.fd)
        if slab.map is not None:
            slab.map.unmap()  # whoever still faults it is refused by the kernel

    def close(self) -> None:
        """Let go of all of them."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        for number in list(self.slabs):
            self.drop(number)

    def _keep(self, fd: int, memory: Mapping | None) -> Slab:
        self._numbers += 1
        slab = self.slabs[self._numbers] = Slab(self._numbers, fd, memory)
        return slab

    # -- in the background -----------------------------------------------------------------------------------

    def _work(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
        while True:
            with self._changed:
                while not self._cold and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                slab = self._cold.popleft()
            large = enlarge(slab, self.slab_bytes, lambda: self._closing)
            with self._changed:
                if large and slab.number in self.slabs:
                    self._large.add(slab.number)


def fault(slab: Slab, size: int, stop: Callable[[], bool] = lambda: False) -> None:
    """Have the first `size` bytes in memory, so that no read waits for it. Best effort."""
    assert slab.map is not None
    for start in range(0, size, STEP):
        if stop() or not advise(slab.map.address + start, min(STEP, size - start), MADV_POPULATE_WRITE):
            return


def enlarge(slab: Slab, size: int, stop: Callable[[], bool] = lambda: False) -> bool:
    """`fault`, in huge pages as far as the kernel makes them when it is asked outright (Linux 6.1); whether all of it
    is. It takes a page to begin with, one of each; what is being read into stays as it is."""
    assert slab.map is not None
    whole = True
    for start in range(slab.map.address, slab.map.address + size, HUGE_STEP):
        if stop():
            return False
        length = min(HUGE_STEP, slab.map.address + size - start)
        for first in range(start, start + length, HUGE_PAGE):
            advise(first, mmap.PAGESIZE, MADV_POPULATE_WRITE)
        if not advise(start, length, MADV_COLLAPSE):
            advise(start, length, MADV_POPULATE_WRITE)
            whole = False
    return whole
