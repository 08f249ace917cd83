"""The whole control plane on a virtual clock, its events in whatever order somebody picks.

    client ─► Gateway (production Dispatcher) ◄══ Link ══► Node (production RelayCore, modelled containers)
                   ╚══════ Link ══════► Controller (production Machine, RouteTable) ◄══════ Link ══════╝

What decides is production code; modelled are links, containers, the store and the clients. A link holds what was sent
and has not arrived, both ways. Links keep order, as ZeroMQ does; those to the controller may also reorder, repeat and
lose single messages, after which they count as `torn` and say HELLO again before the world must come to rest. Any link
may be cut (all that was on its way is lost), either end may take the other for lost at any time, and anybody may die.

What is checked on the way: every part's own `validate()`; an invocation starts at most once under a fence, never again
once its client has seen output, ends once, and its outputs come whole and in order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sllm_gateway.handle import Call, Handle

from sllm_faas.controller import events as ev
from sllm_faas.controller.state import Machine
from sllm_faas.spec import AppSpec, RetryPolicy, Target, Timeouts
from sllm_faas.wire.header import Header
from sllm_faas.wire.messages import NodeInfo
from tests.histories.loop import VirtualLoop
from tests.histories.parties import OUTPUTS, Controller, Gateway, Link, Node

PATIENT = Timeouts(None, None, None, None, None)
"""Nothing ends because it waited: what is lost stays, and is found."""
QUIET = (0.2, 0.2, 2.0, 15.0, 70.0)
"""Seconds of silence after which nothing more comes: demand gathered, cancels repeated, graces and back-offs ended."""


@dataclass
class Store:
    """What survives a controller."""

    versions: dict[int, ev.StoredVersion] = field(default_factory=dict)
    nodes: dict[str, NodeInfo] = field(default_factory=dict)

    def add(self, spec: AppSpec, *, active: bool = False) -> int:
        number = len(self.versions) + 1
        self.versions[number] = ev.StoredVersion(spec.name, number, spec, active, 0.0, active=active)
        return number

    def activate(self, number: int) -> None:
        for other, stored in self.versions.items():
            ready = stored.ready or other == number
            self.versions[other] = ev.StoredVersion(stored.app, other, stored.spec, ready, 0.0, active=other == number)


@dataclass
class Request:
    gateway: Gateway
    handle: Handle
    stream: bool
    outputs: list[bytes] = field(default_factory=list)

    def read(self) -> None:
        """The client takes what has come."""
        if self.handle._pending or self.handle.ended is not None:
            batch = self.handle.batch()
            try:
                batch.send(None)
            except StopIteration as stop:
                self.outputs += stop.value
            assert self.outputs == [b"%d" % k for k in range(len(self.outputs))], "outputs have a gap or come twice"

    def check(self) -> None:
        """It has ended, and what it promised is there."""
        ended = self.handle.ended
        assert ended is not None, f"{self.handle.inv.id.hex()} is lost: {self.handle.inv.state}"
        if ended.error is None and self.gateway.dispatcher is not None:
            self.read()
            assert len(self.outputs) == OUTPUTS if self.stream else ended.payload == self.handle.inv.id


class Platform:
    """`spec` is deployed already; `nodes` and `gateways` are there."""

    def __init__(self, spec: AppSpec, nodes: dict[str, int], gateways: int) -> None:
        self.loop = VirtualLoop()
        self.links: list[Link] = []
        self.store = Store()
        self.spec, self.memory = spec, nodes
        self.store.add(spec, active=True)
        self.starts: Counter[tuple[bytes, int]] = Counter()
        self.requests: dict[bytes, Request] = {}
        self.met: Gateway | Node | None = None
        """The one that the present step is about; None: perhaps all."""
        self.lives = 1
        self.controller = Controller(self, "c1")
        self.nodes = {name: Node(self, name, "1", memory) for name, memory in nodes.items()}
        self.gateways = {f"g{k}": Gateway(self, f"g{k}", "1") for k in range(gateways)}

    @property
    def now(self) -> float:
        return self.loop.now

    def settle(self) -> None:
        """The end of a wake-up: what was put off to it happens; whoever was part of it is consistent."""
        self.loop.settle()
        everybody = (*self.gateways.values(), *self.nodes.values())
        for party in everybody if self.met is None else (self.met,):
            party.validate()
        self.met = None

    # -- clients ---------------------------------------------------------------------------------------------

    def submit(self, gateway: str, function: str, *, stream: bool = False, retries: int = 0) -> bool:
        where = self.gateways.get(gateway)
        if where is None:
            return False
        route = where.dispatcher.routes.functions.get((self.spec.name, function))
        if route is None:
            return False
        key = b"%016d" % len(self.requests)
        target = Target(self.spec.name, function, route.version)
        policy = RetryPolicy(retries, initial_delay=0.1)
        call = Call(key, target, function, b"", stream=stream, timeouts=PATIENT, retries=policy)
        self.requests[key] = Request(where, where.dispatcher.submit(call), stream)
        return True

    def note_start(self, header: Header) -> None:
        self.starts[header.id, header.fence] += 1
        assert self.starts[header.id, header.fence] == 1, f"{header.id!r} runs twice under fence {header.fence}"
        request = self.requests[header.id]
        seen = request.outputs or request.handle._pending
        assert not seen, f"{header.id!r} runs again after its client has seen output"

    # -- what may happen -------------------------------------------------------------------------------------

    def deliver(self, link: Link, upwards: bool, index: int = 0) -> bool:
        queue = link.up if upwards else link.down
        if not queue:
            return False
        parts = queue[index]
        del queue[index]
        if not upwards:
            self.met = link.client
            if not link.closed:
                link.receive(parts)
        elif not link.server:
            self.controller.serve(link, parts)
        elif (node := self.nodes.get(link.server)) is not None:
            self.met = node
            node.serve(link, parts)
        return True

    def work(self, node: Node, number: int, *, well: bool) -> None:
        """Something that is under way in its containers goes a step further; `well`: nothing fails."""
        self.met = node
        node.move(number, well)

    def lose_client(self, link: Link) -> None:
        """The server hears nothing any more."""
        if not link.server:
            self.controller.lose_peer(link)
        elif (node := self.nodes.get(link.server)) is not None:
            node.lose_gateway(link)
        if link.closed:
            self.links.remove(link)
        else:
            link.torn = True

    def kill_node(self, name: str) -> None:
        node = self.nodes.pop(name, None)
        if node is not None:
            node.uplink.closed = True
            node.uplink.down.clear()

    def revive_node(self, name: str) -> None:
        if name not in self.nodes:
            self.lives += 1
            self.nodes[name] = Node(self, name, str(self.lives), self.memory[name])

    def kill_gateway(self, name: str) -> None:
        gateway = self.gateways.pop(name, None)
        if gateway is not None:
            gateway.die()

    def revive_gateway(self, name: str) -> None:
        if name not in self.gateways:
            self.lives += 1
            self.gateways[name] = Gateway(self, name, str(self.lives))

    def restart_controller(self) -> None:
        self.lives += 1
        self.controller = Controller(self, f"c{self.lives}")

    def deploy(self, spec: AppSpec) -> None:
        self.spec = spec
        self.controller.feed(ev.VersionAdded(spec.name, self.store.add(spec), spec))

    def stored(self) -> None:
        if self.controller.later:
            self.controller.feed(self.controller.later.popleft())

    def wait(self, seconds: float) -> None:
        """Everybody's timers go off in order."""
        end = self.now + seconds
        while (when := self.next_deadline()) is not None and when <= end:
            self.loop.advance(when)
            self.controller.tick()
        self.loop.advance(end)
        for node in self.nodes.values():
            node.tick()

    def next_deadline(self) -> float | None:
        times = (self.loop.next(), self.controller.machine.next_deadline())
        return min((max(when, self.now) for when in times if when is not None), default=None)

    # -- coming to rest --------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Nothing fails any more: the silent are noticed, the torn say HELLO, all arrives, works and ends."""
        for link in list(self.links):
            if link.closed:
                self.lose_client(link)
            elif link.torn or link.life != self._life_of(link.server):
                link.torn = False
                link.up.clear()
                link.down.clear()
                link.lose()
                link.hello()
        quiet = 0
        for _ in range(5000):
            if self._step():
                quiet = 0
            elif quiet < len(QUIET):
                self.wait(QUIET[quiet])
                self.settle()
                quiet += 1
            else:
                return
        raise AssertionError("the platform does not come to rest")

    def _life_of(self, server: str) -> str:
        return self.nodes[server].life if server else self.controller.life

    def _step(self) -> bool:
        moved = False
        while self.controller.later:
            self.stored()
            moved = True
        for link in list(self.links):
            while link.down or link.up:
                self.deliver(link, bool(link.up))
                self.loop.settle()
                moved = True
            if link.closed and link in self.links:
                self.lose_client(link)
        for node in list(self.nodes.values()):
            while node.moves:
                node.move(0, True)
                moved = True
        for request in self.requests.values():
            if request.handle._pending:
                request.read()
                moved = True
        return moved

    def check(self) -> None:
        """At rest: nobody is lost, no slot is taken, what runs is what is wanted and known."""
        for request in self.requests.values():
            if request.gateway is self.gateways.get(request.gateway.name):
                request.check()
        for gateway in self.gateways.values():
            assert len(gateway.dispatcher) == gateway.dispatcher.slots.in_flight() == 0, "a slot is leaked"
        for node in self.nodes.values():
            assert not node.core.flights and not node.jobs, f"{node.name} runs what nobody waits for"
            for instance in node.core.instances:
                assert node.core.credits.running(instance) == 0, "a slot is leaked"
        machine = self.controller.machine
        machine.validate()
        for key, record in machine.state.targets.items():
            live = len(machine.ledger.live(key))
            assert live == record.desired or record.blocked, f"{key}: {live} live, {record.desired} desired"
        running = {name for node in self.nodes.values() for name in node.entries}
        assert running == set(machine.state.instances), "what runs is not what the controller knows"

    def check_replay(self) -> None:
        machine = self.controller.machine
        assert self.controller.replayed().snapshot() == machine.snapshot(), "the log gives another state"
        assert Machine.restore(machine.snapshot()).snapshot() == machine.snapshot()
