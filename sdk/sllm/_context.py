"""What the running code can ask about itself, and how it is told to stop.

The runner sets `_invocation` around each call of user code; asyncio tasks and copied contexts inherit it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


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


_invocation: ContextVar[Invocation | None] = ContextVar("sllm_invocation", default=None)


def current_invocation() -> Invocation | None:
    """The invocation this code serves; None outside of one (at import, in `enter`, on the client)."""
    return _invocation.get()


@contextmanager
def serving(invocation: Invocation) -> Iterator[None]:
    """For runners: code within the block serves `invocation`."""
    token = _invocation.set(invocation)
    try:
        yield
    finally:
        _invocation.reset(token)
