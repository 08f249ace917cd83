"""A modelled gateway around the production queue and slot table: takes requests in, dispatches, tells demand.

What is modelled is serving: the prompt's tokens, then the generated ones, at constant rates. A move hands an invocation
over to the instance that takes its place: its tokens are computed there while it goes on here, then it pauses for the
commit. A preempted one waits again and continues from its tokens, which have to be computed anew, or begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sllm_faas.controller import events as ev
from sllm_faas.dispatch.queue import WaitQueue
from sllm_faas.dispatch.served import Served
from sllm_faas.dispatch.slots import Instance, SlotTable
from sllm_faas.errors import QueueFull
from sllm_faas.sim.clock import Clock
from sllm_faas.sim.node import Running, SimNode
from sllm_faas.sim.results import Samples
from sllm_faas.sim.scenario import FunctionModel
from sllm_faas.sim.workload import Request
from sllm_faas.spec import Target
from sllm_faas.wire.messages import Grant, Migrate, Migrated, MoveResult, TargetDemand

GATHER = 0.1
"""Seconds for which demand that nobody waits on is gathered, as in the gateway."""
PAUSE = 0.05
"""Seconds an invocation stands still at the commit of its move."""
NAME = "gateway-0"


@dataclass(slots=True, eq=False)
class Call:
    """One request on its way."""

    request: Request
    model: FunctionModel
    target: Target
    since: float
    """Of the wait that goes on or was the last."""
    waited: float = 0.0
    first: float | None = None
    """When its first output came."""
    done: int = 0
    """Tokens generated before its present instance."""
    began: float = 0.0
    """At its present instance, after the prompt."""
    slot: Instance | None = None
    placed: float = 0.0
    """When it got that, or the one it was moved from."""
    turn: int = 0
    """Raised whenever what was planned for it is void."""

    @property
    def tokens(self) -> int:
        return self.request.input


@dataclass(slots=True)
class Hand:
    """A MIGRATE that is being carried out by `node`; answered once all `count` have a result."""

    body: Migrate
    node: str
    count: int
    results: list[MoveResult] = field(default_factory=list)


@dataclass(slots=True)
class Line:
    """What the controller is to be told of a target."""

    running: int = 0
    sent: tuple[int, int] = (0, 0)
    calls: dict[tuple[str, int], dict[Call, None]] = field(default_factory=dict)
    """By instance."""


class SimGateway:
    def __init__(
        self,
        targets: Sequence[Target],
        models: Sequence[FunctionModel],
        nodes: dict[str, SimNode],
        clock: Clock,
        samples: Samples,
        tell: Callable[[ev.Event], None],
        *,
        tokens: bool,
        moves: bool,
        resumes: bool,
    ) -> None:
        """`tokens`: nodes report them; `moves`: what is to move does; `resumes`: what is stopped keeps its tokens."""
        self._targets, self._models, self._nodes = targets, models, nodes
        self._clock, self._samples, self._tell = clock, samples, tell
        self._tells_tokens, self._moves, self._resumes = tokens, moves, resumes
        self.queue: WaitQueue[Call] = WaitQueue(1_000_000)
        self.slots = SlotTable()
        self._served = Served()
        self._lines: dict[Target, Line] = {target: Line() for target in targets}
        self._changed: dict[Target, None] = {}
        self._gathering = False
        self._seq = 0

    # -- requests --------------------------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        target, model = self._targets[request.function], self._models[request.function]
        self._samples.counts["requests"] += 1
        if model.slo_ttft:
            self._samples.counts["promised"] += 1
        call = Call(request, model, target, self._clock.now)
        slot = self.slots.reserve(target) if not self.queue.waiting(target) else None
        if slot is not None:
            self._begin(call, slot)
            return
        try:
            loser = self.queue.push(call, max_queue=model.max_queue, weight=model.weight)
        except QueueFull:
            self._samples.counts["refused"] += 1
            return
        if loser is not None:
            self._samples.counts["refused"] += 1
            self._later(loser.target)
        self._flush((target,))

    def _begin(self, call: Call, slot: Instance) -> None:
        now = self._clock.now
        call.waited += now - call.since
        call.slot, call.placed = slot, now
        line = self._lines[call.target]
        line.running += 1
        key = (slot.node, slot.number)
        line.calls.setdefault(key, {})[call] = None
        instance = self._nodes[slot.node].instances[slot.instance]
        instance.in_flight += 1
        model, request = call.model, call.request
        call.began = now + model.seconds + model.per_input * (request.input + call.done)
        if call.first is None:
            call.first = call.began
        self._plan(call)
        self._note_tokens(call, instance)
        self._later(call.target)

    def _plan(self, call: Call) -> None:
        call.turn += 1
        turn = call.turn
        end = call.began + call.model.per_output * max(0, call.request.output - call.done)
        self._clock.at(end, lambda: self._finish(call, turn))

    def _finish(self, call: Call, turn: int) -> None:
        if call.turn != turn:
            return
        call.turn += 1
        samples, first = self._samples, call.first
        assert first is not None
        samples.counts["answered"] += 1
        samples.startup.append(call.waited)
        if call.model.app:
            times = samples.apps.get(call.model.app)
            if times is None:
                times = samples.apps[call.model.app] = type(samples.startup)("d")
            times.append(call.waited)
        ttft = first - call.request.at
        samples.ttft.append(ttft)
        if call.model.slo_ttft and ttft <= call.model.slo_ttft:
            samples.counts["kept"] += 1
        self._served.add(call.target, self._clock.now - call.placed)
        self._leave(call)

    def _leave(self, call: Call) -> None:
        """Its slot is free."""
        slot = call.slot
        assert slot is not None
        self._detach(call)
        self.slots.release(slot)
        node = self._nodes[slot.node]
        instance = node.instances.get(slot.instance)
        if instance is not None:
            node.finish_drain(instance)
        self._serve(call.target)
        self._later(call.target)

    def _detach(self, call: Call) -> None:
        slot = call.slot
        assert slot is not None
        line = self._lines[call.target]
        line.running -= 1
        key = (slot.node, slot.number)
        calls = line.calls[key]
        del calls[call]
        if not calls:
            del line.calls[key]
        instance = self._nodes[slot.node].instances.get(slot.instance)
        if instance is not None:
            instance.in_flight -= 1
        call.slot = None

    def _serve(self, target: Target) -> None:
        while self.queue.waiting(target) and (slot := self.slots.reserve(target)) is not None:
            call = self.queue.pop(target)
            assert call is not None
            self._begin(call, slot)

    # -- instances -------------------------------------------------------------------------------------------

    def instance_changed(self, node: SimNode, instance: Running) -> None:
        """The invoker's grant, at the moment it would be sent."""
        limit = instance.start.spec.concurrency if instance.state == "ready" else 0
        self._seq += 1
        grant = Grant(instance.id, instance.target, limit, instance.start.spec.concurrency, node.name, instance.state)
        self.slots.grant(node.name, instance.number, self._seq, grant)
        if instance.state == "ready":
            self._serve(instance.target)
            self._later(instance.target)
        elif instance.state == "stopped":
            for call in list(self._lines[instance.target].calls.get((node.name, instance.number), ())):
                self._preempted(call)

    def _tokens(self, call: Call) -> int:
        """Generated so far."""
        spent = self._clock.now - call.began
        rate = call.model.per_output
        return min(call.request.output, call.done + (int(spent / rate) if rate and spent > 0 else 0))

    def migrate(self, source: SimNode, body: Migrate) -> None:
        """The invokers' and gateways' part of a move: as many as there are slots, then one answer for all."""
        instance = source.instances.get(body.instance)
        calls = list(self._lines[instance.target].calls.get((source.name, instance.number), ())) if instance else []
        move = Hand(body, source.name, len(calls))
        if not calls:
            self._answered(move)
        for call in calls:
            self._move(call, move)

    def _move(self, call: Call, move: Hand) -> None:
        """A round at the destination while it goes on here, then the hand-over, if a slot is there."""
        # The source takes nothing new, so it is another one's.
        slot = self.slots.reserve(call.target) if self._moves else None
        if slot is None:
            self._moved(move, "kept")
            return
        tokens = call.request.input + self._tokens(call)
        turn, began = call.turn, self._clock.now
        self._clock.after(call.model.per_input * tokens, lambda: self._commit(call, turn, slot, move, tokens, began))

    def _moved(
        self, move: Hand, outcome: Literal["moved", "ended", "kept"], seconds: float = 0.0, tokens: int = 0
    ) -> None:
        move.results.append(MoveResult("", outcome, total=seconds, paused=PAUSE, tokens=tokens))
        if len(move.results) == move.count:
            self._answered(move)

    def _answered(self, move: Hand) -> None:
        body = move.body
        self._tell(ev.MigrationEnded(move.node, Migrated(body.migration, body.instance, tuple(move.results))))

    def _commit(self, call: Call, turn: int, slot: Instance, move: Hand, tokens: int, began: float) -> None:
        there = self._nodes[slot.node].instances.get(slot.instance)
        if call.turn != turn or call.slot is None or there is None or there.state != "ready":
            self.slots.release(slot)  # it finished meanwhile, or the destination is gone
            self._serve(call.target)
            self._moved(move, "ended" if call.slot is None else "kept")
            return
        self._moved(move, "moved", self._clock.now + PAUSE - began, tokens)
        old = call.slot
        done = self._tokens(call)
        self._samples.counts["migrations"] += 1
        self._detach(call)
        self.slots.release(old)
        call.done, call.since = done, self._clock.now
        call.waited += PAUSE
        placed = call.placed
        self._begin(call, slot)
        call.placed = placed
        # What was computed at the destination need not be again: it goes on after the pause.
        call.began = self._clock.now + PAUSE
        self._plan(call)
        node = self._nodes[old.node]
        instance = node.instances.get(old.instance)
        if instance is not None:
            node.finish_drain(instance)

    def _preempted(self, call: Call) -> None:
        self._samples.counts["preemptions"] += 1
        slot = call.slot
        assert slot is not None
        call.turn += 1
        call.done = self._tokens(call) if self._resumes else 0
        if call.first is not None and call.first > self._clock.now:
            call.first = None
        self._detach(call)
        self.slots.release(slot)
        call.since = self._clock.now
        self.queue.push_front(call)
        self._flush((call.target,))

    def _note_tokens(self, call: Call, instance: Running) -> None:
        if self._tells_tokens:
            instance.tokens = call.request.input + call.done
            if instance.state == "ready":
                self._nodes[call.slot.node if call.slot else ""].report(instance)

    # -- demand ----------------------------------------------------------------------------------------------

    def _later(self, target: Target) -> None:
        self._changed[target] = None
        if not self._gathering:
            self._gathering = True
            self._clock.after(GATHER, self._gathered)

    def _gathered(self) -> None:
        self._gathering = False
        changed, self._changed = self._changed, {}
        self._flush(tuple(changed))

    def _flush(self, targets: Sequence[Target]) -> None:
        items = []
        for target in targets:
            line = self._lines[target]
            now = (self.queue.waiting(target), line.running)
            if now != line.sent:
                line.sent = now
                oldest = self.queue.oldest(target)
                age = self._clock.now - oldest.since if oldest else 0.0
                items.append(TargetDemand(target, *now, age, self.queue.tokens(target), *self._served.of(target)))
                self._served.told(target)
        if items:
            self._tell(ev.DemandSeen(NAME, tuple(items)))

    def fail(self, target: Target) -> None:
        """The controller says that nothing will come: what waits has failed."""
        self._samples.counts["refused"] += len(self.queue.take_all(target))
        self._later(target)

    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self.queue) + self.slots.in_flight()
