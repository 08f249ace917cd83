"""Which zygotes exist and which to keep: the pool of warmth layers (`sllm_faas.layers`). Pure.

Base is kept as long as the invoker lives. Every layer above has a keep-alive of its own (`keepalive`), restarted by
each start that goes through it, and all of them together a memory budget: over it, the least valuable goes. Ending a
zygote disturbs nothing that was forked from it. One that died is made again off the critical path when it would still
be kept (`missing`), after a back-off that grows while it keeps dying; one that could not be prepared is not kept at
all: its error goes to whoever asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from sllm_faas.layers import BASE, Layer
from sllm_invoker.containers.keepalive import BreakEven, Cost, KeepAlive, Usage, value

REMEMBERED = 4096
"""Layers whose use is remembered after they are gone."""


@dataclass(slots=True)
class _Deaths:
    count: int = 0
    until: float = 0.0


@dataclass(slots=True)
class Pool:
    """`admit/leave` a zygote, `use` it, `surplus(now)` names those to end, `missing(now)` those to make again."""

    keep: KeepAlive = field(default_factory=BreakEven)
    budget_mb: float = float("inf")
    """MiB for all layers above base; 0: there are none."""
    first_backoff: float = 0.5
    max_backoff: float = 30.0
    _layers: dict[str, tuple[Layer, Cost]] = field(default_factory=dict)
    _usage: OrderedDict[str, Usage] = field(default_factory=OrderedDict)
    _deaths: dict[str, _Deaths] = field(default_factory=dict)
    _lost: dict[str, tuple[Layer, Cost]] = field(default_factory=dict)
    """Those that died and were not made again yet."""

    def __contains__(self, key: str) -> bool:
        return key in self._layers

    def knows(self, key: str) -> bool:
        """It exists, or is to be made again."""
        return key in self._layers or key in self._lost

    def within(self, path: Sequence[Layer]) -> Sequence[Layer]:
        """`path`, as far as this pool keeps layers at all."""
        return path if self.budget_mb > 0 else path[:1]

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
        self._layers[layer.key] = (layer, cost)
        self._lost.pop(layer.key, None)
        self._usage.setdefault(layer.key, Usage(now)).last = now
        while len(self._usage) > REMEMBERED:
            self._usage.popitem(last=False)

    def weigh(self, key: str, memory_mb: float) -> None:
        """It holds so many MiB, as far as it exists."""
        if key in self._layers:
            layer, cost = self._layers[key]
            self._layers[key] = (layer, Cost(cost.seconds, memory_mb))

    def use(self, layers: Sequence[Layer], now: float) -> None:
        """An instance goes through `layers`: each restarts its keep-alive."""
        for layer in layers:
            usage = self._usage.get(layer.key)
            if usage is None:
                self._usage[layer.key] = Usage(now)
            else:
                usage.note(now)
                self._usage.move_to_end(layer.key)

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
        above = [(layer, cost) for layer, cost in self._layers.values() if layer.key != BASE]
        above.sort(key=lambda item: (value(item[1], self._usage[item[0].key], now), item[0].key))
        total = sum(cost.memory_mb for _, cost in above)
        doomed = []
        for layer, cost in above:
            if total > self.budget_mb or self._expired(layer, cost, now):
                doomed.append(layer.key)
                total -= cost.memory_mb
        return doomed

    def missing(self, now: float) -> list[Layer]:
        """Those that died, would still be kept, and may be made again now; parents first."""
        order = ("base", "libs", "template")
        for key in [key for key, (layer, cost) in self._lost.items() if self._expired(layer, cost, now)]:
            del self._lost[key]
        ripe = [layer for layer, _ in self._lost.values() if not self.wait(layer.key, now)]
        return sorted(ripe, key=lambda layer: (order.index(layer.warmth), layer.key))

    def _expired(self, layer: Layer, cost: Cost, now: float) -> bool:
        if layer.key == BASE:
            return False
        usage = self._usage.setdefault(layer.key, Usage(now))
        return now - usage.last >= self.keep.seconds(cost, usage)
