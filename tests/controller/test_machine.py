"""Stories of the machine on a virtual clock: events in, commands out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.model import key_of
from sllm_faas.controller.state import Machine
from sllm_faas.controller.views import Views
from sllm_faas.errors import ErrorInfo
from sllm_faas.spec import AppSpec, CheckpointSpec, Scaling, Target, digest
from sllm_faas.wire.messages import Checked, InstanceReport, NodeInfo, NodeStats, TargetDemand
from tests.controller.fakes import app, function, llm
from tests.controller.world import DIGEST, FAILED, ModelNode, World

F = Target("app", "f", 1)


def world(*nodes: tuple[str, int]) -> World:
    """With nodes of that memory (MiB) up, and a gateway."""
    made = World()
    made.feed(ev.Restored())
    made.feed(ev.GatewayUp("g", "1"))
    for name, memory in nodes or (("node-0", 1000),):
        made.nodes[name] = ModelNode(name, memory)
        made.hello(name)
    return made


def deploy(made: World, spec: AppSpec, number: int = 1) -> None:
    made.feed(ev.VersionAdded(spec.name, number, spec))
    settle(made)


def settle(made: World) -> None:
    """All that was sent arrives; starts succeed and drains end at once; no time passes."""
    while made.to_nodes or made.to_machine or made._move_one():
        if made.to_nodes:
            made.obey()
        elif made.to_machine:
            made.feed(made.to_machine.pop(0))


def deliver(made: World) -> None:
    """All that was sent arrives; instances do nothing by themselves."""
    while made.to_nodes or made.to_machine:
        if made.to_nodes:
            made.obey()
        else:
            made.feed(made.to_machine.pop(0))


def running(made: World) -> list[str]:
    return [name for node in made.nodes.values() for name in node.reports]


def fail_start(made: World) -> None:
    deliver(made)
    (pair,) = [(n.name, r.instance) for n in made.nodes.values() for r in n.reports.values() if r.state == "starting"]
    made.progress(*pair, "failed")
    deliver(made)


# -- deployments -------------------------------------------------------------------------------------------------


def test_a_version_serves_only_after_its_import_check_and_the_stores_commit():
    made = world()
    made.feed(ev.VersionAdded("app", 1, app()))
    assert not made.sent(cmd.PublishFunctions)
    made.feed(ev.VersionChecked("node-0", Checked("app", 1)))
    assert made.sent(cmd.StoreActivation)
    assert not made.sent(cmd.PublishFunctions)
    made.feed(ev.VersionActivated("app", 1))
    (routes,) = made.sent(cmd.PublishFunctions)
    assert [route.spec.name for route in routes.functions] == ["f"]
    assert made.sent(cmd.DeployEnded) == [cmd.DeployEnded("app", 1, 1, None)]


def test_with_min_containers_it_serves_only_when_its_first_instance_is_ready():
    made = world()
    made.feed(ev.VersionAdded("app", 1, app(function(min_containers=2))))
    deliver(made)
    assert len(running(made)) == 2
    assert not made.sent(cmd.StoreActivation)
    made.progress("node-0", running(made)[0], "ready")
    deliver(made)
    assert made.machine.state.apps["app"].active == 1


def test_a_failed_check_leaves_the_old_version_serving_with_its_error_kept():
    made = world()
    deploy(made, app())
    made.feed(ev.VersionAdded("app", 2, app(function(concurrency=2))))
    error = ErrorInfo("import_failed", "No module named 'numpyy'", traceback="Traceback …")
    made.feed(ev.VersionChecked("node-0", Checked("app", 2, error)))
    state = made.machine.state.apps["app"]
    assert (state.active, state.pending, state.versions[2].state) == (1, 0, "failed")
    assert made.sent(cmd.DeployEnded)[-1] == cmd.DeployEnded("app", 2, 1, error)
    assert made.sent(cmd.StoreFailure) == [cmd.StoreFailure("app", 2, error)]


def test_a_first_instance_that_fails_fails_the_deployment_and_its_siblings_stop():
    made = world()
    deploy(made, app())
    made.feed(ev.VersionAdded("app", 2, app(function(min_containers=2))))
    deliver(made)
    first, second = running(made)
    made.progress("node-0", first, "failed")
    deliver(made)
    assert made.machine.state.apps["app"].active == 1
    assert made.sent(cmd.DeployEnded)[-1].error == FAILED
    assert [stop.body.instance for stop in made.sent(cmd.SendStop)] == [second]


def test_a_newer_deployment_supersedes_the_one_under_way():
    made = world()
    made.feed(ev.VersionAdded("app", 1, app()))
    made.feed(ev.VersionAdded("app", 2, app(function(concurrency=2))))
    ended = made.sent(cmd.DeployEnded)[0]
    assert (ended.number, ended.error.code) == (1, "conflict")
    settle(made)
    assert made.machine.state.apps["app"].active == 2


def test_a_switch_that_is_with_the_store_is_not_superseded():
    """The store will say version 1 serves, whatever the machine would like; so it says so, too, until 2 does."""
    made = world()
    made.feed(ev.VersionAdded("app", 1, app()))
    made.feed(ev.VersionChecked("node-0", Checked("app", 1)))
    made.feed(ev.VersionAdded("app", 2, app(function(concurrency=2))))
    made.feed(made.to_machine.pop(0))  # what the store answers
    assert made.machine.state.apps["app"].active == 1
    assert made.machine.state.apps["app"].pending == 2
    settle(made)
    assert made.machine.state.apps["app"].active == 2


def test_a_deployment_ends_when_its_app_is_deleted_while_the_store_switches():
    """Nobody is left waiting for an end that cannot come."""
    made = world()
    made.feed(ev.VersionAdded("app", 1, app()))
    made.feed(ev.VersionChecked("node-0", Checked("app", 1)))
    made.feed(ev.AppDeleted("app"))
    (ended,) = made.sent(cmd.DeployEnded)
    assert (ended.number, ended.error.code) == (1, "conflict")
    settle(made)
    assert "app" not in made.machine.state.apps


def test_a_store_that_refuses_the_switch_fails_the_deployment():
    made = world()
    made.feed(ev.VersionAdded("app", 1, app()))
    made.feed(ev.VersionChecked("node-0", Checked("app", 1)))
    made.feed(ev.VersionRefused("app", 1, ErrorInfo("storage_full", "full")))
    assert made.sent(cmd.DeployEnded)[-1].error.code == "storage_full"
    assert not made.sent(cmd.PublishFunctions)


def test_a_check_moves_to_another_node_when_its_node_is_lost():
    made = world(("node-0", 1000), ("node-1", 1000))
    made.feed(ev.VersionAdded("app", 1, app()))
    assert made.sent(cmd.SendCheck)[-1].node == "node-0"
    made.die("node-0")
    assert made.sent(cmd.SendCheck)[-1].node == "node-1"
    made.feed(ev.VersionChecked("node-0", Checked("app", 1, ErrorInfo("x", "late"))))
    assert made.machine.state.apps["app"].versions[1].state == "checking"


def test_a_check_waits_for_a_node_and_then_fails():
    made = World()
    made.feed(ev.VersionAdded("app", 1, app()))
    made.tick(29.0)
    assert not made.sent(cmd.DeployEnded)
    made.tick(31.0)
    assert made.sent(cmd.DeployEnded)[0].error.code == "unavailable"


def test_a_checkpoint_that_has_not_changed_makes_no_new_version():
    """The spec is the same and so are the weights found behind its source."""
    made = world()
    spec = app(llm("chat"), bundle="")
    deploy(made, spec)
    deploy(made, spec, 2)
    assert made.sent(cmd.DeployEnded)[-1] == cmd.DeployEnded("app", 2, 1, None)
    assert made.sent(cmd.ForgetVersions) == [cmd.ForgetVersions("app", (2,))]


def test_other_weights_behind_the_same_source_are_a_new_version():
    made = world()
    spec = app(llm("chat"), bundle="")
    deploy(made, spec)
    made.feed(ev.VersionAdded("app", 2, spec))
    made.feed(ev.VersionChecked("node-0", Checked("app", 2, checkpoints={"chat": "e" * 64})))
    deliver(made)
    assert made.machine.state.apps["app"].active == 2


def test_a_route_and_a_start_carry_the_checkpoints_digest():
    made = world()
    deploy(made, app(llm("chat"), bundle=""))
    (routes,) = made.sent(cmd.PublishFunctions)
    assert routes.functions[0].spec.checkpoint.digest == DIGEST
    made.demand("g", Target("app", "chat", 1), 1)
    assert made.sent(cmd.SendStart)[0].body.spec.checkpoint.digest == DIGEST


def test_the_old_version_drains_after_the_switch_and_a_rollback_brings_it_back():
    made = world()
    deploy(made, app())
    made.demand("g", F, 0, 1)
    settle(made)
    deploy(made, app(function(concurrency=2)), 2)
    assert made.live(F) == 0
    assert made.sent(cmd.SendStop)[0].body.drain is None
    made.feed(ev.VersionActivated("app", 1))
    assert made.sent(cmd.PublishFunctions)[-1].functions[0].version == 1
    assert made.machine.state.apps["app"].active == 1


def test_what_still_waits_for_the_old_version_is_served_by_it():
    made = world()
    deploy(made, app())
    deploy(made, app(function(concurrency=2)), 2)
    made.demand("g", F, 1)
    settle(made)
    assert made.live(F) == 1
    made.demand("g", F, 0, 1)
    assert made.live(F) == 0, "it takes nothing new once nobody waits"


def test_functions_that_a_version_no_longer_has_are_withdrawn():
    made = world()
    deploy(made, app(function("f"), function("g")))
    deploy(made, app(function("f")), 2)
    assert made.sent(cmd.PublishFunctions)[-1].gone == ("g",)


def test_a_deleted_app_drains_and_its_callers_are_told():
    made = world()
    deploy(made, app())
    made.demand("g", F, 1)
    settle(made)
    made.feed(ev.AppDeleted("app"))
    assert made.sent(cmd.PublishFunctions)[-1] == cmd.PublishFunctions("app", (), ("f",))
    assert made.live(F) == 0
    settle(made)
    failed = made.sent(cmd.FailTarget)[-1]
    assert (failed.gateways, failed.body.error.code) == (("g",), "not_found")
    assert running(made) == []


def test_history_keeps_the_last_twenty_versions_and_the_serving_one():
    made = world()
    for number in range(1, 31):
        deploy(made, app(function(concurrency=number)), number)
    assert sorted(made.machine.state.apps["app"].versions) == list(range(11, 31))


# -- scaling -----------------------------------------------------------------------------------------------------


def test_from_zero_to_one_and_back_to_zero():
    """The start is commanded by the very event that brings the demand; the stop after the idle window."""
    made = world()
    deploy(made, app(function(scaledown_window=10.0)))
    assert running(made) == []
    commands = made.feed(ev.DemandSeen("g", (TargetDemand(F, 1, 0),)))
    assert [type(command) for command in commands] == [cmd.SendStart]
    settle(made)
    made.demand("g", F, 0, 1)
    made.tick(5.0)
    made.demand("g", F, 0, 0)
    made.tick(14.9)
    assert made.live(F) == 1
    made.tick(15.0)
    assert made.live(F) == 0


def test_the_idle_clock_starts_at_ready():
    made = world()
    deploy(made, app(function(scaledown_window=10.0)))
    made.demand("g", F, 1)
    deliver(made)
    made.tick(8.0)
    made.progress("node-0", running(made)[0], "ready")
    deliver(made)
    made.demand("g", F, 0, 0)
    made.tick(17.9)
    assert made.live(F) == 1
    made.tick(18.0)
    assert made.live(F) == 0


def test_a_dip_shorter_than_the_window_stops_nothing():
    made = world()
    deploy(made, app(function(scaledown_window=10.0)))
    made.demand("g", F, 3)
    settle(made)
    for _ in range(5):
        made.demand("g", F, 0, 0)
        made.tick(made.now + 9.0)
        made.demand("g", F, 0, 3)
        made.tick(made.now + 0.1)
    assert made.live(F) == 3
    assert not made.sent(cmd.SendStop)


def test_a_start_that_nobody_waits_for_is_cancelled():
    made = world()
    deploy(made, app())
    made.demand("g", F, 1)
    deliver(made)
    made.demand("g", F, 0)
    assert made.live(F) == 1, "a flicker of demand does not cancel it"
    made.tick(made.now + 1.0)
    stop = made.sent(cmd.SendStop)[0].body
    assert (stop.drain, stop.reason) == (0.0, "nobody waits for it any more")


def test_a_long_prompt_that_waits_asks_for_an_instance_of_its_own():
    made = world(("node-0", 10_000))
    chat = llm("f", memory_mb=100, concurrency=8, scaling=Scaling(target_tokens=1000))
    deploy(made, app(chat))
    made.feed(ev.DemandSeen("g", (TargetDemand(F, 2, 0, tokens=300),)))
    settle(made)
    assert made.live(F) == 1
    made.feed(ev.DemandSeen("g", (TargetDemand(F, 1, 2, tokens=1500),)))
    settle(made)
    assert made.live(F) == 2


def test_contexts_that_grow_ask_for_more_instances():
    made = world(("node-0", 10_000))
    deploy(made, app(llm("f", memory_mb=100, concurrency=8, scaling=Scaling(target_tokens=1000))))
    made.demand("g", F, 0, 4)
    settle(made)
    (name,) = running(made)
    report = InstanceReport(name, 1, F, "ready", running=4, concurrency=8, tokens=1800)
    made.feed(ev.InstanceSeen("node-0", report))
    settle(made)
    assert made.live(F) == 2


def test_a_start_is_not_cancelled_while_the_target_panics():
    made = world(("node-0", 10_000))
    deploy(made, app(function(scaledown_window=60.0)))
    made.demand("g", F, 1)
    settle(made)
    made.demand("g", F, 4, 1)  # of which one instance is ready
    deliver(made)
    made.tick(made.now + 20.0)
    assert made.live(F) == 5
    made.demand("g", F, 0, 0)
    made.tick(made.now + 50.0)
    assert made.live(F) == 5
    made.tick(made.now + 11.0)
    assert made.live(F) == 0


def test_a_lost_gateways_demand_vanishes():
    made = world()
    deploy(made, app(function(scaledown_window=0.0)))
    made.feed(ev.GatewayUp("h", "1"))
    made.demand("g", F, 2)
    made.demand("h", F, 1)
    settle(made)
    assert made.live(F) == 3
    made.feed(ev.GatewayLost("g", "1"))
    made.tick(made.now + 1.0)
    assert made.live(F) == 1


def test_a_lost_life_of_a_gateway_does_not_end_its_next_life():
    made = world()
    deploy(made, app())
    made.feed(ev.GatewayUp("g", "2"))
    made.demand("g", F, 1)
    made.feed(ev.GatewayLost("g", "1"))
    assert made.machine.ledger.load(key_of(F)) == (1, 0)


def test_instances_of_other_parameters_are_apart_and_have_no_minimum():
    made = world()
    deploy(made, app(function(min_containers=1)))
    other = Target("app", "f", 1, '{"size":2}')
    made.demand("g", other, 1)
    settle(made)
    assert (made.live(F), made.live(other)) == (1, 1)
    made.demand("g", other, 0)
    made.tick(made.now + 100.0)
    assert (made.live(F), made.live(other)) == (1, 0)


# -- failures ----------------------------------------------------------------------------------------------------


def test_a_failed_start_is_told_to_those_who_wait_and_retried_with_back_off():
    made = world()
    deploy(made, app())
    for expected in (1.0, 2.0, 4.0):
        made.demand("g", F, 1)
        fail_start(made)
        told = made.sent(cmd.FailTarget)[-1]
        assert told.body.error.message == "enter raised"
        assert told.body.error.retry_after == expected
        starts = len(made.sent(cmd.SendStart))
        made.demand("g", F, 0)
        made.demand("g", F, 1)
        assert len(made.sent(cmd.SendStart)) == starts, "no start during the back-off"
        assert made.sent(cmd.FailTarget)[-1] is not told, "new demand is told at once"
        made.tick(made.now + expected)
        assert len(made.sent(cmd.SendStart)) == starts + 1


def test_one_demand_is_told_once():
    made = world()
    deploy(made, app())
    made.demand("g", F, 1)
    fail_start(made)
    made.tick(made.now + 0.5)
    assert len(made.sent(cmd.FailTarget)) == 1


def test_after_a_failure_one_start_is_the_probe():
    made = world()
    deploy(made, app(function(memory_mb=100)))
    made.demand("g", F, 1)
    fail_start(made)
    made.demand("g", F, 5)
    before = len(made.sent(cmd.SendStart))
    made.tick(made.now + 1.0)
    assert len(made.sent(cmd.SendStart)) == before + 1
    settle(made)
    assert made.live(F) == 5, "when it is ready the others follow"


def test_nobody_is_told_of_a_failure_while_another_instance_serves():
    made = world()
    deploy(made, app())
    made.demand("g", F, 0, 1)
    settle(made)
    made.demand("g", F, 1, 1)
    fail_start(made)
    assert not made.sent(cmd.FailTarget)


def test_an_instance_that_dies_young_again_and_again_is_held_back():
    """The first crash is replaced at once; who keeps dying waits a little, and nobody is told it could not start."""
    made = world()
    deploy(made, app())
    made.demand("g", F, 0, 1)
    settle(made)
    for held in (0.0, 1.0, 2.0, 4.0, 4.0, 4.0):
        made.progress("node-0", running(made)[0], "failed")
        deliver(made)
        if held:
            made.tick(made.now + held - 0.01)
            assert made.live(F) == 0, "held back"
            made.tick(made.now + 0.01)
        settle(made)
        assert made.live(F) == 1
    assert not made.sent(cmd.FailTarget)


def test_instances_that_answered_before_they_died_are_replaced_at_once():
    made = world()
    deploy(made, app(function(min_containers=2)))
    settle(made)
    made.progress("node-0", running(made)[0], "failed")
    deliver(made)
    settle(made)
    for _ in range(8):
        for instance in running(made):
            made.progress("node-0", instance, "failed", served=True)
        deliver(made)
        assert made.live(F) == 2, "both at once, and no probe first"
        settle(made)


def test_failures_are_forgotten_after_a_while():
    made = world()
    deploy(made, app())
    made.demand("g", F, 1)
    fail_start(made)
    made.demand("g", F, 0)
    made.tick(made.now + 200.0)
    assert key_of(F) not in made.machine.state.targets


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


def test_what_a_node_measures_after_its_hello_counts_until_something_was_learned():
    made = world(("node-0", 5000))
    deploy(made, app(function("f", memory_mb=100, checkpoint=CheckpointSpec("org/model"))))
    machine = made.machine
    node, target = machine.state.nodes["node-0"], Target("app", "f", 1)
    spec = machine.ledger.function(target)
    made.feed(ev.CheckpointSeen("node-0", DIGEST, 2**28))
    made.feed(ev.NodeStatsSeen("node-0", NodeStats(0, 0, 0, bandwidth={"disk": 2.0**27})))
    assert machine.scaler.candidates.guess(node, target, spec).load == 2.0
    made.feed(ev.NodeStatsSeen("node-0", NodeStats(0, 0, 0)))
    assert node.info.bandwidth == {"disk": 2.0**27}, "it says nothing new"
    assert Views(machine.ledger).describe_node("node-0", made.now)["bandwidth"] == {"disk": 2.0**27}
    assert made.replayed().snapshot() == machine.snapshot()
