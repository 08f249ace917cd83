"""The link of an instance: frames out from any thread, frames in where nobody is disturbed.

                               ┌─ a thread ─────────┐
    producers ──► Outbox ──► StreamLink             ├── socket ──► invoker
                     │         └─ the user's loop ──┘
                     └─────► MemoryLink (the consumer's loop)  ──► the platform in this process

Where user code may block its thread for as long as it likes, the link's own thread goes on taking frames in and out.
Where it is all asynchronous, its loop does that itself: no frame wakes another thread. A producer wakes the consumer
once, however much it adds; what an invocation added meanwhile leaves as one frame. No decision about an invocation is
made here. Invariants: a terminal frame is never lost (only log lines are, and they are counted); what waits is
bounded, because outputs are bounded by their calls and logs by `MAX_LOGS`.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from sllm_faas.wire.codec import encode
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Log, LogRecord
from sllm_faas.wire.stream import READ, Outgoing, Splitter
from sllm_invoker.runner.call import Call, Parts

MAX_LOGS = 4096
MAX_LOG_BATCH = 256
MAX_WRITE = 1024 * 1024
"""Bytes taken from the outbox before they are written."""

ORPHANED = 81
"""Exit status of a process whose invoker closed the link: it is gone."""

BROKEN = 82
"""Exit status of a process whose link failed."""


class Outbox:
    """What waits to be sent. Many producers, one consumer.

    `wake` is called by a producer when the consumer said that it sleeps.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self._queue: deque[Call | Parts] = deque()
        self._logs: deque[LogRecord] = deque()
        self._dropped = 0
        self._wake = wake
        self._asleep = False

    def send(self, parts: Parts) -> None:
        self._queue.append(parts)
        self.rouse()

    def flush(self, call: Call) -> None:
        if not call.queued:
            call.queued = True
            self._queue.append(call)
            self.rouse()

    def log(self, record: LogRecord) -> None:
        if len(self._logs) >= MAX_LOGS:
            self._dropped += 1
        else:
            self._logs.append(record)
        self.rouse()

    def sleep(self) -> bool:
        """Consumer: from here on a producer wakes me. False when there is something already."""
        self._asleep = True
        if self._queue or self._logs:
            self._asleep = False
            return False
        return True

    def frames(self) -> Iterator[Parts]:
        """Everything that is due. Log lines go first, so that an invocation's precede its end."""
        self._asleep = False
        while self._queue or self._logs:
            yield from self._log_frames()
            if not self._queue:
                continue
            item = self._queue.popleft()
            if isinstance(item, Call):
                item.queued = False
                yield from item.take()
            else:
                yield item

    def _log_frames(self) -> Iterator[Parts]:
        while self._logs:
            records = [self._logs.popleft() for _ in range(min(len(self._logs), MAX_LOG_BATCH))]
            if self._dropped:
                lost, self._dropped = self._dropped, 0
                records.append(LogRecord(time.time(), "platform", f"dropped {lost} lines", level="warning"))
            yield encode(Header(Type.LOG), Log(tuple(records)))

    def rouse(self) -> None:
        """Wake the consumer if it sleeps."""
        if self._asleep:
            self._asleep = False
            self._wake()


class MemoryLink(Outbox):
    """A link without a socket: `deliver(parts)` is called for every frame, inside what `schedule` runs.

    `schedule` is a loop's `call_soon_threadsafe`, so frames arrive on that loop, in order.
    """

    def __init__(self, deliver: Callable[[Parts], None], schedule: Callable[[Callable[[], None]], object]) -> None:
        super().__init__(lambda: schedule(self._drain))
        self._deliver = deliver
        self.sleep()

    def _drain(self) -> None:
        while True:
            for parts in self.frames():
                self._deliver(parts)
            if self.sleep():
                return


class StreamLink(Outbox):
    """A connected socket to the invoker, served by a thread of its own or, within `on`, by a loop.

    `receiver(parts)` is called there for every message, one at a time. When the other end closes, the invoker is gone
    and the process exits at once. `start` and `close` are a pair.
    """

    def __init__(self, sock: socket.socket, receiver: Callable[[Parts], None]) -> None:
        super().__init__(self._wake_thread)
        sock.setblocking(False)
        self.receiver = receiver
        self._sock = sock
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._splitter = Splitter()
        self._outgoing = Outgoing()
        self._frames: Iterator[Parts] = iter(())
        self._leaving = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._leaving = False
        self._thread = threading.Thread(target=self._run, name="sllm-link", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Send everything that waits, then disconnect. Waits at most `timeout` seconds."""
        self._leave(timeout)
        self._sock.close()

    @contextmanager
    def on(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Within the block `loop`, which the calling thread runs, serves the link instead of the thread."""
        self._leave()
        host = _OnLoop(self, loop, self._sock.fileno())
        self._wake = host.wake
        host.attach()
        try:
            yield
        finally:
            host.detach()
            self._wake = self._wake_thread
            self.start()

    def _leave(self, timeout: float | None = None) -> None:
        """Have the thread end when all is sent."""
        assert self._thread is not None
        self._leaving = True
        self._wake_thread()
        self._thread.join(timeout)

    def _wake_thread(self) -> None:
        os.eventfd_write(self._eventfd, 1)

    # -- the two directions, for whoever serves ------------------------------------------------------------------

    def take_in(self) -> None:
        """What can be read now."""
        try:
            data = self._sock.recv(READ)
            if not data:
                os._exit(ORPHANED)
            for parts in self._splitter.feed(data):
                self.receiver(parts)
        except BlockingIOError:
            pass
        except BaseException as error:
            _die(error)

    def send_out(self) -> bool:
        """Write what is due. False when the socket takes no more; True when the next producer wakes the consumer."""
        outgoing = self._outgoing
        try:
            while outgoing.write(self._sock):
                for parts in self._frames:
                    outgoing.add(parts)
                    if outgoing.size >= MAX_WRITE:
                        break
                else:
                    self._frames = self.frames()
                if not outgoing.size and self.sleep():
                    return True
        except BaseException as error:
            _die(error)
        return False

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        fd = self._sock.fileno()
        with select.epoll() as poller:
            # Edge-triggered and never read: each write is a new edge.
            poller.register(self._eventfd, select.EPOLLIN | select.EPOLLET)
            poller.register(fd, select.EPOLLIN)
            full = False
            while True:
                if self.send_out() is full:
                    full = not full
                    poller.modify(fd, select.EPOLLIN | (select.EPOLLOUT if full else 0))
                if self._leaving and not full:
                    return
                for ready, events in poller.poll():
                    if ready == fd and events & ~select.EPOLLOUT:
                        self.take_in()


class _OnLoop:
    """A loop that serves a link."""

    def __init__(self, link: StreamLink, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self._link = link
        self._loop = loop
        self._fd = fd
        self._home = threading.get_ident()

    def attach(self) -> None:
        self._loop.add_reader(self._fd, self._readable)
        self._loop.call_soon(self._write)

    def detach(self) -> None:
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)

    def wake(self) -> None:
        if threading.get_ident() == self._home:
            self._loop.call_soon(self._write)
        else:
            self._loop.call_soon_threadsafe(self._write)

    def _readable(self) -> None:
        self._link.take_in()
        # After the tasks that begin now: what those that never wait have to say goes out in the same turn of the loop.
        self._link.rouse()

    def _write(self) -> None:
        if not self._link.send_out():
            self._loop.add_writer(self._fd, self._writable)

    def _writable(self) -> None:
        self._loop.remove_writer(self._fd)
        self._write()


def _die(error: BaseException) -> NoReturn:
    """Without its link the instance serves nobody, and nobody would know: the process ends."""
    if isinstance(error, ConnectionError):
        os._exit(ORPHANED)
    traceback.print_exception(error, file=sys.__stderr__)
    os._exit(BROKEN)
