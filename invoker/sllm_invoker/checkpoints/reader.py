"""Reading parts of checkpoints from disk, near the device's limit, each byte checked as it lands.

    read(part, memory) ─► read threads: large preadv calls, O_DIRECT, in file order ─► hash thread: xxh3 per chunk
                              └── best priority first, then the least left to read,         └── watermark
                                  asked anew before every call

The shortest first because that makes the mean wait least (Schrage, 1968), and because a model of megabytes then waits
for a chunk of a large one instead of for all of it; a large read is overtaken by none that has more left than itself.

Two calls are under way at a time, so that the device is never idle between them; more gain nothing, and large calls are
immune to a contended GIL. Hashing runs five times as fast as the disk, so it hides behind the next call; what
is left at the end is the hash of one. File offset N lands at byte N of the memory, so direct reads need no bounce
buffer. Where O_DIRECT is refused (tmpfs, overlay, network file systems) the same calls go through the page cache.
With no memory given the page cache itself is the destination: what is read passes through scratch buffers and is
checked all the same.

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
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from sllm_faas.errors import Cancelled, CheckpointCorrupt, CheckpointError, CheckpointUnavailable
from sllm_invoker.checkpoints.object import CHUNK_BYTES, Part

PIECE = 64 * 1024 * 1024
"""Bytes of one view of memory; a call reads one chunk (`CHUNK_BYTES`) of one."""
AT_ONCE = 2
"""Calls under way."""
ALIGNMENT = 4096


def open_past_cache(path: Path, flags: int, *, direct: bool = True) -> tuple[int, bool]:
    """A descriptor that passes the page cache, or one that does not where the file system refuses; and which it is."""
    flags |= os.O_CLOEXEC
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o644), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o644), False


class File(Protocol):
    """What is read from; tests put failing ones in its place."""

    @property
    def size(self) -> int: ...
    def read(self, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset` on; fewer bytes at the end of the file only. Raises OSError."""

    def close(self) -> None: ...


class DirectFile:
    """A file past the page cache where the file system lets us, through it otherwise. `read` from any thread."""

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        self._path = path
        self._refused: list[int] = []
        self._lock = threading.Lock()
        self._fd, self.direct = open_past_cache(path, os.O_RDONLY, direct=direct)
        if not self.direct:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, view: memoryview, offset: int) -> int:
        done = 0
        while done < len(view):
            fd = self._fd
            try:
                count = os.preadv(fd, [view[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or fd in self._refused:
                    raise
                self._through_cache(fd)
                continue
            done += count
            if not count or (self.direct and count % ALIGNMENT):
                break  # the end of the file
        return done

    def _through_cache(self, refused: int) -> None:
        """Some file systems open for direct reads and then refuse them."""
        with self._lock:
            if self._fd == refused and self.direct:
                self._refused.append(refused)  # another call may still be in it
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
                self.direct = False

    def close(self) -> None:
        for fd in (self._fd, *self._refused):
            os.close(fd)


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
        self.chunks = -(-part.bytes // CHUNK_BYTES)
        self.next = 0
        self.landed: dict[int, memoryview] = {}  # read, not checked yet
        self.scratch: dict[int, mmap.mmap] = {}  # by chunk, where it is read to when there is no memory
        self.hashed = 0
        self.error: Exception | None = None
        self.busy = 0  # read threads that are writing to its memory
        self.settled = False  # it is decided how it ends
        self.began = 0.0
        self.file: File | None = None
        self.on_progress = on_progress
        self._reader = reader

    def __repr__(self) -> str:
        return f"<reading {self.path.name} {self.watermark}/{self.part.bytes} priority {self.priority}>"

    def cancel(self) -> None:
        """Stop after the calls under way. `done` then raises Cancelled; nothing happens when it is over."""
        self._reader.fail(self, Cancelled(f"the read of {self.path} was cancelled at byte {self.watermark}."))

    def hasten(self, priority: int) -> None:
        """Raise its priority: someone more urgent waits for it too."""
        self.priority = max(self.priority, priority)

    @property
    def left(self) -> int:
        """Chunks that have not been asked for."""
        return self.chunks - self.next

    @property
    def can_go_on(self) -> bool:
        """Another chunk may be read now. The first call opens the file, alone; without memory it takes a scratch
        buffer, and they are few."""
        if self.file is None:
            return not self.busy
        return self.memory is not None or bool(self._reader.scratch)


class Reader:
    """Reads parts, the most urgent first. `read` and `close` from any thread."""

    def __init__(
        self,
        *,
        piece: int = PIECE,
        at_once: int = AT_ONCE,
        open_file: Opener = open_direct,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if piece <= 0 or piece % CHUNK_BYTES:
            raise ValueError(f"piece {piece} is not allowed; allowed: multiples of {CHUNK_BYTES}")
        self.piece = piece
        self.scratch = [mmap.mmap(-1, CHUNK_BYTES) for _ in range(2 * at_once)]
        """Buffers that no reading has now."""
        self._open = open_file
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: list[Reading] = []  # in order of arrival
        self._unchecked: list[Reading] = []
        self._closing = False
        work = [self._reads] * at_once + [self._hashes]
        self._threads = [threading.Thread(target=each, name="checkpoint-reader", daemon=True) for each in work]
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
        """End a reading with `error`, at once or when the read threads let go of its memory."""
        with self._changed:
            if reading.error is not None or reading.settled:
                return
            reading.error = error
            self._leave(reading)
            idle = reading.settled = not reading.busy
        if idle:
            self._settle(reading)

    def _leave(self, reading: Reading) -> None:
        for queue in (self._queue, self._unchecked):
            if reading in queue:
                queue.remove(reading)

    def close(self) -> None:
        """Cancel everything and end the threads."""
        with self._changed:
            self._closing = True
            left = [*self._queue, *self._unchecked]
            self._changed.notify_all()
        for reading in left:
            reading.cancel()
        for thread in self._threads:
            thread.join()
        for buffer in self.scratch:
            with contextlib.suppress(BufferError):  # a failed reading's traceback may still show it
                buffer.close()

    def _settle(self, reading: Reading) -> None:
        with self._changed:
            while reading.scratch:
                self.scratch.append(reading.scratch.popitem()[1])
            self._changed.notify_all()
        if reading.file is not None:
            reading.file.close()
            reading.file = None
        if reading.error is not None:
            reading.done.set_exception(reading.error)
        else:
            reading.done.set_result(ReadReport(reading.part.bytes, self._clock() - reading.began))

    # -- the read threads ------------------------------------------------------------------------------------

    def _reads(self) -> None:
        while True:
            with self._changed:
                while not (ready := [reading for reading in self._queue if reading.can_go_on]):
                    if self._closing:
                        return
                    self._changed.wait()
                reading = max(ready, key=lambda each: (each.priority, -each.left))  # the oldest of equals
                opens = reading.file is None
                number = reading.next
                reading.busy += 1
                if not opens:
                    if reading.memory is None:
                        reading.scratch[number] = self.scratch.pop()
                    reading.next += 1
                    if reading.next == reading.chunks:
                        self._queue.remove(reading)
            error, view = None, None
            try:
                if opens:
                    self._begin(reading)
                else:
                    view = self._chunk(reading, number)
            except CheckpointError as failure:
                error = failure
            except OSError as failure:
                error = _storage_error(reading.path, failure)
            with self._changed:
                reading.busy -= 1
                reading.error = reading.error or error
                over = False
                if reading.error is not None:
                    self._leave(reading)
                    over = not reading.busy and not reading.settled
                    reading.settled = reading.settled or over
                elif view is not None:
                    reading.landed[number] = view
                    if reading not in self._unchecked:
                        self._unchecked.append(reading)
                self._changed.notify_all()
            if over:
                self._settle(reading)

    def _begin(self, reading: Reading) -> None:
        reading.began = self._clock()
        file = open_cached(reading.path) if reading.memory is None else self._open(reading.path)
        reading.file = file
        if file.size != reading.part.bytes:
            raise _corrupt(reading.path, f"it has {file.size} bytes, the manifest says {reading.part.bytes}")

    def _chunk(self, reading: Reading, number: int) -> memoryview:
        """Read one chunk; the bytes of the file in it."""
        assert reading.file is not None
        offset = number * CHUNK_BYTES
        wanted = min(CHUNK_BYTES, reading.part.bytes - offset)
        if reading.memory is None:
            target = memoryview(reading.scratch[number])[: _rounded(wanted)]
        else:
            start = offset % self.piece
            target = reading.memory[offset // self.piece][start : start + _rounded(wanted)]
        count = reading.file.read(target, offset)
        if count != wanted:
            raise _corrupt(reading.path, f"{count} bytes could be read at {offset}, the manifest says {wanted}")
        return target[:wanted]

    # -- the hash thread -------------------------------------------------------------------------------------

    def _hashes(self) -> None:
        while True:
            with self._changed:
                while not (ready := [reading for reading in self._unchecked if reading.hashed in reading.landed]):
                    if self._closing:
                        return
                    self._changed.wait()
                reading = ready[0]
                view = reading.landed.pop(reading.hashed)
            self._check(reading, view)
            with self._changed:
                if (buffer := reading.scratch.pop(reading.hashed, None)) is not None:
                    self.scratch.append(buffer)
                reading.hashed += 1
                whole = reading.error is None and reading.hashed == reading.chunks
                if whole:
                    reading.settled = True
                    self._leave(reading)
                self._changed.notify_all()
            if whole:
                self._settle(reading)

    def _check(self, reading: Reading, view: memoryview) -> None:
        number = reading.hashed
        if xxhash.xxh3_64_hexdigest(view) != reading.part.chunks[number]:
            what = f"chunk {number} (bytes from {number * CHUNK_BYTES}) has changed"
            self.fail(reading, _corrupt(reading.path, what))
            return
        reading.watermark += len(view)
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
