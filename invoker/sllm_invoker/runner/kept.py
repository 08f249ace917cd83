"""Device memory that outlives an instance: what it and its invoker say to each other. MessagePack over SOCK_SEQPACKET,
with descriptors of memory beside it (SCM_RIGHTS).

    instance ── Want ──► invoker                   once
             ◄── Have + [memory of groups] …       until one says that there is no more
             ── Whole + [memory] ──► invoker       per group, when every byte of it is in place and was checked

Each descriptor is the memory of one group of layers (`device.Shared`). The invoker computes nothing and has no context
on the device: it holds descriptors, as it holds those of slabs. Invariant: an instance does without, wherever the
other end is gone or talks nonsense.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import msgspec

from sllm_faas.errors import WireError

MAX_MESSAGE = 128 * 1024
MAX_FDS = 128

PATIENCE = 10.0
"""Seconds for an answer; an instance that has none copies everything."""

Range = tuple[int, int]
"""Bytes of the part file: start and end."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all of them."""


class Want(Message, frozen=True):
    """The instance's checkpoint is cut into these groups. `room`: bytes of the device it can use in all, them
    included."""

    ranges: tuple[Range, ...]
    room: int


class Have(Message, frozen=True):
    """These are whole; as many descriptors come with them. `freed`: bytes of others that were let go of for it."""

    ranges: tuple[Range, ...]
    freed: int = 0
    more: bool = False


class Whole(Message, frozen=True):
    """Its descriptor comes with it."""

    start: int
    end: int


AnyMessage = Want | Have | Whole
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def send(sock: socket.socket, message: AnyMessage, fds: Sequence[int] = ()) -> None:
    """Raises OSError; BlockingIOError on a non-blocking socket that is full."""
    socket.send_fds(sock, [_encoder.encode(message)], fds)


def receive(sock: socket.socket) -> tuple[AnyMessage, list[int]] | None:
    """A message and its descriptors, the caller's to close; None at the end. Raises OSError, and WireError for what is
    no message, or has another number of descriptors than it should."""
    data, fds, flags, _ = socket.recv_fds(sock, MAX_MESSAGE, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    try:
        if not data:
            return None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise WireError("a message about memory of a GPU was cut off.")
        message = _decoder.decode(data)
        expected = len(message.ranges) if isinstance(message, Have) else int(isinstance(message, Whole))
        if len(fds) != expected:
            raise WireError(f"{type(message).__name__} came with {len(fds)} descriptors; expected: {expected}.")
        found, fds = list(fds), []
        return message, found
    except (msgspec.MsgspecError, ValueError) as error:
        raise WireError(f"not a message about memory of a GPU: {error}.") from None
    finally:
        for fd in fds:
            os.close(fd)


class Kept:
    """The instance's end; takes the descriptor `fd` over. `room`: see `Want`. One thread at a time."""

    def __init__(self, fd: int, room: int) -> None:
        self.room = room
        self._sock: socket.socket | None = socket.socket(fileno=fd)
        self._sock.settimeout(PATIENCE)

    def want(self, ranges: Sequence[Range]) -> tuple[dict[Range, int], int]:
        """Descriptors of the groups that are whole, the caller's to close, and how many bytes were made free."""
        found: dict[Range, int] = {}
        freed, more = 0, True
        try:
            self._say(Want(tuple(ranges), self.room))
            while more:
                received = receive(self._sock) if self._sock is not None else None
                if received is None or not isinstance(received[0], Have):
                    raise ConnectionResetError
                have, fds = received[0], received[1]
                found |= dict(zip(have.ranges, fds, strict=True))
                freed, more = freed + have.freed, have.more
        except (OSError, WireError):
            self.close()
        return found, freed

    def whole(self, group: Range, memory: int) -> None:
        """The invoker may keep it. `memory` stays the caller's."""
        try:
            self._say(Whole(*group), [memory])
        except OSError:
            self.close()

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _say(self, message: AnyMessage, fds: Sequence[int] = ()) -> None:
        if self._sock is not None:
            send(self._sock, message, fds)
