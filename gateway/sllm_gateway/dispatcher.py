"""Runs invocations on instances: the async shell around the pure parts of `sllm_faas.dispatch`.

    submit ──► slot free? ──► INVOKE ──► OUTPUT… ──► DONE | FAILED | CANCELLED ──► slot free ──► next in line
                  └─ no ──► queue, DEMAND, WANT          ▲
                              ▲── REFUSED ───────────────┤ (front of the line)
                              ▲── instance lost ─────────┤ (the same, under a raised fence, from what was believed)
                                             MOVED ──────┘ ACTIVATE where it is held already

It decides nothing the pure parts decide, and knows neither HTTP nor sockets: links are objects with `send(parts)`,
and whoever owns them calls `on_invoker_message` and `on_controller_message`. One event loop, no locks. Per request it
makes no task and no timer: deadlines live in a wheel behind one `call_later`.

Invariants: an invocation is in exactly one of a line, a slot (or adopted, or moved to), back-off, or ended; a slot is
released by a terminal frame or its node's loss and by nothing else; every submitted handle ends; nothing is believed
but what is said under an invocation's own fence by the node where it is.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from sllm_faas.dispatch.fences import Verdict, judge
from sllm_faas.dispatch.invocation import CANCEL_INTERVAL, Due, Invocation, State, TargetClock
from sllm_faas.dispatch.resume import Resume
from sllm_faas.dispatch.routes import RouteTable
from sllm_faas.dispatch.slots import Instance, SlotTable
from sllm_faas.errors import ErrorInfo, SllmError, WireError, to_info
from sllm_faas.spec import Target
from sllm_faas.wire import codec
from sllm_faas.wire.bus import Parts, PeerBusy, PeerGone
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Demand, Grant, Moved, Refused, TargetFailed
from sllm_gateway import ends, frames
from sllm_gateway.alarm import Alarm
from sllm_gateway.control import Control
from sllm_gateway.ghosts import Ghosts
from sllm_gateway.handle import Call, Ended, Handle
from sllm_gateway.moves import objection
from sllm_gateway.rpc import Link, Rpc
from sllm_gateway.targets import Targets

REFUSAL_PAUSE, SUSPICION = 0.05, 10.0
"""Seconds for which an instance that refused without a new grant is left alone; and one that fell silent, longer
than its invoker takes to kill it if it is frozen."""
_RETRYABLE = frozenset({"function_error", "worker_lost"})
_OF_INVOCATIONS = frozenset({Type.OUTPUT, Type.DONE, Type.FAILED, Type.CANCELLED, Type.REFUSED, Type.MOVED})
_IN_FLIGHT = (State.DISPATCHED, State.STREAMING)


class Adopter(Protocol):
    """Takes over what other gateways left behind (see `adoption`)."""

    def on_adopted(self, node: str, frame: codec.Frame) -> None: ...

    def early(self, node: str, frame: codec.Frame) -> bool:
        """A frame of an invocation without a handle: whether it is kept for the one that it may yet get."""


class Dispatcher:
    """`on_ended(handle)` sees every invocation once, when its caller's answer is settled.

    `name`: the gateway's, in routes. `on_routes(table)` sees every change of the table. `drops` counts frames that were
    not believed, by reason; `resumes` what went on elsewhere after a loss, by its cause; `moves` the offers of a move.
    """

    def __init__(
        self,
        *,
        name: str = "",
        clock: Callable[[], float] = time.monotonic,
        window: int = 1024,
        max_waiting: int = 10_000,
        on_ended: Callable[[Handle], None] | None = None,
        on_routes: Callable[[RouteTable], None] | None = None,
    ) -> None:
        self.name = name
        self.clock = clock
        self.window = window
        self.slots = SlotTable()
        self.drops: Counter[str] = Counter()
        self.resumes: Counter[str] = Counter()
        self.moves: Counter[str] = Counter()
        self.nodes: dict[str, Rpc] = {}
        self.adoptions: Adopter | None = None
        self._links: dict[str, Link] = {}
        self._handles: dict[bytes, Handle] = {}
        self._by_inv: dict[Invocation, Handle] = {}
        self._on_ended = on_ended
        self._on_routes = on_routes
        self._alarm = Alarm(clock, self._ring)
        self._targets = Targets(clock, self.slots, self._alarm, max_waiting, self._report, self.send_to)
        self._ghosts = Ghosts(self.send_to, self._ghost_ended)
        self.queue = self._targets.queue
        self._control = control = Control(self.drops, self._targets.report_all, self._rerouted, self._fail_waiting)
        self.routes = control.routes
        self.controller = control.rpc
        self.answers = control.answers
        self.controller_up = control.up
        self.controller_down = control.down
        self.on_controller_message = control.on_message

    # -- callers ---------------------------------------------------------------------------------------------

    def submit(self, call: Call) -> Handle:
        """Run `call`, now or when a slot is free. Raises QueueFull."""
        now = self.clock()
        inv = call.begin(now, self.window)
        handle = Handle(self, inv, call, time.time())
        slot = self._targets.straight(call.target)
        if slot is not None:
            self._add(handle)
            self._dispatch(handle, slot, None)
            return handle
        loser = self._targets.line_up(inv, call.max_queue, call.weight)
        self._add(handle)
        if loser is not None:
            loser.finish(now)
            error = ends.shed(loser.target.app, self.queue.limit)
            self._forget_handle(self._by_inv[loser], Ended(error=error))
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
        if inv.state in _IN_FLIGHT and inv.give_credit(self.clock(), self.window):
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

    def node_up(self, node: str, link: Link) -> None:
        """An invoker has welcomed us: its grants follow."""
        self._links[node] = link
        self.nodes.setdefault(node, Rpc(f"invoker {node}")).up(link.send)
        self._ghosts.node_up(node)

    def node_down(self, node: str) -> None:
        """An invoker is lost, or has left: so is what ran there."""
        link = self._links.pop(node, None)
        if link is None:
            return
        lost = [handle for handle in self._handles.values() if handle.node == node]
        for handle in lost:
            self._leave_behind(handle)
        self._ghosts.node_down(node, link)
        rpc = self.nodes.pop(node, None)
        if rpc is not None:
            rpc.down()
        targets = {instance.target for instance in self.slots.drop_node(node)}
        error = ends.node_lost(node)
        for handle in reversed(lost):  # each goes to the front of its line
            self._attempt_failed(handle, error, "node_lost")
        self._targets.ready_changed(targets)

    def on_invoker_message(self, node: str, parts: Parts) -> None:
        """Take in a frame from an invoker. Whatever the bytes, nothing is raised."""
        try:
            frame = codec.decode(parts)
        except WireError:
            self.drops["bad_frame"] += 1
            return
        kind = frame.header.type
        if kind in _OF_INVOCATIONS:
            self.on_invocation_frame(node, frame)
        elif kind is Type.GRANT:
            self._on_grant(node, frame.header, frame.body)
        elif kind is Type.REPLY:
            rpc = self.nodes.get(node)
            if rpc is None or not rpc.on_reply(frame.header.id, frame.body):
                self.drops["unasked_reply"] += 1
        elif kind is Type.ADOPTED:
            if self.adoptions is not None:
                self.adoptions.on_adopted(node, frame)
        elif kind not in (Type.WELCOME, Type.HEARTBEAT, Type.BYE):
            self.drops["unexpected_type"] += 1

    def adopt(
        self, node: str, inv: Invocation, call: Call, slot: Instance | None, kept: Resume | None, skip: int
    ) -> Handle:
        """Speak for an invocation that another gateway left behind at `node`. Its slot is not from our grants.

        `kept` is its resume state so far, if it is known; its caller has seen the next `skip` outputs."""
        handle = Handle(self, inv, call, time.time())
        handle.adopted, handle.resume, handle.skip = call.context, kept, skip
        handle.node = node
        handle.slot = slot
        self._add(handle)
        self._targets.started(inv.target)
        self._alarm.set(inv, inv.running_due())
        return handle

    def disown(self, node: str, header: Header) -> None:
        """What speaks under this header is not the one."""
        self._ghosts.add((node, header.id, header.fence), header.route)

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
        self._targets.close()
        self._ghosts.close()
        self._alarm.close()

    def tick(self) -> None:
        """See to every deadline that has passed. The alarm does; a test with its own clock may."""
        self._alarm.tick()

    # -- frames of invocations -------------------------------------------------------------------------------

    def on_invocation_frame(self, node: str, frame: codec.Frame) -> None:
        header = frame.header
        handle = self._handles.get(header.id)
        if handle is None and self.adoptions is not None and self.adoptions.early(node, frame):
            return
        if handle is None or handle.node != node:
            self.drops["unknown_invocation" if handle is None else "stray"] += 1
            self._ghosts.heard(node, header)
            return
        inv = handle.inv
        judgement = judge(header, fence=inv.fence, wanted=inv.wanted, credit=inv.credit)
        verdict = judgement.verdict
        if inv.state is State.CANCELLING and verdict in (Verdict.GAP, Verdict.OVERRUN, Verdict.DUPLICATE):
            verdict = Verdict.ACCEPT  # only its end matters any more
        if verdict is Verdict.ACCEPT:
            self._believe(handle, frame, judgement.skip)
            return
        self.drops[verdict.value] += 1
        if verdict is Verdict.STALE:
            self._ghosts.heard(node, header)
        elif verdict in (Verdict.GAP, Verdict.OVERRUN):
            error = ends.broken(verdict.value, inv.wanted)
            if header.type is not Type.OUTPUT:  # it has ended there
                self._attempt_failed(handle, error, "broken")
            elif not self._go_on(handle, "broken", still_there=True):
                self._give_up(handle, error)

    def _believe(self, handle: Handle, frame: codec.Frame, skip: int) -> None:
        header, body, inv = frame.header, frame.body, handle.inv
        if header.type is Type.OUTPUT:
            self._take(handle, frame, skip)
        elif header.type is Type.DONE:
            if handle.handover is not None:
                handle.arrived(self.clock())
            payload = frames.result(body, frame.buffers)
            self._finish(handle, Ended(payload, None, body.seconds, body.usage, body.spans))
        elif header.type is Type.FAILED:
            self._attempt_failed(handle, body.error, "container_lost", body.seconds)
        elif header.type is Type.MOVED:
            self._offered(handle, header, body)
        elif header.type is Type.REFUSED:
            self._refused(handle, body)
        elif inv.state is State.CANCELLING or not self._go_on(handle, "stopped"):
            self._finish(handle, Ended(error=ends.stopped()))

    def _take(self, handle: Handle, frame: codec.Frame, skip: int) -> None:
        header, inv = frame.header, handle.inv
        if inv.state is State.CANCELLING:
            return
        outputs = frames.outputs(frame.body, frame.buffers)
        if outputs is None or len(outputs) != header.items or not inv.stream:
            self.drops["bad_frame"] += 1
            return
        if skip:
            outputs = outputs[skip:]
        now = self.clock()
        first = not inv.wanted
        inv.output(now, len(outputs))
        if first:
            self._alarm.set(inv, inv.running_due())
        if handle.handover is not None:
            handle.arrived(now)
        if handle.resume is not None:
            handle.resume.take(outputs)
        handle.deliver(outputs)

    def _refused(self, handle: Handle, body: Refused) -> None:
        inv, slot = handle.inv, handle.slot
        if inv.state is State.STREAMING:
            self.drops["bad_frame"] += 1
            return
        if not handle.granted:  # it is not held there any more; nothing ran, and its fence is raised already
            self._attempt_failed(handle, ends.refused(body.reason), "move_refused")
            return
        if slot is not None:
            # Our idea of its slots is wrong until the next grant: don't offer it the same work at once.
            self._leave_alone(slot, REFUSAL_PAUSE)
        self._release(handle)
        if inv.state is State.CANCELLING:
            self._finish(handle, Ended(error=ends.refused(body.reason)))
            return
        inv.refuse(self.clock(), self._targets.clock_of(inv.target))
        self._line_up_again(inv)

    def _leave_alone(self, slot: Instance, seconds: float) -> None:
        """Offer the instance nothing until its next grant, or for so long."""
        if slot.limit:
            asyncio.get_running_loop().call_later(seconds, self._resume_slot, slot, slot.limit, slot.seq)
            self.slots.suspend(slot)

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
        self._targets.ready_changed((grant.target,))
        self._pump(grant.target)
        self._targets.answer_grant(instance)

    def _pump(self, target: Target) -> None:
        """Dispatch what waits while there are slots."""
        for each in self._targets.in_turn(target):
            while (found := self._targets.take(each)) is not None:
                inv, slot = found
                self._dispatch(self._by_inv[inv], slot, self._targets.clock_of(each))

    def _dispatch(self, handle: Handle, slot: Instance, clock: TargetClock | None) -> None:
        inv, call = handle.inv, handle.call
        assert call is not None
        now = self.clock()
        inv.dispatch(now, clock)
        inv.give_credit(now, self.window)
        self._place(handle, slot, granted=True)
        self.send_to(slot.node, frames.invoke(call, inv, slot.number))

    def _place(self, handle: Handle, slot: Instance, *, granted: bool) -> None:
        """It is in flight there from here on."""
        handle.slot, handle.node, handle.granted = slot, slot.node, granted
        if handle.handover is not None:
            handle.handover.destination = slot.node
        self._targets.started(handle.inv.target)
        self._alarm.set(handle.inv, handle.inv.running_due())

    def _release(self, handle: Handle) -> None:
        """It is no longer in flight anywhere."""
        if not handle.node:
            return
        handle.node = ""
        self._targets.stopped(handle.inv)
        if handle.granted:
            handle.granted = False
            assert handle.slot is not None
            self.slots.release(handle.slot)

    def _line_up_again(self, inv: Invocation) -> None:
        self._targets.again(inv)
        self._reroute(inv.target)
        self._pump(inv.target)

    # -- going on elsewhere ----------------------------------------------------------------------------------

    def _go_on(self, handle: Handle, why: str, *, still_there: bool = False) -> bool:
        """Let it go on from what was believed, on any instance of its version; False when it cannot.

        `still_there`: its attempt may run on; it is left behind with its slot."""
        inv = handle.inv
        if handle.resume is None or not inv.may_resume:
            return False
        try:
            state = handle.resume.state()
        except WireError:
            self.drops["bad_outputs"] += 1
            return False
        self.resumes[why] += 1
        now = self.clock()
        handle.leave("resume", now, why)
        if still_there:
            self._leave_behind(handle)
        self._release(handle)
        inv.go_on(now, self._targets.clock_of(inv.target), state)
        self._line_up_again(inv)
        return True

    def _leave_behind(self, handle: Handle, *, moved: bool = False) -> None:
        """Its attempt is not believed any more (its fence is about to be raised, or it is about to end), and keeps
        its slot until it has ended too."""
        slot, granted = handle.slot, handle.granted
        handle.granted = False
        key = (handle.node, handle.inv.id, handle.inv.fence)
        self._ghosts.add(key, slot.number if slot is not None else 0, slot if granted else None, moved=moved)

    def _ghost_ended(self, slot: Instance) -> None:
        self.slots.release(slot)
        self._pump(slot.target)

    def _offered(self, handle: Handle, header: Header, body: Moved) -> None:
        """MOVED: commit, or nothing has happened."""
        inv = handle.inv
        why = "not_resumable" if handle.resume is None else ""
        destination = self.slots.get(body.node, body.number)
        why = why or objection(inv, handle.slot, header, body, destination)
        state = b""
        if not why and handle.resume is not None:
            try:
                state = handle.resume.state()
            except WireError:
                why = "bad_outputs"
        self.moves[why or "moved"] += 1
        if why or destination is None:
            self.send_to(handle.node, [header._replace(type=Type.KEPT, items=0).pack()])
            return
        now = self.clock()
        handle.leave("migration", now)
        self._leave_behind(handle, moved=True)
        self._release(handle)
        inv.move(now)
        inv.give_credit(now, self.window)
        self._place(handle, destination, granted=False)
        self.send_to(destination.node, frames.activate(inv, destination.number, state))

    # -- ends ------------------------------------------------------------------------------------------------

    def _attempt_failed(self, handle: Handle, error: ErrorInfo, why: str, seconds: float = 0.0) -> None:
        """It is not running there any more. `why` names the cause, should it be a lost instance."""
        inv = handle.inv
        if error.code == "worker_lost" and self._go_on(handle, why):
            return
        if not inv.may_retry or error.code not in _RETRYABLE:
            self._finish(handle, Ended(error=error, seconds=seconds))
            return
        now = self.clock()
        self._release(handle)
        inv.retry(now)
        self._alarm.set(inv, inv.due(now, self._targets.clock_of(inv.target)))
        self._pump(inv.target)

    def _give_up(self, handle: Handle, error: ErrorInfo) -> None:
        """The caller is answered now; what runs is told to stop, and keeps its slot until it has."""
        inv, now = handle.inv, self.clock()
        self._targets.leave(inv)
        inv.cancel(now)
        if inv.state is State.ENDED:
            self._forget_handle(handle, Ended(error=error))
            return
        self._send(handle, Type.CANCEL)
        self._alarm.set(inv, Due(now + CANCEL_INTERVAL, "cancel"))
        self._settle(handle, Ended(error=error))

    def _finish(self, handle: Handle, ended: Ended) -> None:
        """It is over, here and where it ran."""
        inv = handle.inv
        self._targets.leave(inv)
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
        self._drop(handle)
        self._settle(handle, ended)
        handle.call = handle.resume = None

    def _fail_waiting(self, body: TargetFailed) -> None:
        for inv in list(self.queue.items(body.target)):
            self._finish(self._by_inv[inv], Ended(error=body.error))

    # -- time ------------------------------------------------------------------------------------------------

    def _ring(self, inv: Invocation, now: float) -> None:
        due = inv.due(now, self._targets.clock_of(inv.target))
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
            inv.wake(now, self._targets.clock_of(inv.target))
            self._line_up_again(inv)
        elif due.what != "idle" or not self._suspect(handle):
            self._give_up(handle, ends.overdue(inv, due.what))

    def _suspect(self, handle: Handle) -> bool:
        """Its silence may be that of a frozen instance: let another one try, once."""
        slot, granted = handle.slot, handle.granted
        if handle.inv.vain or handle.resume is None:
            return False
        if slot is not None and granted:
            self._leave_alone(slot, SUSPICION)
        return self._go_on(handle, "idle", still_there=True)

    # -- routes ----------------------------------------------------------------------------------------------

    def _rerouted(self) -> None:
        more = self._targets.caps.replace(self.routes.caps(self.name))
        for target in self.queue.targets():
            self._reroute(target)
        for target in self.queue.targets():
            if target.app in more:
                self._pump(target)
        self._ghosts.keep({*self._links, *self.routes.nodes})
        if self._on_routes is not None:
            self._on_routes(self.routes)

    def _reroute(self, target: Target) -> None:
        to, ended = self._targets.reroute(target, self.routes)
        for inv, error in ended:
            self._finish(self._by_inv[inv], Ended(error=error))
        if to is not None:
            self._pump(to)

    def _report(self, demand: Demand) -> bool:
        return self._control.tell(codec.encode(Header(Type.DEMAND), demand))

    # -- small -----------------------------------------------------------------------------------------------

    def _add(self, handle: Handle) -> None:
        self._handles[handle.inv.id] = handle
        self._by_inv[handle.inv] = handle

    def _drop(self, handle: Handle) -> None:
        self._alarm.clear(handle.inv)
        del self._handles[handle.inv.id]
        del self._by_inv[handle.inv]

    def _send(self, handle: Handle, kind: Type, credit: int = 0) -> None:
        inv = handle.inv
        route = handle.slot.number if handle.slot is not None else 0
        self.send_to(handle.node, [Header(kind, inv.id, inv.fence, route, credit=credit).pack()])

    def validate(self) -> None:
        """Assert the invariants; for tests, and after every event there."""
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
        self._targets.validate(running)
        granted = sum(handle.granted for handle in self._handles.values())
        assert granted + self._ghosts.held() == self.slots.in_flight(), "slots in flight and invocations disagree"
        assert len(self._handles) == len(self._by_inv)
