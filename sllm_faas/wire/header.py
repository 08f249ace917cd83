"""The fixed header of every frame: what a relay needs, and no more.

     0        1      2        4            8                24       28      32       36
     | version | type | items | route      | invocation id  | fence  | seq    | credit |
        u8       u8     u16      u32           16 bytes        u32     u32      u32       big-endian

`route`   number of an instance on its invoker (gateway -> invoker), 0 elsewhere.
`fence`   who may speak for the invocation; receivers drop frames under an older one.
`seq`     ordinal of the first output in the frame (OUTPUT) or of the first to come (INVOKE, HOLD, ACTIVATE), or
          outputs sent in all (DONE, FAILED).
`items`   outputs in the frame.
`credit`  absolute: the sender of outputs may go up to this ordinal. Absolute, so a lost or repeated frame
          neither leaks nor invents credit.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from sllm_faas.errors import WireError

VERSION = 1
_STRUCT = struct.Struct(">BBHI16sIII")
SIZE = _STRUCT.size
NO_INVOCATION = bytes(16)
NO_LIMIT = 0xFFFFFFFF


class Type(IntEnum):
    """Frame types. Bodies are in `messages`; those marked (no body) have only the header."""

    # any link
    HELLO = 1
    WELCOME = 2
    HEARTBEAT = 3  # (no body)
    BYE = 4  # (no body) an orderly end: nothing is resumed for it
    REQUEST = 5  # a call with one answer, matched by the header's id
    REPLY = 6

    # gateway -> invoker -> container
    INVOKE = 16
    CREDIT = 17  # (no body) flow control: header.credit
    CANCEL = 18  # (no body) repeated until a terminal frame comes; controller -> invoker: that INGEST, once
    WANT = 19  # gateway -> invoker: this many more slots would be used
    ADOPT = 20  # gateway -> invoker: an orphan is mine from here; header.seq = first output wanted

    # a move of a running invocation, see `sllm_faas.dispatch.moves`
    HOLD = 21  # source invoker -> destination invoker -> container: compute this and keep silent; again: up to here
    SNAPSHOT = 22  # invoker -> container: (no body) tell your resume state
    PAUSE = 23  # invoker -> container: (no body) say nothing beyond the next boundary, tell your resume state
    CONTINUE = 24  # invoker -> container: (no body) the pause is over
    COMMITTED = 25  # gateway -> source invoker -> destination: (no body) the fence is raised, it is over at the source
    KEPT = 26  # gateway -> source invoker: (no body) not moved, go on
    ACTIVATE = 27  # gateway -> destination invoker -> container: speak, from output header.seq on

    # container -> invoker -> gateway
    OUTPUT = 32  # body: msgpack array of payloads
    DONE = 33  # terminal
    FAILED = 34  # terminal
    CANCELLED = 35  # (no body) terminal
    REFUSED = 36  # invoker -> gateway: never ran; queue it again
    GRANT = 37  # invoker -> gateway: slots it may use, absolute
    ADOPTED = 38
    STATE = 39  # container -> invoker: answers SNAPSHOT and PAUSE; the header.seq outputs it stands for precede it
    HELD = 40  # container -> invoker -> source invoker: (no body) computed and silent, up to output header.seq
    MOVED = 41  # source invoker -> gateway: paused after output header.seq and held elsewhere: commit or keep

    # controller <-> invoker
    START = 48
    STOP = 49
    CHECK = 50
    INGEST = 51
    INSTANCE = 52  # invoker -> controller: an instance changed its state
    CHECKED = 53
    INGESTED = 54
    NODE = 55  # invoker -> controller: resources and calibration
    PROGRESS = 56
    BUNDLE_GET = 57
    BUNDLE_PART = 58
    MIGRATE = 59  # controller -> source invoker
    MIGRATED = 60  # source invoker -> controller
    LEAVING = 61  # invoker -> controller: (no body) the node was given notice; take from it what runs
    KEYS = 62  # controller -> invoker: the public keys to be let in, after WELCOME and whenever they change
    HASTEN = 63  # controller -> invoker: somebody waits by now for a start that was ahead of need
    UNCHECK = 68  # controller -> invoker: nobody waits for a CHECK any more

    # controller <-> gateway
    ROUTES = 64  # the whole table
    ROUTES_DELTA = 65
    DEMAND = 66  # gateway -> controller, absolute
    TARGET_FAILED = 67  # controller -> gateway: waiting invocations of a target cannot start

    # container <-> invoker
    READY = 80
    START_FAILED = 81
    LOG = 82
    SHUTDOWN = 83  # invoker -> container: finish, run exit hooks, leave
    CONTEXT = 84  # container -> invoker: (no body) header.seq tokens are in the contexts of what runs in it


class Header(NamedTuple):
    type: Type
    id: bytes = NO_INVOCATION
    fence: int = 0
    route: int = 0
    seq: int = 0
    items: int = 0
    credit: int = 0

    def pack(self) -> bytes:
        return _STRUCT.pack(VERSION, self.type, self.items, self.route, self.id, self.fence, self.seq, self.credit)


_TYPES = {int(member): member for member in Type}


def unpack(frame: bytes) -> Header:
    """The header of a frame. Raises WireError for a short frame, another version or an unknown type."""
    if len(frame) < SIZE:
        raise WireError(f"frame of {len(frame)} bytes is shorter than its header ({SIZE})")
    version, number, items, route, identity, fence, seq, credit = _STRUCT.unpack_from(frame)
    if version != VERSION:
        raise WireError(f"frame of wire version {version}; this side speaks {VERSION}")
    kind = _TYPES.get(number)
    if kind is None:
        raise WireError(f"frame of unknown type {number}")
    return Header(kind, identity, fence, route, seq, items, credit)
