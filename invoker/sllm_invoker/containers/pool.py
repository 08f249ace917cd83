"""Which zygotes exist and which to keep: the pool of warmth layers (`sllm_faas.layers`). Pure.

Base is kept as long as the invoker lives. Every layer above has a keep-alive of its own (`keepalive`), restarted by
each start that goes through it. All of them together have a memory budget, and within it each kind of layer (libs,
template) may have one of its own: over either, the least valuable goes. Ending a zygote disturbs nothing that was
forked from it.

RainbowCake caches layers one by one because what each saves is for all that share it to sum up. Room is weighed the
same way here: a share set aside for one kind would end a layer that is worth more beside room that nothing better
fills, and where layers are large (libs, a quarter of a GiB) it may hold none of its kind at all. So a kind that is
given no budget may take all there is, and the whole is decided by worth alone; a budget of its own is for whoever
knows better which kind is to be bounded.

A layer is made only where it will be kept, as far as that can be told: from what it took and held before (`wanted`).
A start goes without those that would be ended again at the next look, and does by itself what they would have done
for it; the exception are starts that come together, which share one making. One that died is made again off the
critical path when it would still be kept (`missing`), after a back-off that grows while it keeps dying; one that could
not be prepared is not kept at all: its error goes to whoever asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sllm_faas.layers import BASE, Layer
from sllm_faas.spec import Warmth
from sllm_invoker.containers.keepalive import BreakEven, Cost, KeepAlive, Usage, value

REMEMBERED = 4096
"""Layers whose use and cost are remembered after they are gone."""
TOGETHER = 1.0
"""Seconds within which starts share a layer though it is not to be kept: it lives until the next look (`surplus`)."""
ORDER: tuple[Warmth, ...] = ("base", "libs", "template")
"""Kinds of layers, parents first."""
UNSEEN = Cost(1e6, 1.0)
"""What a layer counts for that was never made: worth making wherever there is room at all, to see what it is."""


_Held = tuple[Layer, Cost]


@dataclass(slots=True)
class _Deaths:
    count: int = 0
    until: float = 0.0


@dataclass(frozen=True, slots=True)
class Short:
    """A budget that cannot hold a layer: of its `kind`, or of all layers (""), which would have to be `needed_mb`."""

    kind: Warmth | Literal[""]
    needed_mb: float


@dataclass(slots=True)
class Pool:
    """`wanted` says which layers of a path a start is to go through; `admit/leave` a zygote, `use` it; `surplus(now)`
    names those to end, about once a second, `missing(now)` those to make again."""

    keep: KeepAlive = field(default_factory=BreakEven)
    budget_mb: float = float("inf")
    """MiB for all layers above base; 0: there are none."""
    budgets: Mapping[Warmth, float] = field(default_factory=dict)
    """MiB for all layers of a kind, within `budget_mb`; a kind that is not named may take all of that."""
    first_backoff: float = 0.5
    max_backoff: float = 30.0
    _layers: dict[str, _Held] = field(default_factory=dict)
    _usage: OrderedDict[str, Usage] = field(default_factory=OrderedDict)
    _known: OrderedDict[str, _Held] = field(default_factory=OrderedDict)
    """What each was when it was last there."""
    _deaths: dict[str, _Deaths] = field(default_factory=dict)
    _lost: dict[str, _Held] = field(default_factory=dict)
    """Those that died and were not made again yet."""

    def __contains__(self, key: str) -> bool:
        return key in self._layers

    def knows(self, key: str) -> bool:
        """It exists, or is to be made again."""
        return key in self._layers or key in self._lost

    def wanted(self, path: Sequence[Layer], now: float, making: Container[str] = ()) -> Sequence[Layer]:
        """`path`, as far as a start is to go through it: up to the last layer that exists, is under way (`making`), or
        is worth making, because it will be kept or others came for it just now. Base always is."""
        used, held = {}, dict(self._layers)
        for layer in path:
            usage = self._usage.get(layer.key)
            used[layer.key] = usage.noted(now) if usage is not None else Usage(now)
            held.setdefault(layer.key, self._known.get(layer.key, (layer, UNSEEN)))
        doomed = self._doomed(held, used, now)
        for number in reversed(range(1, len(path))):
            layer = path[number]
            there = layer.key in self._layers or layer.key in making
            if there or layer.key not in doomed or self._together(layer, now):
                return path[: number + 1]
        return path[:1]

    def _together(self, layer: Layer, now: float) -> bool:
        """Somebody else came for it just now, and it may exist at all."""
        usage = self._usage.get(layer.key)
        allowed = min(self.budget_mb, self._budget(layer.warmth)) > 0
        return allowed and usage is not None and now - usage.last < TOGETHER

    def layers(self) -> tuple[str, ...]:
        """Keys of those that exist."""
        return tuple(sorted(self._layers))

    def memory_mb(self) -> float:
        """Held by all layers above base."""
        return sum(cost.memory_mb for layer, cost in self._layers.values() if layer.key != BASE)

    def warmest(self, layers: Sequence[Layer]) -> Layer | None:
        """The warmest of `layers` that exists now."""
        return next((layer for layer in reversed(layers) if layer.key in self._layers), None)

    def admit(self, layer: Layer, cost: Cost, now: float) -> None:
        """It exists. Its keep-alive begins now; being made is not a use."""
        self._layers[layer.key] = self._known[layer.key] = (layer, cost)
        self._known.move_to_end(layer.key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        self._lost.pop(layer.key, None)
        self._recall(layer.key, now).last = now

    def weigh(self, key: str, memory_mb: float) -> None:
        """It holds so many MiB, as far as it exists."""
        if key in self._layers:
            layer, cost = self._layers[key]
            self._layers[key] = self._known[key] = (layer, Cost(cost.seconds, memory_mb))

    def use(self, layers: Sequence[Layer], now: float) -> None:
        """An instance goes through `layers`, those included that it does without: each restarts its keep-alive."""
        for layer in layers:
            known = layer.key in self._usage
            usage = self._recall(layer.key, now)
            if known:
                usage.note(now)

    def _recall(self, key: str, now: float) -> Usage:
        """Its record, from now on if there was none. Of those that do not exist, the ones not asked for the longest are
        forgotten."""
        usage = self._usage.setdefault(key, Usage(now))
        self._usage.move_to_end(key)
        while len(self._usage) > REMEMBERED + len(self._layers) + len(self._lost):
            oldest = next(iter(self._usage))
            if self.knows(oldest):
                self._usage.move_to_end(oldest)
            else:
                del self._usage[oldest]
        return usage

    def served(self, key: str) -> None:
        """A fork from it succeeded: it is healthy."""
        self._deaths.pop(key, None)

    def leave(self, key: str) -> None:
        """It was ended on purpose."""
        self._layers.pop(key, None)
        self._lost.pop(key, None)

    def died(self, key: str, now: float) -> float:
        """It died by itself; the seconds to wait before it is made again."""
        known = self._layers.pop(key, None)
        if known is not None:
            self._lost[key] = known
        deaths = self._deaths.setdefault(key, _Deaths())
        wait = min(self.max_backoff, self.first_backoff * 2.0**deaths.count) if deaths.count else 0.0
        deaths.count += 1
        deaths.until = now + wait
        return wait

    def wait(self, key: str, now: float) -> float:
        """Seconds of back-off left before `key` may be made."""
        deaths = self._deaths.get(key)
        return max(0.0, deaths.until - now) if deaths else 0.0

    def surplus(self, now: float) -> list[str]:
        """Keys of the zygotes that are not worth their memory any more, the least valuable first."""
        return self._doomed(self._layers, {}, now)

    def short(self, key: str) -> Short | None:
        """The budget that could not hold the layer, which exists, beside those it is made from, with nothing else."""
        layer, cost = self._layers[key]
        needed = cost.memory_mb
        if needed > self._budget(layer.warmth):
            return Short(layer.warmth, needed)
        while layer.parent != BASE and layer.parent in self._known:
            layer, cost = self._known[layer.parent]
            needed += cost.memory_mb
        return Short("", needed) if needed > self.budget_mb else None

    def missing(self, now: float) -> list[Layer]:
        """Those that died, would still be kept, and may be made again now; parents first."""
        for key in self._doomed({**self._layers, **self._lost}, {}, now):
            self._lost.pop(key, None)
        ripe = [layer for layer, _ in self._lost.values() if not self.wait(layer.key, now)]
        return sorted(ripe, key=lambda layer: (ORDER.index(layer.warmth), layer.key))

    def _budget(self, kind: Warmth) -> float:
        return self.budgets.get(kind, float("inf"))

    def _doomed(self, held: Mapping[str, _Held], used: Mapping[str, Usage], now: float) -> list[str]:
        """Keys of those of `held` to end, the least valuable first: whose keep-alive is over, then who is over the
        budget of a kind, and of what is left who is over the whole. So nothing goes for room that others leave. What
        was forked from a layer holds its pages too: it goes before it or with it, or there would be no room.
        `used`: records that count instead of those there are."""
        usage = {key: used.get(key) or self._usage[key] for key in held if key != BASE}
        above = [(layer, cost) for layer, cost in held.values() if layer.key != BASE]
        worth = {layer.key: value(cost, usage[layer.key], now) for layer, cost in above}
        for layer, _ in above:
            if layer.parent in worth:
                worth[layer.parent] = max(worth[layer.parent], worth[layer.key])
        above.sort(key=lambda item: (worth[item[0].key], -ORDER.index(item[0].warmth), item[0].key))

        def expired(layer: Layer, cost: Cost) -> bool:
            return now - usage[layer.key].last >= self.keep.seconds(cost, usage[layer.key])

        left = [each for each in above if not expired(*each)]
        for kind, room in self.budgets.items():
            of_kind = [each for each in left if each[0].warmth == kind]
            over = {layer.key for layer, _ in of_kind[: len(of_kind) - len(_fitting(of_kind, room))]}
            left = [each for each in left if each[0].key not in over and each[0].parent not in over]
        kept = {layer.key for layer, _ in _fitting(left, self.budget_mb)}
        return [layer.key for layer, _ in above if layer.key not in kept]


def _fitting(held: Sequence[_Held], room: float) -> Sequence[_Held]:
    """What is left of `held` when the first go until the rest takes at most `room` MiB."""
    total = sum(cost.memory_mb for _, cost in held)
    for number, (_, cost) in enumerate(held):
        if total <= room:
            return held[number:]
        total -= cost.memory_mb
    return ()
