"""Two nodes, a gateway and their links in memory, message by message, so that anybody can die at any boundary.

The nodes are production relay cores. The gateway is a model of what a gateway does with one invocation (its own tests
are with it), containers are models that say their ordinals. `step` delivers one message, in the order of sending;
`kill` loses a party with everything that is on its way to it, and the others hear of it only later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from sllm_invoker.relay_core import Action, Instance, RelayCore, Report, Send

from sllm_faas.spec import Target, Timeline
from sllm_faas.wire.codec import decode, encode, pack, unpack_as
from sllm_faas.wire.header import Header, Type, unpack
from sllm_faas.wire.messages import (
    Activate,
    Done,
    Invoke,
    Migrate,
    Migrated,
    Moved,
    ResumeState,
    Want,
)

ID = b"i" * 16
TARGET = Target("app", "f", 1)
LENGTH = 30
WINDOW = 1024
MOVING = {
    Type.SNAPSHOT, Type.STATE, Type.HOLD, Type.HELD, Type.PAUSE, Type.MOVED, Type.COMMITTED, Type.KEPT,
    Type.ACTIVATE, Type.CONTINUE, Type.MIGRATE, Type.MIGRATED, Type.CANCEL, Type.CANCELLED,
}  # fmt: skip


@dataclass
class Call:
    fence: int
    said: int
    held: bool = False
    paused: bool = False


class Container:
    """Says one ordinal per turn, LENGTH in all."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.calls: dict[bytes, Call] = {}

    def say(self, kind: Type, key: bytes, call: Call, body: Any = None, **fields: int) -> None:
        parts = encode(Header(kind, key, call.fence, **fields), body)
        self.node.world.send(self.node.name, self.node.name, "container", parts)

    def receive(self, parts: list[bytes]) -> None:
        frame = decode(parts)
        header, key = frame.header, frame.header.id
        call = self.calls.get(key)
        match header.type:
            case Type.INVOKE:
                assert call is None
                self.calls[key] = Call(header.fence, frame.body.outputs)
            case Type.HOLD:
                if call is None:
                    assert frame.body.payload, "the first HOLD brings the arguments"
                    call = self.calls[key] = Call(header.fence, frame.body.outputs, held=True)
                call.said = max(call.said, unpack_as(int, frame.body.resume))
                self.say(Type.HELD, key, call, seq=call.said)
            case Type.ACTIVATE if call is not None and call.held:
                assert unpack_as(int, frame.body.resume) == header.seq >= call.said
                call.held, call.fence, call.said = False, header.fence, header.seq
            case Type.SNAPSHOT | Type.PAUSE if call is not None and call.fence == header.fence:
                call.paused = call.paused or header.type is Type.PAUSE
                state = ResumeState(pack(call.said), paused=call.paused)
                self.say(Type.STATE, key, call, state, seq=call.said)
            case Type.CONTINUE if call is not None:
                call.paused = False
            case Type.CANCEL:
                self.say(Type.CANCELLED, key, self.calls.pop(key, Call(header.fence, 0)))

    def turn(self) -> None:
        for key, call in list(self.calls.items()):
            if call.held or call.paused:
                continue
            if call.said < LENGTH:
                self.say(Type.OUTPUT, key, call, [pack(call.said)], seq=call.said, items=1)
                call.said += 1
            else:
                del self.calls[key]
                self.say(Type.DONE, key, call, Done(), seq=call.said)


class Node:
    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.alive = world, name, True
        self.core = RelayCore(name)
        self.instance = Instance(1, f"ins-{name}", name.encode(), TARGET, 1, None, 5.0)
        self.container = Container(self)
        self.core.add(self.instance)
        self.core.ready(1, Timeline())

    def receive(self, sender: str, parts: list[bytes]) -> None:
        now, header = self.world.now, unpack(parts[0])
        if sender == "controller":
            self.perform(self.core.migrate(decode(parts).body, now))
        elif sender == "container":
            self.perform(self.core.from_container(self.instance.peer, header, parts, now))
        elif sender in self.world.nodes:
            if header.type in (Type.HELD, Type.REFUSED, Type.FAILED):
                self.perform(self.core.from_node(sender, header, now))
            else:
                self.perform(self.core.from_source(sender.encode(), header, parts, now))
        elif header.type is Type.WANT:
            self.core.want(sender.encode(), header, decode(parts).body.slots)
        else:
            self.perform(self.core.from_gateway(sender.encode(), header, parts, now))
        self.settle()

    def settle(self) -> None:
        self.perform(self.core.settle())
        self.core.validate()

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Report):
                self.world.send(self.name, "controller", self.name, encode(Header(Type.MIGRATED), action.migrated))
            elif isinstance(action, Send):
                to = self.name + "/c" if action.to == "container" else action.peer.decode()
                self.world.send(self.name, to, self.name, action.parts)
            else:
                raise AssertionError(f"nobody misbehaves here: {action}")


@dataclass
class Gateway:
    """What a gateway does with one invocation. `ghosts` are attempts left behind: (node, fence)."""

    world: World
    name: str
    alive: bool = True
    fence: int = 0
    node: str = ""
    values: list[int] = field(default_factory=list)
    done: bool = False
    resumes: int = 0
    moves: int = 0
    waiting: bool = False
    ghosts: set[tuple[str, int]] = field(default_factory=set)
    limits: dict[str, int] = field(default_factory=dict)
    adopting: dict[str, tuple[int, bool]] | None = None

    def dispatch(self) -> None:
        """Run it, or on, wherever there is a slot."""
        for node in self.world.living():
            if self.limits.get(node.name):
                self.fence += 1
                self.node, self.waiting, seq = node.name, False, len(self.values)
                body = Invoke("f", stream=True, payload=b"p", resume=pack(seq) if seq else b"", outputs=seq)
                head = Header(Type.INVOKE, ID, self.fence, 1, seq, credit=WINDOW)
                self.world.send(self.name, node.name, self.name, encode(head, body))
                return
        self.waiting = True
        for node in self.world.living():
            self.world.send(self.name, node.name, self.name, encode(Header(Type.WANT, route=1), Want(1)))

    def lost(self, node: str) -> None:
        self.limits.pop(node, None)
        if self.adopting is not None:
            self.adopting.setdefault(node, (0, False))
            self.chosen()
        elif node == self.node and not self.done:
            self.ghosts.add((node, self.fence))
            self.resumes += 1
            self.dispatch()
        self.ghosts = {ghost for ghost in self.ghosts if ghost[0] != node}

    def say(self, node: str, kind: Type, fence: int, **fields: int) -> None:
        self.world.send(self.name, node, self.name, [Header(kind, ID, fence, 1, **fields).pack()])

    def adopt(self) -> None:
        self.adopting = {}
        for node in self.world.living():
            self.world.send(self.name, node.name, self.name, [Header(Type.ADOPT, ID, credit=WINDOW).pack()])

    def chosen(self) -> None:
        """Every invoker has answered: the highest fence is the one."""
        assert self.adopting is not None
        if set(self.adopting) < set(self.world.nodes):
            return
        found = {node: fence for node, (fence, yes) in self.adopting.items() if yes}
        self.adopting = None
        assert found, "somebody has it"
        self.node = max(found, key=lambda node: found[node])
        self.fence = found[self.node]
        for node, fence in found.items():
            if node != self.node:
                self.ghosts.add((node, fence))
                self.say(node, Type.CANCEL, fence)
        early, self.early = self.early, []
        for node, parts in early:
            self.receive(node, parts)

    early: list[tuple[str, list[bytes]]] = field(default_factory=list)

    def receive(self, node: str, parts: list[bytes]) -> None:
        frame = decode(parts)
        header = frame.header
        if header.type is Type.GRANT:
            self.limits[node] = frame.body.limit
            self.world.send(
                self.name, node, self.name, encode(Header(Type.WANT, route=1, seq=header.seq), Want(int(self.waiting)))
            )
            if self.waiting and frame.body.limit:
                self.dispatch()
            return
        if header.type is Type.ADOPTED:
            assert self.adopting is not None
            self.adopting[node] = (header.fence, frame.body.status == "found")
            self.chosen()
            return
        if self.adopting is not None:
            self.early.append((node, parts))
            return
        terminal = header.type in (Type.DONE, Type.FAILED, Type.CANCELLED, Type.REFUSED)
        if header.type is Type.MOVED and (node, header.fence) in self.ghosts:
            self.say(node, Type.COMMITTED, header.fence)
        elif header.fence != self.fence or node != self.node:
            if terminal:
                self.ghosts.discard((node, header.fence))
            elif header.type is Type.OUTPUT:
                self.say(node, Type.CANCEL, header.fence)
        elif header.type is Type.OUTPUT:
            for at, value in enumerate(frame.body):
                if header.seq + at >= len(self.values):
                    assert unpack_as(int, value) == len(self.values) == header.seq + at, "gap-free, each once"
                    self.values.append(unpack_as(int, value))
        elif header.type is Type.MOVED:
            self.moved(node, header, frame.body)
        elif header.type is Type.DONE:
            self.done = True
        elif terminal:
            self.resumes += 1
            self.dispatch()

    def moved(self, node: str, header: Header, body: Moved) -> None:
        if header.seq != len(self.values) or self.done or body.node not in self.limits:
            self.say(node, Type.KEPT, header.fence)
            return
        self.ghosts.add((node, self.fence))
        self.fence, self.node, self.moves = self.fence + 1, body.node, self.moves + 1
        self.say(node, Type.COMMITTED, header.fence)
        head = Header(Type.ACTIVATE, ID, self.fence, body.number, header.seq, credit=WINDOW)
        self.world.send(self.name, body.node, self.name, encode(head, Activate(pack(header.seq))))

    def tick(self) -> None:
        for node, fence in self.ghosts:
            self.say(node, Type.CANCEL, fence)


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.mail: deque[tuple[str, str, str, list[bytes]]] = deque()
        self.delivered: list[Type] = []
        self.dead: set[str] = set()
        self.migrated: list[Migrated] = []
        self.nodes = {name: Node(self, name) for name in ("node-0", "node-1")}
        self.gateway = Gateway(self, "g-0")
        self.join(self.gateway)
        self.run(turns=1)

    def living(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.alive]

    def join(self, gateway: Gateway) -> None:
        for node in self.living():
            node.perform(node.core.gateway_joined(gateway.name.encode(), self.now))
            node.settle()

    def send(self, origin: str, to: str, sender: str, parts: list[bytes]) -> None:
        """`sender` is how the receiver names it."""
        self.mail.append((origin, to, sender, parts))

    def migrate(self) -> None:
        order = Migrate("m", "ins-node-0", "node-1", "ipc:///x", "ins-node-1", 1)
        self.send("controller", "node-0", "controller", encode(Header(Type.MIGRATE), order))

    def step(self) -> bool:
        """Deliver one message; False when there is none."""
        if not self.mail:
            return False
        origin, to, sender, parts = self.mail.popleft()
        if to in self.dead or origin in self.dead or to.removesuffix("/c") in self.dead:
            return True
        self.now += 0.0005
        kind = unpack(parts[0]).type
        if kind in MOVING:
            self.delivered.append(kind)
        if to == "controller":
            self.migrated.append(decode(parts).body)
        elif to.endswith("/c"):
            self.nodes[to[:-2]].container.receive(parts)
        elif to in self.nodes:
            self.nodes[to].receive(sender, parts)
        elif to == self.gateway.name:
            self.gateway.receive(sender, parts)
        return True

    def run(self, turns: int, boundary: int | None = None) -> bool:
        """`turns` of the containers, with all messages between them. True when `boundary` was reached."""
        for _ in range(turns):
            while self.step():
                if boundary is not None and len(self.delivered) >= boundary:
                    return True
            self.now += 0.05
            for node in self.living():
                node.container.turn()
                node.perform(node.core.tick(self.now))
                node.settle()
        return False

    def later(self, seconds: float) -> None:
        while self.step():
            pass
        self.now += seconds
        for node in self.living():
            node.perform(node.core.tick(self.now))
            node.settle()
        self.gateway.tick()
        while self.step():
            pass

    def kill(self, party: str) -> None:
        self.dead.add(party)
        if party in self.nodes:
            self.nodes[party].alive = False

    def notice(self, party: str) -> None:
        """The others find out; a gateway is replaced by another that takes its invocation over."""
        if party in self.nodes:
            for node in self.living():
                node.core.source_lost(party.encode(), self.now)
                node.perform(node.core.node_lost(party, self.now))
                node.settle()
            self.gateway.lost(party)
        elif party == self.gateway.name:
            for node in self.living():
                node.perform(node.core.gateway_lost(party.encode(), self.now))
                node.settle()
            self.gateway = Gateway(self, "g-1")
            self.join(self.gateway)
            self.gateway.adopt()
