"""What placement is shown for a target: the nodes worth considering, each with its estimate. Reads, decides nothing.

A cluster of up to ALL nodes is shown whole. In a larger one the nodes come from indexes, a few of each kind, those
that start soonest first: where the checkpoint is attached or resident, where the version's template exists, where
the checkpoint is on disk, and anywhere; with room, and with room if idle instances go. So a decision costs the same
at a hundred nodes and at ten thousand.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

from sllm_faas.controller import estimate
from sllm_faas.controller.index import UNLIMITED, NodeIndex, Row
from sllm_faas.controller.ledger import Ledger
from sllm_faas.controller.model import Instance, Node
from sllm_faas.controller.placement import Candidate, Idle, Movable, nothing
from sllm_faas.spec import FunctionSpec, Target, Tier, Warmth

ALL = 8
EACH = 3
"""Nodes of one kind that are looked at closely."""
RESIDENCY = 5.0
"""Seconds an instance serves where it is before it may be moved again: no node's memory is swapped to and fro."""
FEW = 48
"""A set of at most so many nodes is gone through; a larger one is met by walking the index."""


class Candidates:
    def __init__(self, ledger: Ledger, *, migrate: bool = False, exhaustive: bool = False) -> None:
        """`migrate`: offer to move busy instances; `exhaustive`: always show all nodes."""
        self.ledger = ledger
        self.state = ledger.state
        self.migrate = migrate
        self.exhaustive = exhaustive
        self._free = NodeIndex()
        self._reclaimable = NodeIndex()
        """Rows with what would be free if all idle instances went."""

    def of(self, target: Target, spec: FunctionSpec) -> list[Candidate]:
        """The nodes worth considering for one more instance."""
        nodes = self.state.nodes
        if self._whole:
            return [self.one(node, target, spec) for node in self.ledger.open_nodes()]
        self._refresh()
        return [self.one(nodes[name], target, spec) for name in self._shortlist(target, spec)]

    def one(self, node: Node, target: Target, spec: FunctionSpec, movable: bool = True) -> Candidate:
        """The node as it is for the target."""
        ledger, info = self.ledger, node.info
        digest = spec.checkpoint.digest if spec.checkpoint else ""
        attached = bool(digest) and ledger.shares(node.name, digest) > 0
        guess = estimate.estimate(
            self.state.book,
            info.bandwidth,
            node.name,
            f"{target.app}/{target.function}",
            self._warmth(node, target, spec),
            self._tier(node, digest, attached),
            self.state.sizes.get(digest, 0),
            max(0.0, self.busy_until(node.name) - ledger.now),
        )
        freeing_mb, freeing_gpus = self._freeing(node)
        return Candidate(
            name=node.name,
            need_mb=spec.memory_mb + (0 if attached else ledger.size_mb(digest)),
            free_mb=info.memory_mb - ledger.used_mb(node.name) if info.memory_mb else None,
            total_mb=info.memory_mb,
            freeing_mb=freeing_mb,
            estimate=guess,
            idle=lambda: self._idle(node, target),
            need_gpus=spec.gpus,
            free_gpus=info.gpus - ledger.used_gpus(node.name),
            total_gpus=info.gpus,
            freeing_gpus=freeing_gpus,
            movable=(lambda: self._movable(node, target)) if self.migrate and movable else nothing,
        )

    def busy_until(self, node: str) -> float:
        """When the loads promised to the node are read, one after another."""
        return max((i.asked + i.queued + i.load for i in self.ledger.loading_on(node) if i.load), default=0.0)

    # -- one node --------------------------------------------------------------------------------------------

    def _tier(self, node: Node, digest: str, attached: bool) -> Tier:
        if attached or (digest and node.stats is not None and digest in node.stats.resident):
            return "dram"
        return "disk" if not digest or node.name in self.ledger.where.holders(digest) else "remote"

    def _warmth(self, node: Node, target: Target, spec: FunctionSpec) -> Warmth:
        if node.name in self.ledger.where.templates(f"{target.app}/{target.function}@{target.version}"):
            return "template"
        libs = libs_of(spec)
        return "libs" if not libs or libs in node.libs else "base"

    def _freeing(self, node: Node) -> tuple[int, int]:
        ending = self.ledger.ending_on(node.name)
        if not ending:
            return 0, 0
        return self.ledger.gives_back(ending), sum(instance.gpus for instance in ending)

    def _idle(self, node: Node, target: Target) -> list[Idle]:
        """Ready instances on the node beyond what their own target wants at this moment."""
        found = []
        for instance in self.ledger.spare_on(node.name):
            if instance.state == "ready" and instance.target != target and not self.ledger.replacement(instance.id):
                memory = self.ledger.gives_back([instance])
                cost = instance.predicted if instance.actual is None else instance.actual
                found.append(Idle(instance.id, memory, instance.ready or 0.0, instance.gpus, cost))
        return found

    def _movable(self, node: Node, target: Target) -> list[Movable]:
        """Ready instances on the node, those with the least context first, each with the best node with room for it."""
        ready = [
            instance
            for instance in self.ledger.on_node(node.name)
            if instance.state == "ready"
            and instance.target != target
            and instance.ready is not None
            and self.ledger.now - instance.ready >= RESIDENCY
            and not self.ledger.replacement(instance.id)
        ]
        ready.sort(key=lambda instance: (instance.tokens, instance.seq))
        found = []
        for instance in ready if self._whole else ready[:EACH]:
            spec = self.ledger.function(instance.target)
            if spec is None:
                continue
            there = [
                (other.estimate.total, other.name)
                for other in self._destinations(node, instance, spec)
                if other.name != node.name and other.fits()
            ]
            start, to = min(there, default=(float("inf"), ""))
            seconds = start + estimate.migration(self.state.book, instance.tokens)
            memory = self.ledger.gives_back([instance])
            found.append(Movable(instance.id, memory, instance.gpus, to, seconds))
        return found

    def _destinations(self, node: Node, instance: Instance, spec: FunctionSpec) -> Iterator[Candidate]:
        nodes = self.state.nodes
        if self._whole:
            names: Iterable[str] = [open_.name for open_ in self.ledger.open_nodes()]
        else:
            names = self._roomy(node.name, instance, spec)
        return (self.one(nodes[name], instance.target, spec, movable=False) for name in names)

    @property
    def _whole(self) -> bool:
        """Whether all nodes are shown."""
        return self.exhaustive or len(self.state.nodes) <= ALL

    # -- many nodes ------------------------------------------------------------------------------------------

    def _shortlist(self, target: Target, spec: FunctionSpec, each: int = EACH) -> list[str]:
        ledger = self.ledger
        digest = spec.checkpoint.digest if spec.checkpoint else ""
        alone = spec.memory_mb
        whole = alone + ledger.size_mb(digest)
        found: dict[str, None] = {}
        if digest:
            self._some(found, ledger.attached(digest), spec.gpus, alone, each)
            self._some(found, ledger.where.resident(digest), spec.gpus, whole, each)
        self._some(
            found, ledger.where.templates(f"{target.app}/{target.function}@{target.version}"), spec.gpus, whole, each
        )
        if digest:
            self._some(found, ledger.where.holders(digest), spec.gpus, whole, each)
        for index in (self._free, self._reclaimable):
            found.update(dict.fromkeys(islice(index.walk(spec.gpus, whole), 1)))
        if not found:
            # Nothing has room: the biggest nodes can still say whether waiting is of use.
            rows = self._free.rows
            big = heapq.nsmallest(EACH, rows, key=lambda name: (-self.state.nodes[name].info.memory_mb, name))
            found.update(dict.fromkeys(big))
            if spec.gpus:
                most = heapq.nsmallest(EACH, rows, key=lambda name: (-self.state.nodes[name].info.gpus, name))
                found.update(dict.fromkeys(most))
        return list(found)

    def _roomy(self, but: str, instance: Instance, spec: FunctionSpec) -> list[str]:
        """Another node where the checkpoint is nearest, and one of all, with room now."""
        need = spec.memory_mb + self.ledger.size_mb(instance.digest)
        where, free = self.ledger.where, self._free
        for names in (where.resident(instance.digest), where.holders(instance.digest)):
            if len(names) <= FEW:
                near = min((n for n in names if n != but and free.fits(n, spec.gpus, need)), default="")
            else:
                near = next((n for n in free.walk(spec.gpus, need, names) if n != but), "")
            if near:
                return [near]
        return list(islice((n for n in free.walk(spec.gpus, need) if n != but), 1))

    def _some(self, found: dict[str, None], names: Collection[str], gpus: int, mb: int, each: int) -> None:
        """A few of these: with room, then with room if the idle go, then — should some move away — without."""
        if not names:
            return
        if len(names) > FEW:
            for index in (self._free, self._reclaimable):
                found.update(dict.fromkeys(islice(index.walk(gpus, mb, names), each)))
            return
        ranked: list[tuple[int, float, str]] = []
        rows = self._free.rows
        for name in names:
            row = rows.get(name)
            if row is None:
                continue
            room = 0 if row.gpus >= gpus and row.mb >= mb else 1 if self._reclaimable.fits(name, gpus, mb) else 2
            if room < 2 or self.migrate:
                ranked.append((room, row.busy_until, name))
        if len(ranked) > each:
            ranked = heapq.nsmallest(each, ranked)
        found.update(dict.fromkeys(name for _, _, name in ranked))

    def keep_up(self) -> None:
        """Called after every event, so that each pays for what it changed."""
        if not self._whole:
            self._refresh()

    def _refresh(self) -> None:
        """Take in what changed since the last look."""
        ledger = self.ledger
        for name in ledger.where.take_stale():
            node = self.state.nodes.get(name)
            if node is None or node.state != "up" or node.cordoned:
                self._free.drop(name)
                self._reclaimable.drop(name)
                continue
            info = node.info
            speed = estimate.bandwidth(self.state.book, info.bandwidth, name, "disk")
            until = self.busy_until(name)
            gpus = info.gpus - ledger.used_gpus(name)
            mb = info.memory_mb - ledger.used_mb(name) if info.memory_mb else UNLIMITED
            self._free.put(name, Row(speed, gpus, max(0, mb), until))
            spare = [i for i in ledger.spare_on(name) if i.state == "ready"] + ledger.ending_on(name)
            if spare:
                mb += ledger.gives_back(spare) if info.memory_mb else 0
                gpus += sum(instance.gpus for instance in spare)
                self._reclaimable.put(name, Row(speed, gpus, max(0, mb), until))
            else:
                self._reclaimable.drop(name)


def libs_of(spec: FunctionSpec) -> str:
    return ",".join(sorted(spec.libs)) or ("llm" if spec.kind == "llm" else "")
