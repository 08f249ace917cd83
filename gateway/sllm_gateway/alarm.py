"""Deadlines of invocations on the event loop: a wheel behind one `call_later`.

Invariant: when anything has a deadline, exactly one timer is set, for the earliest bucket or before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sllm_faas.dispatch.invocation import Due, Invocation
from sllm_faas.dispatch.timers import Wheel

_SLACK = 0.001
"""Seconds later than asked, so that the clock has surely passed the bucket when the timer fires."""


class Alarm:
    """`ring(invocation, now)` is called for each whose deadline has come; it may set it again."""

    def __init__(self, clock: Callable[[], float], ring: Callable[[Invocation, float], None]) -> None:
        self._clock = clock
        self._ring = ring
        self._wheel: Wheel[Invocation] = Wheel()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def set(self, inv: Invocation, due: Due | None) -> None:
        """Its one deadline is now `due`; None: it has none."""
        if due is None:
            self._wheel.remove(inv)
            return
        self._wheel.put(inv, due.when)
        if self._timer is None or due.when < self._timer_at:
            self._start(due.when)

    def clear(self, inv: Invocation) -> None:
        self._wheel.remove(inv)

    def tick(self) -> None:
        """Ring for what has passed, and set the timer for what is next."""
        self.close()
        now = self._clock()
        for inv in self._wheel.due(now):
            self._ring(inv, now)
        following = self._wheel.next()
        if following is not None and (self._timer is None or following < self._timer_at):
            self._start(following)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def validate(self) -> None:
        self._wheel.validate()
        following = self._wheel.next()
        # A bucket's time is a product of floats: it may be a rounding error before what was asked for.
        timely = self._timer is not None and following is not None and self._timer_at <= following + _SLACK
        assert following is None or timely, "no timer is set in time"

    def _start(self, when: float) -> None:
        self.close()
        self._timer_at = when
        delay = max(0.0, when - self._clock()) + _SLACK
        self._timer = asyncio.get_running_loop().call_later(delay, self.tick)
