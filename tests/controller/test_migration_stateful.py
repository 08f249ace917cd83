"""Moves under any order of events: invariants hold, nothing is stopped before its heir is ready, all comes to rest."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sllm_faas.controller import autoscale
from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.spec import Target
from tests.controller.fakes import app, function, llm
from tests.controller.world import ModelNode, World

NODES = ("node-0", "node-1", "node-2")
APPS = {
    "small": app(llm("f", memory_mb=200, concurrency=2, source="org/small"), name="small", bundle=""),
    "big": app(llm("f", memory_mb=650, source="org/big"), name="big", bundle=""),
    "plain": app(function("f", memory_mb=250, scaledown_window=5.0), name="plain"),
}
TARGETS = {name: Target(name, "f", 1) for name in APPS}


class Moves(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        world = self.world = World()
        stored = tuple(ev.StoredVersion(name, 1, spec, True, 1.0, active=True) for name, spec in APPS.items())
        world.feed(ev.Restored(stored))
        world.feed(ev.GatewayUp("g", "1"))
        for name in NODES:
            world.nodes[name] = ModelNode(name, 1000)
            world.hello(name)
        world.demand("g", TARGETS["small"], 1, 1)
        world.demand("g", TARGETS["plain"], 1, 0)

    @rule(name=st.sampled_from(sorted(APPS)), waiting=st.integers(0, 4), running=st.integers(0, 3))
    def demand(self, name, waiting, running):
        self.world.demand("g", TARGETS[name], waiting, running)

    @rule(node=st.sampled_from(NODES))
    def drain(self, node):
        self.world.feed(ev.NodeCordoned(node, True))
        self.world.feed(ev.NodeDrained(node))

    @rule(node=st.sampled_from(NODES))
    def leave(self, node):
        self.world.feed(ev.NodeLeaving(node))

    @rule(node=st.sampled_from(NODES))
    def open(self, node):
        self.world.feed(ev.NodeCordoned(node, False))

    @rule(data=st.data(), node=st.sampled_from(NODES))
    def migrate(self, data, node):
        known = sorted(self.world.machine.state.instances)
        if known:
            self.world.feed(ev.MigrationAsked(data.draw(st.sampled_from(known)), node, ("0" * 32,), "r"))

    @precondition(lambda self: any(node.reports for node in self.world.nodes.values()))
    @rule(data=st.data(), running=st.integers(0, 3))
    def runs(self, data, running):
        node, name = data.draw(st.sampled_from(self._pairs()))
        node.reports[name] = replace(node.reports[name], running=running, tokens=running * 100)
        if node.connected:
            self.world.to_machine.append(ev.InstanceSeen(node.name, node.reports[name]))

    @precondition(lambda self: any(node.reports for node in self.world.nodes.values()))
    @rule(data=st.data(), state=st.sampled_from(["ready", "ready", "ready", "failed", "stopped"]))
    def progress(self, data, state):
        node, name = data.draw(st.sampled_from(self._pairs()))
        self.world.progress(node.name, name, state)

    @rule(starts=st.sampled_from([True, True, False]), busy=st.integers(0, 2))
    def all_arrives(self, starts, busy):
        """And starts end well, their instances get something to do."""
        while self.world.to_nodes or self.world.to_machine:
            if self.world.to_nodes:
                self.world.obey()
            else:
                self.world.feed(self.world.to_machine.pop(0))
            for node, name in self._pairs() if starts else ():
                if node.reports[name].state == "starting":
                    node.reports[name] = replace(node.reports[name], running=busy, tokens=100 * busy)
                    self.world.progress(node.name, name, "ready")

    @precondition(lambda self: self.world.to_machine)
    @rule(data=st.data(), twice=st.booleans(), lost=st.booleans())
    def arrives(self, data, twice, lost):
        event = self.world.to_machine.pop(data.draw(st.integers(0, len(self.world.to_machine) - 1)))
        if twice:
            self.world.to_machine.append(event)
        if twice or not lost:
            self.world.feed(event)

    @precondition(lambda self: self.world.to_nodes)
    @rule(data=st.data(), outcome=st.sampled_from(["moved", "moved", "kept"]))
    def obeyed(self, data, outcome):
        self.world.obey(data.draw(st.integers(0, len(self.world.to_nodes) - 1)), outcome)

    @rule(node=st.sampled_from(NODES), how=st.sampled_from(["nothing", "cut", "die"]))
    def breaks(self, node, how):
        if how != "nothing":
            getattr(self.world, how)(node)

    @rule(node=st.sampled_from(NODES))
    def hello(self, node):
        self.world.hello(node)

    @rule(seconds=st.sampled_from([1.0, 7.0, 70.0]))
    def wait(self, seconds):
        self.world.tick(self.world.now + seconds)

    def _pairs(self):
        return [(node, name) for node in self.world.nodes.values() for name in sorted(node.reports)]

    @invariant()
    def a_second_look_finds_nothing_to_do(self):
        if hasattr(self, "world"):
            machine = self.world.restored()
            machine.ledger.dirty.update(machine.state.targets)
            commands = machine.handle(ev.Tick(), self.world.now)
            assert commands == [], f"looking again commands {commands}"

    @invariant()
    def migrate_goes_from_one_live_instance_to_another_of_its_target(self):
        if not hasattr(self, "world"):
            return
        commands, self.world.commands = self.world.commands, []
        sent: dict[str, str] = {}
        for command in commands:
            if isinstance(command, cmd.SendMigrate):
                body = command.body
                assert body.node != command.node
                assert body.number
                assert body.migration not in sent
                sent[body.migration] = body.instance

    def teardown(self):
        if not hasattr(self, "world"):
            return
        world = self.world
        assert world.replayed().snapshot() == world.machine.snapshot()
        for node in NODES:
            world.feed(ev.NodeCordoned(node, False))
        world.rest()
        machine = world.machine
        assert not machine.state.moves, "every move is over"
        for key, record in machine.state.targets.items():
            live = len(machine.ledger.live(key))
            most = record.desired + autoscale.spare(record.desired, 0)
            assert record.desired <= live <= most or record.blocked, f"{key}: {live} live, {record.desired} desired"
        running = {name for node in world.nodes.values() for name in node.reports}
        assert running == set(machine.state.instances), "what runs is what the machine knows"
        assert world.replayed().snapshot() == machine.snapshot()


Moves.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestMoves = Moves.TestCase
