"""When a process that died is started again. Pure: the clock is an argument.

The first restart is at once, so that a single crash costs nothing but the start itself; each further death within
`STABLE` seconds of a start waits longer, up to `DELAYS[-1]`. Having run for `STABLE` seconds forgets the past.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DELAYS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STABLE = 60.0


@dataclass(slots=True)
class Restarts:
    """Deaths in a row, by process name. Times in seconds."""

    delays: tuple[float, ...] = DELAYS
    stable: float = STABLE
    _began: dict[str, float] = field(default_factory=dict)
    _deaths: dict[str, int] = field(default_factory=dict)

    def started(self, name: str, now: float) -> None:
        self._began[name] = now

    def died(self, name: str, now: float) -> float:
        """Seconds to wait before `name` is started again."""
        if now - self._began.get(name, now) >= self.stable:
            self._deaths.pop(name, None)
        deaths = self._deaths.get(name, 0)
        self._deaths[name] = deaths + 1
        return self.delays[min(deaths, len(self.delays) - 1)]
