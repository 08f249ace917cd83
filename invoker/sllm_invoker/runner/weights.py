"""An instance's weights as one map: over the checkpoint store's slabs, or over the object's own file.

    from_file(path, part)              the page cache holds the bytes
    from_files(directory, parts)       the same for a rank, which reads two: as one part, one behind the other
    from_store(channel, path, part)    slabs, while they are still being filled; `wait` for them

Either way the map is private and copy-on-write, byte N of it is byte N of the part file, and what is read is what all
instances share. A store that dies takes nothing away: whole slabs stay mapped, and unfinished ones are covered by the
file at the same addresses. Invariant: what was waited for has been checked against the manifest, by the store as
it read or, where the file is mapped, when the object was verified.

The channel stays open as long as this process lives: the store takes its end for a sign that nothing is mapped here.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_faas.errors import CheckpointCorrupt, CheckpointUnavailable, SllmError, WireError, from_info
from sllm_faas.spec import Tier
from sllm_invoker.checkpoints import channel
from sllm_invoker.checkpoints.mapping import MADV_POPULATE_READ, Mapping, advise, map_files, map_slabs, paged
from sllm_invoker.checkpoints.object import ByteRange, Part, TensorEntry

if TYPE_CHECKING:
    import torch

STEP = 32 * 1024 * 1024
"""Bytes mapped at a time, at first: the address space is locked that long."""
BRIEF = 0.001
"""Seconds of work. Huge pages are mapped so fast that the next step may be twice as long: after each, this thread takes
the interpreter from the one that binds the model."""


class Weights:
    """`buffer` covers the whole part from the beginning; bytes below `ready` may be read. `tier` is where they were
    when this instance asked, "disk" until the store said so."""

    def __init__(self, buffer: Any, part: Part, *, ready: int) -> None:
        self.buffer = buffer
        self.part = part
        self.ready = ready
        self.tier: Tier = "disk"
        self.waited = 0.0
        """Seconds spent in `wait`."""
        self._first = ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))

    @property
    def arrived(self) -> bool:
        """Every byte may be read."""
        return self.ready >= self.part.bytes

    def view(self, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
        """`count` elements at `offset` of the part file, without copying, whether they have arrived or not."""
        import torch

        return torch.frombuffer(self.buffer, dtype=dtype, count=count, offset=offset)

    def end_of(self, pointer: int, length: int) -> int | None:
        """How far the weights must have arrived before a storage at an address may be read; None for one that is not
        of them."""
        return pointer + length - self._first if self._first <= pointer < self._first + self.part.bytes else None

    def wait(self, end: int | None = None) -> None:
        """Block until the first `end` bytes (all of them) may be read. Raises CheckpointCorrupt, CheckpointError, and
        again each time: what has failed does not arrive any more."""


def from_file(path: Path, part: Part) -> Weights:
    """Raises CheckpointUnavailable, and CheckpointCorrupt when the file has another size."""
    with _opened(path, part) as fd:
        mapped = mmap.mmap(fd, part.bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return Weights(mapped, part, ready=part.bytes)


def from_files(directory: Path, parts: Sequence[Part]) -> Weights:
    """Of the part that they are when `joined`. Raises as `from_file`."""
    with contextlib.ExitStack() as stack:
        files = [(stack.enter_context(_opened(directory / part.name, part)), part.bytes) for part in parts]
        mapped = map_files(files)
    part = joined(parts)
    return Weights(mapped.buffer, part, ready=part.bytes)


def joined(parts: Sequence[Part]) -> Part:
    """Parts as one, as they lie in the map of `from_files`. It has no digest and no sums: those are of the files."""
    first, at = parts[0], 0
    if len(parts) == 1:
        return first
    tensors: list[TensorEntry] = []
    layers: list[ByteRange] = []
    for part in parts:
        at = paged(at)
        moved = at + part.data_start - first.data_start
        tensors += [replace(each, start=each.start + moved, end=each.end + moved) for each in part.tensors]
        layers += [replace(each, start=each.start + moved, end=each.end + moved) for each in part.layers]
        at += part.bytes
    return Part(first.name, at, first.data_start, "", (), tuple(tensors), tuple(layers))


def from_store(fd: int, path: Path, part: Part) -> Weights:
    """Ask the store at the other end of the channel `fd` (this takes it over) for the weights, and map them. A store
    that is gone or talks nonsense means the file. Raises what the store's read met, and what `from_file` raises."""
    sock = socket.socket(fileno=fd)
    try:
        return _arriving(sock, path, part)
    except (OSError, WireError):  # also where there is no address space for the slabs
        sock.close()
        return from_file(path, part)
    except SllmError:
        sock.close()
        raise


def _arriving(sock: socket.socket, path: Path, part: Part) -> Weights:
    channel.send(sock, channel.Attach())
    layout, fds = _layout(sock)
    try:
        if layout.bytes != part.bytes:
            raise CheckpointCorrupt(f"the store has {layout.bytes} bytes of {path}, the manifest says {part.bytes}.")
        if layout.mode == "file":
            return _Arriving(sock, from_file(path, part).buffer, None, path, part)
        mapping = map_slabs(fds, layout.slab_bytes, part.bytes)
        weights = _Arriving(sock, mapping.buffer, mapping, path, part)
        if layout.whole:
            # Page by page, the first pass over the weights would wait for it; up to then there is a core to spare.
            threading.Thread(target=_touch, args=(mapping,), name="map-weights", daemon=True).start()
            weights.wait()  # the store says so next; a pass that need not look for its bytes is a faster one
        return weights
    finally:
        channel.close_all(fds)


class _Arriving(Weights):
    """Weights whose bytes are on their way."""

    def __init__(self, sock: socket.socket, buffer: Any, mapping: Mapping | None, path: Path, part: Part) -> None:
        super().__init__(buffer, part, ready=0)
        self._fd = sock.detach()  # never closed, not even by the garbage collector
        self._mapping = mapping
        self._path = path
        self._failed: SllmError | None = None

    def wait(self, end: int | None = None) -> None:
        wanted = self.part.bytes if end is None else min(end, self.part.bytes)
        if self.ready >= wanted:
            return
        began = time.perf_counter()
        try:
            self._until(wanted)
        finally:
            self.waited += time.perf_counter() - began

    def _until(self, wanted: int) -> None:
        while self.ready < wanted:
            if self._failed is not None:
                raise self._failed
            message = self._hear()
            match message:
                case channel.Watermark():
                    self.ready = max(self.ready, message.bytes)
                case channel.Whole():
                    self.tier, self.ready = message.tier, self.part.bytes
                case channel.NotLoaded():
                    self._failed = from_info(message.error)
                case None:
                    self._cover()
                case _:
                    pass

    def _hear(self) -> channel.AnyMessage | None:
        sock = socket.socket(fileno=self._fd)
        try:
            received = channel.receive(sock)
        except (OSError, WireError):
            return None
        finally:
            sock.detach()
        if received is None:
            return None
        channel.close_all(received[1])
        return received[0]

    def _cover(self) -> None:
        """The store is gone: what it had not finished comes from the file, at the same addresses."""
        if self._mapping is not None:
            with _opened(self._path, self.part) as fd:
                self._mapping.cover(fd)
        self.ready = self.part.bytes


def _touch(mapping: Mapping) -> None:
    """Best effort: what is not mapped here is when it is read."""
    done, step = 0, STEP
    while done < mapping.length:
        length = min(step, mapping.length - done)
        began = time.thread_time()
        if not advise(mapping.address + done, length, MADV_POPULATE_READ):
            return
        done += length
        step = 2 * step if time.thread_time() - began < BRIEF else STEP


def _layout(sock: socket.socket) -> tuple[channel.Layout, list[int]]:
    """The store's answer and all descriptors. Raises OSError, WireError, and what it could not load."""
    received = channel.receive(sock)
    if received is not None and isinstance(received[0], channel.NotLoaded):
        raise from_info(received[0].error)
    if received is None or not isinstance(received[0], channel.Layout):
        raise ConnectionResetError
    layout, fds = received[0], received[1]
    try:
        channel.rest_of(sock, fds, layout.count)
    except (OSError, WireError):
        channel.close_all(fds)
        raise
    return layout, fds


@contextlib.contextmanager
def _opened(path: Path, part: Part) -> Iterator[int]:
    """The file's descriptor; its size is checked on it, because a map beyond the end is SIGBUS at the first touch."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointUnavailable(f"{path} cannot be read: {error.strerror}.") from error
    try:
        size = os.fstat(fd).st_size
        if size != part.bytes:
            raise CheckpointCorrupt(f"{path} has {size} bytes, the manifest says {part.bytes}.")
        yield fd
    finally:
        os.close(fd)
