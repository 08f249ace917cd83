"""Who talks on the platform of `platform`: production code that decides, modelled links and containers around it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sllm_gateway.dispatcher import Dispatcher
from sllm_invoker.relay_core import Action, Instance, Kill, RelayCore, Send

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.routes import RouteTable
from sllm_faas.controller.state import Machine
from sllm_faas.errors import ErrorInfo, IllegalTransition
from sllm_faas.spec import Timeline
from sllm_faas.wire import codec
from sllm_faas.wire.header import Header, Type, unpack
from sllm_faas.wire.messages import Checked, Done, Failed, Hello, InstanceReport, NodeInfo, Start, Stop, Welcome

if TYPE_CHECKING:
    from tests.histories.platform import Platform

BYE = [Header(Type.BYE).pack()]
FAILED = ErrorInfo("start_failed", "enter raised", status=503)
RAISED = ErrorInfo("function_error", "it raised", status=500)
WINDOW = 4
OUTPUTS = 6
"""Of a stream: more than the window, so that flow control is needed."""


@dataclass(eq=False)
class Link:
    """`life`: the server's, while the client takes the link for up. `server` is asked for: it may be another life."""

    client: Gateway | Node
    server: str
    up: deque[list[bytes]] = field(default_factory=deque)
    down: deque[list[bytes]] = field(default_factory=deque)
    life: str = ""
    closed: bool = False
    """The client is dead, or has left."""
    torn: bool = False

    def hello(self) -> None:
        self.up.append(self.client.hello())

    def send(self, parts: list[bytes]) -> None:
        """By the client; the dispatcher's port."""
        if not self.closed:
            self.up.append(parts)

    def answer(self, parts: list[bytes]) -> None:
        """By the server."""
        if not self.closed:
            self.down.append(parts)

    def receive(self, parts: list[bytes]) -> None:
        kind = unpack(parts[0]).type
        if kind is Type.WELCOME:
            life = codec.decode(parts).body.life
            if life != self.life:
                self.lose()
                self.life = life
                self.client.joined(self)
        elif kind is Type.BYE:
            self.lose()
            self.hello()
        elif self.life:
            self.client.take(self, parts)

    def lose(self) -> None:
        if self.life:
            self.life = ""
            self.client.lost(self)

    def cut(self) -> None:
        self.up.clear()
        self.down.clear()
        self.torn = True
        if not self.closed:
            self.lose()
            self.hello()


class Gateway:
    def __init__(self, world: Platform, name: str, life: str) -> None:
        self.world, self.name, self.life = world, name, life
        self.identity = f"{name}:{life}".encode()
        self.dispatcher = Dispatcher(name=name, clock=world.loop.time, window=WINDOW, on_routes=lambda _: self._sync())
        self.links: dict[str, Link] = {}
        self._connect("")

    def hello(self) -> list[bytes]:
        return codec.encode(Header(Type.HELLO), Hello("gateway", self.name, self.life))

    def _connect(self, server: str) -> None:
        link = self.links[server] = Link(self, server)
        self.world.links.append(link)
        link.hello()

    def _sync(self) -> None:
        nodes = self.dispatcher.routes.nodes
        for name in [name for name in self.links if name and name not in nodes]:
            link = self.links.pop(name)
            link.send(BYE)
            link.lose()
            link.closed = True
        for name in nodes:
            if name not in self.links:
                self._connect(name)

    def joined(self, link: Link) -> None:
        if link.server:
            self.dispatcher.node_up(link.server, link)
        else:
            self.dispatcher.controller_up(link)

    def lost(self, link: Link) -> None:
        if link.server:
            self.dispatcher.node_down(link.server)
        else:
            self.dispatcher.controller_down()

    def take(self, link: Link, parts: list[bytes]) -> None:
        if link.server:
            self.dispatcher.on_invoker_message(link.server, parts)
        elif not self.dispatcher.on_controller_message(parts):
            link.hello()

    def validate(self) -> None:
        self.dispatcher.validate()

    def die(self) -> None:
        self.dispatcher.close()
        for link in self.links.values():
            link.closed = True
            link.down.clear()


@dataclass
class Entry:
    start: Start
    number: int
    state: str = "starting"


@dataclass
class Job:
    """An invocation as its container runs it."""

    header: Header
    stream: bool
    credit: int
    sent: int = 0
    cancelled: bool = False


class Node:
    """`memory_mb` is what its HELLO says."""

    def __init__(self, world: Platform, name: str, life: str, memory_mb: int) -> None:
        self.world, self.name, self.life, self.memory_mb = world, name, life, memory_mb
        self.core = RelayCore(name, stream_window=WINDOW)
        self.entries: dict[str, Entry] = {}
        self.jobs: dict[bytes, Job] = {}
        self.links: dict[bytes, Link] = {}
        self._numbers = 0
        self.uplink = Link(self, "")
        world.links.append(self.uplink)
        self.uplink.hello()

    # -- the controller's side -------------------------------------------------------------------------------

    def hello(self) -> list[bytes]:
        info = NodeInfo(self.name, f"ipc:///{self.name}", memory_mb=self.memory_mb, gpus=1)
        reports = tuple(self._describe(entry) for entry in self.entries.values())
        return codec.encode(Header(Type.HELLO), Hello("invoker", self.name, self.life, 0, info, reports))

    def joined(self, link: Link) -> None:
        pass

    def lost(self, link: Link) -> None:
        pass

    def take(self, link: Link, parts: list[bytes]) -> None:
        frame = codec.decode(parts)
        body = frame.body
        if frame.header.type is Type.START:
            self._start(body)
        elif frame.header.type is Type.STOP:
            self._stop(body)
        elif frame.header.type is Type.CHECK:
            self.uplink.send(codec.encode(Header(Type.CHECKED), Checked(body.app.name, body.version)))

    def _start(self, start: Start) -> None:
        entry = self.entries.get(start.instance)
        if entry is None:
            self._numbers += 1
            entry = self.entries[start.instance] = Entry(start, self._numbers)
            peer = start.instance.encode()
            self.core.add(Instance(entry.number, start.instance, peer, start.target, start.spec.concurrency, None, 1.0))
        self._report(entry)
        self._settle()

    def _stop(self, stop: Stop) -> None:
        entry = self.entries.get(stop.instance)
        if entry is not None:
            self._drain(entry)
            if stop.drain is not None:
                self._perform(self.core.cancel_all(entry.number, self.world.now))

    def _drain(self, entry: Entry) -> None:
        if entry.state != "draining":
            entry.state = "draining"
            self._perform(self.core.drain(entry.number, self.world.now))
            self._report(entry)
            self._settle()

    def _describe(self, entry: Entry, error: ErrorInfo | None = None) -> InstanceReport:
        running = self.core.running(entry.number)
        return InstanceReport(
            entry.start.instance,
            entry.number,
            entry.start.target,
            entry.state,  # type: ignore[arg-type]
            entry.start.spec.concurrency,
            running=running,
            error=error,
        )

    def _report(self, entry: Entry, error: ErrorInfo | None = None) -> None:
        if self.uplink.life:
            self.uplink.send(codec.encode(Header(Type.INSTANCE), self._describe(entry, error)))

    # -- the gateways' side ----------------------------------------------------------------------------------

    def serve(self, link: Link, parts: list[bytes]) -> None:
        gateway = link.client
        assert isinstance(gateway, Gateway)
        peer, header, now = gateway.identity, unpack(parts[0]), self.world.now
        if header.type is Type.HELLO:
            self.links[peer] = link
            link.answer(codec.encode(Header(Type.WELCOME), Welcome(self.name, self.life)))
            self._perform(self.core.gateway_joined(peer, now))
        elif peer not in self.links:
            if header.type is not Type.BYE:
                link.answer(BYE)
        elif header.type is Type.BYE:
            del self.links[peer]
            self._perform(self.core.gateway_left(peer, now))
        elif header.type is Type.WANT:
            self.core.want(peer, header, codec.decode(parts).body.slots)
        else:
            self._perform(self.core.from_gateway(peer, header, parts, now))
        self._settle()

    def lose_gateway(self, link: Link) -> None:
        gateway = link.client
        if isinstance(gateway, Gateway) and self.links.pop(gateway.identity, None) is not None:
            self._perform(self.core.gateway_lost(gateway.identity, self.world.now))
            self._settle()

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Kill):
                self.end(next(e for e in self.entries.values() if e.number == action.instance), "failed")
            elif isinstance(action, Send) and action.to == "gateway":
                link = self.links.get(action.peer)
                if link is not None:
                    link.answer(action.parts)
            elif isinstance(action, Send):
                self._to_container(action.parts)

    def _settle(self) -> None:
        self._perform(self.core.settle())

    # -- containers ------------------------------------------------------------------------------------------

    def _to_container(self, parts: list[bytes]) -> None:
        header = unpack(parts[0])
        if header.type is Type.INVOKE:
            self.world.note_start(header)
            self.jobs[header.id] = Job(header, codec.decode(parts).body.stream, header.credit)
        elif (job := self.jobs.get(header.id)) is not None:
            if header.type is Type.CREDIT:
                job.credit = header.credit
            elif header.type is Type.CANCEL:
                job.cancelled = True

    def move(self, number: int, well: bool) -> None:
        options: list[Callable[[bool], None]] = []
        for entry in self.entries.values():
            if entry.state == "starting":
                options.append(lambda well, entry=entry: self._started(entry, well))
            elif entry.state == "draining" and not self.core.running(entry.number):
                options.append(lambda _, entry=entry: self.end(entry, "stopped"))
        for job in self.jobs.values():
            if job.cancelled or not job.stream or job.sent < job.credit:
                options.append(lambda well, job=job: self._worked(job, well))
        if options:
            options[number % len(options)](well)
            self._settle()

    @property
    def moves(self) -> bool:
        return any(
            entry.state == "starting" or (entry.state == "draining" and not self.core.running(entry.number))
            for entry in self.entries.values()
        ) or any(job.cancelled or not job.stream or job.sent < job.credit for job in self.jobs.values())

    def _started(self, entry: Entry, well: bool) -> None:
        if not well:
            self.end(entry, "failed", FAILED)
            return
        entry.state = "ready"
        self.core.ready(entry.number, Timeline())
        self._report(entry)

    def _worked(self, job: Job, well: bool) -> None:
        header = Header(Type.DONE, job.header.id, job.header.fence, job.header.route, job.sent)
        if job.cancelled:
            parts = [header._replace(type=Type.CANCELLED).pack()]
        elif not well:
            parts = codec.encode(header._replace(type=Type.FAILED), Failed(RAISED))
        elif job.stream and job.sent < OUTPUTS:
            items = min(2, job.credit - job.sent, OUTPUTS - job.sent)
            body = [b"%d" % (job.sent + k) for k in range(items)]
            parts = codec.encode(header._replace(type=Type.OUTPUT, items=items), body)
            job.sent += items
        else:
            parts = codec.encode(header, Done(b"" if job.stream else job.header.id))
        peer = next(e.start.instance for e in self.entries.values() if e.number == job.header.route).encode()
        actions = self.core.from_container(peer, unpack(parts[0]), parts, self.world.now)
        if unpack(parts[0]).type is not Type.OUTPUT:
            del self.jobs[job.header.id]
        self._perform(actions)

    def end(self, entry: Entry, state: str, error: ErrorInfo | None = None) -> None:
        entry.state = state
        self.jobs = {key: job for key, job in self.jobs.items() if job.header.route != entry.number}
        self._perform(self.core.gone(entry.number, state, self.world.now))  # type: ignore[arg-type]
        del self.entries[entry.start.instance]
        self._report(entry, error)
        self._settle()

    def validate(self) -> None:
        self.core.validate()

    def tick(self) -> None:
        self._perform(self.core.tick(self.world.now))
        self._settle()


class Controller:
    def __init__(self, world: Platform, life: str) -> None:
        self.world, self.life = world, life
        self.machine = Machine(life)
        self.routes = RouteTable(self._publish)
        self.peers: dict[tuple[str, str], tuple[str, Link]] = {}
        self.log: list[tuple[float, str, bytes]] = []
        self.later: deque[ev.Event] = deque()
        """What the store will answer."""
        store = world.store
        versions = tuple(store.versions.values())
        self.feed(ev.Restored(versions, tuple(ev.StoredNode(n, info=i) for n, i in store.nodes.items())))
        for app in self.machine.state.apps.values():
            self.routes.set_functions(app.name, self.machine.routes(app), ())
        for node in self.machine.state.nodes.values():
            self.routes.set_node(node.info)

    def feed(self, event: ev.Event) -> None:
        now = self.world.now
        try:
            commands = self.machine.handle(event, now)
        except IllegalTransition:
            return
        self.log.append((now, *ev.encode_event(event)))
        self.machine.validate()
        for command in commands:
            self._do(command)

    def tick(self) -> None:
        while (deadline := self.machine.next_deadline()) is not None and deadline <= self.world.now:
            self.feed(ev.Tick())
            assert self.machine.next_deadline() != deadline, "a tick at its deadline left it standing"

    def _do(self, command: cmd.Command) -> None:
        match command:
            case cmd.SendStart(node, body):
                self._tell("invoker", node, codec.encode(Header(Type.START), body))
            case cmd.SendStop(node, body):
                self._tell("invoker", node, codec.encode(Header(Type.STOP), body))
            case cmd.SendCheck(node, body):
                self._tell("invoker", node, codec.encode(Header(Type.CHECK), body))
            case cmd.PublishFunctions(app, functions, gone):
                self.routes.set_functions(app, functions, gone)
            case cmd.PublishNode(info):
                self.routes.set_node(info)
            case cmd.WithdrawNode(name):
                self.routes.drop_node(name)
            case cmd.FailTarget(gateways, body):
                for name in gateways:
                    self._tell("gateway", name, codec.encode(Header(Type.TARGET_FAILED), body))
            case cmd.StoreActivation(app, number):
                self.world.store.activate(number)
                self.later.append(ev.VersionActivated(app, number))

    def _tell(self, role: str, name: str, parts: list[bytes]) -> None:
        found = self.peers.get((role, name))
        if found is not None:
            found[1].answer(parts)

    def _publish(self, delta: Any) -> None:
        parts = codec.encode(Header(Type.ROUTES_DELTA), delta)
        for (role, _), (_, link) in self.peers.items():
            if role == "gateway":
                link.answer(parts)

    def serve(self, link: Link, parts: list[bytes]) -> None:
        frame = codec.decode(parts)
        body, kind = frame.body, frame.header.type
        role = "gateway" if isinstance(link.client, Gateway) else "invoker"
        key = (role, link.client.name)
        if kind is Type.HELLO:
            before = self.peers.get(key)
            self.peers[key] = (body.life, link)
            if before is not None and before[0] != body.life and role == "gateway":
                self.feed(ev.GatewayLost(key[1], before[0]))
            link.answer(codec.encode(Header(Type.WELCOME), Welcome("controller", self.life)))
            if role == "gateway":
                self.feed(ev.GatewayUp(body.name, body.life))
                link.answer(codec.encode(Header(Type.ROUTES), self.routes.whole()))
            else:
                self.world.store.nodes[body.name] = body.node
                self.feed(ev.NodeUp(body.node, body.life, body.instances))
        elif self.peers.get(key, ("", None))[1] is not link:
            link.answer(BYE)
        elif kind is Type.DEMAND:
            self.feed(ev.DemandSeen(key[1], body.items))
        elif kind is Type.INSTANCE:
            self.feed(ev.InstanceSeen(key[1], body))
        elif kind is Type.CHECKED:
            self.feed(ev.VersionChecked(key[1], body))

    def lose_peer(self, link: Link) -> None:
        for key, (life, known) in list(self.peers.items()):
            if known is link:
                del self.peers[key]
                self.feed(ev.GatewayLost(key[1], life) if key[0] == "gateway" else ev.NodeLost(key[1]))

    def replayed(self) -> Machine:
        """Another machine that was told what the log says."""
        other = Machine(self.life)
        for at, kind, data in self.log:
            other.handle(ev.decode_event(kind, data), at)
        return other
