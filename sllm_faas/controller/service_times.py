"""How long an invocation keeps its slot, learned per function, and how far away the next free slot is. Pure.

Gateways tell what they served, as a count and the sum of its seconds, with the demand that they tell anyway. So what
is learned from is means of several: that of n is off by what one is off by, over sqrt(n). Exponentially weighted means
of the seconds and of what one is off by are kept, in the estimator's book:

    slot|app/function            seconds      ~slot|app/function   mean deviation, seconds
    #slot|app/function           invocations that were seen

The store gets them with what is next learned from a start or a move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

WEIGHT = 0.05
"""Of one invocation, once there were many; before, all count the same."""
KNOWN = 5
"""Invocations after which the mean is relied on."""


class ServiceTime(msgspec.Struct, frozen=True):
    """Of a function. `deviation`: the mean one, of one invocation, None as long as it cannot be told; `seen`: so many
    invocations."""

    seconds: float
    deviation: float | None
    seen: int

    def __str__(self) -> str:
        sure = f" ± {self.deviation:.2f}" if self.deviation is not None else ""
        return f"{self.seconds:.2f}{sure} s (mean of {self.seen})"


class SlotWait(msgspec.Struct, frozen=True):
    """Waiting for a slot of those instances that are ready: the last of `ahead` gets one of `slots` in `seconds`; the
    line has been there for `waited` seconds already."""

    seconds: float
    waited: float
    ahead: int
    slots: int
    each: ServiceTime

    def __str__(self) -> str:
        slots = f"{self.slots} slot{'s' * (self.slots > 1)}"
        return (
            f"about {self.seconds:.2f} s; {self.ahead} wait{'s' * (self.ahead == 1)} for {slots}, kept for {self.each}"
        )


def service_time(book: Mapping[str, float], function: str) -> ServiceTime | None:
    """Of `app/function`; None: nothing was seen yet."""
    key = f"slot|{function}"
    found = book.get(key)
    return None if found is None else ServiceTime(found, book.get(f"~{key}"), int(book[f"#{key}"]))


def slot_wait(each: ServiceTime, ahead: int, slots: int, waited: float) -> SlotWait | None:
    """How long the k-th (`ahead`) of those without a slot waits for one of m (`slots`) that are all taken: s * k / m.

    A G/G/m queue, approximated: with service time s and all m busy, slots become free at the rate m / s, and evenly (as
    in the fluid limit; for exponential service times it is the exact mean, Kleinrock, Queueing Systems I, §3.5). Long
    ones among the running make it longer than that: whoever relies on it has to give up when it has taken too long.

    None: nobody waits, no slot is there, or too little was seen.
    """
    if ahead <= 0 or slots <= 0 or each.seen < KNOWN:
        return None
    return SlotWait(each.seconds * ahead / slots, waited, ahead, slots, each)


def learn(book: dict[str, float], function: str, served: int, seconds: float) -> None:
    """Take in that so many ended, which kept their slots for `seconds` together. Nonsense is left out."""
    if served <= 0 or not 0.0 <= seconds < math.inf:
        return
    key = f"slot|{function}"
    count = book.get(f"#{key}", 0.0)
    book[f"#{key}"] = count + served
    mean, before = seconds / served, book.get(key)
    if before is None:
        book[key] = mean
        return
    weight = max(1.0 - (1.0 - WEIGHT) ** served, served / (count + served))
    book[key] = before + weight * (mean - before)
    off = abs(mean - before) * math.sqrt(served)
    known = book.get(f"~{key}")
    book[f"~{key}"] = off if known is None else known + weight * (off - known)
