"""What the running code can ask about itself, and how it is told to stop.

The runner sets `_invocation` around each call of user code; asyncio tasks and copied contexts inherit it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


class Cancelled(BaseException):
    """Raised inside a function whose invocation was cancelled (its caller left, a timeout passed).

    A BaseException, so that `except Exception` does not swallow it: clean up and let it go on. Code that keeps
    running longer than `cancel_grace` seconds is killed with its container. Asynchronous functions get
    `asyncio.CancelledError` as usual. The *caller* of a cancelled invocation gets `sllm.errors.Cancelled`.
    """


@dataclass(frozen=True, slots=True)
class Invocation:
    """The call that is being served. `id` is its text form (`inv-…`)."""

    id: str
    app: str = ""
    function: str = ""
    method: str = ""
    version: int = 0
    instance: str = ""
    node: str = ""


def _nothing() -> None:
    return None


_resumed: ContextVar[Callable[[], Any]] = ContextVar("sllm_resumed", default=_nothing)
_invocation: ContextVar[Invocation | None] = ContextVar("sllm_invocation", default=None)


def current_invocation() -> Invocation | None:
    """The invocation this code serves; None outside of one (at import, in `enter`, on the client)."""
    return _invocation.get()


def resumed() -> Any:
    """In a generator declared `resumable=True` that goes on after its instance was lost, or was moved: the last value
    that was delivered under its earlier life; go on behind it. None when it begins afresh, and everywhere else.

        @app.function(resumable=True)
        def countdown(n: int):
            last = sllm.resumed()
            yield from range(n if last is None else last - 1, 0, -1)

    The value is what the caller got of it: called with JSON, a dataclass comes back as a dict.
    """
    return _resumed.get()()


class serving:  # noqa: N801 - used as a function is
    """For runners: code within the block serves `invocation`, and `resumed()` asks there."""

    __slots__ = ("_earlier", "_invocation", "_resumed", "_token")

    def __init__(self, invocation: Invocation, resumed: Callable[[], Any] = _nothing) -> None:
        self._invocation = invocation
        self._resumed = resumed

    def __enter__(self) -> None:
        self._token = _invocation.set(self._invocation)
        self._earlier = _resumed.set(self._resumed)

    def __exit__(self, *_: object) -> None:
        _resumed.reset(self._earlier)
        _invocation.reset(self._token)
