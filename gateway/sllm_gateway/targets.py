"""What waits and what runs, by target: the lines, the time spent in them, and who is told that there is demand.

    line_up, again ──► line ──► take ──► started … stopped          DEMAND to the controller, WANT to the invokers

Not the one that dispatches: it says what is next, and is told what became of it. Invariant: what is in a line has its
deadline set by the clock of the target whose line that is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from sllm_faas.dispatch.caps import Caps
from sllm_faas.dispatch.invocation import Invocation, TargetClock
from sllm_faas.dispatch.queue import WaitQueue
from sllm_faas.dispatch.routes import RouteTable
from sllm_faas.dispatch.served import Served
from sllm_faas.dispatch.slots import Instance, SlotTable
from sllm_faas.errors import ErrorInfo, NotFound, to_info
from sllm_faas.spec import Target
from sllm_faas.wire import codec
from sllm_faas.wire.bus import Parts
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Demand, Want
from sllm_gateway import ends
from sllm_gateway.alarm import Alarm
from sllm_gateway.demand import DemandReporter


class Rerouted(NamedTuple):
    """What became of a line: nothing (`to` None), or it waits for `to` now, `ended` excepted."""

    to: Target | None = None
    ended: tuple[tuple[Invocation, ErrorInfo], ...] = ()


class Targets:
    """`report` sends a Demand to the controller and says whether it went out; `send` reaches an invoker."""

    def __init__(
        self,
        clock: Callable[[], float],
        slots: SlotTable,
        alarm: Alarm,
        max_waiting: int,
        report: Callable[[Demand], bool],
        send: Callable[[str, Parts], None],
    ) -> None:
        self.queue: WaitQueue[Invocation] = WaitQueue(max_waiting)
        self.caps = Caps()
        self._clock = clock
        self._slots = slots
        self._alarm = alarm
        self._send = send
        self._running: dict[Target, int] = {}
        self._wanting: set[Target] = set()
        """Where the last WANT may have asked for something."""
        self._clocks: dict[Target, TargetClock] = {}
        self._served = Served()
        self._demand = DemandReporter(self._counts, self._line, self._served, report, self._tell_wants, self._forget)

    def close(self) -> None:
        self._demand.close()

    # -- lines -----------------------------------------------------------------------------------------------

    def line_up(self, inv: Invocation, max_queue: int, weight: float) -> Invocation | None:
        """To the end of its line. Returns who lost their place to it, if somebody did. Raises QueueFull."""
        loser = self.queue.push(inv, max_queue=max_queue, weight=weight)
        now, clock = self._clock(), self.clock_of(inv.target)
        inv.wait(now, clock)
        self._alarm.set(inv, inv.due(now, clock))
        self._demand.urgent(inv.target)
        if loser is not None:
            self._demand.changed(loser.target)
        return loser

    def again(self, inv: Invocation) -> None:
        """To the head of its line, where it has been before."""
        self.queue.push_front(inv)
        self._alarm.set(inv, inv.due(self._clock(), self.clock_of(inv.target)))
        self._demand.urgent(inv.target)

    def leave(self, inv: Invocation) -> None:
        """It waits no more. Nothing happens when it did not."""
        if inv in self.queue:
            self.queue.remove(inv)
            self._demand.changed(inv.target)

    def take(self, target: Target) -> tuple[Invocation, Instance] | None:
        """Who is next, and the slot it gets; None when there is nobody, or no slot, or its app runs all it may."""
        if not self.queue.waiting(target) or not self._slots.has_free(target) or not self.caps.room(target.app, 1):
            return None
        inv, slot = self.queue.pop(target), self._slots.reserve(target)
        assert inv is not None
        assert slot is not None
        self._demand.changed(target)
        return inv, slot

    def straight(self, target: Target) -> Instance | None:
        """A slot for a newcomer, if nobody waits before it and its app may run more."""
        if self.queue.waiting(target) or not self.caps.room(target.app, 1):
            return None
        return self._slots.reserve(target)

    def in_turn(self, target: Target) -> list[Target]:
        """Whose line may go on when something changed for the target: its own; where its app is capped all of its,
        those first that have waited longest."""
        if not self.caps.capped(target.app):
            return [target]
        lines = [(oldest.submitted, each) for each, oldest in self._oldest_of(target.app)]
        return [each for _, each in sorted(lines)]

    def _oldest_of(self, app: str) -> list[tuple[Target, Invocation]]:
        mine = [target for target in self.queue.targets() if target.app == app]
        return [(target, oldest) for target in mine if (oldest := self.queue.oldest(target)) is not None]

    def reroute(self, target: Target, routes: RouteTable) -> Rerouted:
        """What waits for a version that no longer serves waits for the one that does; what has been answered in part
        cannot: another version would answer something else."""
        if not self.queue.waiting(target):
            return Rerouted()
        try:
            new = routes.successor(target)
        except NotFound as error:
            info = to_info(error)
            return Rerouted(target, tuple((inv, info) for inv in self.queue.items(target)))
        if new == target:
            return Rerouted()
        now, clock = self._clock(), self.clock_of(new)
        kept, ended = [], []
        for inv in self.queue.take_all(target):
            if inv.wanted:
                ended.append((inv, ends.version_gone(target)))
            elif not routes.serves(new, inv.method):
                ended.append((inv, ends.method_gone(new, inv.method)))
            else:
                inv.target = new
                inv.wait(now, clock)
                self._alarm.set(inv, inv.due(now, clock))
                kept.append(inv)
        self.queue.put_back(kept)
        self._demand.changed(target)
        if kept:
            self._demand.urgent(new)
        return Rerouted(new, tuple(ended))

    # -- running ---------------------------------------------------------------------------------------------

    def started(self, target: Target) -> None:
        self._running[target] = self._running.get(target, 0) + 1
        self.caps.started(target.app)
        self._demand.changed(target)

    def stopped(self, inv: Invocation) -> None:
        """It is in no slot any more."""
        target, seconds = inv.target, inv.service
        if seconds is not None:
            self._served.add(target, seconds)
        running = self._running.pop(target) - 1
        if running:
            self._running[target] = running
        self.caps.stopped(target.app)
        self._demand.changed(target)
        if self.caps.capped(target.app):
            for other, _ in self._oldest_of(target.app):
                self._demand.urgent(other)  # what was above the cap is demand now

    # -- time ------------------------------------------------------------------------------------------------

    def clock_of(self, target: Target) -> TargetClock:
        clock = self._clocks.get(target)
        if clock is None:
            clock = self._clocks[target] = TargetClock(self._clock(), self._slots.has_ready(target))
        return clock

    def ready_changed(self, targets: Collection[Target]) -> None:
        """Perhaps there is a ready instance of them now, or none any more: other deadlines run."""
        now = self._clock()
        for target in targets:
            clock = self._clocks.get(target)
            if clock is not None and clock.set_ready(self._slots.has_ready(target), now):
                for inv in self.queue.items(target):
                    self._alarm.set(inv, inv.due(now, clock))

    # -- demand ----------------------------------------------------------------------------------------------

    def report_all(self) -> None:
        """The controller may know nothing of our demand."""
        self._demand.report_all(set(self._clocks) | set(self._running))

    def answer_grant(self, instance: Instance) -> None:
        """WANT: the grant was taken in, and so many slots more could be used."""
        instance.wanted = instance.want(self._usable(instance.target))
        self._say_want(instance)

    def _tell_wants(self, target: Target) -> None:
        waiting = self._usable(target)
        if not waiting and target not in self._wanting:
            return
        self._wanting.discard(target)
        for instance in self._slots.of(target):
            want = instance.want(waiting)
            if want != instance.wanted:
                instance.wanted = want
                self._say_want(instance)
            elif want:
                self._wanting.add(target)

    def _say_want(self, instance: Instance) -> None:
        if instance.wanted:
            self._wanting.add(instance.target)
        header = Header(Type.WANT, route=instance.number, seq=instance.seq)
        self._send(instance.node, codec.encode(header, Want(instance.wanted)))

    def _counts(self, target: Target) -> tuple[int, int]:
        return self._usable(target), self._running.get(target, 0)

    def _usable(self, target: Target) -> int:
        """How many slots more it could use: one for each that waits, as far as its app may run them. But one if any
        waits, so that its turn does not pass to the app's other functions for want of a slot."""
        waiting = self.queue.waiting(target)
        return max(1, self.caps.room(target.app, waiting)) if waiting else 0

    def _line(self, target: Target) -> tuple[float, int]:
        """Age in seconds of the oldest that waits, and about how many tokens do."""
        oldest = self.queue.oldest(target)
        return self._clock() - oldest.submitted if oldest is not None else 0.0, self.queue.tokens(target)

    def _forget(self, target: Target) -> None:
        if not self.queue.waiting(target) and target not in self._running:
            self._clocks.pop(target, None)
            self._served.told(target)

    def validate(self, running: Mapping[Target, int]) -> None:
        """`running`: what runs, counted by its owner."""
        self.queue.validate()
        assert running == self._running, "running counts disagree"
        apps: dict[str, int] = {}
        for target, count in running.items():
            apps[target.app] = apps.get(target.app, 0) + count
        self.caps.validate(apps)
