"""What a simulation measured: samples while it runs, percentiles and counts afterwards."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

PERCENTILES = (50.0, 95.0, 99.0)


@dataclass(slots=True)
class Samples:
    """Filled in while the simulation runs. Seconds; one value per request that was answered."""

    startup: array[float] = field(default_factory=lambda: array("d"))
    """From its arrival until an instance took it, pauses by preemption and moves added: 0 when one was free."""
    ttft: array[float] = field(default_factory=lambda: array("d"))
    starts: array[float] = field(default_factory=lambda: array("d"))
    """Of instances: from the command to ready."""
    error: array[float] = field(default_factory=lambda: array("d"))
    """|predicted - actual| of each."""
    counts: Counter[str] = field(default_factory=Counter)
    """requests, answered, refused, promised, kept, starts, migrations, preemptions, evictions, bytes from each tier."""
    gpu_seconds: float = 0.0
    instance_seconds: float = 0.0
    apps: dict[str, array[float]] = field(default_factory=dict)
    """Start-up times by app."""


@dataclass(frozen=True, slots=True)
class Result:
    """Of one run. Times in seconds; `slo` is the part of the promises that was kept, of all that were made."""

    scenario: str
    policy: str
    rate: float
    seed: int
    seconds: float
    requests: int
    answered: int
    refused: int
    unfinished: int
    startup: dict[str, float]
    ttft: dict[str, float]
    starts: dict[str, float]
    estimate_error: dict[str, float]
    slo: float | None
    cold: int
    migrations: int
    preemptions: int
    evictions: int
    moved_gb: dict[str, float]
    gpu_seconds: float
    instance_seconds: float
    events: int
    assumptions: tuple[str, ...] = ()
    apps: dict[str, dict[str, float]] = field(default_factory=dict)


def percentile(ordered: Any, q: float) -> float:
    """Nearest rank of sorted values; 0 when there are none."""
    if not len(ordered):
        return 0.0
    return float(ordered[max(0, math.ceil(q / 100 * len(ordered)) - 1)])


def summary(values: Any) -> dict[str, float]:
    ordered = sorted(values)
    out = {"mean": sum(ordered) / len(ordered) if ordered else 0.0}
    out.update((f"p{q:g}", percentile(ordered, q)) for q in PERCENTILES)
    return {name: round(value, 6) for name, value in out.items()}


COLUMNS = (
    "policy",
    "rate",
    "requests",
    "startup p50",
    "p95",
    "p99",
    "ttft p50",
    "p95",
    "p99",
    "SLO",
    "starts",
    "moves",
    "preempted",
    "evicted",
    "GB read",
    "GPU h",
    "refused",
    "unfinished",
)


def row(result: Result) -> tuple[Any, ...]:
    """Under COLUMNS."""
    return (
        result.policy,
        result.rate,
        result.requests,
        *(f"{result.startup[f'p{q:g}']:.3f}" for q in PERCENTILES),
        *(f"{result.ttft[f'p{q:g}']:.3f}" for q in PERCENTILES),
        "-" if result.slo is None else f"{100 * result.slo:.1f} %",
        result.cold,
        result.migrations,
        result.preemptions,
        result.evictions,
        f"{sum(result.moved_gb.values()):.0f}",
        f"{result.gpu_seconds / 3600:.1f}",
        result.refused,
        result.unfinished,
    )
