"""What the machine wants done: frozen values that the shell carries out in order."""

from __future__ import annotations

from dataclasses import dataclass, field

from sllm_faas.errors import ErrorInfo
from sllm_faas.wire.messages import (
    Check,
    FunctionRoute,
    Hasten,
    Migrate,
    MoveResult,
    NodeInfo,
    Start,
    Stop,
    TargetFailed,
)


@dataclass(frozen=True, slots=True)
class SendStart:
    node: str
    body: Start


@dataclass(frozen=True, slots=True)
class SendHasten:
    node: str
    body: Hasten


@dataclass(frozen=True, slots=True)
class SendStop:
    node: str
    body: Stop


@dataclass(frozen=True, slots=True)
class SendCheck:
    node: str
    body: Check


@dataclass(frozen=True, slots=True)
class PublishFunctions:
    """The app's routes are exactly these from now on; `gone` are names that were there before."""

    app: str
    functions: tuple[FunctionRoute, ...]
    gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PublishNode:
    info: NodeInfo


@dataclass(frozen=True, slots=True)
class WithdrawNode:
    name: str


@dataclass(frozen=True, slots=True)
class FailTarget:
    gateways: tuple[str, ...]
    body: TargetFailed


@dataclass(frozen=True, slots=True)
class StoreActivation:
    """Commit the switch, then answer with VersionActivated, or VersionRefused."""

    app: str
    number: int
    digests: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoreFailure:
    app: str
    number: int
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Advance:
    """For people who watch a deployment."""

    app: str
    number: int
    stage: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class DeployEnded:
    """`serving` is the version that serves now; another one than `number` when nothing had changed."""

    app: str
    number: int
    serving: int = 0
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class ForgetVersions:
    """Nothing needs them any more: neither history nor an instance."""

    app: str
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StartEnded:
    """A start came to its end: predicted beside actual, in seconds. `outcome`: ready, failed, stopped or lost."""

    instance: str
    node: str
    outcome: str
    predicted: float
    actual: float


@dataclass(frozen=True, slots=True)
class SendMigrate:
    node: str
    body: Migrate


@dataclass(frozen=True, slots=True)
class MoveEnded:
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
