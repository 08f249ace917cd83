"""What the machine wants done: frozen values that the shell carries out in order."""

from __future__ import annotations

import msgspec

from sllm_faas.errors import ErrorInfo
from sllm_faas.wire.messages import (
    Check,
    FunctionRoute,
    Hasten,
    Ingest,
    Migrate,
    MoveResult,
    NodeInfo,
    Start,
    Stop,
    TargetFailed,
    Uncheck,
)


class SendStart(msgspec.Struct, frozen=True):
    node: str
    body: Start


class SendHasten(msgspec.Struct, frozen=True):
    node: str
    body: Hasten


class SendStop(msgspec.Struct, frozen=True):
    node: str
    body: Stop


class SendCheck(msgspec.Struct, frozen=True):
    node: str
    body: Check


class SendUncheck(msgspec.Struct, frozen=True):
    node: str
    body: Uncheck


class SendIngest(msgspec.Struct, frozen=True):
    """Bring a checkpoint there, ahead of any start."""

    node: str
    body: Ingest


class CancelIngest(msgspec.Struct, frozen=True):
    """Nobody needs what that INGEST was to bring."""

    node: str
    request: str


class PublishFunctions(msgspec.Struct, frozen=True):
    """The app's routes are exactly these from now on; `gone` are names that were there before."""

    app: str
    functions: tuple[FunctionRoute, ...]
    gone: tuple[str, ...] = ()


class PublishNode(msgspec.Struct, frozen=True):
    info: NodeInfo


class WithdrawNode(msgspec.Struct, frozen=True):
    name: str


class FailTarget(msgspec.Struct, frozen=True):
    gateways: tuple[str, ...]
    body: TargetFailed


class StoreActivation(msgspec.Struct, frozen=True):
    """Commit the switch, then answer with VersionActivated, or VersionRefused."""

    app: str
    number: int
    digests: dict[str, str] = msgspec.field(default_factory=dict)
    sizes: dict[str, int] = msgspec.field(default_factory=dict)


class StoreFailure(msgspec.Struct, frozen=True):
    app: str
    number: int
    error: ErrorInfo


class Advance(msgspec.Struct, frozen=True):
    """For people who watch a deployment."""

    app: str
    number: int
    stage: str
    text: str = ""


class DeployEnded(msgspec.Struct, frozen=True):
    """`serving` is the version that serves now; another one than `number` when nothing had changed."""

    app: str
    number: int
    serving: int = 0
    error: ErrorInfo | None = None


class ForgetVersions(msgspec.Struct, frozen=True):
    """Nothing needs them any more: neither history nor an instance."""

    app: str
    numbers: tuple[int, ...]


class StartEnded(msgspec.Struct, frozen=True):
    """A start came to its end: predicted beside actual, in seconds. `outcome`: ready, failed, stopped or lost."""

    instance: str
    node: str
    outcome: str
    predicted: float
    actual: float


class SendMigrate(msgspec.Struct, frozen=True):
    node: str
    body: Migrate


class MoveEnded(msgspec.Struct, frozen=True):
    """How the move of an invocation ended, whoever wanted it. `request`: of the MigrationAsked that did, if one did;
    `result` is None when it never began, and `why` says why."""

    request: str
    source: str
    to: str = ""
    node: str = ""
    result: MoveResult | None = None
    predicted: float = 0.0
    why: str = ""


Command = (
    SendStart
    | SendHasten
    | SendStop
    | SendCheck
    | SendUncheck
    | SendIngest
    | CancelIngest
    | PublishFunctions
    | PublishNode
    | WithdrawNode
    | FailTarget
    | StoreActivation
    | StoreFailure
    | Advance
    | DeployEnded
    | ForgetVersions
    | StartEnded
    | SendMigrate
    | MoveEnded
)
