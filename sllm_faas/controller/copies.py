"""In how many places the checkpoints of what serves are, and who brings one where they are too few. Pure.

Part of the machine (`state.Machine`), which calls it; its table is there. A first start on a node without the
checkpoint waits for a pull, which takes minutes where it is large; and a node that is lost takes its copy with it. So
`goal` places are to have each checkpoint of each version that serves: one at a time is brought (INGEST), to the open
node with the emptiest disk that has room and could run the function.

    waiting   no node could have it now: none is free, open, large enough, or without it
    coming    INGEST is sent
    resting   it failed and is asked for again later; or a node left that may come back; or, without a time, it is spent

A place is where checkpoints are shared: a joined node, or all nodes of the platform's own machine, which keep them in
one folder. Each node brings one at a time, into room that is free, and none for a demand: nothing here is on the way
of a start. What nobody needs any more is called off. A checkpoint that has left a disk is `spent`, as is one that too
many nodes could not bring: nobody is asked for it until it is deployed again or a node joins, so no disk is filled in
turns. Invariants (`validate`): there is a record exactly where a checkpoint that serves is in too few places, and no
node brings two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import cast

from sllm_faas.controller import tables
from sllm_faas.controller.candidates import Candidates
from sllm_faas.controller.commands import CancelIngest, SendIngest
from sllm_faas.controller.ledger import Ledger
from sllm_faas.controller.model import Copy, CopyState, Node
from sllm_faas.errors import ErrorInfo, StorageFull, Unavailable, to_info
from sllm_faas.spec import Target
from sllm_faas.wire.messages import Ingest, Ingested, NodeStats

LIMIT = 3600.0
"""Seconds in which a node is to bring one."""
RETRY = 10.0
"""Seconds until another node is asked, doubled with each that failed in a row."""
TRIES = 6
"""Nodes that may fail in a row."""
PATIENCE = 60.0
"""Seconds in which a node that left, or that a controller which was restarted has not heard yet, may come back with
its copy."""
SPARE_MB = 1024
"""MiB of a disk that stay free. Source and object lie there both while one is brought."""

Wish = tuple[str, str]
"""(app, key in `FunctionSpec.checkpoints`)."""


class Copies:
    def __init__(self, ledger: Ledger, candidates: Candidates, goal: int) -> None:
        """`goal`: places for each checkpoint; below 2 nothing is brought anywhere."""
        self.ledger = ledger
        self.state = ledger.state
        self.goal = goal
        self._candidates = candidates
        self._of: dict[str, dict[str, str]] = {}
        """App -> key -> digest, of the version that serves."""
        self._wishes: dict[str, set[Wish]] = {}
        """Digest -> who wants it."""
        for app in self.state.apps:
            self._note(app)
        copies = self.state.copies
        self._waiting = {digest for digest, copy in copies.items() if copy.state == "waiting"}
        self._bringing = {copy.node: digest for digest, copy in copies.items() if copy.state == "coming"}
        self._freed: set[str] = set()
        """Nodes that bring nothing any more and have not been asked for something else."""
        for digest in sorted({*copies, *self._wishes}):  # the state may be from before, or have had another goal
            self._review(digest, PATIENCE)
        self._freed.clear()  # only an event has others asked

    # -- what is wanted --------------------------------------------------------------------------------------

    def serves(self, app: str, patience: float = 0.0) -> None:
        """Another version of the app serves, or the same anew, or none. `patience`: seconds until anything is done."""
        before = self._of.get(app, {})
        self._note(app)
        after = self._of.get(app, {})
        for digest in sorted({*before.values(), *after.values()}):
            self._review(digest, patience)
        self.deployed(after.values())

    def deployed(self, digests: Iterable[str]) -> None:
        """By whatever version: those of them that serve and are spent are so no more."""
        for digest in sorted(self.state.copies.keys() & set(digests)):
            self._renew(self.state.copies[digest])
            if digest in self._waiting:
                self._try(self.state.copies[digest])
        self._offer_freed()

    def _note(self, name: str) -> None:
        for key, digest in self._of.pop(name, {}).items():
            wishes = self._wishes[digest]
            wishes.discard((name, key))
            if not wishes:
                del self._wishes[digest]
        app = self.state.apps.get(name)
        version = app.versions.get(app.active) if app is not None else None
        if self.goal > 1 and version is not None and version.digests:
            self._of[name] = dict(version.digests)
            for key, digest in version.digests.items():
                self._wishes.setdefault(digest, set()).add((name, key))

    # -- what is known ---------------------------------------------------------------------------------------

    def seen(self, digests: Iterable[str]) -> None:
        """More nodes have these than before."""
        for digest in sorted(self._wishes.keys() & set(digests)):
            self._review(digest)
        self._offer_freed()

    def told(self, node: Node, before: Collection[str], *, left: bool = True) -> None:
        """It says what is on its disk, where `before` was. `left`: what is not there any more had to go."""
        now = set(node.checkpoints)
        for digest in sorted(self._wishes.keys() & (now ^ set(before))):
            self._review(digest, left=node.name if left and digest not in now else "")
        self._offer_freed()

    def answered(self, node: Node, answer: Ingested) -> None:
        """INGESTED; what it brought is noted already."""
        copy = self._coming(node)
        if copy is not None and copy.request == answer.request:
            if answer.digest:
                copy.spent = True  # whoever else is asked gets that too
            found = f"{copy.digest[:12]} is {answer.digest[:12]} by now where {node.name} gets it"
            self._failed(copy, node, answer.error or to_info(Unavailable(found)))
            self._offer_freed()

    def node_up(self, node: Node, before: Collection[str] | None, anew: bool) -> None:
        """HELLO. `before`: what it had when it was last heard, None: it was not known; `anew`: its process is another
        one, maybe with another disk."""
        self.told(node, before or (), left=not anew)
        coming = self._coming(node)
        if coming is not None and anew:
            self._failed(coming, node, to_info(Unavailable(f"{node.name} was started anew")))
        elif coming is not None:
            self._send(coming)  # it, or its answer, may have been lost
        for copy in self.state.copies.values() if before is None else ():
            self._renew(copy)
        self._freed.add(node.name)
        self._offer_freed()

    def node_closed(self, node: Node) -> None:
        """It is cordoned, silent, or has left: what it was to bring, another may."""
        coming = self._coming(node)
        if coming is not None:
            self._call_off(coming)
            self._failed(coming, node, to_info(Unavailable(f"{node.name} takes nothing new")))
            self._offer_freed()

    def node_gone(self, node: Node, patience: float = 0.0) -> None:
        """It was forgotten, and what it had with it. `patience`: seconds in which it may come back."""
        for digest in sorted(self._wishes.keys() & set(node.checkpoints)):
            self._review(digest, patience)

    def stats_seen(self, node: Node, before: NodeStats | None) -> None:
        """Its disk may have room now. A little more than before is not looked at: free space always varies."""
        free_mb = 0 if node.stats is None else node.stats.disk_free_mb
        if before is None or free_mb // SPARE_MB > before.disk_free_mb // SPARE_MB:
            self.offer(node)

    def due(self, digest: str) -> None:
        """An alarm: early and stale ones do nothing."""
        copy = self.state.copies.get(digest)
        if copy is None or copy.due is None or copy.due > self.ledger.now:
            return
        if copy.state == "resting":
            self._move(copy, "again")
            self._try(copy)
        else:
            self._call_off(copy)
            late = Unavailable(f"{copy.node} did not bring it within {LIMIT:g} s")
            self._failed(copy, self.state.nodes[copy.node], to_info(late))
            self._offer_freed()

    def places(self, digest: str) -> set[str]:
        return {_place(self.state.nodes[name]) for name in self.ledger.where.holders(digest)}

    def _short(self, digest: str) -> bool:
        return digest in self._wishes and len(self.places(digest)) < self.goal

    def _coming(self, node: Node) -> Copy | None:
        return self.state.copies.get(self._bringing.get(node.name, ""))

    def _review(self, digest: str, patience: float = 0.0, left: str = "") -> None:
        """Its record is there if it is in too few places, and only then. `left`: the node whose disk it has left."""
        copy = self.state.copies.get(digest)
        if not self._short(digest):
            if copy is not None:
                self._over(copy)
            return
        if copy is None:
            copy = Copy(digest, cast(CopyState, tables.move(tables.COPY, _what(digest), "absent", "short")))
            self.state.copies[digest] = copy
            self._waiting.add(digest)
            if patience:
                self._move(copy, "deferred", self.ledger.now + patience)
            elif not left:
                self._try(copy)
        elif copy.state == "coming" and _place(self.state.nodes[copy.node]) in self.places(digest):
            self._call_off(copy)
            self._brought(copy)
        if left:
            copy.spent, copy.error = True, to_info(Unavailable(f"it has left the disk of {left}"))
            if copy.state != "coming":
                self._move(copy, "deferred")

    # -- what is done ----------------------------------------------------------------------------------------

    def offer(self, node: Node) -> None:
        """It may be able to bring something: the first that waits, by digest."""
        if self._waiting and self._free(node):
            for digest in sorted(self._waiting):
                if self._could(node, self.state.copies[digest], self.places(digest)):
                    self._ask(self.state.copies[digest], node)
                    return

    def _offer_freed(self) -> None:
        freed, self._freed = sorted(self._freed), set()
        for name in freed:
            if name in self.state.nodes:
                self.offer(self.state.nodes[name])

    def _try(self, copy: Copy) -> None:
        """Ask the best node there is: of those that failed least, the one with the emptiest disk."""

        def rank(node: Node) -> tuple[int, int, str]:
            assert node.stats is not None
            return copy.failed.get(_place(node), 0), -node.stats.disk_free_mb, node.name

        if len(self._bringing) == len(self.state.nodes):
            return  # as after the deployment of very many: who is done is offered the next
        there = self.places(copy.digest)
        for node in sorted((node for node in self.state.nodes.values() if self._free(node)), key=rank):
            if self._could(node, copy, there):
                self._ask(copy, node)
                return

    def _free(self, node: Node) -> bool:
        return node.state == "up" and not node.cordoned and node.stats is not None and node.name not in self._bringing

    def _could(self, node: Node, copy: Copy, there: set[str]) -> bool:
        """Whether a free node could have it."""
        place, needed_mb = _place(node), 2 * self.ledger.size_mb(copy.digest) + SPARE_MB
        if place in there or copy.failed.get(place, 0) >= TRIES:
            return False
        if node.stats is None or node.stats.disk_free_mb < needed_mb:
            return False
        target, key = self._wish(copy.digest)
        spec = self.ledger.function(target)
        if spec is None:
            return False
        if key != target.function and spec.checkpoints()[target.function].digest not in node.checkpoints:
            return False  # an adapter goes where its base is
        return self._candidates.one(node, target, spec).big_enough

    def _wish(self, digest: str) -> tuple[Target, str]:
        """On whose account it is brought, the first by name."""
        app, key = min(self._wishes[digest])
        return Target(app, key.partition(":")[0], self.state.apps[app].active), key

    def _ask(self, copy: Copy, node: Node) -> None:
        self.state.ingests += 1
        copy.node, copy.request = node.name, f"copy-{self.state.life}-{self.state.ingests}"
        self._move(copy, "sent", self.ledger.now + LIMIT)
        self._send(copy)

    def _send(self, copy: Copy) -> None:
        target, key = self._wish(copy.digest)
        spec = self.ledger.function(target)
        assert spec is not None
        checkpoints = spec.checkpoints()
        base = checkpoints[target.function].digest if key != target.function else ""
        self.ledger.emit(SendIngest(copy.node, Ingest(copy.request, checkpoints[key], base=base, ahead=True)))

    def _failed(self, copy: Copy, node: Node, error: ErrorInfo) -> None:
        """Where there is no room it is not asked again before it is deployed again."""
        place, full = _place(node), error.code == StorageFull.code
        copy.failed[place] = TRIES if full else copy.failed.get(place, 0) + 1
        copy.error = error
        copy.tries += 1
        copy.spent = copy.spent or copy.tries >= TRIES
        self._move(copy, "failed", None if copy.spent else self.ledger.now + RETRY * 2.0 ** (copy.tries - 1))

    def _brought(self, copy: Copy) -> None:
        """And further places are to have it, unless it has left one meanwhile."""
        self._move(copy, "brought")
        if copy.spent:
            self._move(copy, "deferred")
        else:
            copy.tries, copy.error = 0, None
            self._try(copy)

    def _renew(self, copy: Copy) -> None:
        """What failed before does not count any more."""
        copy.spent, copy.tries, copy.failed = False, 0, {}
        if copy.state == "resting" and copy.due is None:
            self._move(copy, "again")

    def _over(self, copy: Copy) -> None:
        if copy.state == "coming":
            self._call_off(copy)
        self._move(copy, "over")

    def _call_off(self, copy: Copy) -> None:
        """Unless the node has it by now."""
        node = self.state.nodes.get(copy.node)
        if node is not None and node.state == "up" and node.name not in self.ledger.where.holders(copy.digest):
            self.ledger.emit(CancelIngest(node.name, copy.request))

    def _move(self, copy: Copy, event: str, due: float | None = None) -> None:
        """Its state and when it is looked at next, with the indexes."""
        after = tables.move(tables.COPY, _what(copy.digest), copy.state, event)
        self._waiting.discard(copy.digest)
        if copy.state == "coming":
            del self._bringing[copy.node]
            self._freed.add(copy.node)
            copy.node = ""
        if after == "absent":
            del self.state.copies[copy.digest]
            return
        copy.state, copy.due = cast(CopyState, after), due
        if after == "waiting":
            self._waiting.add(copy.digest)
        elif after == "coming":
            self._bringing[copy.node] = copy.digest
        if due is not None:
            self.ledger.wake(due, f"copy|{copy.digest}")

    # -- checking --------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raises AssertionError when an invariant does not hold."""
        short = {digest for digest in self._wishes if self._short(digest)}
        assert short == set(self.state.copies), "records are not of what is in too few places"
        coming = [copy for copy in self.state.copies.values() if copy.state == "coming"]
        assert len({copy.node for copy in coming}) == len(coming), "a node brings two"
        for copy in coming:
            node = self.state.nodes[copy.node]
            assert node.state == "up" and not node.cordoned, "it comes to a node that is not open"
            assert _place(node) not in self.places(copy.digest), "it comes to where it is"
        fresh = Copies(self.ledger, self._candidates, self.goal)
        for name in ("_of", "_wishes", "_waiting", "_bringing"):
            assert getattr(self, name) == getattr(fresh, name), f"{name} is not what the state gives"
        assert not self._freed, "nodes were not asked"
        for copy in self.state.copies.values():
            assert copy.state != "resting" or copy.spent == (copy.due is None), "it rests without end, or is spent"
            assert copy.state != "waiting" or not copy.spent, "it is spent and waits"


def _place(node: Node) -> str:
    return node.name if node.info.joined else ""


def _what(digest: str) -> str:
    return f"copy of {digest[:12]}"
