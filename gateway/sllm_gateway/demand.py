"""What this gateway could use: DEMAND to the controller, WANT to invokers. Absolute, gathered, never repeated.

    something begins to wait without a slot   DEMAND and WANT at the end of this wake-up
    any other change                          both within TRAILING seconds

Not a decision-maker: how many instances there are is the controller's business, who gets a slot the invoker's.
Invariant: once nothing waits or runs for a target, the controller has been told so and nothing of it is kept here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sllm_faas.dispatch.served import Served
from sllm_faas.spec import Target
from sllm_faas.wire.messages import Demand, TargetDemand

TRAILING = 0.1
_IDLE = (0, 0)


class DemandReporter:
    """`counts(target)` gives (waiting, running), `oldest(target)` the seconds since its oldest waiting was submitted;
    `report` sends a Demand and says whether it went out; `want` tells the invokers; `forget` is called for targets that
    became idle. `served` is told along and never by itself."""

    def __init__(
        self,
        counts: Callable[[Target], tuple[int, int]],
        line: Callable[[Target], tuple[float, int]],
        served: Served,
        report: Callable[[Demand], bool],
        want: Callable[[Target], None],
        forget: Callable[[Target], None],
    ) -> None:
        self._counts = counts
        self._line = line
        self._served = served
        self._report = report
        self._want = want
        self._forget = forget
        self._changed: set[Target] = set()
        self._urgent: set[Target] = set()
        self._sent: dict[Target, tuple[int, int]] = {}
        self._soon: asyncio.Handle | None = None
        self._later: asyncio.TimerHandle | None = None

    def changed(self, target: Target) -> None:
        """Something about the target changed; nobody waits longer for our telling it late."""
        self._changed.add(target)
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(TRAILING, self._trail)

    def urgent(self, target: Target) -> None:
        """Something began to wait without a slot."""
        self._urgent.add(target)
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(self._flush_urgent)

    def report_all(self, targets: set[Target]) -> None:
        """The controller may know nothing, or only what it was told before: tell all of it, and what has ended."""
        self._flush(targets | set(self._sent), again=True)

    def close(self) -> None:
        for timer in (self._soon, self._later):
            if timer is not None:
                timer.cancel()
        self._soon = self._later = None

    def _flush_urgent(self) -> None:
        self._soon = None
        targets, self._urgent = self._urgent, set()
        self._flush(targets)

    def _trail(self) -> None:
        self._later = None
        targets, self._changed = self._changed, set()
        self._flush(targets)

    def _flush(self, targets: set[Target], *, again: bool = False) -> None:
        items = []
        sent = self._sent
        for target in targets:
            self._want(target)
            now = self._counts(target)
            if now != sent.get(target, _IDLE) or (again and now != _IDLE):
                items.append(TargetDemand(target, *now, *self._line(target), *self._served.of(target)))
            elif now == _IDLE:
                self._forget(target)
        if items and not self._report(Demand(tuple(items))):
            return  # no controller: it is told everything when it is back
        for item in items:
            self._served.told(item.target)
            if item.waiting or item.running:
                sent[item.target] = (item.waiting, item.running)
            else:
                sent.pop(item.target, None)
                self._forget(item.target)
