"""The one exception tree, in three families: yours, theirs, ours.

- `CallerError`   — what the caller sent or may not do; 4xx.
- `FunctionError` — what the user's function did; the platform worked.
- `PlatformError` — what the platform could not do; 5xx.

Each class has a stable `code` (what programs match on) and an HTTP `status`. A message says what was wrong,
the value, what is allowed; `hint` says the next step. Nothing here imports anything but the standard library,
because `import sllm` re-exports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class SllmError(Exception):
    """Base of every error the platform raises on purpose.

    `param` names the offending request parameter when there is one. `retry_after` is in seconds.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        param: str = "",
        retry_after: float | None = None,
        traceback: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        self.retry_after = retry_after
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


# -- yours ---------------------------------------------------------------------------------------------------


class CallerError(SllmError):
    code = "caller_error"
    status = 400


class BadRequest(CallerError):
    """Malformed input: JSON that does not parse, a value out of range, an unknown parameter."""

    code = "bad_request"


class UnsupportedParameter(CallerError):
    code = "unsupported_parameter"


class ContextTooLong(CallerError):
    code = "context_length_exceeded"


class BadSpec(CallerError):
    """An app, function, manifest or configuration file that does not describe something possible."""

    code = "invalid_spec"
    status = 422


class Unauthenticated(CallerError):
    code = "unauthenticated"
    status = 401


class Forbidden(CallerError):
    code = "forbidden"
    status = 403


class NotFound(CallerError):
    code = "not_found"
    status = 404


class Conflict(CallerError):
    code = "conflict"
    status = 409


class Gone(CallerError):
    """It existed, but what is asked for is no longer kept (a stream's replay window, say)."""

    code = "gone"
    status = 410


class TooLarge(CallerError):
    code = "payload_too_large"
    status = 413


class QueueFull(CallerError):
    code = "queue_full"
    status = 429


class Cancelled(CallerError):
    """The invocation was cancelled by its caller or by `DELETE`. 499 is nginx's code for that."""

    code = "cancelled"
    status = 499


# -- theirs --------------------------------------------------------------------------------------------------


class FunctionError(SllmError):
    """The function ran and failed. Carries the remote traceback."""

    code = "function_error"
    status = 500


class RemoteError(FunctionError):
    """A remote exception whose own type cannot be had here; `type_name` names it."""

    def __init__(self, message: str, *, type_name: str = "", traceback: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint, traceback=traceback)
        self.type_name = type_name


class BadResult(FunctionError):
    """The function returned or yielded what cannot be encoded."""

    code = "result_not_encodable"


class ImportFailed(FunctionError):
    """The app's module did not import, or a function named in it is not there."""

    code = "import_failed"
    status = 503


class StartFailed(FunctionError):
    """The instance did not become ready: `enter` raised, or it died while starting."""

    code = "start_failed"
    status = 503


class WorkerLost(FunctionError):
    """The container or invoker died with the invocation in it, and it could not be resumed."""

    code = "worker_lost"
    status = 502


# -- ours ----------------------------------------------------------------------------------------------------


class PlatformError(SllmError):
    code = "internal"
    status = 500


class NoCapacity(PlatformError):
    code = "no_capacity"
    status = 503


class Unavailable(PlatformError):
    """A part of the platform is not reachable now (controller restarting, no node joined)."""

    code = "unavailable"
    status = 503


class DeadlineExceeded(PlatformError):
    """A timeout passed. `phase` is the one: queue, startup, first_output, idle or execution."""

    code = "deadline_exceeded"
    status = 504

    def __init__(self, message: str, *, phase: str = "execution", hint: str = "") -> None:
        super().__init__(message, hint=hint, param=phase)
        self.phase = phase


class CheckpointError(PlatformError):
    code = "checkpoint_error"
    status = 503


class CheckpointCorrupt(CheckpointError):
    """Bytes are not what the manifest says, or the manifest or a safetensors header is not one."""

    code = "checkpoint_corrupt"


class CheckpointIncomplete(CheckpointError):
    """A tensor the model needs is missing: something would have stayed on the meta device."""

    code = "checkpoint_incomplete"


class CheckpointUnavailable(CheckpointError):
    """The source cannot be reached, does not exist or is refused by policy."""

    code = "checkpoint_unavailable"


class StorageFull(PlatformError):
    code = "storage_full"
    status = 507


class WireError(PlatformError):
    """A frame that is not one: counted and dropped by whoever receives it."""

    code = "bad_frame"


class IllegalTransition(PlatformError):
    """A state machine was given an event its state does not allow; names both."""

    code = "illegal_transition"


# -- across boundaries ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error as a value, for wire and store.

    `type` is the Python type's qualified name `module:qualname` when user code raised it, and `args` its
    arguments as a payload (see wire.payload), so that the caller can raise the same type.
    """

    code: str
    message: str
    hint: str = ""
    param: str = ""
    status: int = 500
    retry_after: float | None = None
    type: str = ""
    args: bytes = b""
    traceback: str = ""


def _subclasses(cls: type[SllmError]) -> list[type[SllmError]]:
    return [cls, *(deep for sub in cls.__subclasses__() for deep in _subclasses(sub))]


def by_code(code: str) -> type[SllmError]:
    """The most basic class with that code, or `PlatformError`."""
    return next((cls for cls in _subclasses(SllmError) if cls.code == code), PlatformError)


def to_info(error: BaseException) -> ErrorInfo:
    """An exception as a value. One that is not ours is an internal error, its text kept for the log."""
    if isinstance(error, SllmError):
        return ErrorInfo(
            code=error.code,
            message=error.message,
            hint=error.hint,
            param=error.param,
            status=error.status,
            retry_after=error.retry_after,
            type=getattr(error, "type_name", ""),
            traceback=error.traceback,
        )
    return ErrorInfo(code="internal", message=f"{type(error).__name__}: {error}", status=500)


def from_info(info: ErrorInfo) -> SllmError:
    """The exception of our tree that `info` names. A user's own type is restored by the SDK, not here."""
    cls = by_code(info.code)
    if issubclass(cls, DeadlineExceeded):
        return cls(info.message, phase=info.param or "execution", hint=info.hint)
    if info.type and issubclass(cls, FunctionError) and cls in (FunctionError, RemoteError):
        return RemoteError(info.message, type_name=info.type, traceback=info.traceback, hint=info.hint)
    if cls is RemoteError:
        return RemoteError(info.message, traceback=info.traceback, hint=info.hint)
    return cls(
        info.message,
        hint=info.hint,
        param=info.param,
        retry_after=info.retry_after,
        traceback=info.traceback,
    )
