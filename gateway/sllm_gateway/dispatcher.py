"""Runs invocations on instances: the async shell around the pure parts of `sllm_faas.dispatch`.

    submit ──► slot free? ──► INVOKE ──► OUTPUT… ──► DONE | FAILED | CANCELLED ──► slot free ──► next in line
                  └─ no ──► queue, DEMAND, WANT          ▲
                              ▲── REFUSED ───────────────┘ (front of the line)

It decides nothing the pure parts decide, and knows neither HTTP nor sockets: links are objects with `send(parts)`,
and whoever owns them calls `on_invoker_message` and `on_controller_message`. One event loop, no locks. Per request it
makes no task and no timer: deadlines live in a wheel behind one `call_later`.

Invariants: an invocation is in exactly one of the queue, a slot (or adopted), back-off, or ended; its slot is released
by its terminal frame or its node's loss and by nothing else; every submitted handle ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from sllm_faas.dispatch.fences import Verdict, judge
from sllm_faas.dispatch.invocation import CANCEL_INTERVAL, Due, Invocation, State, TargetClock
from sllm_faas.dispatch.queue import WaitQueue
from sllm_faas.dispatch.routes import RouteTable
from sllm_faas.dispatch.slots import Instance, SlotTable
from sllm_faas.errors import (
    ErrorInfo,
    NotFound,
    SllmError,
    WireError,
    to_info,
)
from sllm_faas.spec import Target
from sllm_faas.wire import codec
from sllm_faas.wire.bus import Parts, PeerBusy, PeerGone
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import (
    Demand,
    Grant,
    Refused,
    TargetDemand,
    TargetFailed,
    Want,
)
from sllm_gateway import ends, frames
from sllm_gateway.alarm import Alarm
from sllm_gateway.demand import DemandReporter
from sllm_gateway.handle import Call, Ended, Handle
from sllm_gateway.rpc import Answers, Link, Rpc

REFUSAL_PAUSE = 0.05
"""Seconds for which an instance that refused without a new grant is left alone."""
_RETRYABLE = frozenset({"function_error", "worker_lost"})


class Dispatcher:
    """`on_ended(handle)` sees every invocation once, when its caller's answer is settled.

    `on_routes(table)` sees every change of the table. `drops` counts frames that were not believed, by reason.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        window: int = 1024,
        max_waiting: int = 10_000,
        on_ended: Callable[[Handle], None] | None = None,
        on_routes: Callable[[RouteTable], None] | None = None,
    ) -> None:
        self.clock = clock
        self.window = window
        self.routes = RouteTable()
        self.slots = SlotTable()
        self.queue: WaitQueue[Invocation] = WaitQueue(max_waiting)
        self.drops: Counter[str] = Counter()
        self.controller = Rpc("controller")
        self.nodes: dict[str, Rpc] = {}
        self.answers = Answers()
        self.adoptions: Callable[[str, codec.Frame], None] | None = None
        """Takes ADOPTED frames (see `adoption`)."""
        self._links: dict[str, Link] = {}
        self._controller_link: Link | None = None
        self._handles: dict[bytes, Handle] = {}
        self._by_inv: dict[Invocation, Handle] = {}
        self._running: Counter[Target] = Counter()
        self._clocks: dict[Target, TargetClock] = {}
        self._alarm = Alarm(clock, self._ring)
        self._on_ended = on_ended
        self._on_routes = on_routes
        self._demand = DemandReporter(self._measure, self._report, self._tell_wants, self._forget)

    # -- callers ---------------------------------------------------------------------------------------------

    def submit(self, call: Call) -> Handle:
        """Run `call`, now or when a slot is free. Raises QueueFull."""
        now = self.clock()
        inv = call.begin(now, self.window)
        handle = Handle(self, inv, call, time.time())
        if not self.queue.waiting(call.target):
            slot = self.slots.reserve(call.target)
            if slot is not None:
                self._add(handle)
                self._dispatch(handle, slot, None)
                return handle
        loser = self.queue.push(inv, max_queue=call.max_queue, weight=call.weight)
        self._add(handle)
        clock = self._clock_of(call.target)
        inv.wait(now, clock)
        self._alarm.set(inv, inv.due(now, clock))
        self._demand.urgent(call.target)
        if loser is not None:
            self._shed(loser, now)
        return handle

    def cancel(self, handle: Handle) -> None:
        """Give the invocation up: out of the queue at once, or CANCEL until its end is reported."""
        inv = handle.inv
        if inv.state in (State.CANCELLING, State.ENDED):
            return
        self._give_up(handle, ends.cancelled())

    def abandon(self, error: SllmError) -> None:
        """Give up everything that has not ended: the process is about to leave."""
        info = to_info(error)
        for handle in self.handles():
            if handle.inv.state not in (State.CANCELLING, State.ENDED):
                self._give_up(handle, info)

    def consumed(self, handle: Handle, outputs: int) -> None:
        """The caller took `outputs` more; perhaps the sender may go on."""
        inv = handle.inv
        inv.consumed += outputs
        if inv.state is State.STREAMING and inv.give_credit(self.clock(), self.window):
            self._send(handle, Type.CREDIT, credit=inv.credit)
            self._alarm.set(inv, inv.running_due())

    def handle(self, identity: bytes) -> Handle | None:
        """The invocation of that id that has not ended here."""
        return self._handles.get(identity)

    def handles(self) -> list[Handle]:
        return list(self._handles.values())

    def waiting(self) -> int:
        return len(self.queue)

    def __len__(self) -> int:
        """Invocations whose end is not known yet."""
        return len(self._handles)

    # -- links -----------------------------------------------------------------------------------------------

    def controller_up(self, link: Link) -> None:
        """The controller has welcomed us: it is told all demand."""
        self._controller_link = link
        self.controller.up(link.send)
        self._demand.report_all(set(self._clocks) | set(self._running))

    def controller_down(self) -> None:
        """Invocations go on; only what nobody but the controller knows is unavailable."""
        self._controller_link = None
        self.controller.down()

    def node_up(self, node: str, link: Link) -> None:
        """An invoker has welcomed us: its grants follow."""
        self._links[node] = link
        self.nodes.setdefault(node, Rpc(f"invoker {node}")).up(link.send)

    def node_down(self, node: str) -> None:
        """An invoker is lost, or has left: so is what ran there."""
        if self._links.pop(node, None) is None:
            return
        rpc = self.nodes.pop(node, None)
        if rpc is not None:
            rpc.down()
        targets = {instance.target for instance in self.slots.drop_node(node)}
        lost = ends.node_lost(node)
        for handle in [handle for handle in self._handles.values() if handle.node == node]:
            self._attempt_failed(handle, lost)
        self._ready_changed(targets)

    def on_controller_message(self, parts: Parts) -> bool:
        """Take in a frame from the controller. False: the table has a gap, say HELLO again."""
        try:
            frame = codec.decode(parts)
        except WireError:
            self.drops["bad_frame"] += 1
            return True
        body = frame.body
        match frame.header.type:
            case Type.ROUTES:
                self.routes.replace(body)
                self._rerouted()
                # The controller forgot our demand when we said HELLO, be it only for a gap.
                self._demand.report_all(set(self._clocks) | set(self._running))
            case Type.ROUTES_DELTA:
                if not self.routes.apply(body):
                    return False
                self._rerouted()
            case Type.TARGET_FAILED:
                self._target_failed(body)
            case Type.REPLY:
                if not self.controller.on_reply(frame.header.id, body):
                    self.drops["unasked_reply"] += 1
            case Type.REQUEST:
                self._tell_controller(self.answers.reply(frame.header, body))
            case Type.WELCOME | Type.HEARTBEAT | Type.BYE:
                pass  # the link's own business
            case _:
                self.drops["unexpected_type"] += 1
        return True

    def on_invoker_message(self, node: str, parts: Parts) -> None:
        """Take in a frame from an invoker. Whatever the bytes, nothing is raised."""
        try:
            frame = codec.decode(parts)
        except WireError:
            self.drops["bad_frame"] += 1
            return
        kind = frame.header.type
        if kind in (Type.OUTPUT, Type.DONE, Type.FAILED, Type.CANCELLED, Type.REFUSED):
            self._on_invocation_frame(node, frame)
        elif kind is Type.GRANT:
            self._on_grant(node, frame.header, frame.body)
        elif kind is Type.REPLY:
            rpc = self.nodes.get(node)
            if rpc is None or not rpc.on_reply(frame.header.id, frame.body):
                self.drops["unasked_reply"] += 1
        elif kind is Type.ADOPTED:
            if self.adoptions is not None:
                self.adoptions(node, frame)
        elif kind not in (Type.WELCOME, Type.HEARTBEAT, Type.BYE):
            self.drops["unexpected_type"] += 1

    def adopt(self, node: str, inv: Invocation, context: bytes, slot: Instance | None) -> Handle:
        """Speak for an invocation that another gateway left behind at `node`. Its slot is not from our grants."""
        handle = Handle(self, inv, None, time.time())
        handle.adopted = context
        handle.node = node
        handle.slot = slot
        self._add(handle)
        self._running[inv.target] += 1
        self._alarm.set(inv, inv.running_due())
        self._demand.changed(inv.target)
        return handle

    def send_to(self, node: str, parts: Parts) -> None:
        """Nothing happens when the node is not there; its loss is noticed elsewhere."""
        link = self._links.get(node)
        if link is not None:
            try:
                link.send(parts)
            except (PeerGone, PeerBusy):
                self.node_down(node)

    def linked(self) -> list[str]:
        """The nodes whose invokers have welcomed us."""
        return list(self._links)

    def close(self) -> None:
        """Stop the timers. What still runs is the invokers' to cancel."""
        self._demand.close()
        self._alarm.close()

    def tick(self) -> None:
        """See to every deadline that has passed. The alarm does; a test with its own clock may."""
        self._alarm.tick()

    # -- frames of invocations -------------------------------------------------------------------------------

    def _on_invocation_frame(self, node: str, frame: codec.Frame) -> None:
        header = frame.header
        handle = self._handles.get(header.id)
        if handle is None:
            self.drops["unknown_invocation"] += 1
            if header.type is Type.OUTPUT:  # work that nobody owns
                self.send_to(node, [Header(Type.CANCEL, header.id, header.fence, header.route).pack()])
            return
        inv = handle.inv
        if handle.node != node:
            self.drops["stray"] += 1
            return
        judgement = judge(header, fence=inv.fence, wanted=inv.wanted, credit=inv.credit)
        verdict = judgement.verdict
        if inv.state is State.CANCELLING and verdict in (Verdict.GAP, Verdict.OVERRUN, Verdict.DUPLICATE):
            verdict = Verdict.ACCEPT  # only its end matters any more
        if verdict is Verdict.ACCEPT:
            self._believe(handle, frame, judgement.skip)
            return
        self.drops[verdict.value] += 1
        if verdict in (Verdict.GAP, Verdict.OVERRUN):
            error = ends.broken(verdict.value, inv.wanted)
            if header.type is Type.OUTPUT:
                self._give_up(handle, error)
            else:
                self._finish(handle, Ended(error=error))

    def _believe(self, handle: Handle, frame: codec.Frame, skip: int) -> None:
        header, body, inv = frame.header, frame.body, handle.inv
        if header.type is Type.OUTPUT:
            if inv.state is State.CANCELLING:
                return
            outputs = frames.outputs(body, frame.buffers)
            if outputs is None or len(outputs) != header.items or not inv.stream:
                self.drops["bad_frame"] += 1
                return
            now = self.clock()
            first = not inv.wanted
            inv.output(now, header.items - skip)
            if first:
                self._alarm.set(inv, inv.running_due())
            handle.deliver(outputs[skip:] if skip else outputs)
        elif header.type is Type.DONE:
            payload = frames.result(body, frame.buffers)
            self._finish(handle, Ended(payload, None, body.seconds, body.usage, body.spans))
        elif header.type is Type.FAILED:
            self._attempt_failed(handle, body.error, body.seconds)
        elif header.type is Type.CANCELLED:
            self._finish(handle, Ended(error=ends.stopped()))
        else:
            self._refused(handle, body)

    def _refused(self, handle: Handle, body: Refused) -> None:
        inv, slot = handle.inv, handle.slot
        if inv.state is State.STREAMING:
            self.drops["bad_frame"] += 1
            return
        if slot is not None:
            # Our idea of its slots is wrong until the next grant: don't offer it the same work at once.
            limit, seq = slot.limit, slot.seq
            self.slots.suspend(slot)
            asyncio.get_running_loop().call_later(REFUSAL_PAUSE, self._resume_slot, slot, limit, seq)
        now = self.clock()
        self._release(handle)
        if handle.call is None or inv.state is State.CANCELLING:
            self._finish(handle, Ended(error=ends.refused(body.reason)))
            return
        clock = self._clock_of(inv.target)
        inv.refuse(now, clock)
        self.queue.push_front(inv)
        self._alarm.set(inv, inv.due(now, clock))
        self._demand.urgent(inv.target)
        self._reroute(inv.target)
        self._pump(inv.target)

    def _resume_slot(self, slot: Instance, limit: int, seq: int) -> None:
        if slot.seq == seq and self.slots.resume(slot, limit):
            self._pump(slot.target)

    # -- slots -----------------------------------------------------------------------------------------------

    def _on_grant(self, node: str, header: Header, grant: Grant) -> None:
        if node not in self._links or grant.node != node:
            self.drops["stray"] += 1
            return
        try:
            instance = self.slots.grant(node, header.route, header.seq, grant)
        except SllmError:
            self.drops["bad_frame"] += 1
            return
        target = grant.target
        self._ready_changed({target})
        self._pump(target)
        instance.wanted = instance.want(self.queue.waiting(target))
        self.send_to(node, codec.encode(Header(Type.WANT, route=header.route, seq=header.seq), Want(instance.wanted)))

    def _tell_wants(self, target: Target) -> None:
        waiting = self.queue.waiting(target)
        for instance in self.slots.of(target):
            want = instance.want(waiting)
            if want != instance.wanted:
                instance.wanted = want
                header = Header(Type.WANT, route=instance.number, seq=instance.seq)
                self.send_to(instance.node, codec.encode(header, Want(want)))

    def _pump(self, target: Target) -> None:
        """Dispatch what waits while there are slots."""
        while self.slots.has_free(target) and self.queue.waiting(target):
            inv = self.queue.pop(target)
            slot = self.slots.reserve(target)
            assert inv is not None
            assert slot is not None
            self._demand.changed(target)
            self._dispatch(self._by_inv[inv], slot, self._clock_of(target))

    def _dispatch(self, handle: Handle, slot: Instance, clock: TargetClock | None) -> None:
        inv, call = handle.inv, handle.call
        assert call is not None
        inv.dispatch(self.clock(), clock)
        handle.slot, handle.node = slot, slot.node
        self._running[inv.target] += 1
        self._alarm.set(inv, inv.running_due())
        self._demand.changed(inv.target)
        self.send_to(slot.node, frames.invoke(call, inv, slot.number))

    def _release(self, handle: Handle) -> None:
        """It is no longer in flight anywhere."""
        if not handle.node:
            return
        handle.node = ""
        target = handle.inv.target
        self._running[target] -= 1
        if not self._running[target]:
            del self._running[target]
        if handle.slot is not None and handle.call is not None:
            self.slots.release(handle.slot)
        self._demand.changed(target)

    # -- ends ------------------------------------------------------------------------------------------------

    def _attempt_failed(self, handle: Handle, error: ErrorInfo, seconds: float = 0.0) -> None:
        inv = handle.inv
        if handle.call is None or not inv.may_retry or error.code not in _RETRYABLE:
            self._finish(handle, Ended(error=error, seconds=seconds))
            return
        now = self.clock()
        self._release(handle)
        inv.retry(now)
        self._alarm.set(inv, inv.due(now, self._clock_of(inv.target)))
        self._pump(inv.target)

    def _give_up(self, handle: Handle, error: ErrorInfo) -> None:
        """The caller is answered now; what runs is told to stop, and keeps its slot until it has."""
        inv, now = handle.inv, self.clock()
        if inv.state is State.QUEUED:
            self.queue.remove(inv)
        inv.cancel(now)
        self._demand.changed(inv.target)
        if inv.state is State.ENDED:
            self._forget_handle(handle, Ended(error=error))
            return
        self._send(handle, Type.CANCEL)
        self._alarm.set(inv, Due(now + CANCEL_INTERVAL, "cancel"))
        self._settle(handle, Ended(error=error))

    def _finish(self, handle: Handle, ended: Ended) -> None:
        """It is over, here and where it ran."""
        inv = handle.inv
        if inv.state is State.QUEUED and inv in self.queue:
            self.queue.remove(inv)
            self._demand.changed(inv.target)
        inv.finish(self.clock())
        self._release(handle)
        self._forget_handle(handle, ended)
        self._pump(inv.target)

    def _settle(self, handle: Handle, ended: Ended) -> None:
        if handle.ended is None:
            handle.end(ended)
            if self._on_ended is not None:
                self._on_ended(handle)

    def _forget_handle(self, handle: Handle, ended: Ended) -> None:
        inv = handle.inv
        self._alarm.clear(inv)
        del self._handles[inv.id]
        del self._by_inv[inv]
        self._settle(handle, ended)
        handle.call = None

    def _shed(self, inv: Invocation, now: float) -> None:
        inv.finish(now)
        self._demand.changed(inv.target)
        self._forget_handle(self._by_inv[inv], Ended(error=ends.shed(inv.target.app, self.queue.limit)))

    def _fail_waiting(self, target: Target, error: ErrorInfo) -> None:
        for inv in list(self.queue.items(target)):
            self._finish(self._by_inv[inv], Ended(error=error))

    def _target_failed(self, body: TargetFailed) -> None:
        self._fail_waiting(body.target, body.error)

    # -- time ------------------------------------------------------------------------------------------------

    def _ring(self, inv: Invocation, now: float) -> None:
        due = inv.due(now, self._clock_of(inv.target))
        if due is not None and due.when <= now:
            self._passed(self._by_inv[inv], due, now)
        else:
            self._alarm.set(inv, due)  # it moved on since: an idle clock, say

    def _passed(self, handle: Handle, due: Due, now: float) -> None:
        inv = handle.inv
        if due.what == "cancel":
            inv.cancel(now)
            self._send(handle, Type.CANCEL)
            self._alarm.set(inv, Due(now + CANCEL_INTERVAL, "cancel"))
        elif due.what == "retry":
            clock = self._clock_of(inv.target)
            inv.wake(now, clock)
            self.queue.push_front(inv)
            self._alarm.set(inv, inv.due(now, clock))
            self._demand.urgent(inv.target)
            self._reroute(inv.target)
            self._pump(inv.target)
        else:
            self._give_up(handle, ends.overdue(inv, due.what))

    # -- targets ---------------------------------------------------------------------------------------------

    def _clock_of(self, target: Target) -> TargetClock:
        clock = self._clocks.get(target)
        if clock is None:
            clock = self._clocks[target] = TargetClock(self.clock(), self.slots.has_ready(target))
        return clock

    def _ready_changed(self, targets: set[Target]) -> None:
        now = self.clock()
        for target in targets:
            clock = self._clocks.get(target)
            if clock is not None and clock.set_ready(self.slots.has_ready(target), now):
                for inv in self.queue.items(target):
                    self._alarm.set(inv, inv.due(now, clock))

    def _rerouted(self) -> None:
        for target in self.queue.targets():
            self._reroute(target)
        if self._on_routes is not None:
            self._on_routes(self.routes)

    def _reroute(self, target: Target) -> None:
        """What waits for a version that no longer serves waits for the one that does."""
        try:
            new = self.routes.successor(target)
        except NotFound as error:
            self._fail_waiting(target, to_info(error))
            return
        if new == target:
            return
        now, clock = self.clock(), self._clock_of(new)
        kept = []
        for inv in self.queue.take_all(target):
            if self.routes.serves(new, inv.method):
                inv.target = new
                inv.wait(now, clock)
                self._alarm.set(inv, inv.due(now, clock))
                kept.append(inv)
            else:
                self._finish(self._by_inv[inv], Ended(error=ends.method_gone(new, inv.method)))
        self.queue.put_back(kept)
        self._demand.changed(target)
        if kept:
            self._demand.urgent(new)
            self._pump(new)

    def _measure(self, target: Target) -> TargetDemand:
        oldest = self.queue.oldest(target)
        age = self.clock() - oldest.submitted if oldest is not None else 0.0
        return TargetDemand(target, self.queue.waiting(target), self._running[target], age)

    def _report(self, demand: Demand) -> bool:
        return self._tell_controller(codec.encode(Header(Type.DEMAND), demand))

    def _tell_controller(self, parts: Parts) -> bool:
        if self._controller_link is None:
            return False
        try:
            self._controller_link.send(parts)
        except (PeerGone, PeerBusy):
            return False
        return True

    def _forget(self, target: Target) -> None:
        if not self.queue.waiting(target) and target not in self._running:
            self._clocks.pop(target, None)

    # -- small -----------------------------------------------------------------------------------------------

    def _add(self, handle: Handle) -> None:
        self._handles[handle.inv.id] = handle
        self._by_inv[handle.inv] = handle

    def _send(self, handle: Handle, kind: Type, credit: int = 0) -> None:
        inv = handle.inv
        route = handle.slot.number if handle.slot is not None else 0
        self.send_to(handle.node, [Header(kind, inv.id, inv.fence, route, credit=credit).pack()])

    def validate(self) -> None:
        """Assert the invariants; for tests, and after every event there."""
        self.queue.validate()
        self.slots.validate()
        self._alarm.validate()
        for handle in self._handles.values():
            inv = handle.inv
            inv.validate()
            assert self._by_inv[inv] is handle
            assert inv.state is not State.ENDED, f"{inv.id.hex()} ended and is kept"
            assert (inv.state is State.QUEUED) == (inv in self.queue), f"{inv.id.hex()} is {inv.state} and not in line"
            assert bool(handle.node) == (inv.state in (State.DISPATCHED, State.STREAMING, State.CANCELLING))
        running = Counter(handle.inv.target for handle in self._handles.values() if handle.node)
        assert running == self._running, "running counts disagree"
        ours = sum(1 for handle in self._handles.values() if handle.node and handle.call is not None)
        assert ours == self.slots.in_flight(), "slots in flight and invocations disagree"
        assert len(self._handles) == len(self._by_inv)
