"""Stories of the machine on a virtual clock: events in, commands out."""

from __future__ import annotations

import pytest

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.deployments import CHECK_LIMIT
from sllm_faas.controller.model import key_of
from sllm_faas.errors import ErrorInfo
from sllm_faas.spec import Scaling, Target
from sllm_faas.wire.messages import Checked, InstanceReport, TargetDemand, Uncheck
from tests.controller.fakes import app, function, llm
from tests.controller.story import F, deliver, deploy, fail_start, running, settle, world
from tests.controller.world import DIGEST, FAILED, World

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
    assert made.sent(cmd.SendUncheck) == [cmd.SendUncheck("node-0", Uncheck("app", 1))], "it may pull for long"
    order = [command for command in made.commands if isinstance(command, cmd.SendCheck | cmd.SendUncheck)]
    assert [command.body.version for command in order] == [1, 2, 1], "and what it pulls may be needed by this one"
    settle(made)
    assert len(made.sent(cmd.SendUncheck)) == 1
    assert made.machine.state.apps["app"].active == 2


@pytest.mark.parametrize("end", ["deleted", "late", "failed", "warming"])
def test_a_check_that_nobody_waits_for_any_more_is_ended_where_it_runs(end):
    made = world()
    made.feed(ev.VersionAdded("app", 1, app(function(min_containers=1))))
    assert not made.sent(cmd.SendUncheck)
    if end == "late":
        made.tick(CHECK_LIMIT)
    elif end == "failed":
        made.feed(ev.VersionChecked("node-0", Checked("app", 1, FAILED)))
    elif end == "warming":
        made.feed(ev.VersionChecked("node-0", Checked("app", 1)))
    made.feed(ev.AppDeleted("app"))
    assert made.sent(cmd.SendUncheck) == (
        [cmd.SendUncheck("node-0", Uncheck("app", 1))] if end in ("deleted", "late") else []
    )


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
