"""Writing a file past the page cache: what was handed over goes to the disk while the next bytes are made.

    write(view) ─► a thread of its own: large pwrite calls, O_DIRECT, in order ─► disk

A page cache that grows costs a core for a second or two per GiB, more than the disk takes, and what is written here is
read past it too (`reader`). Where O_DIRECT is refused (tmpfs, overlay, network file systems), and for the bytes at the
end that fill no block, the same calls go through it. Not here: sums (`part`), and having the disk keep it (`store`).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from sllm_invoker.checkpoints.reader import ALIGNMENT, open_past_cache

AT_ONCE = 2
"""Views that wait for the disk, the one under way included."""


class DirectWriter:
    """A new file, from its first byte to its last. Views lie at multiples of `ALIGNMENT` in memory and are as long; the
    last may end anywhere. `write` and the end of the context raise what the disk said: OSError."""

    def __init__(self, path: Path) -> None:
        self._fd, self._direct = open_past_cache(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._thread = ThreadPoolExecutor(1, "checkpoint-writer")
        self._under_way: deque[Future[None]] = deque()
        self._at = 0

    def write(self, view: memoryview) -> None:
        """Behind what came before. Returns when at most `AT_ONCE` views are not written yet: it is the writer's until
        that many others were handed over."""
        self._under_way.append(self._thread.submit(self._put, view, self._at))
        self._at += view.nbytes
        while len(self._under_way) > AT_ONCE:
            self._under_way.popleft().result()

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """All of it is written, or, after an error, nothing writes any more."""
        self._thread.shutdown(cancel_futures=error is not None)
        os.close(self._fd)
        if error is None:
            for each in self._under_way:
                each.result()

    def _put(self, view: memoryview, at: int) -> None:
        done = 0
        while done < view.nbytes:
            left = view[done:]
            if self._direct and left.nbytes >= ALIGNMENT:
                left = left[: left.nbytes // ALIGNMENT * ALIGNMENT]
            else:
                self._through_cache()
            try:
                done += os.pwrite(self._fd, left, at + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._through_cache()  # opened for direct writes and then refused

    def _through_cache(self) -> None:
        if self._direct:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._direct = False
