"""What the node's disk and memory give, in bytes per second by tier, measured before any start could teach it.

    idle for QUIET ticks ──► thread, nice 19: write a file, read it, copy memory ──► told, and kept for a week
        ▲── START, CHECK, INGEST: it gives up at once, and tries again when idle

Never on the way of anything: a node serves before it has measured, and without it if it cannot. The file is nameless,
in the directory of the checkpoints; it is written and read past the page cache, in calls of STEP, two reads at a time
as checkpoints are read. Of the nodes that share the directory one measures at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import math
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import msgspec

from sllm_faas import config, logging
from sllm_invoker import node
from sllm_invoker.checkpoints.reader import AT_ONCE, File, open_direct

SIZE = 64 * 1024 * 1024
STEP = 4 * 1024 * 1024
LIMIT = 0.2
"""Seconds after which no further call is made, of the writing and of the reading."""
QUIET = 5
"""Ticks of the agent, seconds, without work before it begins."""
WEEK = 7 * 86400.0
SPARE_MB = 1024
"""Memory, and room on the disk, that must be there for it."""
NICE = 19

TIERS = ("disk", "dram")
Bandwidth = dict[str, float]
"""By tier."""


class Kept(msgspec.Struct, frozen=True):
    """`at`: Unix seconds; `device`: that of the checkpoints' directory."""

    at: float
    device: int
    bandwidth: Bandwidth


def kept(path: Path, device: int, now: float) -> Bandwidth:
    """What was measured there on that device, unless it is old; empty: nothing."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Kept)
    except (OSError, msgspec.MsgspecError):
        return {}
    sane = all(tier in TIERS and 0.0 < value < math.inf for tier, value in found.bandwidth.items())
    return found.bandwidth if sane and found.device == device and 0.0 <= now - found.at < WEEK else {}


def measure(directory: Path, stopped: Callable[[], bool]) -> Bandwidth | None:
    """None: it was stopped, or another node is measuring. Raises OSError where it cannot."""
    if node.memory_available_mb() < SPARE_MB:
        raise OSError(errno.ENOMEM, f"less than {SPARE_MB} MiB of memory are free")
    disk = os.statvfs(directory)
    if disk.f_bavail * disk.f_frsize < SPARE_MB << 20:
        raise OSError(errno.ENOSPC, f"less than {SPARE_MB} MiB are free", str(directory))
    with contextlib.ExitStack() as stack:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        noise = os.urandom(STEP)  # a file system may compress, or leave out zeros
        views = []
        for _ in range(2):
            view = memoryview(mmap.mmap(-1, SIZE))
            for start in range(0, SIZE, STEP):
                if stopped():
                    return None
                view[start : start + STEP] = noise  # so that its pages are there
            views.append(view)
        file = stack.enter_context(tempfile.TemporaryFile(dir=directory))
        path = Path(f"/proc/self/fd/{file.fileno()}")
        size = _write(path, views[0], stopped)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with contextlib.closing(open_direct(path)) as reader:
            read = _read(reader, views[1][:size], stopped)
        copied = _copy(*views)
    return None if stopped() else {"disk": read, "dram": copied}


def _write(path: Path, data: memoryview, stopped: Callable[[], bool]) -> int:
    """How many bytes got there in the time."""
    try:
        return _write_as(path, os.O_DIRECT, data, stopped)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return _write_as(path, os.O_DSYNC, data, stopped)  # no direct access there


def _write_as(path: Path, flags: int, data: memoryview, stopped: Callable[[], bool]) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags)
    try:
        done, end = 0, time.perf_counter() + LIMIT
        while done < len(data) and not (stopped() or (done and time.perf_counter() >= end)):
            count = os.pwrite(fd, data[done : done + STEP], done)
            done += count
            if count % STEP:
                break
        return done // STEP * STEP or done
    finally:
        os.close(fd)


def _read(file: File, memory: memoryview, stopped: Callable[[], bool]) -> float:
    """Bytes per second."""
    counts: list[int] = []
    offsets = iter(range(0, len(memory), STEP))
    began = time.perf_counter()
    end = began + LIMIT

    def work() -> None:
        for offset in offsets:  # each takes what none has taken
            counts.append(file.read(memory[offset : offset + STEP], offset))
            if stopped() or time.perf_counter() >= end:
                return

    with ThreadPoolExecutor(AT_ONCE) as readers:
        for each in [readers.submit(work) for _ in range(AT_ONCE)]:
            each.result()
    return sum(counts) / (time.perf_counter() - began)


def _copy(source: memoryview, to: memoryview) -> float:
    """Bytes per second, of the median step: others may have run in some."""
    took = []
    for start in range(0, SIZE, STEP):  # the interpreter is held for each
        began = time.perf_counter()
        to[start : start + STEP] = source[start : start + STEP]
        took.append(time.perf_counter() - began)
    return STEP / median(took)


def _give_way() -> None:
    """This thread, and those that it makes, run when nobody else does."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Calibration:
    """`idle`: whether the node has nothing to do now. `bandwidth` is what is known: empty until there is something."""

    def __init__(self, state: Path, checkpoints: Path, idle: Callable[[], bool]) -> None:
        self._path = state / "bandwidth.json"
        self._checkpoints = checkpoints
        self._idle = idle
        self._quiet = 0
        self._stop = threading.Event()
        self._task: asyncio.Task[None] | None = None
        self.bandwidth: Bandwidth = {}
        self._over = True
        """It is known, or cannot be."""
        with contextlib.suppress(OSError):
            self.bandwidth = kept(self._path, checkpoints.stat().st_dev, time.time())
            self._over = bool(self.bandwidth)

    def tick(self) -> None:
        """To be called once a second."""
        if self._over or self._task is not None:
            return
        self._quiet = self._quiet + 1 if self._idle() else 0
        if self._quiet >= QUIET:
            self._quiet = 0
            self._stop.clear()
            self._task = asyncio.get_running_loop().create_task(self._run())

    def interrupt(self) -> None:
        """There is work."""
        self._quiet = 0
        self._stop.set()

    async def close(self) -> None:
        self._over = True
        self._stop.set()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        own = ThreadPoolExecutor(1, "calibration", initializer=_give_way)
        try:
            found = await asyncio.get_running_loop().run_in_executor(own, self._measure)
            if found is not None:
                self.bandwidth, self._over = found, True
        except OSError as error:
            self._over = True
            logging.get("invoker").warning("not_calibrated", directory=str(self._checkpoints), error=str(error))
        finally:
            own.shutdown(wait=False)
            self._task = None

    def _measure(self) -> Bandwidth | None:
        found = measure(self._checkpoints, self._stop.is_set)
        if found is not None:
            now = Kept(time.time(), self._checkpoints.stat().st_dev, found)
            config.write_private(self._path, msgspec.json.encode(now))
        return found
