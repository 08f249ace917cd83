"""Files of a remote source brought to disk, over a few connections, so that nothing is fetched twice.

    sums = fetch(remote, listing, folder, report)      files, hashed as they are written

    connections ─► pieces in memory, in any order ─► one writer, in order: blake3, write, progress

A file is asked for in pieces, over several connections. What has come is written in order as it comes, so a file on
disk is always a prefix of the whole: what a killed fetch left is gone on with from its size. A server that answers with
the whole instead of a piece, or names no content that pieces could be of (no strong ETag), is read in one stream, and
begun anew where it breaks off. An answer that ends early is asked again from there; one that ends there again and
again, while nothing else of the file comes either, is an error.

Nothing is synced and nothing renamed. A folder is for one listing alone, of these tags and sizes, so a file is whole
when it has its size. File systems make a file longer when its bytes are on disk, not before: after a power cut one may
be shorter than it was, never longer, and is gone on with.

Invariants: nothing of a piece is written before all that is in front of it. Memory: a piece per connection, and one
that is being written. The last bytes are written when it is known that there are no more than were listed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import blake3

from sllm_faas.errors import CheckpointIncomplete, CheckpointUnavailable
from sllm_invoker.checkpoints.object import Progress, hashed
from sllm_invoker.checkpoints.remote import Answer, Connection, Entry, Remote

PAUSES = (0.5, 2.0, 5.0)
"""Seconds before an answer that broke off is asked for again, by how often nothing new has come."""
PIECE = 16 * 1024 * 1024
CONNECTIONS = 4
_BATCH = 2 * 1024 * 1024
"""Bytes for which the writer is woken."""
_FLUSH_S = 0.2
"""Seconds after which fewer will do."""
_WRITE = 256 * 1024
"""Bytes that are hashed and written at once: what a core's cache holds, and no more than a few pages of the page cache
that lie together, since in a virtual machine those may have to be had from the host first."""
_LEAVE_S = 1.0
"""Seconds that connections have to end; one that cannot be ended then waits for its own end, and changes nothing."""


class _BrokeOff(Exception):
    """As often as it may."""


@dataclass(slots=True, eq=False)
class _Piece:
    """Bytes `start` to `end` of a file: those before `at` have come, those before `written` have left the memory."""

    start: int
    end: int
    at: int
    written: int
    memory: memoryview

    @property
    def rest(self) -> memoryview:
        """Where the next bytes go."""
        return self.memory[self.at - self.start : self.end - self.start]


def fetch(remote: Remote, listing: tuple[Entry, ...], folder: Path, report: Progress) -> dict[str, str]:
    """Have the files in `folder`, which is for this listing alone; name → blake3. There is room for them (`room`).

    Raises CheckpointUnavailable, CheckpointIncomplete, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(entry.bytes for entry in listing)
    sums, before = {}, 0
    for entry in listing:
        sums[entry.name] = _fetch(remote, entry, folder / entry.name, partial(_report, report, before, total))
        before += entry.bytes
    return sums


def _report(report: Progress, before: int, total: int, done: int) -> None:
    report(before + done, total, "fetch")


def _fetch(remote: Remote, entry: Entry, path: Path, report: Callable[[int], None]) -> str:
    """One file. Returns its blake3."""
    path.touch()
    if path.stat().st_size > entry.bytes:
        os.truncate(path, 0)  # none of ours
    hasher, done = hashed(path), path.stat().st_size
    if done == entry.bytes:
        report(done)
        return str(hasher.hexdigest())
    most = done
    with path.open("r+b", buffering=0) as file, _Arrivals(remote, entry, done) as arrivals:
        file.seek(done)
        try:
            for start, came in arrivals:
                if start != done:  # from the beginning
                    file.truncate(0)
                    file.seek(0)
                    hasher, done = blake3.blake3(), 0
                for at in range(0, len(came), _WRITE):
                    some = came[at : at + _WRITE]
                    hasher.update(some)
                    _write(file, some)
                    done += len(some)
                    most = max(most, done)
                    report(most)
        except _BrokeOff as error:
            raise CheckpointIncomplete(
                f"{remote.url}/{entry.name} broke off after {done} of {entry.bytes} bytes: {error}.",
                hint="Pull again: it goes on from there.",
            ) from error
    return str(hasher.hexdigest())


def _write(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


class _Arrivals:
    """A file on its way, from byte `start` on; iterate over (offset, bytes), in order. What was given is no longer
    looked at when the next is asked for. An offset of 0 in the middle: the file begins anew.

    Raises _BrokeOff, CheckpointUnavailable, CheckpointIncomplete, when all is given that came before that."""

    def __init__(self, remote: Remote, entry: Entry, start: int) -> None:
        self._remote = remote
        self._entry = entry
        self._size = min(PIECE, entry.bytes)
        self._next = start  # where the next piece begins
        self._one_stream = not entry.tag or entry.bytes - start <= self._size
        self._decided = self._one_stream
        self._pieces: deque[_Piece] = deque()  # in order; all but those that are written
        self._memory: list[memoryview] = []  # of no piece now
        self._made = 0
        self._news = 0  # goes up with every byte that had not come before
        self._known = 0  # came before a stream was begun anew, so is no news
        self._writing = False
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._connections: list[Connection] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> _Arrivals:
        with self._changed:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()
            connections, threads = list(self._connections), list(self._threads)
        for connection in connections:
            connection.abort()
        until = time.monotonic() + _LEAVE_S
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    # -- the writer's side -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        while True:
            with self._changed:
                piece = self._ready()
                if piece is None:
                    return
                start, end = piece.written, piece.at
                self._writing = True
            yield start, piece.memory[start - piece.start : end - piece.start]
            with self._changed:
                self._writing = False
                piece.written = end
                if end == piece.end:
                    self._pieces.popleft()
                    self._memory.append(piece.memory)
                self._changed.notify_all()

    def _ready(self) -> _Piece | None:
        """The first piece, when enough of it has come; None at the end."""
        late = False
        while True:
            if self._pieces:
                piece = self._pieces[0]
                ready = piece.at - piece.written
                if ready >= _BATCH or piece.at == piece.end or (ready and (late or self._error is not None)):
                    return piece
            elif self._next == self._entry.bytes:
                return None
            if self._error is not None:
                raise self._error
            late = not self._changed.wait(_FLUSH_S)

    # -- the connections' side -------------------------------------------------------------------------------

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=f"fetch-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        try:
            with self._remote.connect() as connection:
                with self._changed:
                    self._connections.append(connection)
                self._bring(connection)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _bring(self, connection: Connection) -> None:
        """Piece after piece."""
        piece, failures = self._take(), 0
        while piece is not None:
            news = self._news
            rest, reason = self._ask(connection, piece)
            if self._over:
                return
            if rest is None:
                piece, failures = self._take(), 0
                continue
            piece, failures = rest, failures + 1 if self._news == news else 0
            if failures == len(PAUSES):
                raise _BrokeOff(reason)
            if self._stopped.wait(PAUSES[failures]):
                return

    def _ask(self, connection: Connection, piece: _Piece) -> tuple[_Piece | None, str]:
        """Fill a piece, in one stream those after it too, as far as one answer goes. The one that is not whole then,
        and why."""
        try:
            end = self._entry.bytes if self._one_stream else piece.end
            with connection.open(self._entry, piece.at, end) as answer:
                piece = self._begun(piece, answer)
                while not self._over and (count := answer.read(piece.rest)):
                    if piece.at + count == self._entry.bytes:
                        self._expect_end(answer)
                    self._came(piece, count)
                    if piece.at == piece.end:
                        following = self._take() if self._one_stream else None
                        if following is None:
                            return None, ""
                        piece = following
        except ConnectionError as error:
            return piece, str(error) or type(error).__name__
        return piece, "the answer ended"

    def _take(self) -> _Piece | None:
        """The next piece, when there is memory for it; None when there is none."""
        with self._changed:
            while not self._over and self._next < self._entry.bytes:
                if self._memory or self._made <= CONNECTIONS:
                    return self._piece()
                self._changed.wait()
            return None

    @property
    def _over(self) -> bool:
        return self._error is not None or self._stopped.is_set()

    def _piece(self) -> _Piece:
        if not self._memory:
            self._made += 1
            self._memory.append(memoryview(bytearray(self._size)))
        memory = self._memory.pop()
        start, end = self._next, min(self._next + self._size, self._entry.bytes)
        piece = _Piece(start, end, start, start, memory)
        self._pieces.append(piece)
        self._next = end
        return piece

    def _begun(self, piece: _Piece, answer: Answer) -> _Piece:
        """The first answer decides whether there are pieces. The one that this answer begins with."""
        with self._changed:
            if not self._decided:
                self._decided = True
                self._one_stream = answer.end > piece.end
                if not self._one_stream:
                    for _ in range(min(CONNECTIONS, -(-(self._entry.bytes - piece.start) // self._size)) - 1):
                        self._start()
            if answer.start == piece.at:
                return piece
            if not self._one_stream:
                what = "answered another range than was asked for"
                raise CheckpointUnavailable(f"{self._remote.url}/{self._entry.name} {what}.")
            while self._writing and not self._over:
                self._changed.wait()
            self._known = max(self._known, piece.at)
            while self._pieces:
                self._memory.append(self._pieces.pop().memory)
            self._next = 0
            return self._piece()

    def _came(self, piece: _Piece, count: int) -> None:
        waiting = piece.at - piece.written
        piece.at += count
        if piece.at > self._known:
            self._news += 1
        if waiting < _BATCH <= waiting + count or piece.at == piece.end:
            with self._changed:
                self._changed.notify_all()

    def _expect_end(self, answer: Answer) -> None:
        """Asked before the last bytes are handed on, so that what has more is never taken for whole."""
        with contextlib.suppress(ConnectionError):  # they are here
            if answer.read(memoryview(bytearray(1))):
                what = f"{self._remote.url}/{self._entry.name} gave more than its {self._entry.bytes} bytes"
                raise CheckpointIncomplete(f"{what}.")
