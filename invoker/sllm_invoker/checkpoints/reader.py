"""Reading parts of checkpoints from disk, near the device's limit, each byte checked as it lands.

    read(part, memory) ─► read thread: 64 MiB preadv, O_DIRECT, in file order ─► hash thread: xxh3 per chunk
                              └── best priority first, asked anew before every piece      └── watermark

Two threads and not more: one reader with large calls reached what the device gives, and large calls are immune
to a contended GIL; hashing runs five times as fast as the disk, so it hides behind the next piece. File offset N
lands at byte N of the memory, so direct reads need no bounce buffer. Where O_DIRECT is refused (tmpfs, overlay,
network file systems) the same calls go through the page cache. With no memory given the page cache itself is the
destination: pieces pass through two scratch buffers and are checked all the same.

Invariants: `watermark` counts bytes that are in place *and* checked, from the start without a gap. When `done`
resolves — read, failed or cancelled — nothing writes to the memory any more.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from sllm_faas.errors import Cancelled, CheckpointCorrupt, CheckpointError, CheckpointUnavailable
from sllm_invoker.checkpoints.object import CHUNK_BYTES, Part

PIECE = 64 * 1024 * 1024
"""Bytes per read call."""
ALIGNMENT = 4096
SCRATCH_PIECES = 2


class File(Protocol):
    """What is read from; tests put failing ones in its place."""

    @property
    def size(self) -> int: ...
    def read(self, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset` on; fewer bytes at the end of the file only. Raises OSError."""

    def close(self) -> None: ...


class DirectFile:
    """A file past the page cache where the file system lets us, through it otherwise."""

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        self._path = path
        self.direct = direct
        if direct:
            try:
                self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False
        if not self.direct:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, view: memoryview, offset: int) -> int:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self._through_cache()
                continue
            done += count
            if not count or (self.direct and count % ALIGNMENT):
                break  # the end of the file
        return done

    def _through_cache(self) -> None:
        """Some file systems open for direct reads and then refuse them."""
        os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self.direct = False

    def close(self) -> None:
        os.close(self._fd)


def open_direct(path: Path) -> File:
    return DirectFile(path)


def open_cached(path: Path) -> File:
    return DirectFile(path, direct=False)


Opener = Callable[[Path], File]


@dataclass(frozen=True, slots=True)
class ReadReport:
    """`seconds` from the first byte asked for to the last one checked."""

    bytes: int
    seconds: float


class Reading:
    """One part on its way. `done` resolves to its report, or raises CheckpointCorrupt, CheckpointUnavailable,
    CheckpointError (the device failed) or Cancelled. `on_progress(watermark)` is called on the hash thread."""

    def __init__(
        self,
        reader: Reader,
        path: Path,
        part: Part,
        memory: Sequence[memoryview] | None,
        priority: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self.path = path
        self.part = part
        self.memory = memory
        self.priority = priority
        self.watermark = 0
        self.done: Future[ReadReport] = Future()
        self.pieces = -(-part.bytes // reader.piece)
        self.next = 0
        self.hashed = 0
        self.error: Exception | None = None
        self.busy = False  # the read thread is writing to its memory
        self.settled = False  # it is decided how it ends
        self.began = 0.0
        self.file: File | None = None
        self.on_progress = on_progress
        self._reader = reader

    def __repr__(self) -> str:
        return f"<reading {self.path.name} {self.watermark}/{self.part.bytes} priority {self.priority}>"

    def cancel(self) -> None:
        """Stop after the piece under way. `done` then raises Cancelled; nothing happens when it is over."""
        self._reader.fail(self, Cancelled(f"the read of {self.path} was cancelled at byte {self.watermark}."))

    def hasten(self, priority: int) -> None:
        """Raise its priority: someone more urgent waits for it too."""
        self.priority = max(self.priority, priority)

    @property
    def can_go_on(self) -> bool:
        """Another piece may be read now: scratch buffers hold but so many that are not checked yet."""
        return self.memory is not None or self.next - self.hashed < SCRATCH_PIECES


class Reader:
    """Reads parts, the most urgent first. `read` and `close` from any thread."""

    def __init__(
        self,
        *,
        piece: int = PIECE,
        open_file: Opener = open_direct,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if piece <= 0 or piece % CHUNK_BYTES:
            raise ValueError(f"piece {piece} is not allowed; allowed: multiples of {CHUNK_BYTES}")
        self.piece = piece
        self._open = open_file
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: list[Reading] = []  # in order of arrival
        self._landed: deque[tuple[Reading, int, memoryview]] = deque()
        self._scratch: list[mmap.mmap] = []
        self._closing = False
        self._threads = [
            threading.Thread(target=self._reads, name="checkpoint-read", daemon=True),
            threading.Thread(target=self._hashes, name="checkpoint-hash", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def read(
        self,
        path: Path,
        part: Part,
        memory: Sequence[memoryview] | None,
        *,
        priority: int = 0,
        on_progress: Callable[[int], None] | None = None,
    ) -> Reading:
        """Begin to read `part`. `memory`: writable views of `piece` bytes, enough for the file; the last may be
        shorter, but holds what is left rounded up to 4096. None: into the page cache."""
        if memory is not None:
            for index in range(-(-part.bytes // self.piece)):
                needed = min(self.piece, _rounded(part.bytes - index * self.piece))
                if len(memory) <= index or len(memory[index]) < needed:
                    raise ValueError(f"memory for piece {index} is too small; needed: {needed} bytes")
        reading = Reading(self, path, part, memory, priority, on_progress or _nothing)
        with self._changed:
            if self._closing:
                raise Cancelled("the reader is closed.")
            self._queue.append(reading)
            self._changed.notify_all()
        return reading

    def fail(self, reading: Reading, error: Exception) -> None:
        """End a reading with `error`, at once or when the read thread lets go of its memory."""
        with self._changed:
            if reading.error is not None or reading.settled:
                return
            reading.error = error
            idle = not reading.busy
            if idle and reading in self._queue:
                self._queue.remove(reading)
        if idle:
            self._settle(reading)

    def close(self) -> None:
        """Cancel everything and end the threads."""
        with self._changed:
            self._closing = True
            left = [*self._queue, *(landed[0] for landed in self._landed)]
            self._changed.notify_all()
        for reading in left:
            reading.cancel()
        for thread in self._threads:
            thread.join()
        for buffer in self._scratch:
            with contextlib.suppress(BufferError):  # a failed reading's traceback may still show it
                buffer.close()

    def _settle(self, reading: Reading) -> None:
        if reading.file is not None:
            reading.file.close()
            reading.file = None
        if reading.error is not None:
            reading.done.set_exception(reading.error)
        else:
            reading.done.set_result(ReadReport(reading.part.bytes, self._clock() - reading.began))

    # -- the read thread -------------------------------------------------------------------------------------

    def _reads(self) -> None:
        while True:
            with self._changed:
                while not (ready := [reading for reading in self._queue if reading.can_go_on]):
                    if self._closing:
                        return
                    self._changed.wait()
                reading = max(ready, key=lambda each: each.priority)  # the oldest of the most urgent
                index, reading.busy = reading.next, True
            error, view = None, None
            try:
                view = self._piece(reading, index)
            except CheckpointError as failure:
                error = failure
            except OSError as failure:
                error = _storage_error(reading.path, failure)
            with self._changed:
                reading.busy = False
                reading.next += 1
                reading.error = reading.error or error
                if reading.error is not None or reading.next == reading.pieces:
                    self._queue.remove(reading)
                if reading.error is None and view is not None:
                    self._landed.append((reading, index, view))
                    self._changed.notify_all()
            if reading.error is not None:
                self._settle(reading)

    def _piece(self, reading: Reading, index: int) -> memoryview:
        """Read one piece; the bytes of the file in it."""
        size = reading.part.bytes
        if reading.file is None:
            reading.began = self._clock()
            reading.file = open_cached(reading.path) if reading.memory is None else self._open(reading.path)
            if reading.file.size != size:
                raise _corrupt(reading.path, f"it has {reading.file.size} bytes, the manifest says {size}")
        offset = index * self.piece
        wanted = min(self.piece, size - offset)
        target = (self._buffer(index) if reading.memory is None else reading.memory[index])[: _rounded(wanted)]
        count = reading.file.read(target, offset)
        if count != wanted:
            raise _corrupt(reading.path, f"{count} bytes could be read at {offset}, the manifest says {wanted}")
        return target[:wanted]

    def _buffer(self, index: int) -> memoryview:
        while len(self._scratch) < SCRATCH_PIECES:
            self._scratch.append(mmap.mmap(-1, self.piece))
        return memoryview(self._scratch[index % SCRATCH_PIECES])

    # -- the hash thread -------------------------------------------------------------------------------------

    def _hashes(self) -> None:
        while True:
            with self._changed:
                while not self._landed:
                    if self._closing:
                        return
                    self._changed.wait()
                reading, index, view = self._landed.popleft()
            if reading.error is None:
                self._check(reading, index, view)
            with self._changed:
                reading.hashed += 1
                self._changed.notify_all()
                whole = reading.settled = reading.error is None and reading.hashed == reading.pieces
            if whole:
                self._settle(reading)

    def _check(self, reading: Reading, index: int, view: memoryview) -> None:
        first = index * (self.piece // CHUNK_BYTES)
        for number, start in enumerate(range(0, len(view), CHUNK_BYTES), first):
            chunk = view[start : start + CHUNK_BYTES]
            if xxhash.xxh3_64_hexdigest(chunk) != reading.part.chunks[number]:
                what = f"chunk {number} (bytes from {number * CHUNK_BYTES}) has changed"
                self.fail(reading, _corrupt(reading.path, what))
                return
            reading.watermark += len(chunk)
            reading.on_progress(reading.watermark)


def _rounded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _nothing(_watermark: int) -> None:
    pass


def _corrupt(path: Path, what: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(f"{path}: {what}.", hint="Remove this checkpoint and ingest it again.")


def _storage_error(path: Path, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return CheckpointUnavailable(f"{path} is not there any more.")
    if error.errno == errno.EIO:
        return CheckpointError(f"{path} cannot be read: {error.strerror}.", hint="The disk may be failing.")
    return CheckpointError(f"{path} cannot be read: {error.strerror}.")
