"""What placement is shown for a target: the nodes worth considering, each with its estimate. Reads, decides nothing.

A cluster of up to ALL nodes is shown whole. In a larger one the nodes come from indexes, a few of each kind, those
that start soonest first: where the checkpoint is attached or resident, where the version's template exists, where
the checkpoint is on disk, and anywhere; with room, and with room if idle instances go. So a decision costs the same
at a hundred nodes and at ten thousand.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from itertools import islice
from typing import NamedTuple

from sllm_faas.controller import estimate, move_times
from sllm_faas.controller.index import UNLIMITED, NodeIndex, Row
from sllm_faas.controller.ledger import Ledger
from sllm_faas.controller.migration import can_move
from sllm_faas.controller.model import Instance, Node, key_of
from sllm_faas.controller.placement import Candidate, Idle, Movable, nothing
from sllm_faas.layers import Layer, path
from sllm_faas.spec import FunctionSpec, Target, Tier

ALL = 8
EACH = 3
"""Nodes of one kind that are looked at closely."""
RESIDENCY = 5.0
"""Seconds an instance serves where it is before it may be moved again: no node's memory is swapped to and fro."""
SERVES = 1.0
"""An instance serves so many times as long as its start took before it may be evicted for another."""
FEW = 48
"""A set of at most so many nodes is gone through; a larger one is met by walking the index."""


class Need(NamedTuple):
    """What one more instance of a target needs, and who has what of it: looked up once for all nodes.

    `alone_mb`: where an instance has the checkpoint attached already; `whole_mb`: elsewhere. `layers` from the base to
    the warmest; `layered`: nodes that have each.
    """

    target: Target
    known: estimate.Known
    digest: str
    bytes: int
    alone_mb: int
    whole_mb: int
    gpus: int
    attached: Collection[str]
    resident: Collection[str]
    holders: Collection[str]
    layers: tuple[Layer, ...]
    layered: tuple[Collection[str], ...]


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

    def of(self, target: Target, spec: FunctionSpec, *, movable: bool = True) -> list[Candidate]:
        """The nodes worth considering for one more instance; with `movable`, also what could move away there."""
        self._refresh()
        need = self._need(target, spec)
        if self._whole:
            return [self._one(node, need, movable=movable) for node in self.ledger.open_nodes()]
        nodes = self.state.nodes
        return [self._one(nodes[name], need, movable=movable) for name in self._shortlist(need)]

    def one(self, node: Node, target: Target, spec: FunctionSpec) -> Candidate:
        """The node as it is for the target."""
        self._refresh()
        return self._one(node, self._need(target, spec))

    def guess(self, node: Node, target: Target, spec: FunctionSpec, but: str = "") -> estimate.Estimate:
        """How long one more instance would take to start there; `but`: the one it is, if it has been commanded."""
        return self._guess(node, self._need(target, spec), but)

    def start(self, node: Node, instance: Instance) -> estimate.Start | None:
        """What was known of the instance's start; None: its function is gone."""
        spec = self.ledger.function(instance.target)
        if spec is None:
            return None
        need = self._need(instance.target, spec)
        warmest = need.layers[self._warmest(node.name, need)]
        return estimate.Start(
            node.name, need.known.function, need.known.libs, warmest.warmth, instance.tier, instance.size, need.digest,
            path(spec, instance.digest),
        )  # fmt: skip

    def _need(self, target: Target, spec: FunctionSpec) -> Need:
        ledger, where, book = self.ledger, self.ledger.where, self.state.book
        digest = spec.checkpoint.digest if spec.checkpoint else ""
        layers = path(spec, digest)
        return Need(
            target=target,
            known=estimate.known(book, f"{target.app}/{target.function}", libs_of(layers)),
            digest=digest,
            bytes=self.state.sizes.get(digest, 0),
            alone_mb=spec.memory_mb,
            whole_mb=spec.memory_mb + ledger.size_mb(digest),
            gpus=spec.gpus,
            attached=ledger.attached(digest),
            resident=where.resident(digest),
            holders=where.holders(digest),
            layers=layers,
            layered=tuple(where.layered(layer.key) for layer in layers),
        )

    def _one(self, node: Node, need: Need, *, movable: bool = True) -> Candidate:
        name, info = node.name, node.info
        row = self._free.rows.get(name) or self._row(node)[0]  # a cordoned node is in no index
        return Candidate(
            name=name,
            need_mb=need.alone_mb if name in need.attached else need.whole_mb,
            free_mb=row.mb if info.memory_mb else None,
            total_mb=info.memory_mb,
            freeing_mb=row.freeing_mb,
            estimate=self._guess(node, need),
            idle=lambda: self._idle(node, need.target),
            need_gpus=need.gpus,
            free_gpus=row.gpus,
            total_gpus=info.gpus,
            freeing_gpus=row.freeing_gpus,
            movable=(lambda: self._movable(node, need.target)) if self.migrate and movable else nothing,
        )

    # -- estimates -------------------------------------------------------------------------------------------

    def _guess(self, node: Node, need: Need, but: str = "") -> estimate.Estimate:
        warmest = self._warmest(node.name, need)
        warmth, missing = need.layers[warmest].warmth, need.layers[warmest + 1 :]
        book, tier, size = self.state.book, self._tier(node, need), need.bytes
        making = estimate.making_seconds(book, missing) if missing else 0.0
        rate = estimate.bandwidth(book, node.info.bandwidth, node.name, tier, size)
        pace = book.get(f"pace|{node.name}", 1.0)
        others = self._starting_beside(node, but)
        if not others:
            return need.known.estimate(warmth, tier, making, size / rate, 0.0, pace)
        now = self.ledger.now
        queue = max(0.0, max((_read(i) for i in others if i.load), default=0.0) - now)
        here = [i for i in others if i.node == node.name]
        if size and (same := [i for i in here if i.digest == need.digest and i.load]):
            # It shares that one's read, or what is left of it.
            queue = max(0.0, min(map(_read, same)) - now)
            tier, size = same[0].tier, 1
            rate = estimate.bandwidth(book, node.info.bandwidth, node.name, tier, size)
        making = max(0.0, making - self._awaited(missing, here))
        alone = need.known.estimate(warmth, tier, making, size / rate, queue, pace)
        if alone.total <= 0:
            return alone
        left = sum(min(1.0, max(0.0, i.asked + i.predicted - now) / alone.total) for i in others)
        return need.known.estimate(warmth, tier, making, size / rate, queue, pace, 1.0 + left)

    def _starting_beside(self, node: Node, but: str) -> list[Instance]:
        ledger = self.ledger
        if not node.info.host and not ledger.loading_on(node.name):
            return []
        return [i for name in ledger.where.beside(node) for i in ledger.loading_on(name) if i.id != but]

    def _warmest(self, node: str, need: Need) -> int:
        """Which of its layers is the warmest there."""
        for k in range(len(need.layers) - 1, 0, -1):
            if node in need.layered[k]:
                return k
        return 0

    def _tier(self, node: Node, need: Need) -> Tier:
        if not need.digest:
            return "disk"
        if node.name in need.resident or (node.name in need.attached and self._ready_with(node, need.digest)):
            return "dram"
        return "disk" if node.name in need.holders else "remote"

    def _ready_with(self, node: Node, digest: str) -> bool:
        """Whether an instance there has the checkpoint in its memory."""
        for instance in self.ledger.on_node(node.name):
            if instance.digest == digest and instance.ready is not None:
                return True
        return False

    def _awaited(self, missing: Sequence[Layer], here: Sequence[Instance]) -> float:
        """Seconds of making those layers that starts on the node have behind them."""
        keys, best = {layer.key for layer in missing}, 0.0
        for other in here if keys else ():
            spec = self.ledger.function(other.target)
            common = [layer for layer in path(spec, other.digest) if layer.key in keys]
            spent = min(self.ledger.now - other.asked, estimate.making_seconds(self.state.book, common))
            best = max(best, spent)
        return best

    # -- one node --------------------------------------------------------------------------------------------

    def _idle(self, node: Node, target: Target) -> list[Idle]:
        """Ready instances on the node beyond what their own target wants at this moment."""
        found = []
        for instance in self.ledger.spare_on(node.name):
            if instance.state == "ready" and instance.target != target and not self.ledger.replacement(instance.id):
                memory = self.ledger.gives_back([instance])
                cost = self._again(node, instance)
                now = self.ledger.now
                idle = max(0.0, now - (now if instance.spare is None else instance.spare))
                rests = max(0.0, (instance.ready or 0.0) + SERVES * (instance.actual or 0.0) - now)
                found.append(Idle(instance.id, memory, idle, instance.gpus, cost, rests))
        return found

    def _again(self, node: Node, instance: Instance) -> float:
        """Seconds to start it anew there once it is gone: its checkpoint may still be in DRAM then."""
        took = instance.predicted if instance.actual is None else instance.actual
        if not instance.size or node.name not in self.ledger.where.resident(instance.digest):
            return took
        rate = estimate.bandwidth(self.state.book, node.info.bandwidth, node.name, "dram", instance.size)
        return min(took, instance.size / rate)

    def _movable(self, node: Node, target: Target) -> list[Movable]:
        """Ready instances on the node, those with the least context first, each with the best node with room for it."""
        ready = [
            instance
            for instance in self.ledger.on_node(node.name)
            if instance.state == "ready"
            and instance.target != target
            and instance.ready is not None
            and self.ledger.now - instance.ready >= RESIDENCY
            and instance.id not in self.state.moves
        ]
        ready.sort(key=lambda instance: (instance.tokens, instance.seq))
        found = []
        for instance in ready if self._whole else ready[:EACH]:
            spec = self.ledger.function(instance.target)
            if spec is None or not can_move(spec):
                continue
            there = [(0.0, other.node) for other in self._roomy_others(instance)]
            need = self._need(instance.target, spec)
            start, to = min(there) if there else self._destination(node, need)
            seconds = start + move_times.seconds(self.state.book, need.known.function, instance.tokens)
            memory = self.ledger.gives_back([instance])
            found.append(Movable(instance.id, memory, instance.gpus, to, seconds))
        return found

    def _roomy_others(self, instance: Instance) -> list[Instance]:
        """Ready instances of its target elsewhere that could take in all that runs in it, if the target can do with one
        less: else it would want its room back from whoever got it, by turns."""
        if not self.ledger.has_spare(key_of(instance.target)):
            return []
        return [
            other
            for other in self.ledger.instances_of(key_of(instance.target))
            if other.state == "ready"
            and other.node != instance.node
            and not self.state.nodes[other.node].cordoned
            and other.id not in self.state.moves
            and other.concurrency - other.running >= max(1, instance.running)
        ]

    def _destination(self, node: Node, need: Need) -> tuple[float, str]:
        """Where it would start soonest beside the node, and in how many seconds; infinite and empty: nowhere."""
        nodes, best = self.state.nodes, (float("inf"), "")
        for name in self._free.rows if self._whole else self._roomy(node.name, need):
            if name != node.name:
                there = self._one(nodes[name], need, movable=False)
                if there.fits():
                    best = min(best, (there.estimate.total, name))
        return best

    @property
    def _whole(self) -> bool:
        """Whether all nodes are shown."""
        return self.exhaustive or len(self.state.nodes) <= ALL

    # -- many nodes ------------------------------------------------------------------------------------------

    def _shortlist(self, need: Need, each: int = EACH) -> list[str]:
        found: dict[str, None] = {}
        if need.digest:
            self._some(found, need.attached, need.gpus, need.alone_mb, each)
            self._some(found, need.resident, need.gpus, need.whole_mb, each)
        if len(need.layers) > 1:
            self._some(found, need.layered[-1], need.gpus, need.whole_mb, each)
        if need.digest:
            self._some(found, need.holders, need.gpus, need.whole_mb, each)
        for index in (self._free, self._reclaimable):
            found.update(dict.fromkeys(islice(index.walk(need.gpus, need.whole_mb), 1)))
        if not found:
            # Nothing has room: the biggest nodes can still say whether waiting is of use.
            rows = self._free.rows
            big = heapq.nsmallest(EACH, rows, key=lambda name: (-self.state.nodes[name].info.memory_mb, name))
            found.update(dict.fromkeys(big))
            if need.gpus:
                most = heapq.nsmallest(EACH, rows, key=lambda name: (-self.state.nodes[name].info.gpus, name))
                found.update(dict.fromkeys(most))
        return list(found)

    def _roomy(self, but: str, need: Need) -> list[str]:
        """Another node where the checkpoint is nearest, or else one of all, with room now."""
        free = self._free
        for names in (need.resident, need.holders):
            if len(names) <= FEW:
                near = min((n for n in names if n != but and free.fits(n, need.gpus, need.whole_mb)), default="")
            else:
                near = next((n for n in free.walk(need.gpus, need.whole_mb, names) if n != but), "")
            if near:
                return [near]
        return list(islice((n for n in free.walk(need.gpus, need.whole_mb) if n != but), 1))

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
        self._refresh()

    def _refresh(self) -> None:
        """Take in what changed since the last look."""
        nodes, put = self.state.nodes, self._free.put
        for name in self.ledger.where.take_stale():
            node = nodes.get(name)
            if node is None or node.state != "up" or node.cordoned:
                self._free.drop(name)
                self._reclaimable.drop(name)
                continue
            row, idle = self._row(node)
            put(name, row)
            if idle is None:
                self._reclaimable.drop(name)
            else:
                self._reclaimable.put(name, idle)

    def _row(self, node: Node) -> tuple[Row, Row | None]:
        """What is free there, and what would be if those that may go, and those that end, had gone."""
        ledger, info, name = self.ledger, node.info, node.name
        speed = estimate.bandwidth(self.state.book, info.bandwidth, name, "disk")
        until = max((_read(i) for i in ledger.loading_on(name) if i.load), default=0.0)
        gpus = info.gpus - ledger.used_gpus(name)
        mb = info.memory_mb - ledger.used_mb(name) if info.memory_mb else UNLIMITED
        ending = ledger.ending_on(name)
        row = Row(speed, gpus, mb, until)
        if ending:
            row = Row(speed, gpus, mb, until, sum(i.gpus for i in ending), ledger.gives_back(ending))
        ending += [i for i in ledger.spare_on(name) if i.state == "ready"]
        if not ending:
            return row, None
        return row, Row(speed, gpus + sum(i.gpus for i in ending), mb + ledger.gives_back(ending), until)


def libs_of(layers: Sequence[Layer]) -> str:
    """The key of the path's first layer above the base, if it has one: what its container has imported."""
    return layers[1].key if len(layers) > 1 else layers[0].key


def _read(instance: Instance) -> float:
    """When its checkpoint is expected to be read."""
    return instance.asked + instance.queued + instance.load
