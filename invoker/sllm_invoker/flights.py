"""What the relay's parts share: flights, instances, and what a shell is to carry out. Pure.

A flight is an invocation that runs in a container of this node; what is held here for another node is an
`arrivals.Hold`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from sllm_faas.dispatch.moves import Departure
from sllm_faas.spec import Target, Timeline
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import InstanceState, Migrated

Parts = list[bytes]

RESEND = 1.0
"""Seconds after which a CANCEL is said again."""


class Send(NamedTuple):
    """A message for a peer: of one of the two sockets (invokers that move something here are peers of the gateways'),
    or another node, by its name."""

    to: Literal["gateway", "container", "node"]
    peer: bytes
    parts: Parts


class Kill(NamedTuple):
    """The instance must be killed: code in it ignores its cancellation, or it does not read."""

    instance: int
    reason: str


class Drain(NamedTuple):
    """Nothing new for the instance; it is to be killed when what runs in it has ended."""

    instance: int
    reason: str


class Report(NamedTuple):
    """A migration is over: the controller is to be told."""

    migrated: Migrated


Action = Send | Kill | Drain | Report


@dataclass(slots=True)
class Instance:
    """What the relay needs of an instance. `peer` is the identity its container connects with."""

    number: int
    name: str
    peer: bytes
    target: Target
    concurrency: int
    execution: float | None
    cancel_grace: float
    state: InstanceState = "starting"
    flights: set[bytes] = field(default_factory=set)
    doomed: str = ""
    killed: bool = False
    timeline: Timeline | None = None
    why: str = ""
    answered: bool = False
    """An invocation that has ended there got an answer, or a part of one."""


@dataclass(slots=True)
class Flight:
    id: bytes
    fence: int
    owner: bytes | None
    where: Instance
    invoke: Parts
    """Its INVOKE (or first HOLD), as it came."""
    began: float
    overdue: float
    """When the execution backstop passes."""
    credit: int
    start: int = 0
    """Ordinal of the output that follows the resume state in `invoke`."""
    next: int = 0
    """Ordinal of the next output."""
    base: int = 0
    """Ordinal of the first output still in the window."""
    window: deque[tuple[int, Parts]] = field(default_factory=deque)
    bytes: int = 0
    cancelled: float | None = None
    resend: float = 0.0
    until: float | None = None
    """An orphan is cancelled, an ended flight forgotten, then."""
    terminal: Parts | None = None
    move: Departure | None = None
    """The last attempt to move it away, over or not."""

    @property
    def spoke(self) -> bool:
        """Something was said here, beyond what it began with."""
        return self.next > self.start

    def header(self, kind: Type) -> Header:
        return Header(kind, self.id, self.fence, self.where.number, self.next)


def size(parts: Iterable[bytes]) -> int:
    return sum(map(len, parts))
