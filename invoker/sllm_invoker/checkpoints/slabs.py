"""The memory of the DRAM tier: slabs, each a memfd of fixed size, mapped here once and faulted ahead of use.

First touch of fresh memory costs about a CPU-second per GiB, so one thread of low priority faults those that
will be needed (`warm`); what is missing then is faulted by whoever needs it. A slab is sealed: readers
can map it private only (F_SEAL_FUTURE_WRITE), and nobody can change its size. Huge pages where the system allows
them for shared memory. Not here: who holds a slab (`slab_book`). Invariant: no more than `limit` slabs are made.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from sllm_faas.errors import StorageFull
from sllm_invoker.checkpoints.mapping import MADV_HUGEPAGE, MADV_POPULATE_WRITE, advise

SLAB_BYTES = 64 * 1024 * 1024
STEP = 4 * 1024 * 1024
"""Bytes faulted at a time: the address space is locked that long against the threads that load."""
_F_ADD_SEALS = 1033
_SEAL, _SHRINK, _GROW, _FUTURE_WRITE = 1, 2, 4, 16
_LOWEST = 19


@dataclass(frozen=True, slots=True, eq=False)
class Slab:
    """`view` is writable in this process. `adopted`: made by an earlier life, here only to be handed on."""

    number: int
    fd: int
    map: mmap.mmap | None

    @property
    def view(self) -> memoryview:
        assert self.map is not None, "an adopted slab is never written"
        return memoryview(self.map)

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
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="slab-fault", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<{len(self.slabs)} of {self.limit} slabs of {self.slab_bytes} bytes>"

    def warm(self, slab: Slab) -> None:
        """Fault it in the background. It may be used meanwhile: whoever comes first to a page faults it."""
        with self._changed:
            self._cold.append(slab)
            self._changed.notify()

    def create(self) -> Slab | None:
        """A new slab, not faulted; None at the limit. Raises StorageFull when the system has no memory for it."""
        if len(self.slabs) >= self.limit:
            return None
        fd = os.memfd_create("sllm-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self.slab_bytes)
            memory = mmap.mmap(fd, self.slab_bytes)
        except OSError as error:
            os.close(fd)
            raise StorageFull(f"no memory for a slab of {self.slab_bytes} bytes: {error.strerror}.") from error
        advise(_address(memory), self.slab_bytes, MADV_HUGEPAGE)
        with contextlib.suppress(OSError):  # before Linux 5.1: readers are trusted not to map it writable
            fcntl.fcntl(fd, _F_ADD_SEALS, _SEAL | _SHRINK | _GROW | _FUTURE_WRITE)
        return self._keep(fd, memory)

    def adopt(self, fd: int) -> Slab:
        """Take over a slab of an earlier life; it may exceed the limit, which then keeps new ones from being made."""
        return self._keep(fd, None)

    def drop(self, number: int) -> None:
        """Let go of a slab; its memory returns to the system with the last process that maps it."""
        slab = self.slabs.pop(number)
        with self._changed:
            if slab in self._cold:
                self._cold.remove(slab)
        os.close(slab.fd)
        if slab.map is not None:
            with contextlib.suppress(BufferError):
                slab.map.close()

    def close(self) -> None:
        """Let go of all of them."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        for number in list(self.slabs):
            self.drop(number)

    def _keep(self, fd: int, memory: mmap.mmap | None) -> Slab:
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
            fault(slab, self.slab_bytes, lambda: self._closing)


def fault(slab: Slab, size: int, stop: Callable[[], bool] = lambda: False) -> None:
    """Have the first `size` bytes in memory, so that no read waits for it. Best effort."""
    assert slab.map is not None
    try:
        held = ctypes.c_char.from_buffer(slab.map)  # as long as this is there it stays mapped, dropped or not
    except ValueError:  # dropped, and unmapped already
        return
    address = ctypes.addressof(held)
    for start in range(0, size, STEP):
        if stop() or not advise(address + start, min(STEP, size - start), MADV_POPULATE_WRITE):
            return


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
