"""Who waits for room: how long an instance stays although another wants its place, and when the waiting look again."""

from __future__ import annotations

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.model import key_of
from sllm_faas.spec import CheckpointSpec, Target
from sllm_faas.wire.messages import NodeStats
from tests.controller.fakes import app, function
from tests.controller.story import deliver, deploy, settle, world
from tests.controller.world import DIGEST, World

F, G = Target("app", "f", 1), Target("app", "g", 1)
START = 2.0
"""Seconds that starts take here."""


def crowded(*nodes: tuple[str, int]) -> World:
    """f and g are deployed, and only one of them fits at a time."""
    made = world(*nodes or (("node-0", 500),))
    deploy(made, app(function("f", memory_mb=300), function("g", memory_mb=300)))
    return made


def pass_time(made: World, seconds: float) -> None:
    """Starts that are under way become ready when their time has come, drains end at once."""
    end = made.now + seconds
    while True:
        deliver(made)
        for node in made.nodes.values():
            for report in list(node.reports.values()):
                if report.state == "draining":
                    made.progress(node.name, report.instance, "stopped")
        deliver(made)
        starting = [i for i in made.machine.state.instances.values() if i.state in ("requested", "starting")]
        ready = min((i.asked + START for i in starting), default=end)
        made.tick(min(end, ready))
        for instance in starting:
            if instance.asked + START <= made.now and instance.state == "starting":
                made.progress(instance.node, instance.id, "ready")
        deliver(made)
        if made.now >= end:
            return


def test_an_instance_serves_as_long_as_its_start_took_before_it_is_evicted_for_another():
    made = crowded()
    made.demand("g", F, 1)
    pass_time(made, START)
    made.demand("g", F, 0)
    made.demand("g", G, 1)
    assert not made.sent(cmd.SendStop)
    assert "have served for a while" in made.machine.state.targets[key_of(G)].blocked
    made.tick(made.now + START - 0.01)
    assert not made.sent(cmd.SendStop)
    made.tick(made.now + 0.01)
    assert [stop.body.reason for stop in made.sent(cmd.SendStop)] == [f"evicted for {G}"]


def test_two_that_fit_only_by_evicting_each_other_take_turns_that_are_worth_their_starts():
    made = crowded()
    seconds = 60.0
    for step in range(int(seconds / 0.25)):
        for target in (F, G):
            made.demand("g", target, int(step % 2 == 0))  # served, or given up, and asked again a moment later
        pass_time(made, 0.25)
    assert 2 <= len(made.sent(cmd.SendStart)) <= seconds / (2 * START) + 1


def test_who_waits_for_room_on_a_node_looks_elsewhere_when_that_node_takes_nothing_new():
    made = crowded(("node-0", 500), ("node-1", 500))
    made.demand("g", F, 2)
    settle(made)
    made.demand("g", F, 0, 2)
    going = made.sent(cmd.SendStart)[0]
    made.feed(ev.InstanceStopAsked(going.body.instance))
    made.demand("g", F, 0, 1)
    made.demand("g", G, 1)
    record = made.machine.state.targets[key_of(G)]
    assert f"being freed on {going.node}" in record.blocked
    made.feed(ev.NodeCordoned(going.node, True))
    assert going.node not in record.blocked


def pinned(made: World, digest: str, megabytes: int) -> None:
    """The node says that so much of its memory has to stay what it is."""
    made.feed(ev.NodeStatsSeen("node-0", NodeStats(0, 0, 0, (digest,), pinned={digest: megabytes})))


def test_an_instance_that_would_not_fit_beside_what_is_pinned_in_memory_is_not_started():
    made = crowded()
    pinned(made, "e" * 64, 250)
    made.demand("g", F, 1)
    settle(made)
    assert not made.sent(cmd.SendStart)
    pinned(made, "e" * 64, 150)
    assert [start.body.target for start in made.sent(cmd.SendStart)] == [F]


def test_an_instance_of_a_pinned_checkpoint_needs_no_memory_for_it_again():
    made = world(("node-0", 500))
    deploy(made, app(function("f", memory_mb=300, checkpoint=CheckpointSpec("org/model"))))
    pinned(made, DIGEST, 256)
    made.demand("g", F, 1)
    settle(made)
    assert not made.sent(cmd.SendStart), "256 MiB of weights and 300 of its own are more than 500"
    pinned(made, DIGEST, 200)
    assert made.sent(cmd.SendStart)


def test_what_goes_is_at_once_no_longer_counted_among_those_its_target_could_spare():
    made = world(("node-0", 1000))
    deploy(made, app(function("f", memory_mb=300)))
    made.demand("g", F, 2)
    settle(made)
    made.demand("g", F, 0)
    machine, key = made.machine, key_of(F)
    first, second = machine.ledger.live(key)
    machine.scaler.stop(first, "evicted", None)
    assert machine.ledger.has_spare(key)
    machine.scaler.stop(second, "evicted", None)
    assert not machine.ledger.has_spare(key)
    assert not machine.ledger.dirty
    machine.validate()
