"""What happens to the controller: facts, as frozen values. The machine takes nothing else.

Facts about the store (`VersionAdded`, `VersionActivated`, `AppDeleted`, `NodeCordoned`) are told to the machine after
their transaction committed, so what it commands on their account can never be ahead of the store.
No prompt or output is in any of them. `created` and the like are Unix seconds and only shown; the machine's time is
`now`, monotonic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from sllm_faas.errors import ErrorInfo, WireError
from sllm_faas.spec import AppSpec
from sllm_faas.wire.messages import Checked, Ingested, InstanceReport, Migrated, NodeInfo, NodeStats, TargetDemand


@dataclass(frozen=True, slots=True)
class StoredVersion:
    app: str
    number: int
    spec: AppSpec
    ready: bool
    created: float
    active: bool = False
    error: ErrorInfo | None = None
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredNode:
    """`info` is there when the node had not left in order: it may still run instances."""

    name: str
    cordoned: bool = False
    info: NodeInfo | None = None


@dataclass(frozen=True, slots=True)
class Restored:
    """The first event of a controller's life: all that its store knows."""

    versions: tuple[StoredVersion, ...] = ()
    nodes: tuple[StoredNode, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    """Checkpoint digest -> bytes."""
    calibration: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VersionAdded:
    app: str
    number: int
    spec: AppSpec
    created: float = 0.0


@dataclass(frozen=True, slots=True)
class VersionChecked:
    node: str
    result: Checked


@dataclass(frozen=True, slots=True)
class VersionActivated:
    """The store's active pointer of the app is this version: after a deployment, or by a rollback."""

    app: str
    number: int


@dataclass(frozen=True, slots=True)
class VersionRefused:
    """The store would not take the switch (disk full, say)."""

    app: str
    number: int
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class AppDeleted:
    app: str


@dataclass(frozen=True, slots=True)
class GatewayUp:
    """HELLO of a gateway: all of its demand comes anew."""

    name: str
    life: str


@dataclass(frozen=True, slots=True)
class GatewayLost:
    """Silent, gone in order, or replaced: its leases end."""

    name: str
    life: str


@dataclass(frozen=True, slots=True)
class DemandSeen:
    gateway: str
    items: tuple[TargetDemand, ...]


@dataclass(frozen=True, slots=True)
class NodeUp:
    """HELLO of an invoker: `reports` are all of its instances. `cordoned` counts for a node that is new here."""

    info: NodeInfo
    life: str
    reports: tuple[InstanceReport, ...] = ()
    cordoned: bool = False


@dataclass(frozen=True, slots=True)
class NodeLost:
    """Silent for too long."""

    name: str


@dataclass(frozen=True, slots=True)
class NodeLeft:
    """Gone in order."""

    name: str


@dataclass(frozen=True, slots=True)
class NodeCordoned:
    name: str
    cordoned: bool


@dataclass(frozen=True, slots=True)
class NodeDrained:
    """Everything on the node is to end; the node is cordoned already."""

    name: str


@dataclass(frozen=True, slots=True)
class NodeLeaving:
    """It was given notice: everything on it is to go on elsewhere; it comes back open, with another life, or not."""

    name: str


@dataclass(frozen=True, slots=True)
class NodeStatsSeen:
    name: str
    stats: NodeStats


@dataclass(frozen=True, slots=True)
class CheckpointPulled:
    """A node's answer to INGEST: an object is on its disk, or why not."""

    node: str
    result: Ingested


@dataclass(frozen=True, slots=True)
class InstanceSeen:
    node: str
    report: InstanceReport


@dataclass(frozen=True, slots=True)
class InstanceStopAsked:
    """By a person. `drain` as in wire.messages.Stop."""

    instance: str
    drain: float | None = None


@dataclass(frozen=True, slots=True)
class MigrationAsked:
    """By a person: these invocations (hex ids) of an instance are to go on at `node`. `request` is told the end."""

    instance: str
    node: str
    invocations: tuple[str, ...]
    request: str


@dataclass(frozen=True, slots=True)
class MigrationEnded:
    """An invoker's answer to MIGRATE."""

    node: str
    result: Migrated


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed: `now` is at or after the machine's `next_deadline()`."""


Event = (
    Restored
    | VersionAdded
    | VersionChecked
    | VersionActivated
    | VersionRefused
    | AppDeleted
    | GatewayUp
    | GatewayLost
    | DemandSeen
    | NodeUp
    | NodeLost
    | NodeLeft
    | NodeCordoned
    | NodeDrained
    | NodeLeaving
    | NodeStatsSeen
    | CheckpointPulled
    | InstanceSeen
    | InstanceStopAsked
    | MigrationAsked
    | MigrationEnded
    | Tick
)

KINDS: dict[str, type] = {kind.__name__: kind for kind in Event.__args__}


def encode_event(event: Event) -> tuple[str, bytes]:
    """Its kind and its fields, for the event log."""
    return type(event).__name__, msgspec.msgpack.encode(event, order="deterministic")


def decode_event(kind: str, data: bytes) -> Any:
    """Raises WireError for what is not an event."""
    try:
        return msgspec.msgpack.decode(data, type=KINDS[kind])
    except (KeyError, msgspec.MsgspecError) as error:
        raise WireError(f"not an event of kind {kind!r}: {error}") from None
