"""Virtual time: a heap of what is to happen when. Equal times happen in the order in which they were asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Action]] = []
        self._asked = 0
        self.happened = 0

    def at(self, when: float, action: Action) -> None:
        """Not before now: what is late happens next."""
        self._asked += 1
        heapq.heappush(self._heap, (max(when, self.now), self._asked, action))

    def after(self, seconds: float, action: Action) -> None:
        self.at(self.now + seconds, action)

    def run(self, until: float) -> None:
        """Let happen all that is due by `until`; the time is `until` then."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, action = heapq.heappop(heap)
            self.happened += 1
            action()
        self.now = until
