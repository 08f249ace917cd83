"""The invoker's side of the checkpoint store process: it runs it, asks it for checkpoints, keeps its slabs alive.

    opening = tier.open(digest, directory)    the read begins at once
        opening.channel                       descriptor for the container, which attaches through it
        opening.loaded                        resolves to Loaded, or raises what the read met
        opening.close()                       after the container has the descriptor

A store process that dies takes nothing with it: readers keep their maps, the slabs it had filled are held here and
handed to its next life. What was being read when it died is reported as lost (`Unavailable`); a reader that finds
its channel ended maps the file instead. Invariant: a store process is running or about to, while the tier is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sllm_faas import logging
from sllm_faas.errors import Unavailable, WireError, from_info
from sllm_faas.spec import Tier
from sllm_invoker.checkpoints import channel
from sllm_invoker.checkpoints.channel import AnyMessage, Loaded, Seen
from sllm_invoker.checkpoints.priority import Priority
from sllm_invoker.containers.tree import Tree

MIB = 1024 * 1024
FIRST_WAIT = 0.1
LONGEST_WAIT = 30.0
"""Seconds between two lives of a store process that keeps dying; doubled every time, from the first."""


@dataclass(slots=True)
class _Kept:
    """Slabs of one residence, so that they outlive the process that made them."""

    held: channel.Held
    fds: list[int]

    @property
    def whole(self) -> bool:
        return len(self.fds) == self.held.count


class Opening:
    """One wish for a checkpoint. `channel` is -1 for a prefetch."""

    def __init__(self, request: int, end: socket.socket | None, loaded: asyncio.Future[Loaded]) -> None:
        self.request = request
        self._end = end
        self.loaded = loaded
        self.tier: Tier | None = None
        """Where it was when it was asked for; None until the store said so."""

    @property
    def channel(self) -> int:
        return self._end.fileno() if self._end is not None else -1

    def close(self) -> None:
        """Let go of the descriptor; the container's own copy stays. A read nobody else waits for is cancelled."""
        if self._end is not None:
            self._end.close()


class MemoryTier:
    """`users` tells which processes may map a checkpoint: a new life of the store must know them."""

    def __init__(
        self,
        root: Path,
        limit_mb: int,
        tree: Tree,
        *,
        users: Callable[[str], list[int]] = lambda _digest: [],
        options: tuple[str, ...] = (),
    ) -> None:
        self._root = root
        self._limit_mb = limit_mb
        self._tree = tree
        self._users = users
        self._options = options
        self._log = logging.get("invoker")
        self._loop = asyncio.get_running_loop()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._outbox: list[tuple[AnyMessage, list[int]]] = []
        self._requests: dict[int, Opening] = {}
        self._looks: dict[int, asyncio.Future[Seen]] = {}
        self._count = 0
        self._kept: dict[int, _Kept] = {}
        self._filling: int | None = None
        self._largest = 0
        self._granted_mb = limit_mb
        self._wait = FIRST_WAIT
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def pid(self) -> int:
        """Of the store process; 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    @property
    def granted_mb(self) -> int:
        """What slabs may take."""
        return self._granted_mb

    def pinned(self) -> dict[str, int]:
        """MiB in slabs of the checkpoints that stay there whatever else needs memory, by digest."""
        with contextlib.suppress(OSError):
            pins = {path.name for path in (self._root / "pins").iterdir()}
            held = [kept.held for kept in self._kept.values() if kept.whole and kept.held.digest in pins]
            return {each.digest: -(-each.bytes // MIB) for each in held}
        return {}

    def resident(self) -> tuple[str, ...]:
        """Digests of the checkpoints that are whole in slabs."""
        return tuple(sorted({kept.held.digest for kept in self._kept.values() if kept.whole}))

    def start(self) -> None:
        """Run the store process; again after every death of it."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a descriptor per slab
        ours, theirs = channel.pair()
        command = [sys.executable, "-P", "-m", "sllm_invoker.checkpoints.store_process", str(theirs.fileno())]
        command += ["--root", str(self._root), "--limit-mb", str(self._limit_mb), *self._options]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._tree.add(self._process.pid)
        ours.setblocking(False)
        self._control = ours
        self._loop.add_reader(ours, self._readable)
        kept, self._kept = list(self._kept.values()), {}
        if self._granted_mb < self._limit_mb:
            self._send(channel.Limit(self._granted_mb * MIB))
        for each in kept:
            self._hand_over(each)
        if self._largest:
            self._send(channel.Expect(self._largest))

    def promote(self, digest: str, directory: Path) -> Opening:
        """Have it read ahead of need where that costs nobody anything. `loaded` raises where it does, and where a load
        came that needed the room."""
        return self.open(digest, directory, prefetch=True, promote=True)

    def grant(self, megabytes: int) -> None:
        """Slabs may take so many MiB from now on, and never more than the tier was made for."""
        granted = max(0, min(megabytes, self._limit_mb))
        if granted != self._granted_mb:
            self._granted_mb = granted
            self._send(channel.Limit(granted * MIB))

    def open(
        self,
        digest: str,
        directory: Path,
        *,
        priority: Priority = Priority.WAITED,
        prefetch: bool = False,
        promote: bool = False,
    ) -> Opening:
        """Have it read, unless it is in memory. More urgent reads come first. `prefetch`: nobody attaches it yet."""
        self._count += 1
        future: asyncio.Future[Loaded] = self._loop.create_future()
        end: socket.socket | None = None
        fds: list[int] = []
        if not prefetch:
            end, theirs = channel.reader_pair()
            fds = [theirs.detach()]
        opening = Opening(self._count, end, future)
        if self._control is None:
            channel.close_all(fds)  # whoever has the other end maps the file
            future.set_exception(Unavailable("the checkpoint store is restarting."))
        else:
            self._requests[self._count] = opening
            self._send(channel.Open(self._count, digest, str(directory), priority, promote), fds)
        future.add_done_callback(_seen)
        return opening

    def hasten(self, opening: Opening, priority: Priority) -> None:
        """Who wants it is more urgent by now. Nothing happens when it is read already."""
        if opening.request in self._requests:
            self._send(channel.Hasten(opening.request, priority))

    def feed(self) -> socket.socket | None:
        """A channel through which an ingest forwards what it writes; None while there is no store process."""
        if self._control is None:
            return None
        ours, theirs = channel.pair()
        self._send(channel.Feed(), [theirs.detach()])
        return ours

    def expect(self, size: int) -> None:
        """A checkpoint of `size` bytes is on this node: have memory ready for one of that size."""
        if size > self._largest:
            self._largest = size
            self._send(channel.Expect(size))

    def forget(self, digest: str) -> None:
        """Its object was removed."""
        self._send(channel.Forget(digest))

    async def look(self) -> Seen:
        """What is in memory. Raises Unavailable."""
        self._count += 1
        future: asyncio.Future[Seen] = self._loop.create_future()
        if self._control is None:
            raise Unavailable("the checkpoint store is restarting.")
        self._looks[self._count] = future
        self._send(channel.Look(self._count))
        return await future

    async def close(self) -> None:
        """End the store process and let go of its slabs."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._lose()
        if self._process is not None:
            process, self._process = self._process, None
            try:
                await asyncio.to_thread(process.wait, 5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
            self._tree.remove(process.pid)
        for each in self._kept.values():
            channel.close_all(each.fds)
        self._kept.clear()

    # -- to and from the process -----------------------------------------------------------------------------

    def _send(self, message: AnyMessage, fds: list[int] | None = None) -> None:
        """The descriptors are ours to close."""
        if self._control is None:
            channel.close_all(fds or [])
            return
        self._outbox.append((message, fds or []))
        self._flush()

    def _flush(self) -> None:
        assert self._control is not None
        try:
            while self._outbox:
                message, fds = self._outbox[0]
                channel.send(self._control, message, fds)
                self._outbox.pop(0)
                channel.close_all(fds)
            self._loop.remove_writer(self._control)
        except BlockingIOError:
            self._loop.add_writer(self._control, self._flush)
        except OSError:
            pass  # its end of file is being read

    def _readable(self) -> None:
        assert self._control is not None
        try:
            while (received := channel.receive(self._control)) is not None:
                message, fds, _ = received
                self._handle(message, fds)
        except BlockingIOError:
            return
        except (OSError, WireError):
            pass
        self._died()

    def _handle(self, message: AnyMessage, fds: list[int]) -> None:
        self._wait = FIRST_WAIT
        match message:
            case channel.Opened() if message.request in self._requests:
                self._requests[message.request].tier = message.tier
            case channel.Loaded():
                opening = self._requests.pop(message.request, None)
                if opening is not None and not opening.loaded.done():
                    opening.loaded.set_result(message)
            case channel.NotLoaded():
                opening = self._requests.pop(message.request, None)
                if opening is not None and not opening.loaded.done():
                    opening.loaded.set_exception(from_info(message.error))
            case channel.Held():
                self._kept[message.residence] = _Kept(message, fds)
                self._filling = message.residence
            case channel.Slabs() if self._filling in self._kept:
                self._kept[self._filling].fds += fds
            case channel.Dropped():
                kept = self._kept.pop(message.residence, None)
                if kept is not None:
                    channel.close_all(kept.fds)
            case channel.Seen():
                look = self._looks.pop(message.request, None)
                if look is not None and not look.done():
                    look.set_result(message)
            case _:
                channel.close_all(fds)

    # -- its lives -------------------------------------------------------------------------------------------

    def _lose(self) -> None:
        if self._control is not None:
            self._loop.remove_reader(self._control)
            self._loop.remove_writer(self._control)
            self._control.close()
            self._control = None
        for _, fds in self._outbox:
            channel.close_all(fds)
        self._outbox.clear()
        loading = [opening.loaded for opening in self._requests.values()]
        lost: list[asyncio.Future[Loaded] | asyncio.Future[Seen]] = [*loading, *self._looks.values()]
        for future in lost:
            if not future.done():
                future.set_exception(Unavailable("the checkpoint store ended."))
        self._requests.clear()
        self._looks.clear()

    def _died(self) -> None:
        self._lose()
        assert self._process is not None
        self._process.kill()
        status = self._process.wait()  # it has closed its end: it is dead or dying
        self._tree.remove(self._process.pid)
        self._process = None
        if not self._closed:
            self._log.warning("checkpoint_store_died", status=status, retry_after=self._wait)
            self._timer = self._loop.call_later(self._wait, self.start)
            self._wait = min(LONGEST_WAIT, self._wait * 2)

    def _hand_over(self, kept: _Kept) -> None:
        """Give a new life what an earlier one had whole; it answers with Held of its own."""
        held = kept.held
        if not kept.whole:
            channel.close_all(kept.fds)
            return
        size = os.fstat(kept.fds[0]).st_size
        adopt = channel.Adopt(
            held.digest, held.directory, held.bytes, held.count, size, tuple(self._users(held.digest))
        )
        for message, fds in channel.with_fds(adopt, kept.fds):
            self._send(message, list(fds))


def _seen(future: asyncio.Future[Loaded]) -> None:
    """Nobody need await a wish: its error is not to be complained about."""
    with contextlib.suppress(asyncio.CancelledError):
        future.exception()
