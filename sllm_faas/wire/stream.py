"""Messages of several parts over a connected stream socket, between an invoker and the processes it starts.

    | more: 1 bit | length: 31 bits | part |   big-endian; `more` is clear before the last part of a message

The two ends of a socket pair need no address, no handshake and no thread: whoever holds the descriptor is the peer.
`Splitter` and `Outgoing` are the two directions without a loop; `Stream` is both on one. What the messages say is no
business of this module.

Invariants: a message arrives whole or not at all; bytes that are no frame end the stream with one typed error; a send
never blocks, and what is sent in one wake-up of the loop is written together at its end.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from sllm_faas.errors import WireError
from sllm_faas.wire.codec import MAX_BUFFERS
from sllm_faas.wire.messages import MAX_FRAME
from sllm_faas.wire.peers import Parts, PeerBusy, PeerGone

MAX_PARTS = 1 + MAX_BUFFERS
MAX_MESSAGE = 2 * MAX_FRAME
"""Bytes of all parts of one message."""

MAX_WAITING = 512 * 1024 * 1024
"""Bytes that may wait for a peer that does not read."""

READ = 64 * 1024
_COPY = 16 * 1024
"""Bytes up to which a part is copied behind its prefix instead of being written from where it is."""

_VECTOR = 512
"""Pieces to one system call."""

_PREFIX = struct.Struct(">I")
_MORE = 0x8000_0000
_LENGTH = 0x7FFF_FFFF


class BadStream(WireError):
    """The bytes are not messages; nothing after them can be understood."""

    code = "bad_stream"


def fits(parts: Parts) -> bool:
    """Whether `parts` are a message that a Splitter takes."""
    if len(parts) == 1:
        return len(parts[0]) <= MAX_FRAME
    sizes = list(map(len, parts))
    return 0 < len(sizes) <= MAX_PARTS and max(sizes) <= MAX_FRAME and sum(sizes) <= MAX_MESSAGE


class Splitter:
    """Bytes as they come to whole messages."""

    def __init__(self) -> None:
        self._parts: Parts = []
        self._size = 0
        self._rest = bytearray()
        self._needed = _PREFIX.size

    def feed(self, data: bytes) -> Iterator[Parts]:
        """The messages that `data` completes, all of them to be taken. Raises BadStream after those before it; the
        stream is to be closed then."""
        rest = self._rest
        if rest:
            rest += data
            if len(rest) < self._needed:
                return
            data = bytes(rest)
            rest.clear()
        at, end = 0, len(data)
        self._needed = _PREFIX.size
        while end - at >= _PREFIX.size:
            (prefix,) = _PREFIX.unpack_from(data, at)
            begin = at + _PREFIX.size
            length = prefix & _LENGTH
            if length > MAX_FRAME or self._size + length > MAX_MESSAGE or len(self._parts) == MAX_PARTS:
                raise BadStream(
                    f"part {len(self._parts) + 1} of a message has {length} bytes after {self._size}; allowed: "
                    f"{MAX_FRAME} bytes, {MAX_MESSAGE} in all, {MAX_PARTS} parts"
                )
            stop = begin + length
            if stop > end:
                self._needed = stop - at
                break
            self._parts.append(data[begin:stop])
            at = stop
            if prefix & _MORE:
                self._size += length
            else:
                parts, self._parts, self._size = self._parts, [], 0
                yield parts
        if at < end:
            rest += memoryview(data)[at:]

    @property
    def between(self) -> bool:
        """Whether the bytes so far end with a message."""
        return not self._rest and not self._parts


class Outgoing:
    """Messages on their way into a socket. `size` is how many bytes wait."""

    def __init__(self) -> None:
        self.size = 0
        self._pieces: deque[bytes | memoryview] = deque()

    def add(self, parts: Parts) -> None:
        """`parts` must fit; whoever reads them checks."""
        for part in parts[:-1]:
            self._piece(len(part) | _MORE, part)
        self._piece(len(parts[-1]), parts[-1])

    def _piece(self, prefix: int, part: bytes) -> None:
        head = _PREFIX.pack(prefix)
        self.size += len(head) + len(part)
        if len(part) <= _COPY:
            self._pieces.append(head + part)
        else:
            self._pieces.append(head)
            self._pieces.append(part)

    def write(self, sock: socket.socket) -> bool:
        """Write what `sock` takes. False when something still waits. Raises OSError."""
        pieces = self._pieces
        while pieces:
            try:
                sent = sock.sendmsg(pieces if len(pieces) <= _VECTOR else islice(pieces, _VECTOR))
            except BlockingIOError:
                return False
            self.size -= sent
            while pieces and sent >= len(pieces[0]):
                sent -= len(pieces.popleft())
            if sent:
                pieces[0] = memoryview(pieces[0])[sent:]
        return True


class Stream:
    """One end of a connected socket on the running loop, which it owns from here on.

    `on_message(parts)` is called for every message, `on_end(error)` once, when the other end closed (None) or sent
    what is no message; not after `close`.
    """

    def __init__(
        self, sock: socket.socket, on_message: Callable[[Parts], None], on_end: Callable[[BadStream | None], None]
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._on_message = on_message
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._splitter = Splitter()
        self._outgoing = Outgoing()
        self._flushing = False
        self._closed = False
        self._loop.add_reader(self._fd, self._read)

    def send(self, parts: Parts) -> None:
        """Raises PeerGone when the stream has ended, PeerBusy when too much waits already."""
        if self._closed:
            raise PeerGone("the stream has ended")
        if self._outgoing.size > MAX_WAITING:
            raise PeerBusy(f"the peer does not read: {self._outgoing.size} bytes wait")
        self._outgoing.add(parts)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def drain(self) -> None:
        """Take in now what the other end has sent: it is dead, and its last words count."""
        while not self._closed and self._read():
            pass

    def close(self) -> None:
        """Idempotent. What was sent in this wake-up still goes out if the socket takes it."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        try:
            self._outgoing.write(self._sock)
        except OSError:
            pass  # nobody is there to read it
        self._sock.close()

    def _read(self) -> bool:
        try:
            data = self._sock.recv(READ)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        try:
            for parts in self._splitter.feed(data):
                self._on_message(parts)
                if self._closed:
                    return False
        except BadStream as error:
            self._end(error)
            return False
        if not data:
            self._end(None if self._splitter.between else BadStream("the stream ended within a message"))
        return bool(data)

    def _flush(self) -> None:
        self._flushing = False
        if self._closed:
            return
        try:
            written = self._outgoing.write(self._sock)
        except OSError:
            return  # the reader sees the end, after what was said before it
        if not written:
            self._flushing = True
            self._loop.add_writer(self._fd, self._writable)

    def _writable(self) -> None:
        self._loop.remove_writer(self._fd)
        self._flush()

    def _end(self, error: BadStream | None) -> None:
        if not self._closed:
            self.close()
            self._on_end(error)
