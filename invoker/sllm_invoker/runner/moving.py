"""How calls of user code move: a resumable generator's state is its last output.

Nothing of it is computed ahead: where it is held it is a name and a state, and begins at ACTIVATE. What its code
does between two outputs is not interrupted by a pause; the next output waits.
"""

from __future__ import annotations

from sllm_faas.wire.header import Type
from sllm_invoker.runner.call import Call


class Movable:
    """An executor of user code, as `Instance` sees it when calls move."""

    holds = False

    def ask(self, call: Call, kind: Type) -> None:
        answer(call, kind)


def answer(call: Call, kind: Type) -> None:
    """SNAPSHOT, PAUSE or CONTINUE of a call whose state is with the call itself. On any thread."""
    if kind is Type.CONTINUE:
        call.proceed()
        return
    if kind is Type.PAUSE and call.resumable:
        call.pause()
    call.state()
