"""When a process that ended is started again. Pure: the clock is an argument.

A back-off is for what cannot run: something that ends again and again before it has served anybody. What has served is
missed by others, so it comes back at once, however often it has been killed.

    it ended                              deaths in a row    wait
    before it was ready                   one more           DELAYS[deaths in a row before this one], the last at most
    ready, for less than SETTLED          one more           the same
    ready, for SETTLED or longer          this is the first  DELAYS[0]: none

The first restart is at once in any case, so that a single crash costs nothing but the start itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DELAYS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SETTLED = 5.0
"""Seconds. Some starts' worth: who ends each time after these spends most of its life serving, not starting."""


@dataclass(slots=True)
class Restarts:
    """Deaths in a row, by process name. Times in seconds."""

    delays: tuple[float, ...] = DELAYS
    settled: float = SETTLED
    _ready: dict[str, float] = field(default_factory=dict)
    _deaths: dict[str, int] = field(default_factory=dict)

    def ready(self, name: str, now: float) -> None:
        """`name`, which was started, serves from now on."""
        self._ready[name] = now

    def ended(self, name: str, now: float) -> float:
        """Seconds to wait before `name` is started again."""
        if now - self._ready.pop(name, now) >= self.settled:
            self._deaths.pop(name, None)
        deaths = self._deaths.get(name, 0)
        self._deaths[name] = deaths + 1
        return self.delays[min(deaths, len(self.delays) - 1)]
