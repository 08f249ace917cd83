"""Slots this gateway may use, per instance: leases granted by invokers, and what is in flight on them. Pure.

    grant(node, number, …)   absolute: limit, state         reserve(target) ──► slot in flight
    drop_node(node)          all its instances vanish        release(slot)   ◄── terminal frame only

`reserve` takes the instance used last among those with a free slot. Work is thereby packed onto few instances with
warm caches, and the others go idle and can be scaled down; the controller, not this choice, adds instances when
slots run short. Both verbs are O(1).

Invariants (`validate`): an instance is in its target's free list if and only if it is ready and in_flight < limit;
in_flight above limit happens only after a recall, and nothing is reserved until it is below again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sllm_faas.errors import IllegalTransition
from sllm_faas.spec import Target, Timeline
from sllm_faas.wire.messages import Grant, InstanceState

Key = tuple[str, int]
"""(node, number of the instance on it)."""


@dataclass(slots=True, eq=False)
class Instance:
    """One instance as this gateway sees it. `in_flight`: this gateway's own invocations on it."""

    node: str
    number: int
    instance: str
    target: Target
    limit: int = 0
    concurrency: int = 1
    in_flight: int = 0
    state: InstanceState = "starting"
    seq: int = 0
    """The last grant taken in."""
    wanted: int = 0
    """What the last WANT asked for."""
    timeline: Timeline = field(default_factory=Timeline)
    why: str = ""

    @property
    def free(self) -> bool:
        return self.state == "ready" and self.in_flight < self.limit

    def want(self, waiting: int) -> int:
        """Slots beyond the grant that `waiting` invocations could use here."""
        return min(waiting, max(0, self.concurrency - self.limit)) if self.state == "ready" else 0


class SlotTable:
    def __init__(self) -> None:
        self._instances: dict[Key, Instance] = {}
        self._by_target: dict[Target, dict[Key, Instance]] = {}
        self._free: dict[Target, dict[Key, Instance]] = {}

    def __len__(self) -> int:
        return len(self._instances)

    def __iter__(self) -> Iterator[Instance]:
        return iter(list(self._instances.values()))

    def get(self, node: str, number: int) -> Instance | None:
        return self._instances.get((node, number))

    def of(self, target: Target) -> list[Instance]:
        return list(self._by_target.get(target, {}).values())

    def has_ready(self, target: Target) -> bool:
        return any(instance.state == "ready" for instance in self._by_target.get(target, {}).values())

    def has_free(self, target: Target) -> bool:
        return bool(self._free.get(target))

    def in_flight(self) -> int:
        return sum(instance.in_flight for instance in self._instances.values())

    def grant(self, node: str, number: int, seq: int, grant: Grant) -> Instance:
        """Take in a grant; an ended instance is forgotten once nothing is in flight on it."""
        key = (node, number)
        instance = self._instances.get(key)
        if instance is not None and instance.instance != grant.instance:
            raise IllegalTransition(
                f"grant for {grant.instance} at {node} number {number}, which is {instance.instance}"
            )
        if instance is None:
            instance = Instance(node, number, grant.instance, grant.target)
            self._instances[key] = instance
            self._by_target.setdefault(grant.target, {})[key] = instance
        instance.limit = grant.limit
        instance.concurrency = grant.concurrency
        instance.state = grant.state
        instance.seq = seq
        if grant.timeline is not None:
            instance.timeline = grant.timeline
        instance.why = grant.why or instance.why
        self._settle(instance)
        return instance

    def reserve(self, target: Target) -> Instance | None:
        """A free slot of `target`, now in flight; None when there is none."""
        free = self._free.get(target)
        if not free:
            return None
        instance = free[next(reversed(free))]
        instance.in_flight += 1
        if instance.in_flight >= instance.limit:
            self._unfree(instance)
        return instance

    def release(self, instance: Instance) -> None:
        """The slot is free again. Nothing happens when the instance's node was dropped meanwhile."""
        if self._instances.get((instance.node, instance.number)) is not instance:
            return
        if instance.in_flight < 1:
            raise IllegalTransition(f"release of {instance.instance}, which has nothing in flight")
        instance.in_flight -= 1
        self._settle(instance)

    def suspend(self, instance: Instance) -> None:
        """Offer nothing more on it until the next grant, or `resume`."""
        instance.limit = 0
        self._settle(instance)

    def resume(self, instance: Instance, limit: int) -> bool:
        """Undo `suspend`. False when the instance is gone."""
        if self._instances.get((instance.node, instance.number)) is not instance:
            return False
        instance.limit = limit
        self._settle(instance)
        return True

    def drop_node(self, node: str) -> list[Instance]:
        """Forget the instances of a lost node, with what is in flight there."""
        lost = [instance for instance in self._instances.values() if instance.node == node]
        for instance in lost:
            self._forget(instance)
        return lost

    def _settle(self, instance: Instance) -> None:
        if instance.free:
            free = self._free.setdefault(instance.target, {})
            key = (instance.node, instance.number)
            free.pop(key, None)
            free[key] = instance  # last in, first taken
        else:
            self._unfree(instance)
            if instance.state in ("stopped", "failed") and not instance.in_flight:
                self._forget(instance)

    def _unfree(self, instance: Instance) -> None:
        free = self._free.get(instance.target)
        if free is not None:
            free.pop((instance.node, instance.number), None)
            if not free:
                del self._free[instance.target]

    def _forget(self, instance: Instance) -> None:
        self._unfree(instance)
        key = (instance.node, instance.number)
        del self._instances[key]
        mine = self._by_target[instance.target]
        del mine[key]
        if not mine:
            del self._by_target[instance.target]

    def validate(self) -> None:
        for key, instance in self._instances.items():
            assert key == (instance.node, instance.number)
            assert instance.in_flight >= 0, f"{instance} has negative in_flight"
            assert key in self._by_target[instance.target], f"{instance} is not listed under its target"
            assert (key in self._free.get(instance.target, {})) == instance.free, f"{instance} is wrongly (un)free"
        listed = sum(len(mine) for mine in self._by_target.values())
        assert listed == len(self._instances), "an instance is listed twice"
        assert all(self._free.values()), "an empty free list is kept"
