"""What a gateway has served since it last told: per target, how many invocations ended and the seconds they ran. Pure.

    add(target, seconds)   one has left its slot       of(target) ──► told with the target's demand ──► told(target)

The seconds are those in a slot, not those of waiting for one; the controller learns from them how long a slot is taken.
What could not be told stays, added up, until it can.
"""

from __future__ import annotations

from sllm_faas.spec import Target


class Served:
    def __init__(self) -> None:
        self._counts: dict[Target, tuple[int, float]] = {}

    def add(self, target: Target, seconds: float) -> None:
        count, sum_of = self._counts.get(target, (0, 0.0))
        self._counts[target] = (count + 1, sum_of + seconds)

    def of(self, target: Target) -> tuple[int, float]:
        """(invocations, seconds) not told yet."""
        return self._counts.get(target, (0, 0.0))

    def told(self, target: Target) -> None:
        """Those have been told, or never will be."""
        self._counts.pop(target, None)
