"""As much of an event loop as the gateway's dispatcher asks for, on virtual time."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Timer:
    def __init__(self, when: float, call: Callable[[], object]) -> None:
        self._when, self.call, self.cancelled = when, call, False

    def cancel(self) -> None:
        self.cancelled = True

    def when(self) -> float:
        return self._when


class VirtualLoop:
    def __init__(self) -> None:
        self.now = 0.0
        self._soon: deque[Timer] = deque()
        self._later: list[tuple[float, int, Timer]] = []
        self._asked = 0

    def time(self) -> float:
        return self.now

    def call_soon(self, call: Callable[..., object], *args: Any) -> Timer:
        timer = Timer(self.now, lambda: call(*args))
        self._soon.append(timer)
        return timer

    def call_later(self, delay: float, call: Callable[..., object], *args: Any) -> Timer:
        timer = Timer(self.now + delay, lambda: call(*args))
        self._asked += 1
        heapq.heappush(self._later, (timer.when(), self._asked, timer))
        return timer

    def settle(self) -> None:
        """Whatever is to happen in this wake-up."""
        while self._soon:
            timer = self._soon.popleft()
            if not timer.cancelled:
                timer.call()

    def next(self) -> float | None:
        while self._later and self._later[0][2].cancelled:
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else None

    def advance(self, until: float) -> None:
        while (when := self.next()) is not None and when <= until:
            self.now = max(self.now, when)
            heapq.heappop(self._later)[2].call()
            self.settle()
        self.now = max(self.now, until)

    @contextmanager
    def running(self) -> Iterator[None]:
        asyncio._set_running_loop(self)  # type: ignore[arg-type]
        try:
            yield
        finally:
            asyncio._set_running_loop(None)
