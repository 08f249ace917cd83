"""What the controller knows: plain records that can be copied, compared, encoded and read back. No behaviour.

All of it is facts and decisions; whatever can be computed from them (who runs where, memory in use, demand of a
target) is kept by `ledger.Ledger`, and rebuilt from here. Times are the machine's `now` unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sllm_faas.errors import ErrorInfo
from sllm_faas.spec import AppSpec, Target, Tier, Timeline, Warmth
from sllm_faas.wire.messages import MoveResult, NodeInfo, NodeStats, TargetDemand

VersionState = Literal["checking", "warming", "ready", "failed"]
CopyState = Literal["waiting", "coming", "resting"]
MoveState = Literal["waiting", "moving", "resting"]
InstanceState = Literal["requested", "starting", "ready", "draining"]
NodeState = Literal["up", "lost"]


def key_of(target: Target) -> str:
    """Names a target in the controller's maps. Unlike `str(target)` it holds the parameters whole."""
    return f"{target.app}/{target.function}@{target.version}#{target.parameters}"


@dataclass(slots=True)
class Version:
    app: str
    number: int
    spec: AppSpec
    state: VersionState
    created: float
    """Unix seconds."""
    error: ErrorInfo | None = None
    digests: dict[str, str] = field(default_factory=dict)
    """Function -> digest of its checkpoint, once checked."""
    check_node: str = ""
    """The node that runs its import check; empty while none does."""
    deadline: float = 0.0
    """Of the check: without a node at first, then of the check itself."""
    storing: bool = False
    """Its activation is with the store."""


@dataclass(slots=True)
class App:
    name: str
    active: int = 0
    """The version that serves; 0 for none yet."""
    pending: int = 0
    """The version being deployed; 0 for none."""
    versions: dict[int, Version] = field(default_factory=dict)


@dataclass(slots=True)
class Node:
    name: str
    state: NodeState
    since: float
    info: NodeInfo
    life: str = ""
    cordoned: bool = False
    draining: bool = False
    stats: NodeStats | None = None
    checkpoints: list[str] = field(default_factory=list)
    """Digests on its disk, sorted."""
    layers: list[str] = field(default_factory=list)
    """Keys of the warmth layers (`sllm_faas.layers`) that exist there, sorted: as it told, or by what started there."""


@dataclass(slots=True)
class Instance:
    id: str
    seq: int
    """Order of creation; ties are broken by it."""
    target: Target
    node: str
    state: InstanceState
    asked: float
    """When its start was commanded, or when it was adopted."""
    memory_mb: int
    digest: str = ""
    gpus: int = 0
    ready: float | None = None
    running: int = 0
    concurrency: int = 1
    tokens: int = 0
    """In the contexts of what runs there, as last told."""
    spare: float | None = None
    """Since when nobody wants it; None: somebody does."""
    replaces: str = ""
    """The busy instance it takes over from, which counts as live until then, and this one does not."""
    size: int = 0
    """Bytes of its checkpoint."""
    predicted: float = 0.0
    margin: float | None = None
    """Seconds by which such predictions were off so far, on the average."""
    queued: float = 0.0
    """Seconds its reading was expected to wait for those promised to the node before it."""
    load: float = 0.0
    """Seconds of checkpoint reading promised to its node while it starts."""
    company: float = 0.0
    """Seconds that other starts on its machine went on beside its own, added up over those that have ended."""
    warmth: Warmth = "cold"
    """The layer its node says it began from; until it did, the one that is expected."""
    tier: Tier = "disk"
    why: str = ""
    adopted: bool = False
    """Found running: its start was not ours to time."""
    actual: float | None = None
    number: int = 0
    pid: int = 0
    timeline: Timeline = field(default_factory=Timeline)
    ahead: bool = False
    """Of need: nobody waits for its start, as far as its node was told."""
    stopping: str = ""
    """Why it drains."""
    drain: float | None = None
    """Seconds it was given for that; None: all it takes."""
    draining_since: float | None = None
    """Since when, as it was last told; None: it does not, or a snapshot did not say."""


@dataclass(slots=True)
class Move:
    """What runs in an instance is to go on in another of its target."""

    id: str
    """Of the last MIGRATE that was sent; empty before."""
    source: str
    state: MoveState
    why: str
    asked: float
    node: str = ""
    """The node it must go to; empty: any other."""
    to: str = ""
    """The instance it was last sent to, or the one that is being started for it."""
    invocations: list[str] = field(default_factory=list)
    """Hex ids; empty: all that run there, and then the source ends."""
    request: str = ""
    """Who is told the end."""
    tries: int = 0
    due: float | None = None
    """When it is looked at again; None: when its heir becomes ready or ends."""
    predicted: float = 0.0


@dataclass(slots=True)
class MoveRecord:
    """How the move of one invocation ended, kept for people. Seconds; `at` is the machine's time."""

    invocation: str
    function: str
    source: str
    source_node: str
    to: str
    to_node: str
    why: str
    predicted: float
    result: MoveResult
    at: float


@dataclass(slots=True)
class Copy:
    """A checkpoint of a version that serves, which is in too few places."""

    digest: str
    state: CopyState
    node: str = ""
    """Where it is being brought."""
    request: str = ""
    """Of the last INGEST."""
    tries: int = 0
    """Nodes that failed in a row."""
    failed: dict[str, int] = field(default_factory=dict)
    """By place, how often it failed there: who failed least is asked first. `copies.TRIES`: there is no room."""
    error: ErrorInfo | None = None
    """Of the last that failed, or why it is spent."""
    spent: bool = False
    """Nobody else is asked until it is deployed again or a node joins."""
    due: float | None = None
    """When it is looked at again; None: when something changes."""


@dataclass(slots=True)
class Pressure:
    """A target's demand in invocations, averaged over the short window, and whether it panics. `load`: since `at`."""

    mean: float = 0.0
    at: float = 0.0
    load: int = 0
    until: float = 0.0
    """When the panic ends; 0: there is none."""
    most: int = 0
    """The most instances that were asked for in it."""


@dataclass(slots=True)
class TargetState:
    target: Target
    desired: int = 0
    peaks: list[tuple[float, int]] = field(default_factory=list)
    pressure: Pressure = field(default_factory=Pressure)
    failures: int = 0
    """Starts or fresh instances that failed in a row."""
    retry_at: float = 0.0
    forget_at: float = 0.0
    """When the failures are old enough to be forgotten."""
    error: ErrorInfo | None = None
    """Why it cannot start, while that holds: told to those who wait."""
    told: list[str] = field(default_factory=list)
    """Gateways that know `error` for the demand they last sent."""
    waiting_since: float | None = None
    blocked: str = ""
    """Why its start has to wait for room."""
    made_room: str = ""
    """What was last done to make room for that start."""
    evicted: list[str] = field(default_factory=list)
    """Instances that were last told to end for it."""
    look_at: float = 0.0
    """While it waits for room: until then, its choice stands unless room appears."""
    waits_up_to: int = 0
    """Demand in invocations with which it chose to wait for a slot of its own instances; 0: it did not. With more it
    chooses anew."""
    placement: str = ""
    """The last choice of a node, explained."""
    alarm: float | None = None


@dataclass(slots=True)
class Gateway:
    name: str
    life: str
    demand: dict[str, TargetDemand] = field(default_factory=dict)


@dataclass(slots=True)
class StartRecord:
    """A start that has ended, kept for people."""

    instance: str
    node: str
    version: int
    outcome: str
    warmth: Warmth
    tier: Tier
    predicted: float
    actual: float
    why: str
    at: float
    timeline: Timeline = field(default_factory=Timeline)
    error: ErrorInfo | None = None
    margin: float | None = None
    """As for the instance: how sure the prediction was."""


@dataclass(slots=True)
class State:
    life: str
    """Of this controller; part of the ids it gives."""
    apps: dict[str, App] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    instances: dict[str, Instance] = field(default_factory=dict)
    targets: dict[str, TargetState] = field(default_factory=dict)
    gateways: dict[str, Gateway] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """Checkpoint digest -> bytes."""
    book: dict[str, float] = field(default_factory=dict)
    """What `estimate` has learned."""
    history: dict[str, list[StartRecord]] = field(default_factory=dict)
    """`app/function` -> its last starts, newest first."""
    moves: dict[str, Move] = field(default_factory=dict)
    """By source instance."""
    moved: list[MoveRecord] = field(default_factory=list)
    """The last moves that were made or refused, newest first."""
    copies: dict[str, Copy] = field(default_factory=dict)
    """By digest."""
    blocked: list[str] = field(default_factory=list)
    """Keys of targets that wait for room, sorted."""
    alarms: list[tuple[float, str]] = field(default_factory=list)
    """A heap of (when, what): early or stale ones are harmless."""
    settle_until: float = 0.0
    """Nothing starts before: after a restart the nodes first tell what they run."""
    created: int = 0
    """Instances ever made."""
    migrations: int = 0
    """MIGRATE ever sent."""
    ingests: int = 0
    """INGEST ever sent for a copy."""
