"""When room that is being freed is expected to be there: what ends on a node, one way or another."""

from __future__ import annotations

import json
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller import move_times, service_times
from sllm_faas.controller.candidates import ENDS, SERVING, Candidates
from sllm_faas.controller.ledger import Ledger
from sllm_faas.controller.model import Instance, Move, Node, State
from sllm_faas.controller.state import Machine
from sllm_faas.spec import Target
from sllm_faas.wire.messages import InstanceReport, NodeInfo
from tests.controller.fakes import app, function
from tests.controller.story import deliver, deploy, settle, world
from tests.controller.world import ModelNode, World

F, G = Target("app", "f", 1), Target("app", "g", 1)
NOW = 1000.0
MOVE = move_times.BASE + 100 * move_times.PER_TOKEN
"""Seconds to move what runs in an instance here, if no move was seen yet."""


def ending(name: str = "i", seq: int = 1, **values: Any) -> Instance:
    """On node-0, told to end at NOW."""
    known = {"state": "draining", "memory_mb": 300, "tokens": 100, "draining_since": NOW, "ready": 1.0} | values
    return Instance(name, seq, F, known.pop("node", "node-0"), asked=known.pop("asked", 0.0), **known)


def at(seconds: float, *instances: Instance, moves: tuple[str, ...] = (), serves: float = 0.0) -> Candidates:
    """So long after NOW, of a function whose calls take `serves` seconds, if some were seen."""
    state = State("abc")
    for name in ("node-0", "node-1"):
        state.nodes[name] = Node(name, "up", 0.0, NodeInfo(name, f"ipc:///{name}", memory_mb=1000, gpus=2))
    for instance in instances:
        state.instances[instance.id] = instance
    for name in moves:
        state.moves[name] = Move("", name, "resting", "drained", NOW)
    if serves:
        service_times.learn(state.book, "app/f", 10, 10 * serves)
    ledger = Ledger(state)
    ledger.begin(NOW + seconds)
    return Candidates(ledger)


def freed(known: Candidates, memory_mb: int = 1000, gpus: int = 0) -> float:
    """Seconds until node-0 has so much."""
    node = known.state.nodes["node-0"]
    there = known.one(node, G, function("g", memory_mb=memory_mb, gpus=gpus))
    return 0.0 if there.fits() else there.room_in()


HEIR: dict[str, Any] = {"node": "node-1", "replaces": "i", "draining_since": None, "ready": None}


@pytest.mark.parametrize(
    ("seconds", "instance", "serves", "left"),
    [
        (0.0, {}, 0.0, ENDS),
        (0.5, {}, 0.0, 0.5),
        (0.0, {"running": 2}, 0.0, SERVING),
        (0.0, {"running": 2}, 4.0, 4.0),
        (3.0, {"running": 2}, 4.0, 4.0),
        (9.0, {"running": 2}, 4.0, 9.0),
        (0.0, {"running": 1, "drain": 0.0}, 4.0, 0.0),
        (0.0, {"running": 1, "drain": 3.0}, 4.0, 3.0),
        (2.5, {"running": 1, "drain": 3.0}, 4.0, 0.5),
        (2.5, {"running": 1, "drain": 30.0}, 4.0, 4.0),
        (3.2, {"running": 1, "drain": 3.0}, 4.0, 0.2),
        (0.0, {"drain": 30.0}, 4.0, ENDS),
        (5.0, {"draining_since": None}, 0.0, ENDS),
    ],
    ids=[
        "runs nothing", "runs nothing and has not ended", "runs something unknown", "runs something known",
        "what has passed says nothing", "runs for longer than expected", "is killed", "is killed when its time is up",
        "has little time left", "ends before its time is up", "its time was up a moment ago", "needs no such time",
        "nobody knows since when",
    ],
)  # fmt: skip
def test_what_ends_is_expected_to_have_ended(seconds, instance, serves, left):
    assert freed(at(seconds, ending(**instance), serves=serves)) == pytest.approx(left)


@pytest.mark.parametrize(
    ("seconds", "source", "heir", "left"),
    [
        (0.0, {"state": "ready"}, {"state": "starting", "asked": NOW, "predicted": 2.0}, 2.0 + MOVE),
        (1.5, {"state": "ready"}, {"state": "requested", "asked": NOW, "predicted": 2.0}, 0.5 + MOVE),
        (3.0, {"state": "ready"}, {"state": "starting", "asked": NOW, "predicted": 2.0}, 1.0 + MOVE),
        (0.0, {"running": 1}, {"state": "ready", "ready": NOW}, MOVE),
        (0.0, {"running": 1}, None, MOVE),
        (7.0, {"running": 1}, None, 7.0),
        (7.0, {"running": 1}, {"state": "ready", "ready": NOW}, 7.0),
        (7.0, {"running": 1, "drain": 8.0}, None, 1.0),
    ],
    ids=[
        "its heir starts", "its heir will be ready soon", "its heir is late", "its heir is ready", "another takes over",
        "nobody could take over", "its heir did not take over", "its time is nearly up",
    ],
)  # fmt: skip
def test_what_is_to_go_on_elsewhere_is_expected_to_have_gone(seconds, source, heir, left):
    instances = [ending(**({"draining_since": None} if source.get("state") == "ready" else {}) | source)]
    if heir is not None:
        instances.append(ending("j", 2, **(HEIR | heir)))
    assert freed(at(seconds, *instances, moves=("i",))) == pytest.approx(left)


@pytest.mark.parametrize(("drain", "left"), [(None, MOVE), (7.05, 0.05)])
def test_a_move_under_way_is_expected_to_end_as_estimated_also_when_it_is_late(drain, left):
    known = at(7.0, ending(running=1, drain=drain), moves=("i",))
    known.state.moves["i"].state = "moving"
    assert freed(known) == pytest.approx(left)


def test_room_is_there_when_the_last_of_those_that_are_needed_for_it_has_ended():
    known = at(0.0, ending(), ending("j", 2, running=1, gpus=1), ending("k", 3, running=1, drain=0.5, gpus=1))
    assert freed(known, 400) == ENDS
    assert freed(known, 401) == 0.5
    assert freed(known, 701) == SERVING
    assert freed(known, 100, gpus=2) == SERVING
    assert freed(known, 100, gpus=3) == inf
    assert freed(known, 1001) == inf


@given(
    st.lists(
        st.tuples(
            st.integers(1, 200), st.integers(0, 2), st.integers(0, 1), st.sampled_from([None, 0.0, 0.3, 7.0]),
            st.sampled_from([0.0, 0.2, 50.0]),
        ),
        max_size=6,
    ),
    st.integers(1, 1000),
    st.integers(0, 3),
)  # fmt: skip
def test_more_room_is_never_there_sooner_and_all_that_ends_is_all_there_is(values, mb, gpus):
    instances = [
        ending(f"i{k}", k, memory_mb=memory, running=running, gpus=count, drain=drain, draining_since=NOW - since)
        for k, (memory, running, count, drain, since) in enumerate(values)
    ]
    known = at(0.0, *instances)
    seconds = freed(known, mb, gpus)
    assert 0 <= seconds <= freed(known, mb + 1, gpus)
    assert seconds <= freed(known, mb, gpus + 1)
    node = known.one(known.state.nodes["node-0"], G, function("g", memory_mb=mb, gpus=gpus))
    assert (seconds < inf) == node.will_fit() or not instances
    assert seconds == freed(at(0.0, *reversed(instances)), mb, gpus), "in whatever order they are known"


def one_drains(drain: float | None = None) -> World:
    """What runs in it does not end."""
    made = world(("node-0", 500))
    deploy(made, app(function("f", memory_mb=300)))
    made.demand("g", F, 1)
    settle(made)
    made.tick(NOW)
    made.feed(ev.InstanceStopAsked(made.sent(cmd.SendStart)[0].body.instance, drain))
    deliver(made)
    return made


def since(machine: Machine) -> list[float | None]:
    return [instance.draining_since for instance in machine.state.instances.values() if instance.state == "draining"]


def test_since_when_it_drains_is_when_it_was_last_told_to():
    made = one_drains()
    made.tick(NOW + 5)
    made.feed(ev.InstanceStopAsked(made.sent(cmd.SendStart)[0].body.instance))
    deliver(made)
    assert since(made.machine) == [NOW], "being told the same again changes nothing"
    made.feed(ev.InstanceStopAsked(made.sent(cmd.SendStart)[0].body.instance, 2.0))
    assert since(made.machine) == [NOW + 5]
    assert freed(made.machine.scaler.candidates, 500) == pytest.approx(ENDS)


def test_what_is_found_draining_drains_since_then():
    made = world(("node-0", 500))
    deploy(made, app(function("f", memory_mb=300)))
    made.now = NOW
    made.feed(ev.InstanceSeen("node-0", InstanceReport("ins-old", 1, F, "draining", running=1)))
    assert since(made.machine) == [NOW]
    assert freed(made.machine.scaler.candidates, 500) == SERVING


def test_a_snapshot_from_before_it_was_known_since_when_it_drains_is_read_back_as_it_is():
    made = one_drains()
    older = json.loads(made.machine.snapshot())
    for instance in older["instances"].values():
        assert instance.pop("draining_since") == NOW
    machine = Machine.restore(json.dumps(older).encode())
    assert since(machine) == [None]
    machine.validate()
    machine.handle(ev.Tick(), NOW + 1)
    assert since(machine) == [None]
    assert freed(machine.scaler.candidates, 500) == ENDS


def go_idle(made: World, *names: str) -> None:
    """One instance each serves for long, then nobody wants it."""
    for name in names:
        made.demand("g", Target("app", name, 1), 1)
    settle(made)
    made.tick(NOW)
    for name in names:
        made.demand("g", Target("app", name, 1), 0)
    made.tick(NOW + 20)
    assert not made.sent(cmd.SendStop)


def look_again(made: World, seconds: float) -> int:
    """Things end elsewhere all the time, which makes who waits for room look again. How many were told to end."""
    end = made.now + seconds
    while made.now < end:
        made.tick(made.now + 0.05)
        made.machine.ledger.room_changed()
        made.feed(ev.Tick())
        deliver(made)
    return len(made.sent(cmd.SendStop))


@pytest.mark.parametrize("nodes", [("node-0",), ("node-0", "node-1", "node-2")])
def test_who_made_room_makes_no_more_while_that_takes_a_while_to_come(nodes):
    """As an exit hook may take."""
    made = world(*[(name, 600) for name in nodes])
    names = [f"f{k}" for k in range(2 * len(nodes))]
    deploy(made, app(*[function(name, memory_mb=300) for name in (*names, "g")]))
    go_idle(made, *names)
    made.demand("g", G, 1)
    assert look_again(made, 4.5) == 1
    assert look_again(made, 1.0) == 2, "what takes very long is given up"
    settle(made)
    assert made.live(G) == 1
    assert not made.machine.state.targets["app/g@1#"].evicted


def test_a_drained_node_makes_room_for_its_heirs_once_at_a_time():
    made = world(("node-0", 300))
    deploy(made, app(*[function(name, memory_mb=300) for name in ("f0", "f1", "g")]))
    made.demand("g", G, 1)
    settle(made)
    made.demand("g", G, 0, 1)
    made.nodes["node-1"] = ModelNode("node-1", 600)
    made.hello("node-1")
    go_idle(made, "f0", "f1")
    made.feed(ev.NodeDrained("node-0"))
    assert look_again(made, 4.5) == 1
    settle(made)
    assert made.live(G) == 1
