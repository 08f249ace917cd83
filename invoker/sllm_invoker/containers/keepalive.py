"""How long an idle warmth layer is worth its memory: what is known of its use, and the rule. Pure.

After RainbowCake (Yu et al., ASPLOS'24): every layer has a keep-alive of its own, from what its absence costs, what
its presence costs, and how often *anything* that shares it is started. Sharing needs no term of its own: a start goes
through all of its layers, so a layer's record is the sum of its users' starts.

Keeping a layer idle for T seconds before it is ended costs, over the waits w between its uses that were seen,

    cost(T) = sum over w of  min(w, T) * MiB / price  +  (seconds its making takes, if w > T)

and the T with the least cost is taken, the longest among equals. It is never beyond break-even, price * seconds / MiB:
who holds on until there and no longer spends at most twice what somebody who knew the future would (ski rental:
Karlin et al., "Competitive randomized algorithms", SODA 1990). One wait of just that length is always counted as seen,
so that a layer is given up sooner only where long waits have shown to be longer still.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

PRICE = 60_000.0
"""MiB·s of idle memory that one second of start-up time is worth: 1 GiB for a minute."""
FADE = 0.98
"""What a wait still counts after the next one: about fifty are remembered."""
SHORTEST = 0.1
GROWTH = 1.5
BINS = 42
"""Waits are counted in bins up to 0.1 s, 0.15 s, … 0.1 s * 1.5^41: 19 days."""
BOUNDS = tuple(SHORTEST * GROWTH**k for k in range(BINS))


@dataclass(frozen=True, slots=True)
class Cost:
    """What a layer is: seconds to make it where its parent exists, and MiB it holds for itself."""

    seconds: float
    memory_mb: float


@dataclass(slots=True)
class Usage:
    """When a layer was used last, and how often it waited how long between uses, the recent ones counting most."""

    last: float
    counts: list[float] = field(default_factory=lambda: [0.0] * BINS)
    total: float = 0.0
    """Seconds of all waits, fading as they do."""

    def note(self, now: float) -> None:
        wait = max(0.0, now - self.last)
        self.counts = [count * FADE for count in self.counts]
        place = math.ceil(math.log(max(wait, SHORTEST) / SHORTEST) / math.log(GROWTH))
        self.counts[min(BINS - 1, place)] += 1.0
        self.total = self.total * FADE + wait
        self.last = now

    def noted(self, now: float) -> Usage:
        """As it will be once it is used now."""
        after = Usage(self.last, self.counts, self.total)
        after.note(now)
        return after

    def rate(self) -> float:
        """Uses per second over the remembered waits; 0 while there is none."""
        return sum(self.counts) / self.total if self.total > 0 else 0.0


class KeepAlive(Protocol):
    """Seconds for which an unused layer is kept."""

    def seconds(self, cost: Cost, usage: Usage, /) -> float: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same for all: what a platform without a policy does."""

    keep: float

    def seconds(self, _cost: Cost, _usage: Usage, /) -> float:
        return self.keep


@dataclass(frozen=True, slots=True)
class BreakEven:
    """See the module. `price` in MiB·s per second."""

    price: float = PRICE

    def seconds(self, cost: Cost, usage: Usage, /) -> float:
        limit = self.price * cost.seconds / max(1.0, cost.memory_mb)
        waits = [*zip(BOUNDS, usage.counts, strict=True), (limit, 1.0)]
        holding = 1.0 / limit if limit else 0.0  # of one second, in makings of the layer
        later = sum(count for _, count in waits)
        passed, best, least = 0.0, 0.0, later
        for bound, here in sorted(waits):
            if bound > limit:
                break
            passed, later = passed + bound * here, later - here
            total = (passed + bound * later) * holding + later
            if total <= least:
                best, least = bound, total
        return best


def value(cost: Cost, usage: Usage, now: float) -> float:
    """Seconds of starts saved per second and MiB: who has the least goes first when memory is short.

    A layer unused for longer than its usual wait is worth what that longer wait says.
    """
    idle = now - usage.last
    rate = usage.rate()
    rate = min(rate, 1.0 / idle) if rate and idle > 0 else rate or 1.0 / max(idle, 1.0)
    return rate * cost.seconds / max(1.0, cost.memory_mb)
