"""What the store process, its invoker and its readers say to each other: MessagePack over SOCK_SEQPACKET, with
descriptors beside it (SCM_RIGHTS).

    invoker ── Open + [channel end] ──► store          the other end of the channel is inherited by the container
            ── Hasten ──►                               what was opened is more urgent by now
            ── Adopt + [slabs], Expect, Limit, Forget, Look ──►
            ── Feed + [channel end] ──►                 the other end is inherited by an ingest
            ◄── Opened, Loaded | NotLoaded, Held + [slabs], Whole, Dropped, Seen
    reader ── Attach ──► store                         the kernel vouches for its process (SCM_CREDENTIALS)
           ◄── Layout, Slabs + [slabs] …, Watermark …, Whole | NotLoaded
    ingest ── Lend ──► store                            it is about to write so much
           ◄── Lent + [slabs]
           ── Written ──► store                         the object is in place, and they hold what is in it
           ◄── Whole | NotLoaded

A message that is not one of these ends the connection it came on. More than `MAX_FDS` descriptors travel in
several messages, in order.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from sllm_faas.errors import ErrorInfo, WireError
from sllm_faas.spec import Tier

MAX_MESSAGE = 64 * 1024
MAX_FDS = 128
"""The kernel takes 253 in one message."""
_CREDENTIALS = struct.Struct("3i")


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all of them."""


class Open(Message, frozen=True):
    """Have `digest`, whose object is in `directory`, in memory; a channel end comes with it, or none to prefetch.
    More urgent reads come first. `promote`: only if that costs nobody anything; else NotLoaded."""

    request: int
    digest: str
    directory: str
    priority: int = 0
    promote: bool = False


class Hasten(Message, frozen=True):
    """Whoever wanted `request` is more urgent by now."""

    request: int
    priority: int


class Opened(Message, frozen=True):
    """Where it is now; a read was begun unless that is dram."""

    request: int
    tier: Tier


class Loaded(Message, frozen=True):
    """It is in memory. `bytes` were read in `seconds`; 0 where it was there."""

    request: int
    tier: Tier
    bytes: int
    seconds: float


class NotLoaded(Message, frozen=True):
    """`request` is 0 on a channel."""

    request: int
    error: ErrorInfo


class Held(Message, frozen=True):
    """The slabs of a residence, for the invoker to keep alive; in order, the rest in further messages."""

    residence: int
    digest: str
    directory: str
    bytes: int
    count: int


class Whole(Message, frozen=True):
    """Every byte of it is in place and checked."""

    residence: int = 0
    tier: Tier = "dram"
    seconds: float = 0.0


class Dropped(Message, frozen=True):
    """The store let go of it; so should whoever kept its slabs."""

    residence: int


class Adopt(Message, frozen=True):
    """To a new life of the store: a whole checkpoint of the earlier one, and the processes that may map it."""

    digest: str
    directory: str
    bytes: int
    count: int
    slab_bytes: int
    pids: tuple[int, ...]


class Expect(Message, frozen=True):
    """A checkpoint of that many bytes may be opened: have memory ready for one."""

    bytes: int


class Limit(Message, frozen=True):
    """Slabs may take so many bytes from now on."""

    bytes: int


class Forget(Message, frozen=True):
    """The object was removed."""

    digest: str


class Look(Message, frozen=True):
    request: int


class Feed(Message, frozen=True):
    """An ingest may forward what it writes; the end of its channel comes with it."""


class Lend(Message, frozen=True):
    """An ingest is about to write so many bytes. It maps nothing any more of what it was lent before."""

    bytes: int


class Lent(Message, frozen=True):
    """`count` slabs to fill, until the channel is closed; none where there is no room that is nobody's."""

    slab_bytes: int
    count: int


class Written(Message, frozen=True):
    """What was lent holds the weights of an object that is in place, and the ingest does not map it any more."""

    digest: str
    directory: str
    bytes: int


class Resident(Message, frozen=True):
    digest: str
    state: Literal["filling", "full", "retiring"]
    bytes: int
    leases: int
    watermark: int


class Seen(Message, frozen=True):
    """Answer to Look. Bytes: `slab_bytes` × slabs that exist, are free, may exist."""

    request: int
    slab_bytes: int
    slabs: int
    free: int
    limit: int
    residents: tuple[Resident, ...]


class Attach(Message, frozen=True):
    """The reader wants to map it."""


class Layout(Message, frozen=True):
    """mode "slabs": `count` descriptors follow; `whole`: every byte is in them already. "file": map the object's file,
    its pages are being read."""

    mode: Literal["slabs", "file"]
    bytes: int
    slab_bytes: int = 0
    count: int = 0
    whole: bool = False


class Slabs(Message, frozen=True):
    """Carries descriptors."""


class Watermark(Message, frozen=True):
    """Bytes in place and checked, from the start."""

    bytes: int


AnyMessage = (
    Open | Hasten | Opened | Loaded | NotLoaded | Held | Whole | Dropped | Adopt | Expect | Limit | Forget | Look | Seen
    | Attach | Layout | Slabs | Watermark | Feed | Lend | Lent | Written
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def reader_pair() -> tuple[socket.socket, socket.socket]:
    """A reader's end and the store's, on which the kernel says from the first message on whose message it is."""
    readers, stores = pair()
    stores.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return readers, stores


def send(sock: socket.socket, message: AnyMessage, fds: Sequence[int] = ()) -> None:
    """Raises OSError; BlockingIOError on a non-blocking socket that is full."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([_encoder.encode(message)], rights)


def receive(sock: socket.socket) -> tuple[AnyMessage, list[int], int] | None:
    """A message, its descriptors (the caller's to close), and the sender's pid where the socket passes credentials
    (else 0); None at the end. Raises OSError, and WireError for what is no message."""
    space = socket.CMSG_SPACE(MAX_FDS * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)
    data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
    fds, pid = array.array("i"), 0
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid = _CREDENTIALS.unpack(content[: _CREDENTIALS.size])[0]
    if not data:
        close_all(fds)
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise WireError("a message to or from the checkpoint store was cut off.")
        return _decoder.decode(data), list(fds), pid
    except (msgspec.MsgspecError, ValueError) as error:
        close_all(fds)
        raise WireError(f"not a message of the checkpoint store: {error}.") from None
    except WireError:
        close_all(fds)
        raise


def with_fds(message: AnyMessage, fds: Sequence[int]) -> Iterator[tuple[AnyMessage, Sequence[int]]]:
    """The message with the first of the descriptors, and those that carry the rest."""
    yield message, fds[:MAX_FDS]
    for start in range(MAX_FDS, len(fds), MAX_FDS):
        yield Slabs(), fds[start : start + MAX_FDS]


def rest_of(sock: socket.socket, fds: list[int], count: int) -> None:
    """Receive into `fds`, which came with a message, until they are `count`. Raises OSError, and WireError, with those
    that did come in `fds`, the caller's to close."""
    while len(fds) < count:
        more = receive(sock)
        if more is None or not more[1]:
            raise ConnectionResetError
        fds += more[1]


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
