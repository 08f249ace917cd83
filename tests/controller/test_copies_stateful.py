"""Whatever nodes and people do, nobody brings two, nothing is brought in vain, and all is where it should be."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.copies import TRIES
from sllm_faas.controller.state import Machine
from sllm_faas.errors import ErrorInfo
from sllm_faas.wire.messages import Checked, Ingested, NodeStats
from tests.controller.fakes import app, llm
from tests.controller.world import ModelNode, World

NODES = ("home", "beside", "far-0", "far-1", "far-2")
SOURCES = ("org/a", "org/b", "org/c")
GOAL = 2


def digest_of(source: str) -> str:
    return source[-1] * 64


class Chaos(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.world = World(Machine("abc", migrate=True, copies=GOAL))
        self.world.feed(ev.Restored())
        self.numbers = {"one": 0, "two": 0}
        self.spent: dict[str, set[str]] = {}
        """Digest -> requests for it by when it was spent."""
        for name in NODES:
            self.world.nodes[name] = ModelNode(name, 2000, joined=name.startswith("far"))
            self.world.hello(name)
            self.stats(name, 9000)

    @property
    def coming(self):
        return [i for i, (_, _, c) in enumerate(self.world.to_nodes) if isinstance(c, cmd.SendIngest)]

    @rule(name=st.sampled_from(["one", "two"]), sources=st.sets(st.sampled_from(SOURCES), min_size=1))
    def deploy(self, name, sources):
        """To its end."""
        self.numbers[name] += 1
        number, spec = self.numbers[name], app(*(llm(s[-1], source=s, memory_mb=100) for s in sorted(sources)))
        self.world.feed(ev.VersionAdded(name, number, app(*spec.functions, name=name)))
        version = self.world.machine.ledger.version(name, number)
        if version is not None and version.check_node:
            found = {source[-1]: digest_of(source) for source in sources}
            self.world.nodes[version.check_node].checkpoints.update(found.values())
            sizes = dict.fromkeys(found.values(), 2**28)
            self.world.feed(ev.VersionChecked(version.check_node, Checked(name, number, None, found, sizes)))
            self.world.to_nodes = [item for item in self.world.to_nodes if not isinstance(item[2], cmd.SendCheck)]
            while self.world.to_machine and isinstance(self.world.to_machine[-1], ev.VersionActivated):
                self.world.feed(self.world.to_machine.pop())

    @rule(name=st.sampled_from(["one", "two"]), number=st.integers(1, 3))
    def roll_back(self, name, number):
        version = self.world.machine.ledger.version(name, number)
        if version is not None and version.state == "ready":
            self.world.feed(ev.VersionActivated(name, number))

    @rule(name=st.sampled_from(["one", "two"]))
    def delete(self, name):
        self.world.feed(ev.AppDeleted(name))

    @rule(name=st.sampled_from(NODES), disk=st.sampled_from([0, 1000, 3000, 9000]))
    def stats(self, name, disk):
        self.world.feed(ev.NodeStatsSeen(name, NodeStats(0, disk, 0)))

    @rule(name=st.sampled_from(NODES), source=st.sampled_from(SOURCES))
    def evict(self, name, source):
        node = self.world.nodes[name]
        node.checkpoints.discard(digest_of(source))
        if node.connected:
            told = tuple(sorted(node.checkpoints))
            self.world.feed(ev.NodeStatsSeen(name, NodeStats(0, 9000, 0, checkpoints=told)))

    @rule(name=st.sampled_from(NODES), cordoned=st.booleans())
    def cordon(self, name, cordoned):
        self.world.feed(ev.NodeCordoned(name, cordoned))

    @rule(name=st.sampled_from(NODES), emptied=st.booleans())
    def hello(self, name, emptied):
        if emptied:
            self.world.nodes[name].checkpoints.clear()
        self.world.hello(name)

    @rule(name=st.sampled_from(NODES))
    def die(self, name):
        self.world.die(name)

    @rule(name=st.sampled_from(NODES))
    def cut(self, name):
        self.world.cut(name)

    @rule(name=st.sampled_from(NODES))
    def left(self, name):
        self.world.nodes[name].life += 1
        self.world.nodes[name].alive = self.world.nodes[name].connected = False
        self.world.feed(ev.NodeLeft(name))

    @rule(name=st.sampled_from(NODES), source=st.sampled_from(SOURCES))
    def pulled(self, name, source):
        """By a person."""
        if self.world.nodes[name].connected:
            self.world.nodes[name].checkpoints.add(digest_of(source))
            self.world.feed(ev.CheckpointPulled(name, Ingested("pull-1", digest_of(source), 2**28)))

    @precondition(lambda self: self.coming)
    @rule(data=st.data(), outcome=st.sampled_from(["moved", "moved", "kept"]))
    def obeyed(self, data, outcome):
        self.world.obey(data.draw(st.sampled_from(self.coming)), outcome)

    @precondition(lambda self: self.coming)
    @rule(data=st.data())
    def full(self, data):
        node, life, command = self.world.to_nodes.pop(data.draw(st.sampled_from(self.coming)))
        if self.world.nodes[node].connected and self.world.nodes[node].life == life:
            answer = Ingested(command.body.request, error=ErrorInfo("storage_full", "no room"))
            self.world.to_machine.append(ev.CheckpointPulled(node, answer))

    @precondition(lambda self: self.world.to_machine)
    @rule(data=st.data(), twice=st.booleans())
    def arrives(self, data, twice):
        event = self.world.to_machine.pop(data.draw(st.integers(0, len(self.world.to_machine) - 1)))
        if twice and isinstance(event, ev.CheckpointPulled):
            self.world.to_machine.append(event)
        self.world.feed(event)

    @rule(seconds=st.sampled_from([1.0, 15.0, 70.0, 4000.0]))
    def wait(self, seconds):
        self.world.tick(self.world.now + seconds)

    @invariant()
    def a_second_look_finds_nothing_to_do(self):
        if hasattr(self, "world"):
            machine = self.world.restored()
            machine.validate()
            assert machine.handle(ev.Tick(), self.world.now) == []
            assert all(copy.tries <= TRIES for copy in machine.state.copies.values())

    @invariant()
    def nobody_is_asked_for_what_is_spent(self):
        if hasattr(self, "world"):
            asked: dict[str, set[str]] = {}
            for command in self.world.sent(cmd.SendIngest):
                asked.setdefault(command.body.checkpoint.digest, set()).add(command.body.request)
            copies = self.world.machine.state.copies.values()
            now = {copy.digest: asked.get(copy.digest, set()) for copy in copies if copy.spent}
            for digest in now.keys() & self.spent.keys():
                assert now[digest] == self.spent[digest]
            self.spent = now

    def teardown(self):
        if not hasattr(self, "world"):
            return
        world = self.world
        assert world.replayed().snapshot() == world.machine.snapshot()
        for name in NODES:
            self.left(name)
        world.rest()
        for name in NODES:
            self.cordon(name, False)
            self.stats(name, 0)
            self.stats(name, 9000)
        world.rest()
        for each in world.machine.state.apps.values():
            for digest in each.versions[each.active].digests.values() if each.active else ():
                assert len(world.machine.copies.places(digest)) >= GOAL, digest
        assert not world.machine.state.copies
        assert world.replayed().snapshot() == world.machine.snapshot()


Chaos.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestChaos = Chaos.TestCase
