"""Where an instance starts: the node with the least estimated start among those it fits. Pure and deterministic.

Admission: an instance needs its private memory, and its checkpoint's bytes once per node however many instances share
them. A node whose memory is unknown (0) admits everything. When no node has room, idle instances of others are
chosen to go: the node needing the fewest stops, then the least estimate. When memory is already being freed there,
the start waits for it instead of evicting more.

The answer says in a sentence which candidates there were and why the winner won.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sllm_faas.controller.estimate import Estimate

SHOWN = 5
EVICTION_COST = 0.5
"""Seconds charged per instance that must go: its drain, and the start it may cost its own function later."""


@dataclass(frozen=True, slots=True)
class Idle:
    """An instance that nobody needs now, and the memory (MiB) its end gives back."""

    instance: str
    memory_mb: int
    since: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node as placement sees it. `free_mb` None: unknown, not limited. `idle` is asked only when nothing fits."""

    name: str
    need_mb: int
    free_mb: int | None
    total_mb: int
    freeing_mb: int
    estimate: Estimate
    idle: Callable[[], Sequence[Idle]]

    def fits(self) -> bool:
        return self.free_mb is None or self.need_mb <= self.free_mb


@dataclass(frozen=True, slots=True)
class Placed:
    node: str
    estimate: Estimate
    why: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Stop these, then place again."""

    node: str
    instances: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Full:
    """No room now; `never`: no node is big enough, waiting is of no use."""

    why: str
    never: bool = False


def place(candidates: Iterable[Candidate]) -> Placed | Evict | Full:
    nodes = list(candidates)
    if not nodes:
        return Full("no node is up and open for instances")
    fitting = [node for node in nodes if node.fits()]
    if fitting:
        ranked = sorted(fitting, key=_rank)
        return Placed(ranked[0].name, ranked[0].estimate, _explain(ranked, len(nodes)))
    if all(node.total_mb < node.need_mb for node in nodes):
        biggest = max(nodes, key=lambda node: node.total_mb)
        return Full(
            f"it needs {biggest.need_mb} MiB; the biggest node, {biggest.name}, has {biggest.total_mb} MiB", never=True
        )
    for node in sorted(nodes, key=_rank):
        if node.free_mb is not None and node.need_mb <= node.free_mb + node.freeing_mb:
            return Full(f"waits for memory that is being freed on {node.name}")
    plans = [plan for node in nodes if (plan := _evict(node)) is not None]
    if not plans:
        return Full(
            f"none of {len(nodes)} nodes has {min(node.need_mb for node in nodes)} MiB free, and nothing there is idle"
        )
    _, node, chosen = min(plans, key=lambda plan: (plan[0], plan[1].name))
    return Evict(
        node.name, chosen, f"{node.name}: stops {len(chosen)} idle to free {node.need_mb} MiB, then {node.estimate}"
    )


def _rank(node: Candidate) -> tuple[float, int, str]:
    # Equal estimates: the emptier node, so load spreads; then the name, so the choice is always the same.
    return (round(node.estimate.total, 6), -(node.free_mb if node.free_mb is not None else 0), node.name)


def _evict(node: Candidate) -> tuple[float, Candidate, tuple[str, ...]] | None:
    assert node.free_mb is not None
    missing = node.need_mb - node.free_mb - node.freeing_mb
    chosen: list[str] = []
    for idle in sorted(node.idle(), key=lambda idle: (idle.since, idle.instance)):
        if missing <= 0:
            break
        chosen.append(idle.instance)
        missing -= idle.memory_mb
    if missing > 0:
        return None
    return node.estimate.total + EVICTION_COST * len(chosen), node, tuple(chosen)


def _explain(ranked: Sequence[Candidate], total: int) -> str:
    winner, others = ranked[0], ranked[1:SHOWN]
    text = f"{winner.name}: {winner.estimate}"
    if others:
        text += "; over " + ", ".join(f"{node.name} {node.estimate.total:.2f} s" for node in others)
        if len(ranked) > SHOWN:
            text += f" and {len(ranked) - SHOWN} more"
    if len(ranked) < total:
        text += f"; {total - len(ranked)} without room"
    return text
