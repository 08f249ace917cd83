"""Stories of nodes, of their memory, and of a controller that was restarted, on a virtual clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.model import key_of
from sllm_faas.controller.state import Machine
from sllm_faas.controller.views import Views
from sllm_faas.spec import CheckpointSpec, Target, digest
from sllm_faas.wire.messages import Ingested, InstanceReport, NodeInfo, NodeStats, TargetDemand
from tests.controller.fakes import app, function, llm
from tests.controller.story import F, deliver, deploy, running, settle, world
from tests.controller.world import DIGEST, ModelNode, World

# -- nodes and memory --------------------------------------------------------------------------------------------


def test_a_lost_nodes_instances_are_started_elsewhere():
    made = world(("node-0", 1000), ("node-1", 1000))
    deploy(made, app())
    made.demand("g", F, 0, 1)
    settle(made)
    made.die("node-0")
    assert made.sent(cmd.SendStart)[-1].node == "node-1"


def test_a_node_that_comes_back_has_its_instances_adopted():
    made = world()
    deploy(made, app())
    made.demand("g", F, 0, 1)
    settle(made)
    before = running(made)
    made.cut("node-0")
    assert made.live(F) == 0
    made.hello("node-0")
    assert list(made.machine.state.instances) == before
    assert len(made.sent(cmd.SendStart)) == 1, "nothing was started in its stead"


def test_a_new_life_of_a_node_has_lost_what_ran_there():
    made = world()
    deploy(made, app())
    made.demand("g", F, 0, 1)
    settle(made)
    made.nodes["node-0"].reports.clear()
    made.nodes["node-0"].life = 2
    made.hello("node-0")
    assert len(made.sent(cmd.SendStart)) == 2


def test_a_stop_that_was_lost_with_the_link_is_said_again():
    made = world()
    deploy(made, app())
    made.demand("g", F, 0, 1)
    settle(made)
    (name,) = running(made)
    made.feed(ev.InstanceStopAsked(name, 3.0))
    made.to_nodes.clear()
    made.hello("node-0")
    assert [(stop.body.instance, stop.body.drain) for stop in made.sent(cmd.SendStop)] == [(name, 3.0)] * 2


def test_an_instance_of_a_deleted_version_that_turns_up_is_stopped():
    made = world()
    report = InstanceReport("ins-old-1", 1, Target("gone", "f", 3), "ready")
    made.feed(ev.NodeUp(NodeInfo("node-0", "ipc:///x", memory_mb=1000), "life-1", (report,)))
    (stop,) = made.sent(cmd.SendStop)
    assert (stop.body.instance, stop.body.reason) == ("ins-old-1", "its version is gone")


def test_an_instance_that_would_not_fit_waits_until_it_does():
    made = world(("node-0", 500))
    deploy(made, app(function("f", memory_mb=300), function("g", memory_mb=300)))
    made.demand("g", F, 0, 1)
    settle(made)
    made.demand("g", Target("app", "g", 1), 1)
    assert len(made.sent(cmd.SendStart)) == 1
    record = made.machine.state.targets[key_of(Target("app", "g", 1))]
    assert "none of 1 nodes has 300 MiB free" in record.blocked
    made.demand("g", F, 0, 0)
    made.demand("g", Target("app", "g", 1), 2)
    settle(made)
    assert made.live(Target("app", "g", 1)) == 1, "the idle one made room"
    assert made.sent(cmd.SendStart)[-1].body.why.startswith("after stopping 1 on node-0: node-0: "), "both are told"


def test_what_is_too_big_for_every_node_is_refused_at_once():
    made = world(("node-0", 500))
    deploy(made, app(function(memory_mb=900)))
    made.demand("g", F, 1)
    (failed,) = made.sent(cmd.FailTarget)
    assert failed.body.error.code == "no_capacity"
    assert "needs 900 MiB; the biggest node, node-0, has 500 MiB" in failed.body.error.message
    made.nodes["node-1"] = ModelNode("node-1", 2000)
    made.hello("node-1")
    assert made.sent(cmd.SendStart), "a bigger node ends the refusal"


def test_weights_shared_on_a_node_are_counted_once():
    made = world(("node-0", 1000))
    deploy(made, app(llm("chat", memory_mb=100), bundle=""))
    made.demand("g", Target("app", "chat", 1), 5)
    settle(made)
    assert made.live(Target("app", "chat", 1)) == 5, "5 times 100 MiB and 256 MiB of weights fit into 1000"
    assert made.machine.ledger.used_mb("node-0") == 756


def test_a_cordoned_node_gets_nothing_new_and_keeps_what_it_has():
    made = world(("node-0", 1000), ("node-1", 1000))
    deploy(made, app())
    made.demand("g", F, 0, 1)
    settle(made)
    made.feed(ev.NodeCordoned("node-0", True))
    made.demand("g", F, 1, 1)
    assert made.sent(cmd.SendStart)[-1].node == "node-1"
    assert not made.sent(cmd.SendStop)


def test_a_drained_node_is_emptied_and_its_work_replaced():
    made = world(("node-0", 1000), ("node-1", 1000))
    deploy(made, app())
    made.demand("g", F, 0, 1)
    settle(made)
    made.feed(ev.NodeDrained("node-0"))
    assert not made.sent(cmd.SendStop), "not before another can take its place"
    settle(made)
    assert made.sent(cmd.SendStop)[-1].body.drain is None
    assert made.sent(cmd.SendStart)[-1].node == "node-1"


def test_a_lost_node_stays_routed_for_a_minute_one_that_left_does_not():
    """Gateways judge their own links: streams on a node that only we lost go on."""
    made = world(("node-0", 1000), ("node-1", 1000))
    made.feed(ev.NodeLeft("node-1"))
    assert made.sent(cmd.WithdrawNode) == [cmd.WithdrawNode("node-1")]
    made.cut("node-0")
    made.tick(made.now + 59.0)
    assert len(made.sent(cmd.WithdrawNode)) == 1
    made.tick(made.now + 1.0)
    assert made.sent(cmd.WithdrawNode)[-1] == cmd.WithdrawNode("node-0")


# -- restart -----------------------------------------------------------------------------------------------------


def restored(*nodes: str) -> World:
    made = World()
    version = ev.StoredVersion("app", 1, app(function(min_containers=1)), ready=True, created=1.0, active=True)
    known = tuple(ev.StoredNode(name, info=NodeInfo(name, f"ipc:///{name}", memory_mb=1000)) for name in nodes)
    made.feed(ev.Restored((version,), known))
    for name in nodes:
        made.nodes[name] = ModelNode(name, 1000)
    return made


def test_after_a_restart_running_instances_are_adopted_before_anything_starts():
    made = restored("node-0", "node-1")
    made.nodes["node-1"].reports["ins-old-1"] = InstanceReport("ins-old-1", 1, F, "ready")
    made.hello("node-0")
    assert not made.sent(cmd.SendStart), "node-1 may have it"
    made.hello("node-1")
    assert list(made.machine.state.instances) == ["ins-old-1"]
    made.tick(10.0)
    assert not made.sent(cmd.SendStart)


def test_after_a_restart_a_node_that_does_not_return_holds_nothing_up_for_long():
    made = restored("node-0", "node-1")
    made.hello("node-0")
    made.tick(2.9)
    assert not made.sent(cmd.SendStart)
    made.tick(3.0)
    assert made.sent(cmd.SendStart)[0].node == "node-0"


def test_restoring_is_only_possible_first():
    made = restored("node-0")
    before = len(made.log)
    made.feed(ev.Restored())
    assert len(made.log) == before


def test_the_cap_of_an_app_is_shared_out_between_the_gateways_there_are():
    """What does not divide goes to the first of them by name."""
    made = world()
    deploy(made, app(max_concurrency=5))
    made.feed(ev.GatewayUp("h", "1"))
    made.feed(ev.GatewayUp("h", "2"))
    made.feed(ev.GatewayUp("e", "1"))
    made.feed(ev.GatewayLost("h", "1"))  # of the life before
    made.feed(ev.GatewayLost("h", "2"))
    caps = [{(route.cap, route.more) for route in each.functions} for each in made.sent(cmd.PublishFunctions)]
    assert caps == [{(5, ())}, {(2, ("g",))}, {(1, ("e", "g"))}, {(2, ("e",))}]


@given(cap=st.integers(1, 40), gateways=st.integers(1, 12))
def test_the_parts_of_a_cap_are_the_whole_where_each_gateway_can_have_one(cap, gateways):
    made = World()
    for number in range(gateways):
        made.feed(ev.GatewayUp(f"g-{number}", "1"))
    part, more = made.machine.deployments.cap(app(max_concurrency=cap))
    assert part * gateways + len(more) == max(cap, gateways)


@pytest.mark.parametrize(("dram_mb", "third"), [(None, ("dram", 0.0)), (3000, ("dram", 0.0)), (2500, ("disk", 2.0))])
def test_only_a_start_that_reads_waits_for_the_reads_before_it(dram_mb: int | None, third: tuple[str, float]):
    """What is in DRAM is attached, whatever the disk is busy with; unless what is read now takes its place there."""
    machine = Machine("abc")
    specs = [llm(name, memory_mb=100) for name in ("a", "b", "c")]
    digests = {spec.name: digest(spec.name.encode()) for spec in specs}
    version = ev.StoredVersion("app", 1, app(*specs), True, 0.0, active=True, digests=digests)
    machine.handle(ev.Restored((version,), sizes=dict.fromkeys(digests.values(), 10**9)), 0.0)
    machine.handle(ev.GatewayUp("g", "1"), 0.0)
    info = NodeInfo("n", "ipc:///n", memory_mb=50_000, bandwidth={"disk": 1e9}, checkpoints=tuple(digests.values()))
    machine.handle(ev.NodeUp(info, "1"), 0.0)
    machine.handle(ev.NodeStatsSeen("n", NodeStats(50_000, 50_000, 0, (digests["c"],), dram_mb=dram_mb)), 0.0)
    for name in "abc":
        machine.handle(ev.DemandSeen("g", (TargetDemand(Target("app", name, 1), 1, 0),)), 0.0)
    queued = {i.target.function: (i.tier, i.queued) for i in machine.state.instances.values()}
    assert queued == {"a": ("disk", 0.0), "b": ("disk", 1.0), "c": third}


def test_a_read_waits_for_those_that_are_no_larger():
    machine = Machine("abc")
    specs = {name: llm(name, memory_mb=100) for name in ("large", "like", "small")}
    digests = {name: digest(name.encode()) for name in specs}
    version = ev.StoredVersion("app", 1, app(*specs.values()), True, 0.0, active=True, digests=digests)
    sizes = dict(zip(digests.values(), (4 * 10**9, 4 * 10**9, 10**9), strict=True))
    machine.handle(ev.Restored((version,), sizes=sizes), 0.0)
    machine.handle(ev.GatewayUp("g", "1"), 0.0)
    info = NodeInfo("n", "ipc:///n", memory_mb=50_000, bandwidth={"disk": 1e9}, checkpoints=tuple(digests.values()))
    machine.handle(ev.NodeUp(info, "1"), 0.0)
    for name in specs:
        machine.handle(ev.DemandSeen("g", (TargetDemand(Target("app", name, 1), 1, 0),)), 0.0)
    queued = {i.target.function: i.queued for i in machine.state.instances.values()}
    assert queued == {"large": 0.0, "like": 4.0, "small": 0.0}


@pytest.mark.parametrize("crowd", [(), tuple(f"other{number}" for number in range(12))], ids=["all shown", "indexed"])
def test_a_start_goes_to_the_node_whose_gpu_has_the_checkpoint_and_waits_for_no_read(crowd: tuple[str, ...]):
    machine = Machine("abc")
    specs = [llm("a", memory_mb=100), llm("b", memory_mb=100, gpus=1)]
    digests = {spec.name: digest(spec.name.encode()) for spec in specs}
    version = ev.StoredVersion("app", 1, app(*specs), True, 0.0, active=True, digests=digests)
    machine.handle(ev.Restored((version,), sizes=dict.fromkeys(digests.values(), 10**9)), 0.0)
    machine.handle(ev.GatewayUp("g", "1"), 0.0)
    for name in ("dram", "gpu", *crowd):
        there, gpus = tuple(digests.values()), 0 if name in crowd else 1
        info = NodeInfo(name, f"ipc:///{name}", memory_mb=50_000, gpus=gpus, checkpoints=there, host="one")
        machine.handle(ev.NodeUp(info, "1"), 0.0)
    machine.handle(ev.NodeStatsSeen("dram", NodeStats(50_000, 50_000, 0, (digests["b"],))), 0.0)
    machine.handle(ev.NodeStatsSeen("gpu", NodeStats(50_000, 50_000, 0, on_gpu=tuple(digests.values()))), 0.0)
    machine.validate()
    for name in "ab":
        machine.handle(ev.DemandSeen("g", (TargetDemand(Target("app", name, 1), 1, 0),)), 0.0)
    found = {i.target.function: i for i in machine.state.instances.values()}
    assert (found["b"].node, found["b"].tier, found["b"].queued) == ("gpu", "gpu", 0.0)
    assert found["a"].tier == "disk", "it computes on a CPU"


def test_a_node_that_names_a_checkpoint_twice_can_say_something_else_and_leave():
    machine, twice = Machine("abc"), (DIGEST, DIGEST)
    info = NodeInfo("n", "ipc:///n", memory_mb=50_000, checkpoints=twice)
    machine.handle(ev.NodeUp(info, "1"), 0.0)
    for stats in (NodeStats(1, 1, 0, twice, twice, on_gpu=twice), NodeStats(1, 1, 0)):
        machine.handle(ev.NodeStatsSeen("n", stats), 0.0)
        machine.validate()
    machine.handle(ev.NodeLeft("n"), 0.0)
    machine.validate()


def test_a_node_tells_what_has_left_its_disk_and_what_came_to_it():
    machine = Machine("abc")
    info = NodeInfo("n", "ipc:///n", memory_mb=50_000, checkpoints=(DIGEST,))
    machine.handle(ev.NodeUp(info, "1"), 0.0)
    for told, there in ((None, True), ((), False), ((DIGEST, DIGEST), True)):
        machine.handle(ev.NodeStatsSeen("n", NodeStats(1, 1, 0, checkpoints=told)), 0.0)
        machine.validate()
        assert ("n" in machine.ledger.where.holders(DIGEST)) is there


def test_a_start_is_timed_and_the_next_one_predicted_by_it():
    made = world()
    deploy(made, app())
    for asked, predicted, actual in ((1, 0.1, 0.75), (2, 0.75, 0.25), (3, 0.4167, 0.25)):
        made.demand("g", F, asked)
        start = made.sent(cmd.SendStart)[-1].body
        assert start.predicted == predicted
        deliver(made)
        made.tick(made.now + actual)
        made.progress("node-0", start.instance, "ready")
        deliver(made)
        ended = made.sent(cmd.StartEnded)[-1]
        assert (ended.outcome, ended.actual) == ("ready", pytest.approx(actual))


@pytest.mark.parametrize(("apart", "together"), [(0.002, True), (0.02, False)])
def test_starts_that_are_commanded_soon_after_each_other_are_expected_to_slow_each_other(apart, together):
    made = world(("node-0", 5000))
    deploy(made, app(function("f"), function("g")))
    made.demand("g", F, 1)
    alone = made.sent(cmd.SendStart)[0].body
    made.tick(made.now + apart)
    made.demand("g", Target("app", "g", 1), 1)
    first, second = (made.machine.state.instances[start.body.instance] for start in made.sent(cmd.SendStart))
    assert second.predicted == pytest.approx(alone.predicted * 1.25)
    assert first.predicted == pytest.approx(alone.predicted * (1.25 if together else 1.0))


def test_what_a_node_measures_after_its_hello_counts_until_something_was_learned():
    made = world(("node-0", 5000))
    deploy(made, app(function("f", memory_mb=100, checkpoint=CheckpointSpec("org/model"))))
    machine = made.machine
    node, target = machine.state.nodes["node-0"], Target("app", "f", 1)
    spec = machine.ledger.function(target)
    made.feed(ev.CheckpointPulled("node-0", Ingested("pull-1", DIGEST, 2**28)))
    made.feed(ev.NodeStatsSeen("node-0", NodeStats(0, 0, 0, bandwidth={"disk": 2.0**27})))
    assert machine.scaler.candidates.guess(node, target, spec).load == 2.0
    made.feed(ev.NodeStatsSeen("node-0", NodeStats(0, 0, 0)))
    assert node.info.bandwidth == {"disk": 2.0**27}, "it says nothing new"
    assert Views(machine.ledger).describe_node("node-0", made.now)["bandwidth"] == {"disk": 2.0**27}
    assert made.replayed().snapshot() == machine.snapshot()
