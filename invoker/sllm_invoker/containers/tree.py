"""The process tree of a node: who belongs to it, what an earlier life left, and ending all of it.

Every instance is a subreaper, and so is the invoker: a descendant of an instance stays below it however often
it forks or leaves its session, and becomes the invoker's child the moment the instance dies. Hence a child of
the invoker that it does not know is what a dead instance left, and is killed (`sweep`).

A killed invoker cannot sweep. Its lifeline ends the zygotes and the process groups of its instances; for what
escaped those, its next life kills everything on record that still is the same process, and everything that carries the
node's mark in its environment (`reap`).

The record is a line for each process that came or went, appended: to put a new file in the place of another waits for
the disk, 15 ms while a checkpoint is read, for each of the starts on their way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path

MARK = "SLLM_TREE"
"""Environment variable, set for the base zygote and inherited by everything below it: the node's directory."""

RECORD = "processes.jsonl"
LINES = 4096
"""Of the record, after which it is written anew."""

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """`started` (clock ticks since boot) tells a process from a later one with its number."""

    pid: int
    parent: int
    started: int
    zombie: bool


def look(pid: int) -> Process | None:
    """None when there is no such process."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold anything
    return Process(pid, int(fields[1]), int(fields[19]), fields[0] in "ZX")


def children(pid: int) -> list[int]:
    """The processes whose parent is `pid`, zombies too."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in (_PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def private_mb(pid: int) -> float:
    """MiB that the process holds for itself alone; 0 when it is gone."""
    try:
        text = (_PROC / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return 0.0
    fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
    return sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) / 1024


def descendants(pid: int) -> list[int]:
    found = children(pid)
    for child in found:  # grows while it is walked
        found += children(child)
    return found


def alive(pid: int) -> bool:
    process = look(pid)
    return process is not None and not process.zombie


def kill(pid: int) -> None:
    """SIGKILL; nothing happens when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait(pid: int) -> int | None:
    """The exit code of a child that has ended, None when it has not. Raises ChildProcessError for no child."""
    waited, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if waited else None


async def gone(pidfd: int) -> None:
    """Wait until the process behind `pidfd` has ended."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    watched = os.dup(pidfd)

    def ended() -> None:
        if not done.done():
            done.set_result(None)

    loop.add_reader(watched, ended)
    try:
        await done
    finally:
        loop.remove_reader(watched)
        os.close(watched)


class Tree:
    """The invoker's own children, and the record of its tree that survives it."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / RECORD
        self._lines = 0
        self.mark = str(directory)
        self._known: dict[int, int] = {}
        self._sweeping: asyncio.Lock = asyncio.Lock()

    def add(self, pid: int) -> None:
        """A process of ours: a zygote, an instance, a helper."""
        process = look(pid)
        self._known[pid] = process.started if process else 0
        self._note(pid, self._known[pid])

    def remove(self, pid: int) -> None:
        if self._known.pop(pid, None) is not None:
            self._note(pid, None)

    def __contains__(self, pid: int) -> bool:
        return pid in self._known

    def _note(self, pid: int, started: int | None) -> None:
        with contextlib.suppress(OSError):  # a full disk must not stop the node; the marks remain
            if self._lines >= LINES:
                temporary = self._path.with_suffix(".tmp")
                temporary.write_bytes(b"".join(_line(*each) for each in self._known.items()))
                temporary.replace(self._path)
                self._lines = 0
                return
            with self._path.open("ab", buffering=0) as file:
                file.write(_line(pid, started))
            self._lines += 1

    def strays(self) -> list[int]:
        """Children of this process that it does not know."""
        return [pid for pid in children(os.getpid()) if pid not in self._known]

    async def sweep(self) -> int:
        """Kill what dead instances left; how many it were. Returns when all of it is gone."""
        killed = 0
        async with self._sweeping:
            while strays := self.strays():
                for pid in strays:
                    killed += await self._end(pid)
        return killed

    async def _end(self, pid: int) -> int:
        process = look(pid)
        if process is None or process.parent != os.getpid():
            return 0
        count = 0
        if not process.zombie:
            count = 1
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    await gone(pidfd)
                finally:
                    os.close(pidfd)
        with contextlib.suppress(ChildProcessError):
            wait(pid)
        return count


def reap(directory: Path, timeout: float = 5.0) -> int:
    """Kill what an earlier life of the node left; how many processes it were. Blocks up to `timeout` seconds.

    To be called before this life starts anything."""
    killed = 0
    while doomed := _leftovers(directory):
        poller = select.poll()
        fds = []
        for pid in doomed:
            with contextlib.suppress(OSError):
                fds.append(os.pidfd_open(pid))
                poller.register(fds[-1], select.POLLIN)
                kill(pid)
        for _ in fds:
            if not poller.poll(timeout * 1000):
                break
            for fd, _event in poller.poll(0):
                poller.unregister(fd)
        for fd in fds:
            os.close(fd)
        if not fds:
            break
        killed += len(fds)
    forget(directory)
    return killed


def forget(directory: Path) -> None:
    """Of the node nothing is left."""
    (directory / RECORD).unlink(missing_ok=True)


def recorded(directory: Path) -> dict[int, int]:
    """When each process on record was started, by its number. A line that is none, as after a crash, says nothing."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for line in (directory / RECORD).read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                if record["started"] is None:
                    found.pop(int(record["pid"]), None)
                else:
                    found[int(record["pid"])] = int(record["started"])
    return found


def _line(pid: int, started: int | None) -> bytes:
    return json.dumps({"pid": pid, "started": started}).encode() + b"\n"


def _leftovers(directory: Path) -> set[int]:
    found: set[int] = set()
    for pid, started in recorded(directory).items():
        process = look(pid)
        if process is not None and process.started == started:
            found |= {pid, *descendants(pid)}
    marks = f"{MARK}={directory}".encode()
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if marks in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
    return {pid for pid in found if pid != os.getpid() and alive(pid)}
