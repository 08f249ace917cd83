"""What a modelled node reads from one tier: one checkpoint at a time, the one with the least left first.

As the reader of a node does (`sllm_invoker.checkpoints.reader`): a read is overtaken by one that is shorter than what
is left of it, and goes on where it was.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from sllm_faas.sim.clock import Clock


class Reads:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, float, Callable[[], None]]] = []
        """(bytes left, number, seconds a byte, what follows); the first is under way."""
        self._since = 0.0
        """When the first went on."""
        self._number = 0
        self._turn = 0

    def add(self, size: int, seconds: float, done: Callable[[], None]) -> None:
        """Read `size` bytes in `seconds`, apart from waiting, then call `done`."""
        now = self._clock.now
        if self._heap:
            left, number, pace, follows = self._heap[0]
            self._heap[0] = (max(0.0, left - (now - self._since) / pace), number, pace, follows)
        self._since = now
        self._number += 1
        heapq.heappush(self._heap, (float(size), self._number, seconds / size, done))
        self._go_on()

    def _go_on(self) -> None:
        self._turn += 1
        turn, (left, _, pace, _) = self._turn, self._heap[0]
        self._clock.after(left * pace, lambda: self._ended(turn))

    def _ended(self, turn: int) -> None:
        if turn != self._turn:
            return  # it was overtaken, or is counted anew
        *_, done = heapq.heappop(self._heap)
        self._since = self._clock.now
        if self._heap:
            self._go_on()
        done()
