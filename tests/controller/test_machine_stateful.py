"""Whatever order the world's events come in, the invariants hold, the log replays, and it comes to rest as desired."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sllm_faas.controller import events as ev
from sllm_faas.controller.state import Machine
from sllm_faas.spec import Target
from sllm_faas.wire.messages import NodeStats, TargetDemand
from tests.controller.fakes import app, function, llm
from tests.controller.world import World

NODES = ("node-0", "node-1", "node-2")
GATEWAYS = ("gateway-0", "gateway-1")
APPS = ("app-a", "app-b")
SPECS = {
    "small": (function("f", concurrency=2, memory_mb=100, scaledown_window=5.0, max_containers=3),),
    "kept": (function("f", memory_mb=200, min_containers=1, buffer_containers=1, max_containers=4),),
    "pair": (function("f", memory_mb=300, scaledown_window=0.0), function("g", memory_mb=100, min_containers=2)),
    "llm": (llm("f", memory_mb=200, concurrency=4),),
    "big": (llm("f", memory_mb=700), llm("g", memory_mb=500, source="org/other")),
}


class Chaos(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.world = World(Machine("abc", migrate=True, copies=2))
        self.numbers = dict.fromkeys(APPS, 0)
        self.world.feed(ev.Restored())
        for gateway in GATEWAYS:
            self.world.feed(ev.GatewayUp(gateway, "1"))

    # -- people ----------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(APPS), spec=st.sampled_from(sorted(SPECS)))
    def deploy(self, name, spec):
        self.numbers[name] += 1
        self.world.feed(ev.VersionAdded(name, self.numbers[name], app(*SPECS[spec], name=name)))

    @rule(name=st.sampled_from(APPS), number=st.integers(1, 4))
    def roll_back(self, name, number):
        version = self.world.machine.ledger.version(name, number)
        if version is not None and version.state == "ready":
            self.world.feed(ev.VersionActivated(name, number))

    @rule(name=st.sampled_from(APPS))
    def delete(self, name):
        self.world.feed(ev.AppDeleted(name))

    @rule(node=st.sampled_from(NODES), cordoned=st.booleans())
    def cordon(self, node, cordoned):
        self.world.feed(ev.NodeCordoned(node, cordoned))

    @rule(node=st.sampled_from(NODES))
    def drain(self, node):
        self.world.feed(ev.NodeDrained(node))

    @rule(node=st.sampled_from(NODES))
    def leave(self, node):
        self.world.feed(ev.NodeLeaving(node))

    @rule(data=st.data(), node=st.sampled_from(NODES))
    def migrate(self, data, node):
        known = sorted(self.world.machine.state.instances)
        if known:
            self.world.feed(ev.MigrationAsked(data.draw(st.sampled_from(known)), node, ("0" * 32,), "r"))

    @rule(data=st.data())
    def stop_one(self, data):
        known = sorted(self.world.machine.state.instances)
        if known:
            self.world.feed(ev.InstanceStopAsked(data.draw(st.sampled_from(known)), None))

    # -- gateways --------------------------------------------------------------------------------------------

    @rule(
        gateway=st.sampled_from(GATEWAYS),
        name=st.sampled_from(APPS),
        function=st.sampled_from("fg"),
        version=st.integers(1, 3),
        waiting=st.integers(0, 5),
        running=st.integers(0, 3),
        served=st.sampled_from([0, 0, 3, 20]),
        each=st.sampled_from([0.01, 0.5, 8.0]),
    )
    def demand(self, gateway, name, function, version, waiting, running, served, each):
        item = TargetDemand(Target(name, function, version), waiting, running, 0.0, 0, served, served * each)
        self.world.feed(ev.DemandSeen(gateway, (item,)))

    @rule(gateway=st.sampled_from(GATEWAYS))
    def gateway_lost(self, gateway):
        self.world.feed(ev.GatewayLost(gateway, "1"))

    @rule(gateway=st.sampled_from(GATEWAYS))
    def gateway_back(self, gateway):
        self.world.feed(ev.GatewayUp(gateway, "1"))

    # -- nodes -----------------------------------------------------------------------------------------------

    @rule(node=st.sampled_from(NODES))
    def hello(self, node):
        self.world.nodes.setdefault(node, _node(node))
        self.world.hello(node)

    @rule(node=st.sampled_from(NODES), disk=st.sampled_from([0, 5000, 9000]))
    def stats(self, node, disk):
        self.world.feed(ev.NodeStatsSeen(node, NodeStats(0, disk, 0)))

    @precondition(lambda self: self.world.nodes)
    @rule(data=st.data())
    def die(self, data):
        self.world.die(data.draw(st.sampled_from(sorted(self.world.nodes))))

    @precondition(lambda self: self.world.nodes)
    @rule(data=st.data())
    def cut(self, data):
        self.world.cut(data.draw(st.sampled_from(sorted(self.world.nodes))))

    @precondition(lambda self: any(node.reports for node in self.world.nodes.values()))
    @rule(data=st.data(), state=st.sampled_from(["ready", "ready", "failed", "stopped"]))
    def progress(self, data, state):
        pairs = [(node.name, name) for node in self.world.nodes.values() for name in node.reports]
        self.world.progress(*data.draw(st.sampled_from(pairs)), state)

    @precondition(lambda self: any(node.reports for node in self.world.nodes.values()))
    @rule(data=st.data(), running=st.integers(0, 4))
    def runs(self, data, running):
        """So many invocations run in it."""
        pairs = [(node, name) for node in self.world.nodes.values() for name in node.reports]
        node, name = data.draw(st.sampled_from(pairs))
        node.reports[name] = replace(node.reports[name], running=running, tokens=running * 100)
        if node.connected:
            self.world.to_machine.append(ev.InstanceSeen(node.name, node.reports[name]))

    # -- links -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.to_machine)
    @rule(data=st.data(), twice=st.booleans())
    def arrives(self, data, twice):
        """In any order, and perhaps again later."""
        index = data.draw(st.integers(0, len(self.world.to_machine) - 1))
        event = self.world.to_machine.pop(index)
        if twice and not isinstance(event, ev.VersionActivated):
            self.world.to_machine.append(event)
        self.world.feed(event)

    @precondition(lambda self: self.world.to_nodes)
    @rule(data=st.data(), outcome=st.sampled_from(["moved", "moved", "kept"]))
    def obeyed(self, data, outcome):
        self.world.obey(data.draw(st.integers(0, len(self.world.to_nodes) - 1)), outcome)

    @precondition(lambda self: self.world.to_machine)
    @rule(data=st.data())
    def lost(self, data):
        index = data.draw(st.integers(0, len(self.world.to_machine) - 1))
        if not isinstance(self.world.to_machine[index], ev.VersionActivated):  # the store loses nothing
            self.world.to_machine.pop(index)

    @rule(seconds=st.sampled_from([0.05, 1.0, 7.0, 70.0]))
    def wait(self, seconds):
        self.world.tick(self.world.now + seconds)

    # -- what must hold --------------------------------------------------------------------------------------

    @invariant()
    def a_second_look_finds_nothing_to_do(self):
        if hasattr(self, "world"):
            machine = self.world.restored()
            machine.ledger.dirty.update(machine.state.targets)
            commands = machine.handle(ev.Tick(), self.world.now)
            assert commands == [], f"looking again commands {commands}"

    def teardown(self):
        if not hasattr(self, "world"):
            return
        world = self.world
        assert world.replayed().snapshot() == world.machine.snapshot()
        for node in NODES:
            world.nodes.setdefault(node, _node(node))
            world.feed(ev.NodeCordoned(node, False))
        world.rest()
        for node in NODES:
            world.feed(ev.NodeStatsSeen(node, NodeStats(0, 0, 0)))
            world.feed(ev.NodeStatsSeen(node, NodeStats(0, 9000, 0)))
        world.rest()
        machine = world.machine
        for key, record in machine.state.targets.items():
            live = len(machine.ledger.live(key))
            assert live == record.desired or record.blocked, f"{key}: {live} live, {record.desired} desired"
        running = {name for node in world.nodes.values() for name in node.reports}
        assert running == set(machine.state.instances), "what runs is what the machine knows"
        assert not machine.state.moves, "every move is over"
        assert not machine.state.copies, "every checkpoint has its copies"
        assert not any(app.pending for app in machine.state.apps.values()), "every deployment has ended"
        assert world.replayed().snapshot() == machine.snapshot()


def _node(name):
    from tests.controller.world import ModelNode

    return ModelNode(name, memory_mb=1000, joined=name != "node-0")


Chaos.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestChaos = Chaos.TestCase
