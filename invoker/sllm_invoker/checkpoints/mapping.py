"""One contiguous private map over files one after the other, or over slabs.

    [ slab 0 | slab 1 | … | slab n ]      MAP_PRIVATE, readable and writable: copy-on-write

A write stays in this process; what is read is what all share. (What is to be locked for a device is mapped shared and
read-only instead: locking a private map copies every page.) The address range is reserved first and the slabs
are placed into it (MAP_FIXED), so that offset N of the part file is byte N of the map either way. Not here: whose
slabs they are, and when a map may be made. Invariant: a `Mapping` that exists covers its whole length.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_FAILED = ctypes.c_void_p(-1).value
MADV_HUGEPAGE = 14
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25
HUGE_PAGE = 2 * 1024 * 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Mapping:
    """`buffer` is `length` writable bytes. They stay mapped until `unmap`, also when this object is gone: tensors
    are views of them."""

    def __init__(self, address: int, length: int, reserved: int) -> None:
        self.address = address
        self.length = length
        self._reserved = reserved
        self.buffer = (ctypes.c_ubyte * length).from_address(address)

    def __repr__(self) -> str:
        return f"<map of {self.length} bytes at {self.address:#x}>"

    def cover(self, fd: int) -> None:
        """Put a file of the same length in place of what is mapped, at the same addresses. Raises OSError."""
        _mmap(self.address, self.length, mmap.MAP_PRIVATE | _MAP_FIXED, fd)

    def unmap(self) -> None:
        """Only when nothing refers to `buffer` any more: a later touch is a crash. Idempotent."""
        if self._reserved:
            _libc.munmap(self.address, self._reserved)
            self._reserved = 0


def map_shared(fd: int, length: int) -> Mapping:
    """A file of `length` bytes, whole pages, as itself: writes are the file's. It lies where huge pages can be mapped.
    Raises OSError."""
    base = _mmap(None, length + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, _PROT_NONE)
    address = -(-base // HUGE_PAGE) * HUGE_PAGE
    try:
        _mmap(address, length, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(base, length + HUGE_PAGE)
        raise
    for start, end in ((base, address), (address + length, base + length + HUGE_PAGE)):
        if end > start:
            _libc.munmap(start, end - start)
    return Mapping(address, length, length)


def map_file(fd: int, length: int) -> Mapping:
    """The first `length` bytes of a file. Raises OSError."""
    return Mapping(_mmap(None, length, mmap.MAP_PRIVATE, fd), length, paged(length))


def map_files(files: Sequence[tuple[int, int]]) -> Mapping:
    """Files, each a descriptor and its length, one behind the other: the next begins on the next page (`paged`). The
    descriptors may be closed afterwards. Raises OSError, ValueError."""
    lengths = [length for _, length in files]
    if not lengths or min(lengths) <= 0:
        raise ValueError(f"files of {lengths} bytes cannot be mapped")
    reserved = sum(map(paged, lengths))
    base = _mmap(None, reserved, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, _PROT_NONE)
    at = base
    try:
        for fd, length in files:
            _mmap(at, length, mmap.MAP_PRIVATE | _MAP_FIXED, fd)
            at += paged(length)
    except OSError:
        _libc.munmap(base, reserved)
        raise
    return Mapping(base, reserved - paged(lengths[-1]) + lengths[-1], reserved)


def map_slabs(fds: Sequence[int], slab_bytes: int, length: int, *, shared: bool = False) -> Mapping:
    """`length` bytes over slabs in order; the descriptors may be closed afterwards. `shared`: read-only, a write is a
    crash. Raises OSError, ValueError."""
    if not 0 < length <= len(fds) * slab_bytes or slab_bytes % mmap.PAGESIZE:
        raise ValueError(f"{len(fds)} slabs of {slab_bytes} bytes do not hold {length}")
    reserved = len(fds) * slab_bytes
    base = _mmap(None, reserved, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, _PROT_NONE)
    kind, prot = (mmap.MAP_SHARED, mmap.PROT_READ) if shared else (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        for index, fd in enumerate(fds):
            _mmap(base + index * slab_bytes, slab_bytes, kind | _MAP_FIXED | _MAP_NORESERVE, fd, prot)
    except OSError:
        _libc.munmap(base, reserved)
        raise
    return Mapping(base, length, reserved)


def advise(address: int, length: int, advice: int) -> bool:
    """madvise without the GIL. False when the kernel refuses."""
    return not _libc.madvise(address, length, advice)


def _mmap(address: int | None, length: int, flags: int, fd: int, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> int:
    found = _libc.mmap(address, length, prot, flags, fd, 0)
    if found is None or found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {length} bytes: {os.strerror(code)}")
    return int(found)


def paged(length: int) -> int:
    """Bytes of the pages that hold `length`."""
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
