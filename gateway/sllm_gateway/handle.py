"""One invocation as its caller holds it: what to run, what came of it, and how to give it up.

    Call   what to run, fixed                      Handle   outputs as they arrive, then `ended`
                                                   Ended    the result, or the error as a value

Not the state machine (`sllm_faas.dispatch.invocation`), nor the one that drives it (`dispatcher`). Invariant: outputs
that were believed are all taken before `ended` is seen by `batches`, and `ended` is set exactly once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sllm_faas.dispatch import resume
from sllm_faas.dispatch.invocation import Invocation
from sllm_faas.dispatch.resume import Resume, Way
from sllm_faas.dispatch.slots import Instance
from sllm_faas.errors import ErrorInfo
from sllm_faas.spec import Encoding, RetryPolicy, Target, Timeouts
from sllm_faas.wire.header import NO_LIMIT
from sllm_gateway.handover import Handover

if TYPE_CHECKING:
    from sllm_gateway.dispatcher import Dispatcher


@dataclass(frozen=True, slots=True)
class Call:
    """What to run. `context` is the gateway's own note, found again by whoever adopts the invocation."""

    id: bytes
    target: Target
    method: str
    payload: bytes
    encoding: Encoding = "msgpack"
    stream: bool = False
    timeouts: Timeouts = field(default_factory=Timeouts)
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    max_queue: int = 1000
    weight: float = 1.0
    caller: str = ""
    context: bytes = b""
    way: Way = "never"
    """How it can go on when its instance is lost."""
    tokens: int = 0
    """Of its prompt, about."""

    def begin(self, now: float, window: int) -> Invocation:
        """The invocation of this call, submitted at `now`; a stream may send `window` outputs ahead of its reader."""
        return Invocation(
            self.id,
            self.target,
            now,
            method=self.method,
            stream=self.stream,
            encoding=self.encoding,
            timeouts=self.timeouts,
            retries=self.retries,
            credit=window if self.stream else NO_LIMIT,
            tokens=self.tokens,
        )


@dataclass(frozen=True, slots=True)
class Ended:
    """`payload` is the result in the call's encoding (empty for a stream); `error` when it failed."""

    payload: bytes = b""
    error: ErrorInfo | None = None
    seconds: float = 0.0
    usage: dict[str, int] = field(default_factory=dict)
    spans: tuple[tuple[str, float, float], ...] = ()


class Handle:
    """What `Dispatcher.submit` returns. One consumer; every method is for the dispatcher's event loop."""

    __slots__ = (
        "_dispatcher",
        "_pending",
        "_waiter",
        "adopted",
        "began",
        "call",
        "ended",
        "granted",
        "handover",
        "handovers",
        "inv",
        "node",
        "resume",
        "skip",
        "slot",
    )

    def __init__(self, dispatcher: Dispatcher, inv: Invocation, call: Call, began: float) -> None:
        self._dispatcher = dispatcher
        self.inv = inv
        self.call: Call | None = call
        """None once it has ended, so that no argument is kept."""
        self.resume: Resume | None = resume.begin(call.way)
        """What another instance would need; None for what cannot go on elsewhere, and once it has ended."""
        self.began = began
        """Unix time of its submission."""
        self.slot: Instance | None = None
        """Where it runs, or ran last."""
        self.granted = False
        """It takes a slot of our grants there."""
        self.node = ""
        """The node it is in flight on; empty while it is not."""
        self.adopted = b""
        """The context of an adopted invocation."""
        self.skip = 0
        """Outputs to come that the caller of an adopted one has seen."""
        self.handovers: list[Handover] = []
        self.handover: Handover | None = None
        """The last of them, until there is an output again."""
        self.ended: Ended | None = None
        self._pending: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None

    async def result(self) -> Ended:
        """How it ended. For a stream too: outputs not taken are lost."""
        while self.ended is None:
            await self._wait()
        return self.ended

    async def batch(self) -> list[bytes]:
        """The outputs that arrived since the last call, all at once. An empty list: it has ended, or `nudge`."""
        if not self._pending and self.ended is None:
            await self._wait()
        pending = self._pending
        if pending:
            self._pending = []
            self._dispatcher.consumed(self, len(pending))
        return pending

    async def batches(self) -> AsyncIterator[list[bytes]]:
        """Batches until it has ended; then see `ended`."""
        while True:
            outputs = await self.batch()
            if outputs:
                yield outputs
            elif self.ended is not None:
                return

    def running_for(self) -> float:
        """Seconds since it was dispatched; 0 while it waits."""
        return self._dispatcher.clock() - self.inv.dispatched if self.node else 0.0

    def cancel(self) -> None:
        """Nobody wants it any more. Idempotent; nothing happens once it has ended."""
        self._dispatcher.cancel(self)

    def nudge(self) -> None:
        """Let a waiting `batch` return empty, so that its caller can see to something else (a ping)."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- the dispatcher's side -------------------------------------------------------------------------------

    def leave(self, kind: Literal["migration", "resume"], now: float, why: str = "") -> None:
        """It goes on elsewhere from here."""
        if self.handover is None:
            self.handover = Handover(kind, self.node, now, self.inv.active, why)
            self.handovers.append(self.handover)
        else:  # no output came since the last one: the client waits for both as for one
            self.handover.kind = kind
            self.handover.why = f"{self.handover.why}, {why}".strip(", ")

    def arrived(self, now: float) -> None:
        """The first output since it left."""
        assert self.handover is not None
        self.handover.ended = now
        self.handover = None

    def deliver(self, outputs: list[bytes]) -> None:
        if self.skip:
            seen = min(self.skip, len(outputs))
            self.skip -= seen
            self._dispatcher.consumed(self, seen)
            outputs = outputs[seen:]
        self._pending.extend(outputs)
        self.nudge()

    def end(self, ended: Ended) -> None:
        assert self.ended is None, "an invocation ends once"
        self.ended = ended
        self.nudge()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
