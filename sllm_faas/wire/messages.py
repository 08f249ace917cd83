"""Bodies of frames, by type. Frozen dataclasses, decoded and validated in one step by `codec`.

A body never holds more than its receiver needs; user payloads are opaque bytes here. Payloads above
`INLINE_LIMIT` travel as out-of-band buffers after the frame (see `codec.Frame.buffers`), the field left empty.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from sllm_faas.errors import ErrorInfo
from sllm_faas.spec import AppSpec, CheckpointSpec, Encoding, FunctionSpec, Target, Tier, Timeline, Warmth
from sllm_faas.wire.header import Type

INLINE_LIMIT = 64 * 1024
MAX_FRAME = 80 * 1024 * 1024
"""Bytes of one ZeroMQ part (MAXMSGSIZE): a payload at its limit and room for its envelope."""

InstanceState = Literal["starting", "ready", "draining", "stopped", "failed"]


# -- any link ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """What an invoker knows of one of its instances: sent on every change, and all of them in `Hello`.

    `number` is its `route` on this invoker. `timeline` is that of its start, complete once ready; its spans are
    libs and template where those layers were missing (detail: made, or awaited; a template that the node does not keep
    is made by the instance), fork, checkpoint, import/attach, enter …, with the checkpoint's tier and GB/s in their
    details.
    """

    instance: str
    number: int
    target: Target
    state: InstanceState
    concurrency: int = 1
    warmth: Warmth = "cold"
    """The layer the start began from."""
    pid: int = 0
    running: int = 0
    timeline: Timeline = field(default_factory=Timeline)
    error: ErrorInfo | None = None
    tokens: int = 0
    """In the contexts of what runs there, where they are known."""
    tier: Tier | None = None
    """Where its start found the checkpoint; None: it has none, or it is not known yet."""
    read_bytes: int = 0
    read_seconds: float = 0.0
    """What was read for it, by itself or by another start that it shared the read with."""
    served: bool = False
    """It has answered an invocation, or a part of one."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Resources of a node. `endpoint` is where gateways connect, and the invokers beside it on its machine;
    `neighbour_endpoint` where those of other machines do (empty: they cannot). `curve_key` is its public key over TCP.
    """

    name: str
    endpoint: str
    curve_key: str = ""
    memory_mb: int = 0
    cores: float = 1.0
    gpus: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    bandwidth: dict[str, float] = field(default_factory=dict)
    """Calibrated bytes per second by tier."""
    checkpoints: tuple[str, ...] = ()
    """Digests of the objects on its disk."""
    host: str = ""
    """The machine it is on, where that is known: nodes of one machine share its cores and disk."""
    neighbour_endpoint: str = ""

    @property
    def joined(self) -> bool:
        """Whether it is reached over TCP alone."""
        return self.endpoint.startswith("tcp://")

    def reached_from(self, other: NodeInfo) -> tuple[str, str]:
        """Where the invoker of `other` connects to this one, and the public key that it finds there ("": no TCP)."""
        if self.joined or other.joined:
            return self.neighbour_endpoint, self.curve_key
        return self.endpoint, ""


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of a peer, and again after it was lost. `life` is new for each start of the process."""

    role: Literal["gateway", "invoker", "container", "admin"]
    name: str
    life: str
    pid: int = 0
    node: NodeInfo | None = None
    instances: tuple[InstanceReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Welcome:
    """The answer to Hello."""

    name: str
    life: str
    heartbeat: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """A call with one answer; the header's id matches them. `body` is msgpack of what `op` takes."""

    op: str
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Reply:
    body: bytes = b""
    error: ErrorInfo | None = None
    more: bool = False
    """True while further replies to the same request follow (progress, followed logs)."""


# -- invocations ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Invoke:
    """Run this. `context` is the gateway's own note, handed back to whoever adopts the invocation.

    `resume` is opaque state from an earlier fence; `outputs` of it were already delivered.
    `execution` is the execution timeout in seconds, enforced by the gateway and, as a backstop, the invoker.
    """

    method: str
    encoding: Encoding = "msgpack"
    stream: bool = False
    payload: bytes = b""
    context: bytes = b""
    execution: float | None = None
    resume: bytes = b""
    outputs: int = 0
    caller: str = ""
    """The invocation that made this call, for attribution; empty from outside."""


@dataclass(frozen=True, slots=True)
class Done:
    """The result: a payload in the invocation's encoding (empty for a stream), and seconds spent running."""

    payload: bytes = b""
    seconds: float = 0.0
    usage: dict[str, int] = field(default_factory=dict)
    spans: tuple[tuple[str, float, float], ...] = ()
    """(name, start, seconds) inside the container, relative to the arrival of the invocation there."""


@dataclass(frozen=True, slots=True)
class Failed:
    error: ErrorInfo
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Refused:
    """It never ran there; queue it again."""

    reason: Literal["no_slot", "unknown_instance", "draining", "stale_fence"]


@dataclass(frozen=True, slots=True)
class Grant:
    """How many invocations this gateway may have in flight on an instance: absolute, a lease.

    header.route is the instance's number, header.seq the grant's ordinal on this link. A draining or ended
    instance grants 0. The gateway answers every grant with `Want`, so the invoker knows it was taken in.
    """

    instance: str
    target: Target
    limit: int
    concurrency: int
    node: str
    state: InstanceState = "ready"
    timeline: Timeline | None = None
    why: str = ""
    """The controller's reason for placing it there."""


@dataclass(frozen=True, slots=True)
class Want:
    """How many slots beyond its grant the gateway could use now. header.seq: the last grant taken in."""

    slots: int


@dataclass(frozen=True, slots=True)
class Adopted:
    """`found`: the invocation is here and now this gateway's; its outputs from `header.seq` follow: from the one asked
    for, or from the first under this fence where they are all kept.

    `status` says why not otherwise: unknown here, owned by a gateway that lives, or its window is past.
    """

    status: Literal["found", "unknown", "owned", "gone"]
    invoke: bytes = b""
    """The original Invoke body; its out-of-band buffers are those of this frame."""
    target: Target | None = None
    instance: str = ""


@dataclass(frozen=True, slots=True)
class ResumeState:
    """What another instance needs to go on after output header.seq: opaque to everybody but an instance.

    `possible` False: this call cannot go on elsewhere. `paused`: it says nothing more until CONTINUE.
    `tokens`: in its context, of a language model.
    """

    resume: bytes = b""
    possible: bool = True
    paused: bool = False
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Moved:
    """Where the invocation is held: by `node`, in its instance `instance`, there known as `number`."""

    node: str
    instance: str
    number: int


@dataclass(frozen=True, slots=True)
class Activate:
    """header.fence is the raised one, header.seq the outputs delivered, `resume` the state after them."""

    resume: bytes = b""


# -- controller and invoker ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keys:
    """Public keys of everybody whom an invoker lets in over TCP, by what they may be: absolute."""

    gateways: tuple[str, ...] = ()
    invokers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Migrate:
    """Move running invocations of `instance` to the ready instance `to` of the same target on `node`.

    `endpoint` and `curve_key` are that node's, `number` its own number for the instance. `invocations` are hex ids;
    none: all that run there. One MIGRATED answers it.
    """

    migration: str
    instance: str
    node: str
    endpoint: str
    to: str
    number: int
    curve_key: str = ""
    invocations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MoveResult:
    """How the move of one invocation went. Seconds: `total` from MIGRATE, `paused` from PAUSE to the gateway's word.

    `ended`: it was over before. `kept`: it goes on where it was, `why` says why. `tokens`: of its context when it was
    committed (outputs where it is no language model); `sent`: bytes of resume state.
    """

    invocation: str
    outcome: Literal["moved", "ended", "kept"]
    why: str = ""
    total: float = 0.0
    paused: float = 0.0
    rounds: int = 0
    tokens: int = 0
    sent: int = 0


@dataclass(frozen=True, slots=True)
class Migrated:
    migration: str
    instance: str
    results: tuple[MoveResult, ...] = ()


@dataclass(frozen=True, slots=True)
class Start:
    instance: str
    target: Target
    spec: FunctionSpec
    bundle: str = ""
    why: str = ""
    predicted: float = 0.0
    """The start-up time in seconds the controller expects."""
    ahead: bool = False
    """Of need: nobody waits for it yet."""


@dataclass(frozen=True, slots=True)
class Hasten:
    """Somebody waits by now for an instance whose start was `ahead`."""

    instance: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop an instance: new work is refused at once, running work has `drain` seconds to end (None: all it
    takes), then it is cancelled and has its `cancel_grace`."""

    instance: str
    drain: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """Import check of a version: every function found, every checkpoint here, in a throw-away container."""

    app: AppSpec
    version: int


@dataclass(frozen=True, slots=True)
class Uncheck:
    """Nobody waits for the check of that version any more: it ends, and what it has brought here so far stays."""

    app: str
    version: int


@dataclass(frozen=True, slots=True)
class Checked:
    app: str
    version: int
    error: ErrorInfo | None = None
    checkpoints: dict[str, str] = field(default_factory=dict)
    """function name, `name:adapter` for an adapter -> digest of the object."""
    sizes: dict[str, int] = field(default_factory=dict)
    """digest -> bytes."""


@dataclass(frozen=True, slots=True)
class Ingest:
    """Bring a checkpoint. A CANCEL whose id is `ingest_id` of the request ends it; then there is no answer."""

    request: str
    checkpoint: CheckpointSpec
    name: str = ""
    base: str = ""
    """For an adapter, the name or digest of what it adapts."""
    ahead: bool = False
    """Of need: it waits until nothing starts there, and nothing leaves the disk for it."""


def ingest_id(request: str) -> bytes:
    """Of frames without a body that are about that INGEST."""
    return hashlib.blake2b(request.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Ingested:
    request: str
    digest: str = ""
    bytes: int = 0
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Of a check or an ingest (`request` is `app@version` or the ingest's), for people: never a decision."""

    request: str
    stage: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class BundleGet:
    digest: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class BundlePart:
    """`total` 0: there is no such bundle. The bytes are the frame's only buffer."""

    digest: str
    offset: int
    total: int


@dataclass(frozen=True, slots=True)
class NodeStats:
    """Sent when it changed, at most once a second."""

    memory_free_mb: int
    disk_free_mb: int
    instances: int
    resident: tuple[str, ...] = ()
    """Digests of the checkpoints that are whole in its DRAM tier."""
    layers: tuple[str, ...] | None = None
    """Keys of the warmth layers that exist there (`sllm_faas.layers`); None: it does not tell."""
    pinned: dict[str, int] = field(default_factory=dict)
    """digest -> MiB in its DRAM tier that stay there whatever else needs memory."""
    dram_mb: int | None = None
    """What its DRAM tier may hold; None: it does not tell."""
    on_gpu: tuple[str, ...] = ()
    """Digests of the checkpoints that are whole on a GPU that no instance holds."""
    bandwidth: dict[str, float] = field(default_factory=dict)
    """As in NodeInfo, should it have been measured since; empty: nothing new."""
    checkpoints: tuple[str, ...] | None = None
    """Digests of the objects on its disk by now; None: it does not tell."""


# -- controller and gateway ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FunctionRoute:
    """The serving version of a function. `cap`: invocations of its whole app that may run at once through each gateway,
    and one more through each of those named in `more`; 0: as many as there are slots."""

    app: str
    version: int
    spec: FunctionSpec
    weight: float = 1.0
    created: float = 0.0
    cap: int = 0
    more: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token as gateways know it: the sha256 of its text, never the text."""

    name: str
    sha256: str
    scopes: tuple[str, ...]
    apps: tuple[str, ...] = ()
    """Apps it is good for; empty for all."""
    expires: float | None = None


@dataclass(frozen=True, slots=True)
class Routes:
    """The whole table at `seq`; each delta after it is seq + 1. A gap: ask for the table again (Hello)."""

    seq: int
    functions: tuple[FunctionRoute, ...] = ()
    nodes: tuple[NodeInfo, ...] = ()
    tokens: tuple[TokenEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class RoutesDelta:
    seq: int
    functions: tuple[FunctionRoute, ...] = ()
    functions_gone: tuple[tuple[str, str], ...] = ()
    nodes: tuple[NodeInfo, ...] = ()
    nodes_gone: tuple[str, ...] = ()
    tokens: tuple[TokenEntry, ...] = ()
    tokens_gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TargetDemand:
    """What one gateway has for a target now: absolute. `oldest` is the age in seconds of the oldest waiting; `tokens`
    about how many there are in the prompts that wait. Not absolute: `served` have ended since the target was last told
    of, after `busy_seconds` together in their slots."""

    target: Target
    waiting: int
    running: int
    oldest: float = 0.0
    tokens: int = 0
    served: int = 0
    busy_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Demand:
    """At once when something begins to wait without a slot; else gathered for up to 100 ms."""

    items: tuple[TargetDemand, ...]


@dataclass(frozen=True, slots=True)
class TargetFailed:
    """Nothing can serve the target now: fail what waits. `retry_after`: seconds of back-off left."""

    target: Target
    error: ErrorInfo


# -- container and invoker -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The instance serves. `timeline` holds its own spans (import, attach, enter)."""

    timeline: Timeline


@dataclass(frozen=True, slots=True)
class StartFailed:
    error: ErrorInfo
    timeline: Timeline = field(default_factory=Timeline)


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One line a container wrote. `invocation` is its hex id, or empty outside of one."""

    time: float
    stream: Literal["stdout", "stderr", "platform"]
    text: str
    invocation: str = ""
    level: str = "info"


@dataclass(frozen=True, slots=True)
class Log:
    records: tuple[LogRecord, ...]


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Finish what runs within `drain` seconds (None: all it takes), run exit hooks, leave."""

    drain: float | None = None


Outputs = list[bytes]
"""Body of OUTPUT: payloads in the invocation's encoding, the first one having ordinal header.seq."""

BODIES: dict[Type, type] = {
    Type.HELLO: Hello,
    Type.WELCOME: Welcome,
    Type.REQUEST: Request,
    Type.REPLY: Reply,
    Type.INVOKE: Invoke,
    Type.WANT: Want,
    Type.OUTPUT: list[bytes],
    Type.DONE: Done,
    Type.FAILED: Failed,
    Type.REFUSED: Refused,
    Type.GRANT: Grant,
    Type.ADOPTED: Adopted,
    Type.HOLD: Invoke,
    Type.STATE: ResumeState,
    Type.MOVED: Moved,
    Type.ACTIVATE: Activate,
    Type.MIGRATE: Migrate,
    Type.MIGRATED: Migrated,
    Type.KEYS: Keys,
    Type.START: Start,
    Type.STOP: Stop,
    Type.HASTEN: Hasten,
    Type.CHECK: Check,
    Type.UNCHECK: Uncheck,
    Type.CHECKED: Checked,
    Type.INGEST: Ingest,
    Type.INGESTED: Ingested,
    Type.INSTANCE: InstanceReport,
    Type.NODE: NodeStats,
    Type.PROGRESS: Progress,
    Type.BUNDLE_GET: BundleGet,
    Type.BUNDLE_PART: BundlePart,
    Type.ROUTES: Routes,
    Type.ROUTES_DELTA: RoutesDelta,
    Type.DEMAND: Demand,
    Type.TARGET_FAILED: TargetFailed,
    Type.READY: Ready,
    Type.START_FAILED: StartFailed,
    Type.LOG: Log,
    Type.SHUTDOWN: Shutdown,
}
"""Types that are not here have no body."""
