"""The checkpoint store of a node as a process: it owns the slabs and the reader, and hands both out.

    python -m sllm_invoker.checkpoints.store_process CONTROL --root R --limit-mb N

CONTROL is an inherited SOCK_SEQPACKET descriptor whose other end is the invoker's; its end of file ends the process.
What is said on it and on the channels of readers is in `channel`. A process of its own because reading must not
wait for anyone's interpreter, and because killing it harms nobody: readers keep their maps, the invoker keeps the
slabs and hands them to the next life.

An ingest may feed it: it is lent slabs to fill, which are a checkpoint's when it says that the object is in place, and
free again when its channel ends before that: a process ends its maps before its descriptors.

A reader is proved gone by two facts together: its process has ended (pidfd), and nobody holds its end of the
channel any more, which children that it forked inherit with its maps. Until then its slabs are not reused,
whatever anybody says. Invariant: nothing is handed out before the kernel has vouched for who receives it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import resource
import selectors
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from sllm_faas.errors import SllmError, StorageFull, WireError, to_info
from sllm_invoker.checkpoints import channel
from sllm_invoker.checkpoints.channel import AnyMessage
from sllm_invoker.checkpoints.dram import DramTier, Load
from sllm_invoker.checkpoints.eviction import CostAware, Lru, Policy
from sllm_invoker.checkpoints.reader import ReadReport
from sllm_invoker.checkpoints.slab_book import Residence
from sllm_invoker.checkpoints.slabs import SLAB_BYTES

MIB = 1024 * 1024
POLICIES: dict[str, Callable[[], Policy]] = {"cost": CostAware, "lru": Lru}


class _Peer:
    """One end of a SOCK_SEQPACKET connection that never blocks: what does not fit waits, with its descriptors."""

    def __init__(self, selector: selectors.BaseSelector, sock: socket.socket, on_readable: Callable[[], None]) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.closed = False
        self._selector = selector
        self._on_readable = on_readable
        self._outbox: deque[tuple[AnyMessage, list[int]]] = deque()
        selector.register(sock, selectors.EVENT_READ, self)

    def ready(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush()
        if mask & selectors.EVENT_READ and not self.closed:
            self._on_readable()

    def send(self, message: AnyMessage, fds: Sequence[int] = ()) -> None:
        if self.closed:
            return
        if isinstance(message, channel.Watermark) and self._outbox:
            return  # absolute: the next one says more
        self._outbox.append((message, [os.dup(fd) for fd in fds]))
        self._flush()

    def send_all(self, message: AnyMessage, fds: Sequence[int]) -> None:
        """However many descriptors there are."""
        for each, some in channel.with_fds(message, fds):
            self.send(each, some)

    def hear(self, handle: Callable[[AnyMessage, list[int], int], None]) -> bool:
        """Handle what has come: a message, its descriptors, now the handler's, and its sender. False: this was all."""
        try:
            while (received := channel.receive(self.sock)) is not None:
                handle(*received)
        except BlockingIOError:
            return True
        except (OSError, WireError):
            pass
        return False

    def _flush(self) -> None:
        try:
            while self._outbox:
                message, fds = self._outbox[0]
                channel.send(self.sock, message, fds)
                self._outbox.popleft()
                channel.close_all(fds)
            self._selector.modify(self.sock, selectors.EVENT_READ, self)
        except BlockingIOError:
            self._selector.modify(self.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, self)
        except OSError:
            self._outbox_clear()  # the end of file will be read

    def _outbox_clear(self) -> None:
        for _, fds in self._outbox:
            channel.close_all(fds)
        self._outbox.clear()
        if not self.closed:
            self._selector.modify(self.sock, selectors.EVENT_READ, self)

    def close(self) -> None:
        if not self.closed:
            self._selector.unregister(self.sock)
            self.closed = True
            self._outbox_clear()
            self.sock.close()


class _Process:
    """A process that may map slabs, watched until it has ended."""

    def __init__(self, selector: selectors.BaseSelector, pid: int, on_ended: Callable[[], None]) -> None:
        self.ended = False
        self._selector = selector
        self._on_ended = on_ended
        self._fd = os.pidfd_open(pid)
        selector.register(self._fd, selectors.EVENT_READ, self)

    def ready(self, _mask: int) -> None:
        self._selector.unregister(self._fd)
        os.close(self._fd)
        self.ended = True
        self._on_ended()


class _Reader:
    """The store's end of one reader's channel, from the invoker's Open until it is proved gone."""

    def __init__(self, holder: str, home: Load | Residence) -> None:
        self.holder = holder
        self.home = home
        self.peer: _Peer | None = None
        self.process: _Process | None = None

    @property
    def gone(self) -> bool:
        return (self.peer is None or self.peer.closed) and (self.process is None or self.process.ended)


class _Feed:
    """The store's end of the channel of an ingest."""

    def __init__(self, holder: str) -> None:
        self.holder = holder
        self.peer: _Peer | None = None


class Store:
    def __init__(
        self,
        control: socket.socket,
        root: Path,
        limit: int,
        *,
        slab_bytes: int = SLAB_BYTES,
        small: int = SLAB_BYTES // 2,
        policy: Policy | None = None,
    ) -> None:
        self._selector = selectors.DefaultSelector()
        self._root = root
        self._readers: dict[str, _Reader] = {}
        self._feeds: set[_Feed] = set()
        self._count = 0
        self._adopting: channel.Adopt | None = None
        self._adopted: list[int] = []
        self._posted: deque[Callable[[], None]] = deque()
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_r, selectors.EVENT_READ, self)
        self._stopped = False
        self._control = _Peer(self._selector, control, self._commands)
        self.tier = DramTier(
            limit,
            self._post,
            slab_bytes=slab_bytes,
            small=small,
            policy=policy,
            pinned=self._pinned,
            on_progress=self._progress,
            on_done=self._done,
            on_drop=lambda number: self._control.send(channel.Dropped(number)),
        )

    def run(self) -> None:
        """Serve until the invoker's end is closed."""
        try:
            while not self._stopped:
                for key, mask in self._selector.select():
                    key.data.ready(mask)
                while self._posted:
                    self._posted.popleft()()
        finally:
            self.tier.close()
            for peer in [each.peer for each in self._readers.values()] + [each.peer for each in self._feeds]:
                if peer is not None:
                    peer.close()
            self._control.close()

    def ready(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_r, 4096)

    def _post(self, work: Callable[[], None]) -> None:
        self._posted.append(work)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_w, b"\0")

    def _pinned(self) -> set[str]:
        with contextlib.suppress(OSError):
            return {path.name for path in (self._root / "pins").iterdir()}
        return set()

    # -- the invoker -----------------------------------------------------------------------------------------

    def _commands(self) -> None:
        if not self._control.hear(self._command):
            self._stopped = True

    def _command(self, message: AnyMessage, fds: list[int], _pid: int) -> None:
        match message:
            case channel.Open():
                self._open(message, fds)
            case channel.Hasten():
                self.tier.hasten(message.request, message.priority)
            case channel.Adopt():
                self._adopting, self._adopted = message, fds
                self._adopt()
            case channel.Slabs() if self._adopting is not None:
                self._adopted += fds
                self._adopt()
            case channel.Feed():
                self._feed(fds)
            case channel.Expect():
                self.tier.expect(message.bytes)
            case channel.Limit():
                self.tier.limit(message.bytes)
            case channel.Forget():
                self.tier.forget(message.digest)
            case channel.Look():
                self._control.send(self._seen(message.request))
            case _:
                channel.close_all(fds)

    def _promote(self, message: channel.Open, holder: str) -> Load:
        found = self.tier.promote(message.digest, Path(message.directory), holder)
        if found is None:
            raise StorageFull(f"nothing was read ahead of need: {message.digest[:12]} is here, or has no room.")
        return found

    def _open(self, message: channel.Open, fds: list[int]) -> None:
        self._count += 1
        holder = f"{self._count}"
        theirs = socket.socket(fileno=fds[0]) if fds else None
        channel.close_all(fds[1:])
        try:
            home: Load | Residence
            if message.promote:
                home = self._promote(message, holder)
            else:
                home = self.tier.open(message.digest, Path(message.directory), holder, message.priority)
        except SllmError as error:
            self._control.send(channel.NotLoaded(message.request, to_info(error)))
            if theirs is not None:
                with contextlib.suppress(OSError):
                    channel.send(theirs, channel.NotLoaded(0, to_info(error)))
                theirs.close()
            return
        if theirs is not None:
            reader = self._readers[holder] = _Reader(holder, home)
            reader.peer = _Peer(self._selector, theirs, lambda: self._heard(reader))
        if isinstance(home, Load):
            home.requests.append(message.request)
            self._control.send(channel.Opened(message.request, "disk" if home.reading is not None else "dram"))
        else:
            self._control.send(channel.Opened(message.request, "dram"))
            self._control.send(channel.Loaded(message.request, "dram", 0, 0.0))
            if theirs is None:
                self.tier.gone(holder)

    def _adopt(self) -> None:
        wanted = self._adopting
        assert wanted is not None
        if len(self._adopted) < wanted.count:
            return
        fds, self._adopting, self._adopted = self._adopted, None, []
        if wanted.slab_bytes != self.tier.pool.slab_bytes or self.tier.book.find(wanted.digest) is not None:
            channel.close_all(fds)
            return
        holders = set()
        for pid in wanted.pids:
            holder = f"pid {pid}"
            with contextlib.suppress(OSError):  # ended meanwhile
                reader = self._readers.get(holder) or _Reader(holder, Residence(0, wanted.digest, 0, ()))
                if reader.process is None:
                    reader.process = _Process(self._selector, pid, functools.partial(self._ended, holder))
                self._readers[holder] = reader
                holders.add(holder)
        found = self.tier.adopt(wanted.digest, wanted.bytes, fds, holders)
        self._hold(found, Path(wanted.directory))

    def _hold(self, residence: Residence, directory: Path) -> None:
        """Have the invoker keep the slabs alive over our death."""
        fds = [slab.fd for slab in self.tier.slabs(residence)]
        held = channel.Held(residence.number, residence.digest, str(directory), residence.bytes, len(fds))
        self._control.send_all(held, fds)

    def _seen(self, request: int) -> channel.Seen:
        tier, residents = self.tier, []
        lent = {each.number for each in tier.lent.values()}
        for each in [each for each in tier.book.residences.values() if each.number not in lent]:
            load = tier.loads.get(each.digest) if each.state == "filling" else None
            watermark = load.reading.watermark if load and load.reading else each.bytes
            residents.append(channel.Resident(each.digest, each.state, each.bytes, len(each.leases), watermark))
        pool = tier.pool
        return channel.Seen(
            request, pool.slab_bytes, len(pool.slabs), len(tier.book.free), pool.limit, tuple(residents)
        )

    # -- ingests ---------------------------------------------------------------------------------------------

    def _feed(self, fds: list[int]) -> None:
        channel.close_all(fds[1:])
        if fds:
            self._count += 1
            feed = _Feed(f"{self._count}")
            feed.peer = _Peer(self._selector, socket.socket(fileno=fds[0]), lambda: self._fed(feed))
            self._feeds.add(feed)

    def _fed(self, feed: _Feed) -> None:
        def handle(message: AnyMessage, fds: list[int], _pid: int) -> None:
            assert feed.peer is not None
            channel.close_all(fds)
            match message:
                case channel.Lend():
                    slabs = self.tier.lend(feed.holder, message.bytes)
                    lent = channel.Lent(self.tier.pool.slab_bytes, len(slabs))
                    feed.peer.send_all(lent, [slab.fd for slab in slabs])
                case channel.Written():
                    feed.peer.send(self._take(feed, message))

        assert feed.peer is not None
        if not feed.peer.hear(handle):
            feed.peer.close()
            self.tier.give_back(feed.holder)
            self._feeds.discard(feed)

    def _take(self, feed: _Feed, written: channel.Written) -> AnyMessage:
        """It is in memory from now on, if it is what it should be."""
        try:
            found = self.tier.take(feed.holder, written.digest, Path(written.directory), written.bytes)
        except SllmError as error:
            return channel.NotLoaded(0, to_info(error))
        self._hold(found, Path(written.directory))
        return channel.Whole(found.number)

    # -- readers ---------------------------------------------------------------------------------------------

    def _heard(self, reader: _Reader) -> None:
        def handle(message: AnyMessage, fds: list[int], pid: int) -> None:
            channel.close_all(fds)
            if isinstance(message, channel.Attach) and reader.process is None:
                self._attach(reader, pid)

        assert reader.peer is not None
        if not reader.peer.hear(handle):
            reader.peer.close()
            self.tier.release(reader.holder)
            self._ended(reader.holder)

    def _attach(self, reader: _Reader, pid: int) -> None:
        assert reader.peer is not None
        reader.process = _Process(self._selector, pid, lambda: self._ended(reader.holder))
        home = reader.home
        residence = home.residence if isinstance(home, Load) else home
        whole = not isinstance(home, Load) or self.tier.loads.get(home.digest) is not home
        if residence is None:
            assert isinstance(home, Load)
            reader.peer.send(channel.Layout("file", home.part.bytes))
        else:
            if residence.number not in self.tier.book.residences or reader.holder not in residence.leases:
                return  # its load failed and it was told so
            self.tier.book.map(residence.number, reader.holder)
            slabs = self.tier.slabs(residence)
            layout = channel.Layout("slabs", residence.bytes, self.tier.pool.slab_bytes, len(slabs), whole)
            reader.peer.send_all(layout, [slab.fd for slab in slabs])
        if whole:
            reader.peer.send(channel.Whole())

    def _ended(self, holder: str) -> None:
        reader = self._readers.get(holder)
        if reader is not None and reader.gone:
            del self._readers[holder]
            self.tier.gone(holder)

    def _of(self, load: Load) -> list[_Reader]:
        return [reader for reader in self._readers.values() if reader.home is load]

    def _progress(self, load: Load, watermark: int) -> None:
        for reader in self._of(load):
            if reader.process is not None and reader.peer is not None:
                reader.peer.send(channel.Watermark(watermark))

    def _done(self, load: Load, report: ReadReport | None, error: Exception | None) -> None:
        readers = self._of(load)
        for request in load.requests:
            if error is not None:
                self._control.send(channel.NotLoaded(request, to_info(error)))
            elif report is not None:
                self._control.send(channel.Loaded(request, "disk", report.bytes, report.seconds))
            else:
                self._control.send(channel.Loaded(request, "dram", 0, 0.0))
        for reader in readers:
            if reader.peer is None:
                continue
            if error is not None:
                reader.peer.send(channel.NotLoaded(0, to_info(error)))
            elif reader.process is not None:
                reader.peer.send(channel.Whole(0, "disk" if report else "dram", report.seconds if report else 0.0))
        if error is None and load.residence is not None:
            self._hold(load.residence, load.directory)
        for holder in load.holders - {reader.holder for reader in readers}:
            self.tier.gone(holder)  # a prefetch: nobody uses it yet


def main() -> int:
    parser = argparse.ArgumentParser(prog="sllm-store")
    parser.add_argument("control", type=int)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--limit-mb", type=int, required=True)
    parser.add_argument("--slab-mb", type=int, default=SLAB_BYTES // MIB)
    parser.add_argument("--small-mb", type=int, default=SLAB_BYTES // MIB // 2)
    parser.add_argument("--policy", choices=POLICIES, default="cost")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends when its invoker has
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Store(
        socket.socket(fileno=options.control),
        options.root,
        options.limit_mb * MIB,
        slab_bytes=options.slab_mb * MIB,
        small=options.small_mb * MIB,
        policy=POLICIES[options.policy](),
    ).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
