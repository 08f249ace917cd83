"""The link of an instance: frames out from any thread, frames in on the link's own.

    producers ──► Outbox ──► ZmqLink (a thread that owns the DEALER)  ──► invoker
                     │
                     └─────► MemoryLink (the consumer's loop)         ──► the platform in this process

User code may block its thread for as long as it likes: the link's thread goes on taking frames in and out.
A producer wakes it once, however much it adds; what an invocation added meanwhile leaves as one frame. No
decision about an invocation is made here. Invariants: a terminal frame is never lost (only log lines are, and
they are counted); what waits is bounded, because outputs are bounded by their calls and logs by `MAX_LOGS`.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator

import zmq

from sllm_faas.wire.bus import readable, receive_parts, send_parts
from sllm_faas.wire.codec import encode
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import MAX_FRAME, Log, LogRecord
from sllm_invoker.runner.call import Call, Parts

MAX_LOGS = 4096
MAX_LOG_BATCH = 256
HIGH_WATER = 1000
_BLOCKED_RETRY = 0.005
ORPHANED = 81
"""Exit status of a process whose lifeline ended."""

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
        self._rouse()

    def flush(self, call: Call) -> None:
        if not call.queued:
            call.queued = True
            self._queue.append(call)
            self._rouse()

    def log(self, record: LogRecord) -> None:
        if len(self._logs) >= MAX_LOGS:
            self._dropped += 1
        else:
            self._logs.append(record)
        self._rouse()

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

    def _rouse(self) -> None:
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


class ZmqLink(Outbox):
    """A DEALER to the invoker and the thread that owns it.

    `receiver(parts)` is called on that thread for every message. When `lifeline` (a descriptor) reaches its end
    the invoker is gone and the process exits at once. `start` and `close` are a pair.
    """

    def __init__(self, endpoint: str, identity: str, receiver: Callable[[Parts], None], lifeline: int = -1) -> None:
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        super().__init__(lambda: os.eventfd_write(self._eventfd, 1))
        self._endpoint = endpoint
        self._identity = identity.encode()
        self.receiver = receiver
        self._lifeline = lifeline
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="sllm-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Send everything that waits, then disconnect. Waits at most `timeout` seconds."""
        self._closing = True
        os.eventfd_write(self._eventfd, 1)
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            context = zmq.Context(io_threads=1)
            socket: zmq.SyncSocket = context.socket(zmq.DEALER)
            socket.identity = self._identity
            socket.linger = 2000
            socket.sndhwm = socket.rcvhwm = HIGH_WATER
            socket.maxmsgsize = MAX_FRAME
            socket.reconnect_ivl = 50
            socket.reconnect_ivl_max = 1000
            socket.connect(self._endpoint)
            with select.epoll() as poller:
                poller.register(int(socket.get(zmq.FD)), select.EPOLLIN)
                # Edge-triggered and never read: each write is a new edge.
                poller.register(self._eventfd, select.EPOLLIN | select.EPOLLET)
                if self._lifeline >= 0:
                    poller.register(self._lifeline, select.EPOLLIN)
                self._serve(socket, poller)
            socket.close()
            context.term()
        except BaseException:
            # Without its link the instance serves nobody, and nobody would know.
            traceback.print_exc(file=sys.__stderr__)
            os._exit(BROKEN)

    def _serve(self, socket: zmq.SyncSocket, poller: select.epoll) -> None:
        frames: Iterator[Parts] = iter(())
        blocked: Parts | None = None
        while True:
            # Asked again after every send: that may have consumed the descriptor's edge for what is now readable.
            while readable(socket):
                self.receiver(receive_parts(socket))
            try:
                if blocked is not None:
                    send_parts(socket, blocked)
                    blocked = None
                sent = 0
                for parts in frames:
                    blocked = parts
                    send_parts(socket, parts)
                    blocked = None
                    sent += 1
            except zmq.Again:
                poller.poll(_BLOCKED_RETRY)
                continue
            frames = self.frames()
            if sent or not self.sleep():
                continue
            if self._closing:
                return
            for descriptor, _ in poller.poll():
                if descriptor == self._lifeline:
                    os._exit(ORPHANED)
