"""Who is alive, from when it was last heard. Pure: the clock is an argument.

Any traffic counts. A peer is lost after `misses` whole intervals of silence, and is reported lost once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

P = TypeVar("P", bound=Hashable)

INTERVAL = 1.0
MISSES = 3


@dataclass(slots=True)
class Liveness(Generic[P]):
    interval: float = INTERVAL
    misses: int = MISSES
    _heard: dict[P, float] = field(default_factory=dict)

    def heard(self, peer: P, now: float) -> None:
        self._heard[peer] = now

    def forget(self, peer: P) -> None:
        self._heard.pop(peer, None)

    def __contains__(self, peer: P) -> bool:
        return peer in self._heard

    def expire(self, now: float) -> list[P]:
        """The peers that fell silent since the last call; they are forgotten."""
        limit = now - self.interval * self.misses
        lost = [peer for peer, last in self._heard.items() if last < limit]
        for peer in lost:
            del self._heard[peer]
        return lost
