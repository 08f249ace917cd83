"""What placement is shown for a target: the nodes worth considering, each with its estimate. Reads, decides nothing.

A cluster of up to ALL nodes is shown whole. In a larger one the nodes come from indexes, a few of each kind, those
that start soonest first: where the checkpoint is on a GPU, attached or resident, where the version's template exists,
where the checkpoint is on disk, and anywhere; with room, and with room if idle instances go. So a decision costs the
same at a hundred nodes and at ten thousand.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import islice
from math import inf

import msgspec

from sllm_faas.controller import estimate, move_times
from sllm_faas.controller.autoscale import scaling_of
from sllm_faas.controller.index import UNLIMITED, NodeIndex, Row
from sllm_faas.controller.ledger import Ledger
from sllm_faas.controller.locality import NOWHERE
from sllm_faas.controller.migration import can_move
from sllm_faas.controller.model import Instance, Node, key_of
from sllm_faas.controller.placement import Candidate, Idle, Movable
from sllm_faas.controller.service_times import service_time
from sllm_faas.layers import Layer, path
from sllm_faas.spec import FunctionSpec, Target, Tier

ALL = 8
EACH = 3
"""Nodes of one kind that are looked at closely."""
RESIDENCY = 5.0
"""Seconds an instance serves where it is before it may be moved again: no node's memory is swapped to and fro."""
SERVES = 1.0
"""An instance serves so many times as long as its start took before it may be evicted for another."""
ENDS = 0.01
"""Guess: seconds that an instance in which nothing runs takes to end."""
SERVING = 1.0
"""Guess: seconds until what runs in an instance has ended, of a function that has not been seen to answer."""
MEMORY: tuple[Tier, ...] = ("dram", "gpu")
"""Tiers from which a start reads nothing from a disk or a network."""
FEW = 48
"""A set of at most so many nodes is gone through; a larger one is met by walking the index."""


Way = tuple[float, str, str, tuple[int, int], tuple[int, int]]
"""Of a move: seconds until it can begin, then as in `Movable`: to, place, takes and room."""
NOWAY: Way = (inf, "", "", (0, 0), (0, 0))


class Need(msgspec.Struct, frozen=True):
    """What one more instance of a target needs, and who has what of it: looked up once for all nodes.

    `own`: the instances it has; `alone_mb`: where an instance has the checkpoint attached already; `whole_mb`:
    elsewhere. `holding`: nodes where an instance has it in memory. `layers` from the base to the warmest; `layered`:
    nodes that have each; `cached`: some node had the checkpoint in its page cache.
    """

    own: Collection[str]
    known: estimate.Known
    digest: str
    bytes: int
    alone_mb: int
    whole_mb: int
    gpus: int
    attached: Collection[str]
    holding: Collection[str]
    resident: Collection[str]
    on_gpu: Collection[str]
    holders: Collection[str]
    layers: tuple[Layer, ...]
    layered: tuple[Collection[str], ...]
    cached: bool


class Facts(msgspec.Struct, frozen=True):
    """What the book says of a node, looked up once until it learns more: its pace, the bytes per second of its disk,
    and by tier and bytes the seconds to read so many."""

    pace: float
    speed: float
    load: dict[tuple[Tier, int], float]


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
        self._facts: dict[str, Facts] = {}
        self._making: dict[tuple[str, str, int], float] = {}
        """By libraries, the last layer's key and the warmest that is there."""

    def of(self, target: Target, spec: FunctionSpec, *, idle: bool = True, movable: bool = True) -> list[Candidate]:
        """The nodes worth considering for one more instance; with `idle` and `movable`, also what could go there or
        move away."""
        self._refresh()
        need, movable = self._need(target, spec), movable and self.migrate
        if self._whole:
            return [self._one(node, need, movable, idle) for node in self.ledger.open_nodes()]
        nodes = self.state.nodes
        return [self._one(nodes[name], need, movable, idle) for name in self._shortlist(need)]

    def one(self, node: Node, target: Target, spec: FunctionSpec) -> Candidate:
        """The node as it is for the target."""
        self._refresh()
        return self._one(node, self._need(target, spec), self.migrate)

    def claimable(self, target: Target, spec: FunctionSpec, app: str) -> list[Candidate]:
        """Nodes with instances of `app`, a few of them, as if those might go too although they are needed."""
        need, nodes = self._need(target, spec), self.state.nodes
        names: dict[str, None] = {}
        for instance in self.ledger.shares.instances(app):
            if instance.state == "ready" and not nodes[instance.node].cordoned:
                names[instance.node] = None
                if len(names) == ALL:
                    break
        found = []
        for node in map(nodes.__getitem__, names):
            offers = Offered(self, node, need.own, app)
            found.append(msgspec.structs.replace(self._one(node, need, False), offers=offers, may_go=True))
        return found

    def guess(self, node: Node, target: Target, spec: FunctionSpec, but: str = "") -> estimate.Estimate:
        """How long one more instance would take to start there; `but`: the one it is, if it has been commanded."""
        return self._guess(node, self._need(target, spec), but)

    def start(self, node: Node, instance: Instance) -> estimate.Start | None:
        """What was known of the instance's start; None: its function is gone."""
        spec = self.ledger.function(instance.target)
        if spec is None:
            return None
        need = self._need(instance.target, spec)
        warmest = next(k for k in reversed(range(len(need.layers))) if not k or node.name in need.layered[k])
        warmth = need.layers[warmest].warmth
        return estimate.Start(
            node.name, need.known.function, need.known.libs, warmth, instance.tier, instance.size, need.digest,
            path(spec, instance.digest),
        )  # fmt: skip

    def _need(self, target: Target, spec: FunctionSpec) -> Need:
        ledger, where, book = self.ledger, self.ledger.where, self.state.book
        digest = spec.checkpoint.digest if spec.checkpoint else ""
        layers = path(spec, digest)
        return Need(
            ledger.ids_of(key_of(target)),
            estimate.known(book, f"{target.app}/{target.function}", libs_of(layers)),
            digest,
            self.state.sizes.get(digest, 0),
            spec.memory_mb,
            spec.memory_mb + ledger.size_mb(digest),
            spec.gpus,
            ledger.attached(digest),
            ledger.holding(digest),
            where.resident(digest),
            where.on_gpu(digest) if spec.gpus else NOWHERE,
            where.holders(digest),
            layers,
            tuple([where.layered(layer.key) for layer in layers]),
            bool(digest) and estimate.ever_cached(book, digest),
        )

    def _one(self, node: Node, need: Need, movable: bool, idle: bool = True) -> Candidate:
        name, info = node.name, node.info
        row = self._free.rows.get(name) or self._row(node)[0]  # a cordoned node is in no index
        # Where the checkpoint is in memory for good already, one more instance takes no more for it.
        counted = name in need.attached or (node.stats is not None and need.digest in node.stats.pinned)
        return Candidate(
            name,
            need.alone_mb if counted else need.whole_mb,
            row.mb if info.memory_mb else None,
            info.memory_mb,
            row.freeing_mb,
            self._guess(node, need),
            Offered(self, node, need.own),
            need.gpus,
            row.gpus,
            info.gpus,
            row.freeing_gpus,
            idle and name in self._reclaimable.rows,
            movable,
        )

    # -- estimates -------------------------------------------------------------------------------------------

    def _guess(self, node: Node, need: Need, but: str = "") -> estimate.Estimate:
        name, layered = node.name, need.layered
        warmest = len(layered) - 1
        while warmest and name not in layered[warmest]:
            warmest -= 1
        warmth, making = need.layers[warmest].warmth, self._making_above(need, warmest)
        tier, size = self._tier(name, need), need.bytes
        facts = self._facts.get(name) or self._look_up(node)
        load = (facts.load.get((tier, size)) or self._load(node, tier, size)) if size else 0.0
        others = self.starting_beside(node, but) if node.info.host or self.ledger.loading_on(name) else ()
        if not others:
            return need.known.estimate(warmth, tier, making, load, 0.0, facts.pace)
        now = self.ledger.now
        queue = 0.0
        if tier not in MEMORY:  # that is no read: it waits for none
            # A node reads the shortest first: what is larger is overtaken.
            reads = [_read(i) for i in others if i.load and i.tier not in MEMORY and i.size <= size]
            queue = max(0.0, max(reads) - now) if reads else 0.0
        here = [i for i in others if i.node == name]
        if size and tier != "gpu" and (same := [i for i in here if i.digest == need.digest and i.load]):
            # It shares that one's read, or what is left of it.
            queue = max(0.0, min(map(_read, same)) - now)
            tier, size = same[0].tier, 1
            load = self._load(node, tier, 1)
        missing = need.layers[warmest + 1 :]
        awaited = self._awaited(missing, here)
        making = max(0.0, making - awaited)
        alone = need.known.estimate(warmth, tier, making, load, queue, facts.pace)
        if alone.total <= 0:
            return alone
        at_once = 1.0 + sum(min(1.0, max(0.0, i.asked + i.predicted - now) / alone.total) for i in others)
        if missing:
            making = max(0.0, estimate.making_seconds(self.state.book, missing, at_once) - awaited)
        return need.known.estimate(warmth, tier, making, load, queue, facts.pace, at_once)

    def _making_above(self, need: Need, warmest: int) -> float:
        """Seconds to make the layers that are missing where that is the warmest, by a start alone."""
        layers = need.layers
        if warmest == len(layers) - 1:
            return 0.0
        key = (need.known.libs, layers[-1].key, warmest)
        found = self._making.get(key)
        if found is None:
            found = self._making[key] = estimate.making_seconds(self.state.book, layers[warmest + 1 :])
        return found

    def forget_making(self) -> None:
        """More was learned of how long layers take to make."""
        self._making.clear()

    def starting_beside(self, node: Node, but: str = "") -> list[Instance]:
        """What starts on its machine, but for that one."""
        ledger = self.ledger
        return [i for name in ledger.where.beside(node) for i in ledger.loading_on(name) if i.id != but]

    def _look_up(self, node: Node) -> Facts:
        book, name = self.state.book, node.name
        speed = estimate.bandwidth(book, node.info.bandwidth, name, "disk")
        facts = self._facts[name] = Facts(estimate.pace_of(book, name), speed, {})
        return facts

    def _load(self, node: Node, tier: Tier, size: int) -> float:
        """Seconds to read so many bytes from there, if nothing else reads."""
        loads = (self._facts.get(node.name) or self._look_up(node)).load
        found = loads.get((tier, size))
        if found is None:
            rate = estimate.bandwidth(self.state.book, node.info.bandwidth, node.name, tier, size)
            found = loads[tier, size] = size / rate
        return found

    def _tier(self, node: str, need: Need) -> Tier:
        if not need.digest:
            return "disk"
        if node in need.on_gpu:
            return "gpu"
        if node in need.holding:
            return "dram"
        if node in need.resident and not self._displaced(node, need):
            return "dram"
        if node not in need.holders:
            return "remote"
        if not need.cached:
            return "disk"
        full = self.ledger.crowded_out(node, need.digest)
        return "dram" if estimate.is_cached(self.state.book, node, need.digest, full) else "disk"

    def _displaced(self, node: str, need: Need) -> bool:
        """Whether what others are reading there takes its place in DRAM, beside what is in use, before it is read."""
        loading = self.ledger.loading_on(node)
        if not any(other.load and other.tier not in MEMORY for other in loading) or node in need.attached:
            return False
        return self.ledger.crowded_out(node, need.digest)

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

    def freed(self, node: Node, mb: int, gpus: int) -> float:
        """Seconds until so much more has come free of what ends there; infinite: that is not as much."""
        ending = sorted([(self._ends(i), i.seq, i) for i in self.ledger.ending_on(node.name)])
        gone: list[Instance] = []
        for seconds, _, instance in ending:
            gone.append(instance)
            if _gpus_of(gone) >= gpus and self.ledger.gives_back(gone) >= mb:
                return seconds
        return inf

    def _ends(self, instance: Instance) -> float:
        """Seconds until an instance that ends has ended. What takes longer than expected, but for a move under way, is
        expected to take as long again: what holds it up is not known."""
        ledger, now, function = self.ledger, self.ledger.now, f"{instance.target.app}/{instance.target.function}"
        heir = self.state.instances.get(ledger.replacement(instance.id))
        if heir is not None and heir.state in ("requested", "starting"):
            starts = abs(heir.asked + heir.predicted - now)
            return starts + move_times.seconds(self.state.book, function, instance.tokens)
        left = ENDS
        move = self.state.moves.get(instance.id)
        if heir is not None or move is not None:
            left = move_times.seconds(self.state.book, function, instance.tokens)
        elif instance.running:  # exponential service times, as for a slot: what has passed says nothing
            each = service_time(self.state.book, function)
            left = SERVING if each is None else each.seconds
        since = now if instance.draining_since is None else instance.draining_since
        if move is None or move.state == "resting":  # one under way is nearly over: who turns away meets the next
            left = max(left, now - since)
        return left if instance.drain is None else min(left, abs(since + instance.drain - now))

    def idle(self, node: Node, own: Collection[str]) -> list[Idle]:
        """Ready instances on the node beyond what their target wants at this moment, and not of one's own."""
        ledger, now = self.ledger, self.ledger.now
        found = []
        for instance in ledger.spare_on(node.name):
            if instance.state == "ready" and instance.id not in own and not ledger.replacement(instance.id):
                memory = ledger.gives_back([instance])
                cost = self._again(node, instance)
                idle = max(0.0, now - (now if instance.spare is None else instance.spare))
                rests = _rests(instance, now)
                found.append(Idle(instance.id, memory, idle, instance.gpus, cost, rests))
        return found

    def claimed(self, node: Node, own: Collection[str], app: str) -> list[Idle]:
        """The idle ones, and those of the app that its functions have beyond their `min_containers`."""
        ledger, now = self.ledger, self.ledger.now
        found = self.idle(node, own)
        known = {idle.instance for idle in found}
        spared = Counter(key_of(self.state.instances[name].target) for name in known)
        here = [i for i in ledger.on_node(node.name) if i.target.app == app and i.state == "ready"]
        for instance in sorted(here, key=lambda i: (i.running, -i.seq)):
            key = key_of(instance.target)
            if instance.id in known or instance.id in self.state.moves or ledger.replacement(instance.id):
                continue
            spec = ledger.function(instance.target)
            least = scaling_of(instance.target, spec).min_containers if spec is not None else 0
            if len(ledger.live(key)) - spared[key] > least:
                spared[key] += 1
                rests = _rests(instance, now, RESIDENCY)
                cost, memory = self._again(node, instance), ledger.gives_back([instance])
                found.append(Idle(instance.id, memory, 0.0, instance.gpus, cost, rests, claimed=True))
        return found

    def _again(self, node: Node, instance: Instance) -> float:
        """Seconds to start it anew there once it is gone: its checkpoint may still be in DRAM then."""
        took = instance.predicted if instance.actual is None else instance.actual
        if not instance.size or node.name not in self.ledger.where.resident(instance.digest):
            return took
        return min(took, self._load(node, "dram", instance.size))

    def movable(self, node: Node, own: Collection[str], limit: float) -> list[Movable]:
        """Ready instances on the node that are not one's own, those with the least context first, each with the best
        node with room for it; not those that would take `limit` seconds or more."""
        ledger, moves, latest = self.ledger, self.state.moves, self.ledger.now - RESIDENCY
        ready = [
            (instance.tokens, instance.seq, instance)
            for instance in ledger.on_node(node.name)
            if instance.state == "ready"
            and instance.ready is not None
            and instance.ready <= latest
            and instance.id not in moves
            and instance.id not in own
        ]
        ready.sort()
        found = []
        anew: dict[str, Way] = {}
        """By target: often several on a node are of one."""
        for _, _, instance in ready if self._whole else ready[:EACH]:
            spec = ledger.function(instance.target)
            if spec is None or not can_move(spec):
                continue
            function = f"{instance.target.app}/{instance.target.function}"
            seconds = move_times.seconds(self.state.book, function, instance.tokens)
            if seconds >= limit:
                continue  # wherever it could go
            key = key_of(instance.target)
            there = self._roomy_other(key, instance)
            if there is None:
                there = anew.get(key)
                if there is None:
                    there = anew[key] = self._destination(node, self._need(instance.target, spec))
            start, to, place, takes, room = there
            if start + seconds < limit or limit == inf:
                memory, when = ledger.gives_back([instance]), start + seconds
                found.append(Movable(instance.id, memory, instance.gpus, to, when, place, takes, room))
        return found

    def _roomy_other(self, key: str, instance: Instance) -> Way | None:
        """In no time, and the first node where a ready instance of its target could take in all that runs in it, if the
        target can do with one less: else it would want its room back from whoever got it, by turns."""
        if not self.ledger.has_spare(key):
            return None
        nodes, moves, slots = self.state.nodes, self.state.moves, max(1, instance.running)
        others = [
            (other.node, other.id, other.concurrency - other.running)
            for other in self.ledger.instances_of(key)
            if other.state == "ready"
            and other.concurrency - other.running >= slots
            and other.node != instance.node
            and other.id not in moves
            and not nodes[other.node].cordoned
        ]
        if not others:
            return None
        to, place, free = min(others)
        return 0.0, to, place, (slots, 0), (free, 0)

    def _destination(self, node: Node, need: Need) -> Way:
        """Where it would start soonest beside the node, and in how many seconds; infinite and empty: nowhere."""
        nodes, best = self.state.nodes, NOWAY
        for name in self._free.rows if self._whole else self._roomy(node.name, need):
            if name != node.name:
                mb = need.alone_mb if name in need.attached else need.whole_mb
                if self._free.fits(name, need.gpus, mb):
                    seconds = self._guess(nodes[name], need).total
                    if (seconds, name) < best[:2]:
                        row = self._free.rows[name]
                        best = (seconds, name, name, (mb, need.gpus), (row.mb, row.gpus))
        return best

    @property
    def _whole(self) -> bool:
        """Whether all nodes are shown."""
        return self.exhaustive or len(self.state.nodes) <= ALL

    # -- many nodes ------------------------------------------------------------------------------------------

    def _shortlist(self, need: Need, each: int = EACH) -> list[str]:
        found: dict[str, None] = {}
        warm = need.layered[-1] if len(need.layers) > 1 else NOWHERE
        mb = need.whole_mb
        kinds = (need.on_gpu, mb), (need.attached, need.alone_mb), (need.resident, mb), (warm, mb), (need.holders, mb)
        for names, needed in kinds:
            if names:
                self._some(found, names, need.gpus, needed, each)
        for index in (self._free, self._reclaimable):
            for name in index.walk(need.gpus, need.whole_mb):
                found[name] = None
                break
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
        for names in (need.on_gpu, need.resident, need.holders):
            if not names:
                continue
            if len(names) <= FEW:
                near = min([n for n in names if n != but and free.fits(n, need.gpus, need.whole_mb)], default="")
            else:
                near = next((n for n in free.walk(need.gpus, need.whole_mb, names) if n != but), "")
            if near:
                return [near]
        return list(islice((n for n in free.walk(need.gpus, need.whole_mb) if n != but), 1))

    def _some(self, found: dict[str, None], names: Collection[str], gpus: int, mb: int, each: int) -> None:
        """A few of these: with room, then with room if the idle go, then — should some move away — without."""
        if len(names) > FEW:
            for index in (self._free, self._reclaimable):
                found.update(dict.fromkeys(islice(index.walk(gpus, mb, names), each)))
            return
        free, idle = self._free.rows, self._reclaimable.rows
        if self.migrate and len(names) <= each:  # all of them, whatever room they have
            for name in names:
                if name in free:
                    found[name] = None
            return
        ranked: list[tuple[int, float, str]] = []
        for name in names:
            row = free.get(name)
            if row is None:
                continue
            if row.gpus >= gpus and row.mb >= mb:
                room = 0
            elif (more := idle.get(name)) is not None and more.gpus >= gpus and more.mb >= mb:
                room = 1
            elif self.migrate:
                room = 2
            else:
                continue
            ranked.append((room, row.busy_until, name))
        if len(ranked) > each:
            ranked.sort()
            del ranked[each:]
        for _, _, name in ranked:
            found[name] = None

    def keep_up(self) -> None:
        """Called after every event, so that each pays for what it changed."""
        self._refresh()

    def _refresh(self) -> None:
        """Take in what changed since the last look."""
        stale, renewed = self.ledger.where.take_stale()
        if not stale:
            return  # what is renewed is stale too
        for name in renewed:
            self._facts.pop(name, None)
        nodes, put = self.state.nodes, self._free.put
        for name in stale:
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
        speed = (self._facts.get(name) or self._look_up(node)).speed
        loading = ledger.loading_on(name)
        until = max([_read(i) for i in loading if i.load], default=0.0) if loading else 0.0
        gpus = info.gpus - ledger.used_gpus(name)
        mb = info.memory_mb - ledger.used_mb(name) if info.memory_mb else UNLIMITED
        ending = ledger.ending_on(name)
        spare = ledger.spare_on(name)
        if not ending and not spare:
            return Row(speed, gpus, mb, until), None
        freeing_gpus, freeing_mb = 0, 0
        if ending:
            freeing_gpus, freeing_mb = _gpus_of(ending), ledger.gives_back(ending)
        row = Row(speed, gpus, mb, until, freeing_gpus, freeing_mb)
        if spare and (may_go := [i for i in spare if i.state == "ready"]):
            ending += may_go
            freeing_gpus, freeing_mb = _gpus_of(ending), ledger.gives_back(ending)
        elif not ending:
            return row, None
        return row, Row(speed, gpus + freeing_gpus, mb + freeing_mb, until)


class Offered(msgspec.Struct, frozen=True, gc=False):
    """What a node offers a target that has the instances `own`. Those of `app`, if it has one, go although needed."""

    candidates: Candidates
    node: Node
    own: Collection[str]
    app: str = ""

    def idle(self) -> Sequence[Idle]:
        if self.app:
            return self.candidates.claimed(self.node, self.own, self.app)
        return self.candidates.idle(self.node, self.own)

    def movable(self, limit: float) -> Sequence[Movable]:
        return self.candidates.movable(self.node, self.own, limit)

    def freed(self, mb: int, gpus: int) -> float:
        return self.candidates.freed(self.node, mb, gpus)


def _rests(instance: Instance, now: float, least: float = 0.0) -> float:
    """Seconds for which it may not go yet: until it has served for as long as its start is worth, and the `least`."""
    return max(0.0, (instance.ready or 0.0) + max(least, SERVES * (instance.actual or 0.0)) - now)


def _gpus_of(instances: Sequence[Instance]) -> int:
    return sum([i.gpus for i in instances])


def libs_of(layers: Sequence[Layer]) -> str:
    """The key of the path's first layer above the base, if it has one: what its container has imported."""
    return layers[1].key if len(layers) > 1 else layers[0].key


def _read(instance: Instance) -> float:
    """When its checkpoint is expected to be read."""
    return instance.asked + instance.queued + instance.load
