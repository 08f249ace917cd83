"""How much of each app may run at once through this gateway. Pure.

An app's cap is shared out between the gateways by the controller, which publishes each one's part with the routes. What
is above it waits in its line like what has no slot and, but for one of each line, is not told as demand.
Invariant (`validate`): an app that nothing of runs is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping


class Caps:
    def __init__(self) -> None:
        self._limits: dict[str, int] = {}
        self._running: dict[str, int] = {}

    def replace(self, limits: Mapping[str, int]) -> set[str]:
        """The caps there are now, of the apps that have one. Returns the apps that may run more than before."""
        before, self._limits = self._limits, dict(limits)
        return {app for app, limit in before.items() if limits.get(app, limit + 1) > limit}

    def capped(self, app: str) -> bool:
        return app in self._limits

    def room(self, app: str, wanted: int) -> int:
        """How many of `wanted` more may run now; none when a lowered cap has yet to be reached."""
        limit = self._limits.get(app)
        return wanted if limit is None else min(wanted, max(0, limit - self._running.get(app, 0)))

    def started(self, app: str) -> None:
        self._running[app] = self._running.get(app, 0) + 1

    def stopped(self, app: str) -> None:
        running = self._running.pop(app) - 1
        if running:
            self._running[app] = running

    def validate(self, running: Mapping[str, int]) -> None:
        """`running`: what runs by app, counted by its owner."""
        assert self._running == running, "running counts of apps disagree"
        assert all(count > 0 for count in self._running.values())
        assert all(limit > 0 for limit in self._limits.values())
