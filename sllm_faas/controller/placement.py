"""Where an instance starts: the cheapest way to a running instance among those its candidates offer. Pure.

For every candidate node, cheapest first, in estimated seconds to the first token plus the harm to others:

    it has room                        the estimate
    room is being freed there          + the seconds until it is
    idle instances can go              + Costs.eviction and a part of each one's own start, cheapest set of them
    busy instances can move elsewhere  + the longest of their moves and Costs.move each (where moving is offered)

Where those two take, beside what goes, room that is being freed, they cost no less than the seconds until it is. Where
no node has room, a slot of its own instances may be nearer than the cheapest of those ways that harm others: then that
is waited for, but together no longer than that way would take.

Admission: an instance needs its private memory, its accelerators, and its checkpoint's bytes once per node however
many instances share them. A node whose memory is unknown (0) admits everything.

Deterministic: the same candidates in any order give the same choice. The answer says in a sentence which candidates
there were and why the winner won; that is put into words only when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from operator import itemgetter
from typing import Protocol, TypeVar

import msgspec

from sllm_faas.controller.estimate import Estimate
from sllm_faas.controller.service_times import SlotWait

SHOWN = 5
LOST = 2
"""Ways other than the winner that its explanation names, the nearest to it."""
MOVES = 4
"""Nodes, the cheapest, that are asked what could move away from them: that is the dearest question."""
AGAIN = 5.0
"""Seconds after which who waits for room chooses anew at the latest: what is too young to go or to move may by then."""
LEAST = 0.05
"""... and at the earliest, unless room appears."""
STATES = 64
"""Of the dynamic program at most: beyond, those that miss most are dropped."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a choice is charged for its harm to others, in seconds. Small: what keeps an instance where it is sends
    others behind a slower read, which in overload harms more (seen in `sllm simulate paper` with other costs).

    `eviction`: each instance that must go, about as long as its end takes; and the `reload` share of the time that
    starting it again there takes, less the longer it has been idle: half of it after `horizon` seconds. `move`: each
    that moves, a pause to its caller.
    """

    eviction: float = 0.01
    reload: float = 0.001
    move: float = 0.05
    horizon: float = 10.0

    def of(self, item: Idle) -> float:
        """Of ending it, with the wait until it may go: it is missed the less the longer nobody has."""
        return item.rests + self.eviction + self.reload * item.reload * self.horizon / (self.horizon + item.seconds)


class Idle(msgspec.Struct, frozen=True):
    """An instance that nobody has needed for `seconds`, and what its end gives back. `reload`: seconds its own start
    took; `rests`: seconds for which it may not go yet; `claimed`: it is needed, but its app is above its share."""

    instance: str
    memory_mb: int
    seconds: float
    gpus: int = 0
    reload: float = 0.0
    rests: float = 0.0
    claimed: bool = False


class Movable(msgspec.Struct, frozen=True):
    """A busy instance that could go on at `to`, `seconds` from now: started there, then handed over. With no room
    for it anywhere `to` is empty and `seconds` infinite. It would take `takes` of the `room` of `place`, which others
    may want as well: MiB and accelerators of a node, or slots of an instance."""

    instance: str
    memory_mb: int
    gpus: int
    to: str
    seconds: float
    place: str = ""
    takes: tuple[int, int] = (0, 0)
    room: tuple[int, int] = (0, 0)


class Offers(Protocol):
    """What a node can do for a target beyond the room it has. Asked for only where there is no room."""

    def idle(self) -> Sequence[Idle]: ...

    def movable(self, limit: float) -> Sequence[Movable]:
        """It may leave out what takes `limit` seconds or more."""
        ...

    def freed(self, mb: int, gpus: int) -> float:
        """Seconds until what is ending there has freed so many MiB and accelerators; infinite: that is not as much."""
        ...


class Candidate(msgspec.Struct, frozen=True):
    """A node as placement sees it. `free_mb` None: unknown, not limited. `may_go`: whether its idle instances may be
    stopped; `may_move`: whether its busy ones may be moved away."""

    name: str
    need_mb: int
    free_mb: int | None
    total_mb: int
    freeing_mb: int
    estimate: Estimate
    offers: Offers
    need_gpus: int = 0
    free_gpus: int = 0
    total_gpus: int = 0
    freeing_gpus: int = 0
    may_go: bool = True
    may_move: bool = True

    def idle(self) -> Sequence[Idle]:
        return self.offers.idle() if self.may_go else ()

    def movable(self, limit: float) -> Sequence[Movable]:
        return self.offers.movable(limit) if self.may_move else ()

    def fits(self) -> bool:
        return (self.free_mb is None or self.need_mb <= self.free_mb) and self.need_gpus <= self.free_gpus

    def will_fit(self) -> bool:
        """When what is ending there has ended."""
        free_mb, free_gpus = self.free_mb, self.free_gpus + self.freeing_gpus
        return (free_mb is None or self.need_mb <= free_mb + self.freeing_mb) and self.need_gpus <= free_gpus

    @property
    def big_enough(self) -> bool:
        return (self.free_mb is None or self.need_mb <= self.total_mb) and self.need_gpus <= self.total_gpus

    def room_in(self, parts: Sequence[Part] = ()) -> float:
        """Seconds until so much has ended there that it fits, once these have gone too; infinite: it never does."""
        mb = 0 if self.free_mb is None else self.need_mb - self.free_mb - sum([part.memory_mb for part in parts])
        gpus = self.need_gpus - self.free_gpus - sum([part.gpus for part in parts])
        return self.offers.freed(max(0, mb), max(0, gpus)) if mb > 0 or gpus > 0 else 0.0

    @property
    def missing_mb(self) -> int:
        return 0 if self.free_mb is None else self.need_mb - self.free_mb - self.freeing_mb

    @property
    def missing_gpus(self) -> int:
        return self.need_gpus - self.free_gpus - self.freeing_gpus


class Placed(msgspec.Struct, frozen=True):
    """`others` are the next best with room, `more` the number of those beyond, `full` the nodes without; `ways`: what
    was considered there, as seconds with harm, what, and the node."""

    node: str
    estimate: Estimate
    others: tuple[tuple[str, float], ...] = ()
    more: int = 0
    full: int = 0
    ways: tuple[tuple[float, str, str], ...] = ()

    @property
    def why(self) -> str:
        text = f"{self.node}: {self.estimate}"
        if self.others:
            text += "; over " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.others)
            if self.more:
                text += f" and {self.more} more"
        return text + (f"; {self.full} without room" if self.full else "") + _lost(self.ways)


class Evict(msgspec.Struct, frozen=True):
    """Stop these, then place again. `drain`: as in wire.messages.Stop; `again`: seconds after which, though no room has
    appeared, the choice is made anew."""

    node: str
    instances: tuple[str, ...]
    why: str
    drain: float | None = None
    again: float = AGAIN

    @property
    def done(self) -> str:
        return f"stopping {len(self.instances)} on {self.node}"


class Move(msgspec.Struct, frozen=True):
    """Start each of these anew at its second, hand it over, then place again."""

    node: str
    moves: tuple[tuple[str, str], ...]
    why: str
    again: float = AGAIN

    @property
    def done(self) -> str:
        return f"moving {len(self.moves)} away from {self.node}"


class Full(msgspec.Struct, frozen=True):
    """No room now; `never`: no node is big enough, waiting is of no use."""

    why: str
    never: bool = False
    again: float = AGAIN
    hint: str = ""
    """What would help."""
    own_slot: bool = False
    """It waits for a slot of its own instances."""
    stuck: bool = False
    """Nothing is about to end and nothing can go: no room will come of itself."""


Choice = Placed | Evict | Move | Full
OwnSlot = Callable[[], SlotWait | None]
"""What waiting for a slot of one's own instances would be; asked only where a start would harm others."""


def no_slot() -> None:
    return None


class Policy(Protocol):
    """How nodes are chosen. `exhaustive`: it wants to see every node, not the promising ones."""

    exhaustive: bool

    def place(self, candidates: Sequence[Candidate], own_slot: OwnSlot = no_slot, /) -> Choice: ...


class Cheapest:
    """The platform's own policy."""

    exhaustive = False

    def place(self, candidates: Sequence[Candidate], own_slot: OwnSlot = no_slot) -> Choice:
        return place(candidates, own_slot=own_slot)


DEFAULT = Costs()


def place(candidates: Iterable[Candidate], costs: Costs = DEFAULT, own_slot: OwnSlot = no_slot) -> Choice:
    nodes = list(candidates)
    if not nodes:
        return Full("no node is up and open for instances")
    # Equal estimates: the emptier node, so load spreads; then the name, so the choice is always the same.
    ranked = sorted(
        [
            (int(1e6 * (total := node.estimate.total) + 0.5), -(node.free_mb or 0), node.name, total, node)
            for node in nodes
        ]
    )
    fitting = [(total, node) for _, _, _, total, node in ranked if node.fits()]
    left = best = fitting[0][0] if fitting else inf
    way: Callable[[str], Evict | Move | Full] | None = None
    """To be put into words if it wins."""
    ways: list[tuple[float, str, str]] = []
    """All that were considered: seconds with harm, what, and the node."""
    harms, busy = False, []
    for _, _, _, total, node in ranked:
        if total >= best:
            break  # at the first that has room at the latest
        if not node.big_enough:
            continue
        freed = node.room_in() if node.will_fit() else inf
        if freed < inf:
            ways.append((total + freed, "waiting for room on", node.name))
            if total + freed < best:
                way, best, harms = partial(_wait, node, freed), total + freed, False
        if total + costs.eviction < best and (found := _cheapest_eviction(node, costs, ending=freed == inf)):
            cost, idle = total + found[0], found[1]
            ways.append((cost, "eviction on", node.name))
            if cost < best:
                way, best, harms = partial(_evict, node, idle), cost, True
        elif freed == inf:
            busy.append((total, node))
    for total, node in busy[:MOVES]:  # last, because this question is the dearest: most need not be asked it any more
        limit = best - total - costs.move
        if limit > 0 and (moves := cheapest_moves(node, costs, limit)):
            seconds = max(node.room_in(moves), max(item.seconds for item in moves))
            cost = total + costs.move * len(moves) + seconds
            ways.append((cost, "moving away from", node.name))
            if cost < best:
                way, best, harms = partial(_move, node, moves), cost, True
    if way is None:
        return _placed([node for _, node in fitting], len(nodes), ways) if fitting else no_room(nodes)
    if fitting:
        ways.append((left, "a start on", fitting[0][1].name))
    choice = way(_lost(ways, 1) if len(ways) > 1 else "")
    if harms and not fitting and (slot := own_slot()) is not None and slot.waited + slot.seconds < best:
        return _wait_for_slot(slot, best, choice)
    if fitting and left - best < choice.again:
        # A place that is there was left for this one; queues shorten by a second per second, so it may be better then.
        choice = msgspec.structs.replace(choice, again=max(LEAST, left - best))
    return choice


class Part(Protocol):
    """What can go from a node, and what that gives back."""

    @property
    def instance(self) -> str: ...
    @property
    def memory_mb(self) -> int: ...
    @property
    def gpus(self) -> int: ...


P = TypeVar("P", bound=Part)


def _cheapest_eviction(node: Candidate, costs: Costs, *, ending: bool) -> tuple[float, tuple[Idle, ...]] | None:
    """As `cheapest_idle`, with its cost, which is no less than the time that the rest of the room takes to come. Where
    that is what it costs, those that are enough without may be cheaper."""
    parts = _longest_first(node)
    idle = _enough_idle(node, parts, costs, ending=ending)
    if not idle:
        return None
    harm, seconds = sum(map(costs.of, idle)), node.room_in(idle)
    if harm < seconds and (others := _enough_idle(node, parts, costs, ending=False)):
        more = sum(map(costs.of, others))
        if more < seconds:
            return more, others
    return max(harm, seconds), idle


def cheapest_idle(node: Candidate, costs: Costs = DEFAULT) -> tuple[Idle, ...]:
    """Whom to stop, the longest idle among equals, if what is ending there is waited for too; empty: that would not be
    enough."""
    return _enough_idle(node, _longest_first(node), costs, ending=True)


def _longest_first(node: Candidate) -> list[Idle]:
    return sorted(node.idle(), key=lambda item: (-item.seconds, item.instance))


def _enough_idle(node: Candidate, parts: Sequence[Idle], costs: Costs, *, ending: bool) -> tuple[Idle, ...]:
    """The cheapest of these that are enough, with what is `ending` or by themselves."""
    if not parts:
        return ()
    coming_mb, coming_gpus = (0, 0) if ending else (node.freeing_mb, node.freeing_gpus)
    return cheapest(parts, node.missing_mb + coming_mb, node.missing_gpus + coming_gpus, costs.of)


def cheapest_moves(node: Candidate, costs: Costs = DEFAULT, limit: float = inf) -> tuple[Movable, ...]:
    """Whom to move away, of those that take less than `limit` seconds; empty: that would not be enough."""
    parts = sorted(node.movable(limit), key=lambda item: item.instance)
    while parts:
        chosen = cheapest(parts, node.missing_mb, node.missing_gpus, lambda item: costs.move + item.seconds)
        left_over = _without_room(chosen) if len(chosen) > 1 else None
        if left_over is None:
            return chosen
        parts.remove(left_over)
    return ()


def _without_room(chosen: Sequence[Movable]) -> Movable | None:
    """The first for which those before it leave no room where it is to go."""
    taken: dict[str, tuple[int, int]] = {}
    for item in chosen:
        before = taken.get(item.place, (0, 0))
        after = taken[item.place] = (before[0] + item.takes[0], before[1] + item.takes[1])
        if after[0] > item.room[0] or after[1] > item.room[1]:
            return item
    return None


def cheapest(parts: Sequence[P], mb: int, gpus: int, cost_of: Callable[[P], float]) -> tuple[P, ...]:
    """The cheapest set that gives back that much, the first among equals, one part rather than several; empty: none
    does. Costs are not below 0.

    Dynamic programming over what is still missing, in which what is more than enough counts as enough. Exact as long
    as no more than STATES are left after those are dropped that another is no worse than in any way.
    """
    order = sorted(parts, key=cost_of)
    alone = 0
    for part in order:
        if part.memory_mb >= mb and part.gpus >= gpus:
            break
        alone += 1
    if alone < min(2, len(order)):
        return (order[alone],)  # two others cost as much at least
    found: tuple[P, ...] = ()
    best = inf
    if alone < len(order):
        found, best = (order[alone],), cost_of(order[alone])
        if best <= cost_of(order[0]) + cost_of(order[1]):
            return found
    states: dict[tuple[int, int], tuple[float, tuple[P, ...]]] = {(max(0, mb), max(0, gpus)): (0.0, ())}
    for part in order:
        more = cost_of(part)
        if more >= best:
            break  # no set with it, or with what comes after it, is cheaper
        for (need_mb, need_gpus), (cost, chosen) in list(states.items()):
            left = (max(0, need_mb - part.memory_mb), max(0, need_gpus - part.gpus))
            if cost + more >= best or left == (need_mb, need_gpus):
                continue
            if left == (0, 0):
                found, best = (*chosen, part), cost + more
            elif left not in states or cost + more < states[left][0]:
                states[left] = (cost + more, (*chosen, part))
        if len(states) > STATES:
            states = _best_states(states)
    return found


def _best_states(
    states: dict[tuple[int, int], tuple[float, tuple[P, ...]]],
) -> dict[tuple[int, int], tuple[float, tuple[P, ...]]]:
    """Without those that another is no worse than in any way; of the rest, the STATES that miss least."""
    least: dict[int, int] = {}
    """By GPUs that are missing, the fewest MiB at any cost so far: they are gone through by cost."""
    kept = []
    for (mb, gpus), (cost, chosen) in sorted(states.items(), key=lambda item: (item[1][0], item[0])):
        if all(mb < known for count, known in least.items() if count <= gpus):
            least[gpus] = mb
            kept.append(((mb, gpus), (cost, chosen)))
    kept.sort(key=lambda item: (item[0][1], item[0][0], item[1][0]))
    return dict(kept[:STATES])


def no_room(nodes: Sequence[Candidate]) -> Full:
    """Why none of these takes it, as things are."""
    if not any(node.big_enough for node in nodes):
        biggest = max(nodes, key=lambda node: (node.total_gpus, node.total_mb, node.name))
        if biggest.need_gpus > biggest.total_gpus:
            most = f"the most, on {biggest.name}, are {biggest.total_gpus}" if biggest.total_gpus else "no node has one"
            hint = "Add a node with GPUs, or deploy without `gpu` to compute on the CPU."
            return Full(f"it needs {_gpus(biggest.need_gpus)}; {most}", never=True, hint=hint)
        biggest = max(nodes, key=lambda node: (node.total_mb, node.name))
        what = f"it needs {biggest.need_mb} MiB; the biggest node, {biggest.name}, has {biggest.total_mb} MiB"
        return Full(what, never=True, hint="Lower memory_mb, or add a bigger node.")
    return Full(
        f"none of {len(nodes)} nodes has {min(node.need_mb for node in nodes)} MiB"
        + (f" and {_gpus(nodes[0].need_gpus)}" if nodes[0].need_gpus else "")
        + " free, and nothing there is idle",
        stuck=True,
    )


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count > 1)}"


def _lost(ways: Sequence[tuple[float, str, str]], won: int = 0) -> str:
    """The ways that lost, in words; the first `won`, of equals the first considered, did not."""
    if len(ways) <= won:
        return ""
    found = [
        f"{what} {node} {seconds:.2f} s" for seconds, what, node in sorted(ways, key=itemgetter(0))[won : won + LOST]
    ]
    return "; not " + ", ".join(found)


def _placed(fitting: Sequence[Candidate], total: int, ways: Sequence[tuple[float, str, str]]) -> Placed:
    others = tuple((node.name, node.estimate.total) for node in fitting[1:SHOWN])
    more = max(0, len(fitting) - SHOWN)
    return Placed(fitting[0].name, fitting[0].estimate, others, more, total - len(fitting), tuple(ways))


def _wait(node: Candidate, freed: float, lost: str) -> Full:
    why = f"waits for room that is being freed on {node.name}, in about {freed:.2f} s{lost}"
    return Full(why, again=max(LEAST, freed))


def _wait_for_slot(slot: SlotWait, best: float, other: Choice) -> Full:
    why = f"waits for a slot, {slot}; otherwise in {best:.2f} s, {other.why}"
    return Full(why, again=max(LEAST, slot.seconds), own_slot=True)


def _evict(node: Candidate, idle: Sequence[Idle], lost: str) -> Evict | Full:
    chosen = tuple(item.instance for item in sorted(idle, key=lambda item: (-item.seconds, item.instance)))
    rest = max(item.rests for item in idle)
    if rest > 0:
        why = f"waits until instances on {node.name} have served for a while and may go{lost}"
        return Full(why, again=rest)
    room = f"{node.need_mb} MiB" + (f" and {_gpus(node.need_gpus)}" if node.need_gpus else "")
    claimed = any(item.claimed for item in idle)
    which = "of an app above its share" if claimed else "idle"
    why = f"{node.name}: stops {len(chosen)} {which} to free {room}, then {node.estimate.total:.2f} s{lost}"
    return Evict(node.name, chosen, why)


def _move(node: Candidate, moves: Sequence[Movable], lost: str) -> Move:
    text = ", ".join(f"{item.instance} to {item.to} in {item.seconds:.2f} s" for item in moves)
    return Move(
        node.name,
        tuple((item.instance, item.to) for item in moves),
        f"{node.name}: moves {text}, then {node.estimate}{lost}",
    )
