"""Shares of apps: who starts next where room is short, and who gives room back."""

from __future__ import annotations

from collections import Counter

import pytest

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.model import Instance, Node, State, key_of
from sllm_faas.controller.shares import Shares
from sllm_faas.spec import Target
from sllm_faas.wire.messages import NodeInfo
from tests.controller.fakes import app, function
from tests.controller.story import deliver, deploy, settle, world
from tests.controller.world import ModelNode, World

A, B = Target("a", "f", 1), Target("b", "f", 1)


def two_apps(memory_mb: int, **weights: float) -> World:
    """One node; instances of 100 MiB of two apps."""
    made = world(("node-0", memory_mb))
    for name in ("a", "b"):
        spec = function("f", memory_mb=100, max_containers=50)
        deploy(made, app(spec, name=name, weight=weights.get(name, 1.0)))
    return made


def let_run(made: World, seconds: float) -> None:
    """Instances end and start at once; time passes."""
    for _ in range(int(seconds)):
        made.tick(made.now + 1.0)
        settle(made)


def b_floods_too(made: World, seconds: float) -> None:
    """Ten seconds on, and for so many."""
    made.tick(10.0)
    made.demand("g", B, 50)
    settle(made)
    let_run(made, seconds)


def held(made: World) -> dict[str, int]:
    return dict(Counter(i.target.app for i in made.machine.state.instances.values() if i.state != "draining"))


def join(made: World, name: str, memory_mb: int) -> None:
    made.nodes[name] = ModelNode(name, memory_mb)
    made.hello(name)


def instance(app_name: str, number: int, mb: int, gpus: int, size: int = 0) -> Instance:
    target = Target(app_name, "f", 1)
    return Instance(f"i{number}", number, target, "n", "ready", 0.0, memory_mb=mb, gpus=gpus, size=size)


def test_a_share_is_that_of_the_dominant_resource():
    """Ghodsi et al. 2011, figure 3: of 9 CPUs and 18 GB one user holds three times (1, 4), the other two times (3, 1);
    both have two thirds. Here GPUs take the place of CPUs."""
    state = State("x")
    state.nodes["n"] = Node("n", "up", 0.0, NodeInfo("n", "ipc:///n", memory_mb=18, gpus=9))
    shares = Shares(state)
    for number in range(3):
        shares.add(instance("a", number, 4, 1))
    for number in range(3, 5):
        shares.add(instance("b", number, 1, 3))
    assert shares.of("a") == shares.of("b") == pytest.approx(2 / 3)
    assert shares.of("c") == 0.0
    assert shares.of("c", 2, 3) == pytest.approx(1 / 3)


def test_a_checkpoint_counts_and_what_is_dropped_does_not_nor_a_node_that_is_lost():
    state = State("x")
    state.nodes["n"] = node = Node("n", "up", 0.0, NodeInfo("n", "ipc:///n", memory_mb=100))
    shares = Shares(state)
    one = instance("a", 1, 10, 0, size=40 * 1024 * 1024)
    shares.add(one)
    assert shares.of("a") == 0.5
    assert shares.above(0.4, "b") == ["a"]
    assert shares.above(0.5, "b") == shares.above(0.4, "a") == []
    shares.drop(one)
    shares.drop(one)
    assert shares.of("a") == 0.0
    node.state = "lost"
    shares.nodes_changed()
    assert shares.of("a", 100, 1) == 0.0, "of nothing nobody has a share"


def test_places_that_become_free_at_once_are_filled_by_weight():
    made = two_apps(50, a=1.0, b=3.0)
    made.demand("g", A, 20)
    made.tick(1.0)
    made.demand("g", B, 20)
    assert not made.sent(cmd.SendStart), "none has room yet"
    join(made, "node-1", 800)
    assert held(made) == {"a": 2, "b": 6}


def test_a_freed_place_goes_to_the_app_that_holds_less_though_another_waits_for_longer():
    made = two_apps(300)
    made.demand("g", A, 20)
    settle(made)
    made.tick(1.0)
    made.demand("g", B, 1)
    assert held(made) == {"a": 3}
    deliver(made)
    name = next(name for name, report in made.nodes["node-0"].reports.items() if report.state == "ready")
    made.progress("node-0", name, "failed", served=True)
    deliver(made)
    assert held(made) == {"a": 2, "b": 1}


def test_of_one_app_the_oldest_is_next():
    made = world(("node-0", 50))
    functions = [function(name, memory_mb=100) for name in ("f", "g")]
    deploy(made, app(*functions))
    made.demand("g", Target("app", "g", 1), 1)
    made.tick(1.0)
    made.demand("g", Target("app", "f", 1), 1)
    join(made, "node-1", 100)
    (start,) = made.sent(cmd.SendStart)
    assert start.body.target.function == "g"


@pytest.mark.parametrize(("weight", "shares"), [(1.0, {"a": 4, "b": 4}), (3.0, {"a": 2, "b": 6})])
def test_a_flood_gives_room_back_until_both_hold_by_their_weights_and_no_further(weight, shares):
    """What gives way finishes what it runs; nobody's place is passed to and fro."""
    made = two_apps(800, b=weight)
    made.demand("g", A, 50)
    settle(made)
    assert held(made) == {"a": 8}
    b_floods_too(made, 120)
    assert held(made) == shares
    stops = made.sent(cmd.SendStop)
    assert len(stops) == 8 - shares["a"]
    assert all(stop.body.drain is None for stop in stops), "none is cut short"
    assert {made.machine.state.targets[key_of(t)].blocked != "" for t in (A, B)} == {True}


def test_what_is_kept_by_min_containers_is_not_claimed():
    made = world(("node-0", 400))
    deploy(made, app(function("f", memory_mb=100, max_containers=50, min_containers=3), name="a"))
    deploy(made, app(function("f", memory_mb=100, max_containers=50), name="b"))
    made.demand("g", A, 50)
    settle(made)
    b_floods_too(made, 60)
    assert held(made) == {"a": 3, "b": 1}


def test_an_instance_serves_for_a_while_before_it_is_claimed():
    made = two_apps(200)
    made.demand("g", A, 50)
    settle(made)
    made.demand("g", B, 1)
    assert not made.sent(cmd.SendStop)
    assert "have served for a while" in made.machine.state.targets[key_of(B)].blocked
    let_run(made, 10)
    assert held(made) == {"a": 1, "b": 1}


def test_in_a_large_cluster_room_is_given_back_too():
    """There placement sees a few nodes only."""
    made = world(*[(f"node-{number:02}", 200) for number in range(12)])
    for name in ("a", "b"):
        deploy(made, app(function("f", memory_mb=100, max_containers=50), name=name))
    made.demand("g", A, 50)
    settle(made)
    assert held(made) == {"a": 24}
    b_floods_too(made, 300)
    assert held(made) == {"a": 12, "b": 12}
    assert len(made.sent(cmd.SendStop)) == 12


def test_the_same_events_give_the_same_machine_again():
    made = two_apps(800, b=2.0)
    made.demand("g", A, 50)
    settle(made)
    b_floods_too(made, 60)
    made.feed(ev.NodeCordoned("node-0", True))
    assert made.replayed().snapshot() == made.machine.snapshot()
