"""Other ways to choose a node, behind the controller's own port, to be compared with it.

ours           the platform's: estimate plus harm, evictions and moves among the candidates
random         any node big enough, whatever is there; idle instances go if they must
availability   any node with room (what serverless platforms do by default); else one where idle ones can go
balanced       the node with most room, blind to what is on its disks
preempt        least estimate, and busy instances are stopped to make room: Shepherd's idea with our estimates; what
               was stopped begins anew, as there
preempt-resume the same on this platform: what was stopped goes on from its tokens
serverlessllm  the ServerlessLLM paper's: least of load and migrate-then-load times; harm to others counts nothing
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import inf
from random import Random

import msgspec

from sllm_faas.controller.placement import (
    Candidate,
    Cheapest,
    Choice,
    Costs,
    Evict,
    Full,
    OwnSlot,
    Placed,
    Policy,
    cheapest,
    cheapest_idle,
    no_room,
    no_slot,
    place,
)

FREE = Costs(eviction=0.0, reload=0.0, move=0.0)


class _Blind(ABC):
    """Places by a rank that knows no estimates."""

    exhaustive = True

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    def place(self, candidates: Sequence[Candidate], _own_slot: OwnSlot = no_slot) -> Choice:
        nodes = sorted(candidates, key=lambda node: node.name)
        if not nodes:
            return Full("no node is up and open for instances")
        big = [node for node in nodes if node.big_enough]
        if not big:
            return no_room(nodes)
        for node in self.ranked(big):
            if node.fits():
                return Placed(node.name, node.estimate)
            if node.will_fit():
                return Full(f"waits for memory that is being freed on {node.name}")
            if idle := cheapest_idle(node):
                return Evict(node.name, tuple(item.instance for item in idle), f"{node.name}: stops {len(idle)} idle")
        return no_room(big)

    @abstractmethod
    def ranked(self, nodes: list[Candidate]) -> list[Candidate]: ...


class Anywhere(_Blind):
    def ranked(self, nodes: list[Candidate]) -> list[Candidate]:
        self.rng.shuffle(nodes)
        return nodes


class Availability(_Blind):
    def ranked(self, nodes: list[Candidate]) -> list[Candidate]:
        self.rng.shuffle(nodes)
        return sorted(nodes, key=lambda node: (not node.fits(), not node.will_fit()))


class Balanced(_Blind):
    def ranked(self, nodes: list[Candidate]) -> list[Candidate]:
        return sorted(nodes, key=lambda node: (not node.fits(), -node.free_gpus, -(node.free_mb or 0)))


class Preempt:
    """The running ones that go come back by their own demand."""

    exhaustive = True

    def place(self, candidates: Sequence[Candidate], _own_slot: OwnSlot = no_slot) -> Choice:
        choice = place((_unmovable(node) for node in candidates), FREE)
        best = choice.estimate.total if isinstance(choice, Placed) else inf
        for node in sorted(candidates, key=lambda node: (node.estimate.total, node.name)):
            if node.estimate.total >= best or isinstance(choice, Evict):
                break
            if node.fits() or node.will_fit():
                return choice
            if busy := cheapest(node.movable(inf), node.missing_mb, node.missing_gpus, lambda _: 1.0):
                names = tuple(item.instance for item in busy)
                return Evict(node.name, names, f"{node.name}: preempts {len(names)}, then {node.estimate}", 0.0)
        return choice


def _unmovable(node: Candidate) -> Candidate:
    return msgspec.structs.replace(node, may_move=False)


class Published:
    exhaustive = True

    def place(self, candidates: Sequence[Candidate], _own_slot: OwnSlot = no_slot) -> Choice:
        return place(candidates, FREE)


POLICIES: dict[str, Callable[[Random], Policy]] = {
    "ours": lambda _: Cheapest(),
    "serverlessllm": lambda _: Published(),
    "preempt": lambda _: Preempt(),
    "preempt-resume": lambda _: Preempt(),
    "availability": Availability,
    "balanced": Balanced,
    "random": Anywhere,
}
MOVING = frozenset({"ours", "serverlessllm"})
"""Those that move running invocations."""
SEES_BUSY = MOVING | {"preempt", "preempt-resume"}
ANEW = frozenset({"preempt"})
"""Those under which what is stopped loses its tokens."""
