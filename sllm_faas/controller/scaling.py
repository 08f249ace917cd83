"""Brings a target's instances to the number that is wanted: starts, cancels, stops, back-off, refusals.

One target at a time and idempotent: with nothing changed, looking again commands nothing. What a target is owed
depends on its version:

    serving      the active version: what `autoscale.desired` says, held over the scale-down window
    warming      being deployed: its `min_containers`, before it may become active
    superseded   no longer active: only what still waits for it, no window; else it drains
    gone         deleted, failed or unknown: nothing; who waits is told so
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import msgspec

from sllm_faas.controller import autoscale, placement, tables
from sllm_faas.controller.candidates import Candidates
from sllm_faas.controller.commands import FailTarget, SendHasten, SendStart, SendStop
from sllm_faas.controller.estimate import Estimate
from sllm_faas.controller.ledger import Ledger
from sllm_faas.controller.migration import Migrations, can_move
from sllm_faas.controller.model import Instance, TargetState, key_of
from sllm_faas.controller.service_times import SlotWait, service_time, slot_wait
from sllm_faas.controller.shares import CLOSE, memory_mb
from sllm_faas.errors import NoCapacity, NotFound, to_info
from sllm_faas.spec import FunctionSpec, Target
from sllm_faas.wire.messages import Hasten, Start, Stop, TargetFailed

CLAIMS = 3
"""Apps above their share, the furthest above first, that are asked for room."""
TOGETHER = 0.005
"""Starts on a machine within so many seconds are one crowd: a burst comes as a few events, one after the other."""
Mode = Literal["serving", "warming", "superseded", "gone"]


class Scaler:
    def __init__(self, ledger: Ledger, policy: placement.Policy, migrate: bool) -> None:
        self.ledger = ledger
        self.policy = policy
        self.candidates = Candidates(ledger, migrate=migrate, exhaustive=policy.exhaustive)
        self.migrations = Migrations(ledger, self)
        self.state = ledger.state
        self._begun: list[Instance] = []
        """Starts commanded for the present event."""

    # -- what is owed ----------------------------------------------------------------------------------------

    def mode(self, target: Target) -> Mode:
        return self._owed(target)[0]

    def _owed(self, target: Target) -> tuple[Mode, FunctionSpec | None]:
        """By what rule, and with which spec; None: nothing is."""
        spec = self.ledger.function(target)
        if spec is None:
            return "gone", None
        app = self.state.apps[target.app]
        if app.active == target.version:
            return "serving", spec
        state = app.versions[target.version].state
        if state == "warming":
            return "warming", spec
        return ("superseded", spec) if state == "ready" else ("gone", None)

    def wanted(self, target: Target, mode: Mode, spec: FunctionSpec | None, waiting: int, running: int) -> int:
        if spec is None or mode == "gone":
            return 0
        scaling = autoscale.scaling_of(target, spec)
        tokens = self.ledger.tokens(key_of(target)) if scaling.target_tokens else 0
        if mode == "warming":
            return scaling.min_containers
        if mode == "superseded":
            bare = replace(scaling, min_containers=0, buffer_containers=0)
            return autoscale.desired(bare, spec.concurrency, waiting, running, tokens) if waiting else 0
        return autoscale.desired(scaling, spec.concurrency, waiting, running, tokens)

    # -- one target ------------------------------------------------------------------------------------------

    def reconcile(self, key: str, most: int | None = None) -> bool:
        """Look after one target; `most`: starts at a time. True: it wants more than those and may go on."""
        record = self.state.targets.get(key)
        if record is None:
            return False
        target = record.target
        mode, spec = self._owed(target)
        window = spec.scaling.scaledown_window if spec is not None and mode in ("serving", "warming") else 0.0
        waiting, running = self.ledger.load(key)
        now = self.ledger.now
        if not waiting:
            record.waiting_since = None
        elif record.waiting_since is None:
            record.waiting_since = now
        if record.failures and now >= record.forget_at:
            record.failures = 0
        if record.error is not None and now >= record.retry_at:
            record.error = None

        want = self.wanted(target, mode, spec, waiting, running)
        if want != record.desired:
            longest = max(window, autoscale.START_HOLD)
            record.peaks = autoscale.note_peak(record.peaks, now, record.desired, longest)
            record.desired = want

        live = self.ledger.live(key)
        ready = [instance for instance in live if instance.state == "ready"]
        if self.ledger.note_spare(key, len(live) - want, ready):
            self.ledger.room_changed()
        few = autoscale.PANIC * (live[0].concurrency if live else 1)
        kept = self._pressure(record, waiting + running, few, ready, want, window if mode == "serving" else 0.0)
        blocked, more = "", False
        if waiting and len(ready) < len(live):
            self._hasten(waiting, live)
        if spec is not None and want > len(live):
            begun = self.state.created
            blocked = self._grow(record, spec, want - len(live), live, waiting + running, most)
            if not blocked:
                self.ledger.dirty.discard(key)  # by its own starts, which leave nothing more to do
                more = begun < self.state.created < begun + want - len(live)
        elif len(live) > want:
            hold = 0.0 if window == 0.0 and mode != "serving" else autoscale.START_HOLD
            least = autoscale.scaling_of(target, spec).min_containers if spec is not None else 0
            self._shrink(record, window, hold, least, live, ready, kept)
        self._block(record, key, blocked)
        if mode == "gone" and waiting:
            record.error = to_info(
                NotFound(f"{target} is not deployed (any more)", hint="Deploy the app, or call its serving version.")
            )
        self._refuse(record, key)
        self._release(record, key)
        return more

    def _pressure(
        self, record: TargetState, load: int, few: float, ready: Sequence[Instance], want: int, stable: float
    ) -> int:
        """How many stay because of a panic, which a load up to `few` never is. What may become one is looked at again
        when it would be."""
        pressure = record.pressure
        if load == pressure.load and load <= few and not pressure.until:
            return 0  # as nearly always
        capacity = sum([i.concurrency for i in ready])
        kept = autoscale.note_load(pressure, self.ledger.now, load, capacity, want, stable)
        if load > few and stable and (soon := autoscale.panics_in(pressure, capacity)) is not None:
            self.ledger.wake_target(record, self.ledger.now + soon)
        return kept

    def _grow(
        self,
        record: TargetState,
        spec: FunctionSpec,
        missing: int,
        live: Sequence[Instance],
        load: int,
        most: int | None,
    ) -> str:
        """Start what is missing for a demand of `load` invocations, `most` of it now. Returns why it has to wait, if it
        has to."""
        if self.ledger.now < record.retry_at:
            self.ledger.wake_target(record, record.retry_at)
            return ""
        if self.ledger.now < self.state.settle_until:
            return "waits for the nodes to report"
        if record.failures:
            # After a failure one start is the probe; the others wait for how it ends.
            missing = min(missing, 1 - sum(instance.state != "ready" for instance in live))
        grown = 0 < record.waits_up_to < load
        if record.blocked and self.ledger.now < record.look_at and missing > 0 and not grown:
            self.ledger.wake_target(record, record.look_at)
            return record.blocked
        for _ in range(missing if most is None else min(missing, most)):
            harm = not self.makes_room(record)
            choice = self.policy.place(
                self.candidates.of(record.target, spec, idle=harm, movable=harm),
                partial(self._own_slot, record, spec, load),
            )
            if isinstance(choice, placement.Full) and choice.stuck and harm:
                choice = self._claim(record.target, spec) or choice
            why = record.placement = choice.why
            record.waits_up_to = 0
            if isinstance(choice, placement.Placed):
                if record.made_room:
                    why = record.placement = f"after {record.made_room}: {why}"
                    record.made_room = ""
                self.start(record.target, spec, choice.node, choice.estimate, why)
                continue
            if isinstance(choice, placement.Evict | placement.Move):
                record.made_room = choice.done
            if isinstance(choice, placement.Evict):
                record.evicted = list(choice.instances)
                for name in choice.instances:
                    self._let_go(self.state.instances[name], f"evicted for {record.target}", choice.drain)
            elif isinstance(choice, placement.Move):
                for name, to in choice.moves:
                    self.migrations.make_room(self.state.instances[name], to, f"room for {record.target}")
            elif choice.never and not live:
                record.error = to_info(NoCapacity(f"{record.target} cannot start: {choice.why}", hint=choice.hint))
                record.retry_at = self.ledger.now + autoscale.BACKOFF_LIMIT
                self.ledger.wake_target(record, record.retry_at)
            elif choice.own_slot:
                record.waits_up_to = load
            record.look_at = self.ledger.now + min(choice.again, placement.AGAIN)
            self.ledger.wake_target(record, record.look_at)
            return why
        return ""

    def makes_room(self, record: TargetState) -> bool:
        """Whether what was evicted for it, and runs nothing, has yet to go. Then nobody else has to: another would most
        likely take as long to end. What takes very long is given up."""
        if not record.evicted:
            return False
        instances, gone = self.state.instances, self.ledger.now - placement.AGAIN
        going = [instance for name in record.evicted if (instance := instances.get(name)) is not None]
        return any(i.draining_since is not None and i.draining_since > gone and not i.running for i in going)

    def _own_slot(self, record: TargetState, spec: FunctionSpec, load: int) -> SlotWait | None:
        """Waiting for those that are ready instead of one more start; None: that one is not wanted for who waits."""
        target, now = record.target, self.ledger.now
        each = service_time(self.state.book, f"{target.app}/{target.function}")
        if each is None or record.waiting_since is None:
            return None
        live = self.ledger.live(key_of(target))
        if len(live) < autoscale.scaling_of(target, spec).min_containers:
            return None
        ahead = load - sum([i.concurrency for i in live])
        slots = sum([i.concurrency for i in live if i.state == "ready"])
        return slot_wait(each, ahead, slots, now - record.waiting_since)

    def _claim(self, target: Target, spec: FunctionSpec) -> placement.Choice | None:
        """How to get room from an app that would still hold as much for its weight without it as this one with it, so
        never the other way round next. Its instances finish what they run."""
        shares, size = self.ledger.shares, self.ledger.size_mb(spec.checkpoint.digest if spec.checkpoint else "")
        mine = shares.of(target.app, spec.memory_mb + size, spec.gpus)
        for app in shares.above(mine, target.app)[:CLAIMS]:
            choice = self.policy.place(self.candidates.claimable(target, spec, app))
            if isinstance(choice, placement.Evict):
                gone = [i for name in choice.instances if (i := self.state.instances[name]).target.app == app]
                mb, gpus = sum(map(memory_mb, gone)), sum(i.gpus for i in gone)
                if shares.of(app, -mb, -gpus) >= mine - CLOSE:
                    return choice
            elif not isinstance(choice, placement.Full) or not choice.stuck:
                return choice
        return None

    def _shrink(
        self,
        record: TargetState,
        window: float,
        hold: float,
        least: int,
        live: Sequence[Instance],
        ready: Sequence[Instance],
        kept: int,
    ) -> None:
        """Cancel starts that nobody waits for, stop what has been idle for long enough, be woken for the rest. `kept`:
        so many stay because of a panic."""
        now, count = self.ledger.now, len(live)
        if len(ready) < count:
            keep = max(kept, autoscale.held(record.peaks, now, record.desired, hold))
            for instance in reversed([instance for instance in live if instance.state != "ready"]):
                if count <= keep:
                    break
                self.stop(instance, "nobody waits for it any more", 0.0)
                count -= 1
        keep = autoscale.held(record.peaks, now, record.desired, window)
        keep = max(kept, keep + (autoscale.spare(keep, least) if window else 0))
        if count > keep:
            rested = [instance for instance in ready if (instance.ready or 0.0) + window <= now]
            for instance in sorted(rested, key=lambda i: (i.running, -(i.ready or 0.0), -i.seq)):
                if count <= keep:
                    break
                self._let_go(instance, f"idle for {window:g} s" if window else "not needed any more")
                count -= 1
        if count > record.desired:
            times = [(instance.ready or 0.0) + window for instance in ready]
            times += [autoscale.next_end(record.peaks, now, span) for span in (hold, window)]
            times += [record.pressure.until] if kept else []
            later = [when for when in times if when > now]
            if later:
                self.ledger.wake_target(record, min(later))

    def _let_go(self, instance: Instance, why: str, drain: float | None = None) -> None:
        """Stop it; what runs there goes on in the others if it can and may."""
        self.stop(instance, why, drain)
        if drain is None and self.candidates.migrate and instance.running:
            spec = self.ledger.function(instance.target)
            if spec is not None and can_move(spec):
                self.migrations.empty(instance, why)

    def _block(self, record: TargetState, key: str, why: str) -> None:
        if bool(why) != bool(record.blocked):
            blocked = self.state.blocked
            if why:
                insort(blocked, key)
            else:
                del blocked[bisect_left(blocked, key)]
                record.made_room, record.evicted = "", []
        record.blocked = why

    def _refuse(self, record: TargetState, key: str) -> None:
        """Tell those who wait that nothing will come, once per demand they sent."""
        if record.error is None or self.ledger.live(key):
            return
        waiting = [name for name, item in self.ledger.demand(key).items() if item.waiting and name not in record.told]
        if waiting:
            left = max(0.0, record.retry_at - self.ledger.now)
            error = replace(record.error, retry_after=round(left, 3)) if left else record.error
            record.told = sorted({*record.told, *waiting})
            self.ledger.emit(FailTarget(tuple(sorted(waiting)), TargetFailed(record.target, error)))

    def _release(self, record: TargetState, key: str) -> None:
        """Forget a target about which there is nothing to remember."""
        if record.desired or record.failures or self.ledger.demand(key) or self.ledger.instances_of(key):
            if record.failures:
                self.ledger.wake_target(record, max(record.forget_at, self.ledger.now))
            return
        if record.error is not None and self.ledger.now < record.retry_at:
            return
        self._block(record, key, "")
        del self.state.targets[key]

    # -- starting and stopping -------------------------------------------------------------------------------

    def start(
        self, target: Target, spec: FunctionSpec, node: str, guess: Estimate, why: str, replaces: str = ""
    ) -> None:
        """Start an instance there. `replaces`: it counts for nothing until that one drains."""
        self.state.created += 1
        digest = spec.checkpoint.digest if spec.checkpoint else ""
        key = key_of(target)
        waiting, _ = self.ledger.load(key)
        ahead = not replaces and waiting <= self._coming(self.ledger.live(key))
        instance = Instance(
            id=f"ins-{self.state.life}-{self.state.created}",
            seq=self.state.created,
            target=target,
            node=node,
            state="requested",
            asked=self.ledger.now,
            memory_mb=spec.memory_mb,
            digest=digest,
            size=self.state.sizes.get(digest, 0),
            predicted=guess.total,
            margin=guess.margin,
            gpus=spec.gpus,
            queued=guess.queue,
            load=guess.load,
            replaces=replaces,
            warmth=guess.warmth,
            tier=guess.tier,
            why=why,
            concurrency=spec.concurrency,
            ahead=ahead,
        )
        self.ledger.add_instance(instance)
        self._begun.append(instance)
        version = self.ledger.version(target.app, target.version)
        assert version is not None
        bundle = version.spec.bundle if spec.kind != "llm" else ""
        predicted = round(guess.total, 4)
        start = Start(instance.id, target, spec, bundle, why=why, predicted=predicted, ahead=ahead)
        self.ledger.emit(SendStart(node, start))

    def _coming(self, live: Sequence[Instance]) -> int:
        """Slots of the starts that somebody waits for."""
        return sum([i.concurrency for i in live if i.state != "ready" and not i.ahead])

    def _hasten(self, waiting: int, live: Sequence[Instance]) -> None:
        """As many of the starts ahead of need as somebody waits for by now are so no more, the oldest first."""
        coming = self._coming(live)
        for instance in live:
            if coming >= waiting:
                break
            if instance.ahead and instance.state != "ready":
                instance.ahead = False
                coming += instance.concurrency
                self.ledger.emit(SendHasten(instance.node, Hasten(instance.id)))

    def restate(self) -> None:
        """Starts commanded together slow each other down, the first ones too, which knew nothing of the rest."""
        begun, self._begun = self._begun, []
        crowds: dict[str, Instance] = {}
        for instance in begun:
            if instance.id not in crowds and (node := self.state.nodes.get(instance.node)) is not None:
                beside = self.candidates.starting_beside(node)
                crowd = [i for i in beside if self.ledger.now - i.asked <= TOGETHER] if len(beside) > 1 else ()
                if len(crowd) > 1:
                    crowds.update({i.id: i for i in crowd})
        for instance in sorted(crowds.values(), key=lambda i: i.seq):
            spec, node = self.ledger.function(instance.target), self.state.nodes.get(instance.node)
            if spec is not None and node is not None:
                crowded = self.candidates.guess(node, instance.target, spec, but=instance.id)
                instance.predicted = msgspec.structs.replace(crowded, queue=instance.queued, load=instance.load).total
                self.ledger.restate(instance.id, round(instance.predicted, 4))

    def stop(self, instance: Instance, why: str, drain: float | None) -> None:
        """Drain it. One that drains already is told again only to end sooner."""
        before = instance.state
        after = tables.move(tables.INSTANCE, f"instance {instance.id}", before, "stop")
        assert after == "draining"
        if before == "draining" and drain is None:
            return
        instance.state = "draining"
        instance.stopping = instance.stopping or why
        instance.drain = drain
        self.ledger.note_state(instance)
        if not self.ledger.take_spare(instance):  # its target has nothing to do about one that it could spare
            self.ledger.touch(instance.target)
        self.ledger.emit(SendStop(instance.node, Stop(instance.id, drain, why)))

    def stop_again(self, instance: Instance) -> None:
        """Its node did not hear that it drains."""
        self.ledger.emit(SendStop(instance.node, Stop(instance.id, instance.drain, instance.stopping)))
