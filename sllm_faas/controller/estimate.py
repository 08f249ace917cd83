"""How long a start would take on a node, and how that is learned from starts that were.

    total = queue + container(warmth) + missing bytes / bandwidth(tier) + first token

`queue` is the time until the loads already promised to the node are done. A learned value is an exponentially
weighted mean; its key goes from the particular to the general and the most particular one that exists is used. The
book is a plain `dict[str, float]`: it is stored, shown and replayed as it is.

    container|node|warmth|app/function   container|node|warmth   container|warmth     seconds
    bandwidth|node|tier                                                                bytes per second
    error|node   error                                                                 |predicted - actual|, seconds
    starts                                                                             how many were learned from
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sllm_faas.spec import Tier, Timeline, Warmth

WEIGHT = 0.3
"""Of a new observation: three starts make a constant its own."""

CONTAINER: dict[Warmth, float] = {"cold": 6.0, "base": 2.5, "libs": 0.1, "template": 0.05, "warm": 0.0}
"""Guesses for a node that has started nothing yet: a process with torch and transformers to import, the same forked
from an interpreter, a fork that only imports the user's modules, one that finds its skeleton built."""
BANDWIDTH: dict[Tier, float] = {"remote": 100e6, "disk": 1e9, "dram": 8e9, "gpu": 50e9}
FIRST_TOKEN = 0.05
"""Seconds, for functions with weights to run; nothing for the others."""

Book = dict[str, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds by part. `total` orders candidates."""

    queue: float
    container: float
    load: float
    first: float
    warmth: Warmth
    tier: Tier

    @property
    def total(self) -> float:
        return self.queue + self.container + self.load + self.first

    def __str__(self) -> str:
        return (
            f"{self.total:.2f} s = queue {self.queue:.2f} + {self.warmth} container {self.container:.2f}"
            f" + {self.tier} load {self.load:.2f} + first {self.first:.2f}"
        )


def container_seconds(book: Mapping[str, float], node: str, warmth: Warmth, function: str) -> float:
    for key in (f"container|{node}|{warmth}|{function}", f"container|{node}|{warmth}", f"container|{warmth}"):
        if key in book:
            return book[key]
    return CONTAINER[warmth]


def bandwidth(book: Mapping[str, float], calibrated: Mapping[str, float], node: str, tier: Tier) -> float:
    """Learned, else the invoker's own calibration, else a guess; bytes per second, above zero."""
    value = book.get(f"bandwidth|{node}|{tier}", 0.0) or calibrated.get(tier, 0.0)
    return value if value > 0 else BANDWIDTH[tier]


def estimate(
    book: Mapping[str, float],
    calibrated: Mapping[str, float],
    node: str,
    function: str,
    warmth: Warmth,
    tier: Tier,
    size: int,
    queue: float,
) -> Estimate:
    """`size`: bytes of the checkpoint that are not yet where the instance reads them; `function`: `app/function`."""
    return Estimate(
        queue=queue,
        container=container_seconds(book, node, warmth, function),
        load=size / bandwidth(book, calibrated, node, tier) if size else 0.0,
        first=FIRST_TOKEN if size else 0.0,
        warmth=warmth,
        tier=tier,
    )


def learn(
    book: Book,
    *,
    node: str,
    function: str,
    warmth: Warmth,
    tier: Tier,
    size: int,
    timeline: Timeline,
    predicted: float,
    actual: float,
) -> None:
    """Take a finished start into the book. `actual`: seconds from the command to ready; a span `queue` in it was
    spent waiting for other reads."""
    loading = sum(span.seconds for span in timeline.spans if span.name in ("checkpoint", "load", "attach"))
    queued = sum(span.seconds for span in timeline.spans if span.name == "queue")
    if size and loading > 0:
        _mix(book, f"bandwidth|{node}|{tier}", size / loading)
    container = max(0.0, actual - loading - queued)
    for key in (f"container|{node}|{warmth}|{function}", f"container|{node}|{warmth}", f"container|{warmth}"):
        _mix(book, key, container)
    for key in (f"error|{node}", "error"):
        _mix(book, key, abs(predicted - actual))
    book["starts"] = book.get("starts", 0.0) + 1.0


MIGRATION_PER_TOKEN, MIGRATION_BASE = 250e-6, 0.1
"""Seconds: the destination computes the KV cache anew, then the commit. Guesses until one was seen."""


def migration(book: Mapping[str, float], tokens: int) -> float:
    """Seconds for a context of so many tokens to go on elsewhere, where an instance is ready: a * tokens + b."""
    per_token = book.get("migration|token", MIGRATION_PER_TOKEN)
    return per_token * tokens + book.get("migration|base", MIGRATION_BASE)


def forget(book: Book, node: str) -> None:
    """Drop what was learned of a node that is gone for good."""
    for key in [key for key in book if key.split("|")[1:2] == [node]]:
        del book[key]


def _mix(book: Book, key: str, value: float) -> None:
    before = book.get(key)
    book[key] = value if before is None else before + WEIGHT * (value - before)
