"""Stories of moves on a virtual clock: who goes where, what is stopped when, what is learned."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller import move_times
from sllm_faas.controller.migration import can_move
from sllm_faas.errors import IllegalTransition
from sllm_faas.spec import AppSpec, MethodSpec, Target
from sllm_faas.wire.messages import Migrated, MoveResult
from tests.controller.fakes import app, function, llm
from tests.controller.world import ModelNode, World

SMALL, BIG, PLAIN = Target("small", "f", 1), Target("big", "f", 1), Target("plain", "f", 1)
APPS: dict[str, AppSpec] = {
    "small": app(llm("f", memory_mb=200, concurrency=4), name="small", bundle=""),
    "big": app(llm("f", memory_mb=900), name="big", bundle=""),
    "plain": app(function("f", memory_mb=100, concurrency=4), name="plain"),
}


def world(*nodes: str, memory: int = 1000) -> World:
    made = World()
    made.feed(
        ev.Restored(tuple(ev.StoredVersion(name, 1, spec, True, 1.0, active=True) for name, spec in APPS.items()))
    )
    made.feed(ev.GatewayUp("g", "1"))
    for name in nodes:
        made.nodes[name] = ModelNode(name, memory)
        made.hello(name)
    return made


def arrive(made: World, outcome: str = "moved") -> None:
    while made.to_nodes or made.to_machine:
        if made.to_nodes:
            made.obey(outcome=outcome)
        else:
            made.feed(made.to_machine.pop(0))


def start(made: World) -> None:
    """What starts becomes ready."""
    arrive(made)
    for node in made.nodes.values():
        for report in list(node.reports.values()):
            if report.state == "starting":
                made.progress(node.name, report.instance, "ready")
    while made.to_machine:
        made.feed(made.to_machine.pop(0))


def serve(made: World, target: Target, running: int = 1, tokens: int = 100) -> str:
    """One instance of the target that runs so many; its id."""
    made.demand("g", target, 1, 0)
    start(made)
    made.demand("g", target, 0, running)
    (instance,) = [i for i in made.machine.state.instances.values() if i.target == target and i.state == "ready"]
    node = made.nodes[instance.node]
    node.reports[instance.id] = replace(node.reports[instance.id], running=running, tokens=tokens)
    made.feed(ev.InstanceSeen(node.name, node.reports[instance.id]))
    return instance.id


def kinds(made: World) -> list[str]:
    names = {cmd.SendStart: "start", cmd.SendStop: "stop", cmd.SendMigrate: "migrate"}
    return [names[type(command)] for command in made.commands if type(command) in names]


def moves(made: World) -> list[cmd.SendMigrate]:
    return made.sent(cmd.SendMigrate)  # type: ignore[return-value]


def outcomes(made: World) -> list[str]:
    ended = made.sent(cmd.MoveEnded)
    return [one.result.outcome for one in ended if one.result is not None]  # type: ignore[attr-defined]


def test_a_drain_starts_elsewhere_then_stops_and_moves_at_once():
    made = world("node-0", "node-1")
    source = serve(made, SMALL, 2)
    home = made.machine.state.instances[source].node
    made.commands.clear()
    made.feed(ev.NodeDrained(home))
    assert kinds(made) == ["start"]
    start(made)
    assert kinds(made) == ["start", "stop", "migrate"]
    body = moves(made)[0].body
    assert (moves(made)[0].node, body.instance) == (home, source)
    assert body.to in made.machine.state.instances
    assert body.invocations == ()
    arrive(made)
    assert outcomes(made) == ["moved", "moved"]
    assert not made.machine.state.moves
    made.progress(home, source, "stopped")
    arrive(made)
    assert made.machine.ledger.on_node(home) == []
    assert made.live(SMALL) == 1


def test_what_cannot_move_ends_where_it_is_once_another_serves():
    made = world("node-0", "node-1")
    source = serve(made, PLAIN)
    made.commands.clear()
    made.feed(ev.NodeDrained(made.machine.state.instances[source].node))
    start(made)
    assert kinds(made) == ["start", "stop"]
    assert made.sent(cmd.SendStop)[0].body.drain is None
    assert not made.machine.state.moves


def test_an_idle_instance_nobody_wants_is_stopped_at_once_by_a_drain():
    made = world("node-0", "node-1")
    source = serve(made, SMALL, 0)
    made.commands.clear()
    made.feed(ev.NodeDrained(made.machine.state.instances[source].node))
    assert kinds(made)[0] == "stop"
    assert "start" not in kinds(made)


def test_the_only_node_is_drained_by_letting_everything_finish():
    made = world("node-0")
    serve(made, SMALL)
    made.commands.clear()
    made.feed(ev.NodeDrained("node-0"))
    assert kinds(made) == ["stop"]


def test_a_drain_waits_for_room_elsewhere_and_then_does_without():
    made = world("node-0", "node-1", memory=1000)
    made.feed(ev.NodeCordoned("node-0", True))
    serve(made, SMALL)
    made.feed(ev.NodeCordoned("node-0", False))
    made.nodes["node-0"].memory_mb = 100
    made.hello("node-0")
    made.nodes["node-2"] = ModelNode("node-2", 1000)
    made.hello("node-2")
    serve(made, BIG, 1)
    made.commands.clear()
    made.feed(ev.NodeDrained("node-1"))
    assert kinds(made) == [], "node-2 may have room yet"
    made.tick(made.now + 30.0)
    assert kinds(made) == ["stop"]


def test_a_move_that_was_kept_is_asked_again_later_each_time():
    made = world("node-0", "node-1")
    source = serve(made, SMALL)
    made.feed(ev.NodeDrained(made.machine.state.instances[source].node))
    start(made)
    times = []
    for _ in range(4):
        times.append(made.now)
        arrive(made, "kept")
        asked = len(moves(made))
        while len(moves(made)) == asked:
            made.tick(made.now + 0.5)
    assert [round(b - a, 1) for a, b in pairwise(times)] == [1.0, 2.0, 4.0]
    assert len({command.body.migration for command in moves(made)}) == 5
    arrive(made)
    assert not made.machine.state.moves


def test_an_answer_that_never_comes_is_given_up_and_asked_again():
    made = world("node-0", "node-1")
    source = serve(made, SMALL)
    made.feed(ev.NodeDrained(made.machine.state.instances[source].node))
    start(made)
    made.to_nodes.clear()
    made.tick(made.now + 60.0)
    assert len(moves(made)) == 2
    late = moves(made)[0].body
    made.feed(
        ev.MigrationEnded(moves(made)[0].node, Migrated(late.migration, source, (MoveResult("a" * 32, "moved"),)))
    )
    assert source in made.machine.state.moves, "that was the answer to the first; the second's is still due"
    arrive(made)
    assert not made.machine.state.moves


def test_a_heir_that_does_not_start_is_followed_by_another():
    made = world("node-0", "node-1", "node-2")
    source = serve(made, SMALL)
    made.commands.clear()
    made.feed(ev.NodeDrained(made.machine.state.instances[source].node))
    arrive(made)
    (first,) = [
        report for node in made.nodes.values() for report in node.reports.values() if report.state == "starting"
    ]
    made.progress(next(n.name for n in made.nodes.values() if first.instance in n.reports), first.instance, "failed")
    arrive(made)
    made.tick(made.now + 5.0)
    start(made)
    assert kinds(made) == ["start", "start", "stop", "migrate"]


def test_a_person_moves_one_invocation_and_the_source_serves_on():
    made = world("node-0", "node-1")
    source = serve(made, SMALL, 2)
    other = "node-1" if made.machine.state.instances[source].node == "node-0" else "node-0"
    made.commands.clear()
    made.feed(ev.MigrationAsked(source, other, ("ab" * 16,), "r1"))
    start(made)
    assert kinds(made) == ["start", "migrate"]
    assert moves(made)[0].body.invocations == ("ab" * 16,)
    arrive(made)
    (end,) = made.sent(cmd.MoveEnded)
    assert (end.request, end.node, end.result.outcome) == ("r1", other, "moved")
    assert made.machine.state.instances[source].state == "ready"
    assert made.live(SMALL) == 2, "it counts for itself now"


def test_a_persons_move_of_what_cannot_be_is_refused_and_changes_nothing():
    made = world("node-0", "node-1")
    source = serve(made, PLAIN)
    before = made.machine.snapshot()
    for instance, node in ((source, "node-1"), ("ins-x", "node-1")):
        with pytest.raises(IllegalTransition):
            made.machine.handle(ev.MigrationAsked(instance, node, ("a" * 32,), "r"), made.now)
    assert made.machine.snapshot() == before
    small = serve(made, SMALL)
    for node in ("node-9", made.machine.state.instances[small].node):
        with pytest.raises(IllegalTransition):
            made.machine.handle(ev.MigrationAsked(small, node, ("a" * 32,), "r"), made.now)
    made.machine.validate()


def test_a_persons_move_without_room_says_so():
    made = world("node-0", "node-1", memory=1000)
    big = serve(made, BIG)
    home = made.machine.state.instances[big].node
    other = "node-1" if home == "node-0" else "node-0"
    serve(made, SMALL)
    made.commands.clear()
    made.feed(ev.MigrationAsked(big, other, ("a" * 32,), "r"))
    (end,) = made.sent(cmd.MoveEnded)
    assert end.request == "r"
    assert "no room" in end.why
    assert not made.machine.state.moves


def test_a_running_stream_is_moved_away_for_a_model_that_fits_nowhere_else():
    made = world("node-0")
    small = serve(made, SMALL)
    made.tick(6.0)
    made.nodes["node-1"] = ModelNode("node-1", 300)
    made.hello("node-1")
    made.commands.clear()
    made.demand("g", BIG, 1)
    assert kinds(made) == ["start"], "the small one's heir, where the big one does not fit"
    start(made)
    assert kinds(made) == ["start", "stop", "migrate"]
    arrive(made)
    made.progress("node-0", small, "stopped")
    arrive(made)
    assert made.sent(cmd.SendStart)[-1].body.target == BIG
    assert made.sent(cmd.SendStart)[-1].node == "node-0"


def test_an_idle_instance_elsewhere_is_used_instead_of_a_new_one():
    made = world("node-0", "node-1")
    small = serve(made, SMALL)
    home = made.machine.state.instances[small].node
    other = "node-1" if home == "node-0" else "node-0"
    made.feed(ev.NodeCordoned(home, True))
    made.demand("g", SMALL, 4, 1)
    start(made)
    made.feed(ev.NodeCordoned(home, False))
    twin = next(i for i in made.machine.state.instances.values() if i.node == other)
    made.commands.clear()
    made.machine.scaler.migrations.make_room(made.machine.state.instances[small], other, "room")
    commands = made.machine.ledger.end()
    assert [type(command) for command in commands] == [cmd.SendStop, cmd.SendMigrate]
    assert commands[1].body.to == twin.id


def test_a_drain_does_not_crowd_what_runs_into_the_slots_another_has_left():
    made = world("node-0", "node-1", "node-2")
    small = serve(made, SMALL, 3)
    home = made.machine.state.instances[small].node
    made.feed(ev.NodeCordoned(home, True))
    made.demand("g", SMALL, 1, 5)
    start(made)
    made.feed(ev.NodeCordoned(home, False))
    twin = next(i for i in made.machine.state.instances.values() if i.id != small)
    node = made.nodes[twin.node]
    node.reports[twin.id] = replace(node.reports[twin.id], running=3, concurrency=4)
    made.feed(ev.InstanceSeen(twin.node, node.reports[twin.id]))
    made.demand("g", SMALL, 0, 6)
    made.commands.clear()
    made.feed(ev.NodeDrained(home))
    assert kinds(made) == ["start"], "one slot is not enough for three"


def test_a_node_that_leaves_comes_back_open_and_a_cordoned_one_cordoned():
    made = world("node-0", "node-1")
    made.feed(ev.NodeLeaving("node-0"))
    assert [node.name for node in made.machine.ledger.open_nodes()] == ["node-1"]
    made.die("node-0")
    made.hello("node-0")
    assert [node.name for node in made.machine.ledger.open_nodes()] == ["node-0", "node-1"]
    made.feed(ev.NodeUp(made.nodes["node-1"].info(), "life-9", (), cordoned=True))
    assert [node.name for node in made.machine.ledger.open_nodes()] == ["node-0"]


def test_what_can_move_is_a_language_model_or_has_a_resumable_method():
    assert can_move(llm())
    assert not can_move(function())
    assert can_move(replace(function("f"), methods=(MethodSpec("f", stream=True, resumable=True),)))


def test_the_time_of_a_move_is_learned_as_a_line_over_its_tokens():
    book: dict[str, float] = {}
    assert move_times.seconds(book, "a/f", 1000) == pytest.approx(0.35)
    for tokens in (100, 900, 500, 1300, 200, 700):
        move_times.learn(book, "a/f", tokens, 0.05 + 0.001 * tokens)
    slope, base = move_times.constants(book, "a/f")
    assert slope == pytest.approx(0.001, rel=1e-6)
    assert base == pytest.approx(0.05, rel=1e-6)
    assert move_times.constants(book, "a/other") == (move_times.PER_TOKEN, move_times.BASE)


def test_moves_of_one_length_teach_the_whole_and_no_slope():
    book: dict[str, float] = {}
    for _ in range(5):
        move_times.learn(book, "a/f", 400, 0.5)
    assert move_times.seconds(book, "a/f", 400) == pytest.approx(0.5)
    assert move_times.seconds(book, "a/f", 4000) > 0.5
    assert min(move_times.constants(book, "a/f")) >= 0.0


@pytest.mark.parametrize(
    ("joined", "endpoint", "key"),
    [
        ((False, False), "ipc:///b", ""),
        ((True, False), "tcp://b:2", "key-b"),
        ((False, True), "tcp://b:2", "key-b"),
        ((True, True), "tcp://b:2", "key-b"),
    ],
)
def test_a_source_is_told_where_it_reaches_the_destination_and_by_which_key(
    joined: tuple[bool, bool], endpoint: str, key: str
) -> None:
    made = world("a")
    made.nodes["a"].joined = joined[0]
    made.hello("a")
    source = serve(made, SMALL)
    made.nodes["b"] = ModelNode("b", 1000, joined=joined[1])
    made.hello("b")
    made.feed(ev.MigrationAsked(source, "b", ("00" * 16,), "r-1"))
    start(made)
    (move,) = moves(made)
    assert (move.body.endpoint, move.body.curve_key) == (endpoint, key)
