"""ZeroMQ sockets on an asyncio loop: callbacks in, synchronous sends out.

Not a protocol: who says what is in `messages`, who is alive in `liveness`. Two ends:

    Router(endpoint, on_message)   binds; on_message(peer, parts); send(peer, parts)
    Dealer(endpoint, identity, on_message)   connects; on_message(parts); send(parts)

`memory.py` has both ends without sockets. Invariants: a send never blocks and never silently drops — it waits in a
bounded outbox until the end of the wake-up, where everything goes out together (waking ZeroMQ's own thread costs more
than a message), or it raises `PeerGone` / `PeerBusy`; everything readable is drained in one wake-up (the ZeroMQ
descriptor is edge-triggered: stopping early would lose the wake-up), at most `BURST` messages before other callbacks
get their turn.

Over TCP every socket is CURVE, and a Router lets in only the keys that `curve.Admission` allows in its domain; over ipc
none is.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq

from sllm_faas.errors import BadSpec
from sllm_faas.wire.messages import MAX_FRAME
from sllm_faas.wire.peers import Parts, PeerBusy, PeerGone

HIGH_WATER = 10_000
OUTBOX = 20_000
BURST = 256
HANDSHAKE_MS = 2000
"""A connection that is not let in by then is closed; ZeroMQ leaves one that was put off (`curve.Admission`) open till
then."""
_RETRY = 0.002

__all__ = ["CurveKeys", "Dealer", "Parts", "PeerBusy", "PeerGone", "Router", "check_endpoint"]


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """A CURVE key pair, Z85 text."""

    public: str
    secret: str

    @classmethod
    def generate(cls) -> CurveKeys:
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())


def check_endpoint(endpoint: str, curve: bool) -> None:
    """Raises BadSpec unless it is ipc://, or tcp:// with CURVE."""
    scheme = endpoint.split("://", 1)[0]
    if scheme == "ipc":
        path = endpoint[len("ipc://") :]
        if len(os.fsencode(path)) > 100:
            raise BadSpec(f"socket path {path!r} is longer than 100 bytes", hint="Use a shorter state directory.")
    elif scheme == "tcp":
        if not curve:
            raise BadSpec(f"endpoint {endpoint!r} is TCP without keys; allowed: TCP only with CURVE keys")
    else:
        raise BadSpec(f"endpoint {endpoint!r} has scheme {scheme!r}; allowed: ipc, tcp")


# The C functions under pyzmq's methods, and plain numbers for its enumerations: the methods check again, for each part
# of each message, what is known here, and cost as much as the system calls.
_send = zmq.backend.Socket.send
_receive = zmq.backend.Socket.recv
_get = zmq.backend.Socket.get
_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_RCVMORE, _EVENTS, _POLLIN = int(zmq.RCVMORE), int(zmq.EVENTS), int(zmq.POLLIN)


def send_parts(socket: zmq.SyncSocket, parts: Sequence[bytes]) -> None:
    """Send one message without blocking. Raises zmq.Again, and then nothing of it was sent."""
    for part in parts[:-1]:
        _send(socket, part, _MORE)
    _send(socket, parts[-1], _NOBLOCK)


def receive_parts(socket: zmq.SyncSocket) -> Parts:
    """The next message, without blocking. Raises zmq.Again when there is none."""
    parts = [_receive(socket, _NOBLOCK)]
    while _get(socket, _RCVMORE):
        parts.append(_receive(socket, _NOBLOCK))
    return parts


def readable(socket: zmq.SyncSocket) -> bool:
    """Whether a message can be received. To be asked after every send: sending may consume the descriptor's edge."""
    events = _get(socket, _EVENTS)
    return isinstance(events, int) and bool(events & _POLLIN)


class _Socket(ABC):
    def __init__(self, kind: int) -> None:
        self._zmq: zmq.SyncSocket = zmq.Context.instance().socket(kind)
        self._zmq.setsockopt(zmq.LINGER, 0)
        self._zmq.setsockopt(zmq.SNDHWM, HIGH_WATER)
        self._zmq.setsockopt(zmq.RCVHWM, HIGH_WATER)
        self._zmq.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        self._loop = asyncio.get_running_loop()
        descriptor: object = self._zmq.getsockopt(zmq.FD)
        assert isinstance(descriptor, int)
        self._fd = descriptor
        self._reading = False
        self._scheduled = False
        self._flushing = False
        self._retrying = False
        self._closed = False

    def _start(self) -> None:
        self._loop.add_reader(self._fd, self._wake)
        self._reading = True
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _wake(self) -> None:
        if not self._scheduled:
            self._drain()

    def _drain(self) -> None:
        self._scheduled = False
        if self._closed:
            return
        socket = self._zmq
        try:
            for _ in range(BURST):
                self._deliver(receive_parts(socket))
                if self._closed:
                    return
        except zmq.Again:
            return
        self._schedule()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._closed:
            return
        if not self._write() and not self._retrying:
            self._retrying = True
            self._loop.call_later(_RETRY, self._retry)
        if readable(self._zmq):
            self._schedule()

    def _retry(self) -> None:
        self._retrying = False
        self._flush()

    @abstractmethod
    def _write(self) -> bool:
        """Send what waits. False when some of it has to wait longer."""

    @abstractmethod
    def _deliver(self, parts: Parts) -> None: ...

    def close(self) -> None:
        """Idempotent. What ZeroMQ has not taken or written by now is dropped."""
        if self._closed:
            return
        self._write()
        self._closed = True
        if self._reading:
            self._loop.remove_reader(self._fd)
        self._zmq.close(linger=0)


class Dealer(_Socket):
    """The connecting end. ZeroMQ reconnects by itself; messages sent meanwhile wait in its queue."""

    def __init__(
        self,
        endpoint: str,
        identity: bytes,
        on_message: Callable[[Parts], None],
        *,
        keys: CurveKeys | None = None,
        server_key: str = "",
    ) -> None:
        check_endpoint(endpoint, bool(keys and server_key))
        super().__init__(zmq.DEALER)
        self.endpoint = endpoint
        self._on_message = on_message
        self._outbox: deque[Parts] = deque()
        self._zmq.setsockopt(zmq.IDENTITY, identity)
        self._zmq.setsockopt(zmq.RECONNECT_IVL, 50)
        self._zmq.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        if keys and endpoint.startswith("tcp://"):
            self._zmq.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
            self._zmq.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
            self._zmq.setsockopt(zmq.CURVE_SERVERKEY, server_key.encode())
        self._zmq.connect(endpoint)
        self._start()

    def _deliver(self, parts: Parts) -> None:
        self._on_message(parts)

    def send(self, parts: Parts) -> None:
        """Raises PeerBusy when the outbox is full, PeerGone after close()."""
        if self._closed:
            raise PeerGone(f"link to {self.endpoint} is closed")
        if len(self._outbox) >= OUTBOX:
            raise PeerBusy(f"{self.endpoint} does not read: {OUTBOX} messages wait")
        self._outbox.append(parts)
        self._flush_soon()

    def _write(self) -> bool:
        outbox = self._outbox
        try:
            while outbox:
                send_parts(self._zmq, outbox[0])
                outbox.popleft()
        except zmq.Again:
            return False
        return True


class Router(_Socket):
    """The binding end. Peers are named by the identity they connected with.

    `on_gone(peer)` is called when there turns out to be no peer to send to. `domain` says who is asked for whom it lets
    in over TCP."""

    def __init__(
        self,
        endpoint: str,
        on_message: Callable[[bytes, Parts], None],
        *,
        on_gone: Callable[[bytes], None] = lambda _: None,
        keys: CurveKeys | None = None,
        domain: str = "sllm",
        mode: int = 0o700,
    ) -> None:
        check_endpoint(endpoint, keys is not None)
        super().__init__(zmq.ROUTER)
        self._on_message = on_message
        self._on_gone = on_gone
        self._outbox: dict[bytes, deque[Parts]] = {}
        self._zmq.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._zmq.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if keys and endpoint.startswith("tcp://"):
            self._zmq.setsockopt(zmq.CURVE_SERVER, 1)
            self._zmq.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
            self._zmq.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
            self._zmq.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
            self._zmq.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        try:
            self._zmq.bind(endpoint)
        except zmq.ZMQError as error:
            self._zmq.close(linger=0)
            raise BadSpec(f"cannot listen on {endpoint}: {error}", hint="Is another one running?") from None
        if endpoint.startswith("ipc://"):
            Path(endpoint[len("ipc://") :]).chmod(mode)
        bound = self._zmq.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self.endpoint = bound.rstrip(b"\0").decode()
        self._start()

    def _deliver(self, parts: Parts) -> None:
        self._on_message(parts[0], parts[1:])

    def send(self, peer: bytes, parts: Parts) -> None:
        """Raises PeerBusy when the peer's outbox is full, PeerGone after close()."""
        if self._closed:
            raise PeerGone(f"{self.endpoint} is closed")
        queue = self._outbox.get(peer)
        if queue is None:
            queue = self._outbox[peer] = deque()
        elif len(queue) >= OUTBOX:
            raise PeerBusy(f"peer {peer!r} does not read: {OUTBOX} messages wait")
        queue.append(parts)
        self._flush_soon()

    def _write(self) -> bool:
        gone: list[bytes] = []
        for peer, queue in list(self._outbox.items()):
            try:
                while queue:
                    send_parts(self._zmq, (peer, *queue[0]))
                    queue.popleft()
            except zmq.Again:
                continue
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                gone.append(peer)
            del self._outbox[peer]
        for peer in gone:
            self._on_gone(peer)
        return not self._outbox

    def forget(self, peer: bytes) -> None:
        """Drop what waits for a peer that is lost."""
        self._outbox.pop(peer, None)
