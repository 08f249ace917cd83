"""Where further copies of a checkpoint go, one at a time, and when that ends."""

from __future__ import annotations

import msgspec
import pytest

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.copies import LIMIT, PATIENCE, RETRY, TRIES
from sllm_faas.controller.state import FORGET_NODE, Machine
from sllm_faas.controller.views import Views
from sllm_faas.errors import ErrorInfo
from sllm_faas.spec import AdapterSpec, CheckpointSpec, Target
from sllm_faas.wire.messages import Checked, Ingested, InstanceReport, NodeStats
from tests.controller.fakes import app, llm
from tests.controller.story import settle
from tests.controller.world import DIGEST, ModelNode, World

ADAPTER, OTHER = "a" * 64, "e" * 64
CHAT = app(llm("chat", memory_mb=100))


def cluster(*disks: int, copies: int = 2, memory_mb: int = 5000) -> World:
    """`home`, which is alone at first and so checks what is deployed; `far-0` … with so many MiB of disk."""
    made = World(Machine("abc", migrate=True, copies=copies))
    made.feed(ev.Restored())
    join(made, ModelNode("home", 5000), 50_000)
    for number, disk in enumerate(disks):
        made.nodes[f"far-{number}"] = ModelNode(f"far-{number}", memory_mb, joined=True)
        join(made, made.nodes[f"far-{number}"], disk, cordoned=True)
    return made


def join(made: World, node: ModelNode, disk: int, *, cordoned: bool = False) -> None:
    made.nodes[node.name] = node
    made.hello(node.name)
    made.feed(ev.NodeCordoned(node.name, cordoned))
    made.feed(ev.NodeStatsSeen(node.name, NodeStats(0, disk, 0)))


def deployed(made: World, spec=CHAT, number: int = 1) -> World:
    """Checked at home; nothing that follows has arrived anywhere."""
    made.feed(ev.VersionAdded(spec.name, number, spec))
    made.obey()
    made.feed(made.to_machine.pop(0))
    for name in made.nodes:
        made.feed(ev.NodeCordoned(name, False))
    while made.to_machine:
        made.feed(made.to_machine.pop(0))
    return made


def asked(made: World) -> list[str]:
    """The nodes that were told to bring something, in order."""
    return [command.node for command in made.sent(cmd.SendIngest)]


def alarms(made: World) -> list[str]:
    return [what for _, what in made.machine.state.alarms if what.startswith("copy|")]


def called_off(made: World) -> list[str]:
    return [command.node for command in made.sent(cmd.CancelIngest)]


def holders(made: World, digest: str = DIGEST) -> set[str]:
    assert made.replayed().snapshot() == made.machine.snapshot()
    return set(made.machine.ledger.where.holders(digest))


def fail(made: World, code: str = "checkpoint_unavailable") -> str:
    """Whoever was asked last refuses; its name."""
    node, _, command = made.to_nodes.pop()
    made.feed(ev.CheckpointPulled(node, Ingested(command.body.request, error=ErrorInfo(code, "not there"))))
    return node


def tell(made: World, name: str, *checkpoints: str, disk: int = 50_000) -> None:
    """What is on a node's disk by now."""
    made.nodes[name].checkpoints = set(checkpoints)
    made.feed(ev.NodeStatsSeen(name, NodeStats(0, disk, 0, checkpoints=checkpoints)))


def much_later(made: World) -> None:
    """Time passes, disks are emptied, nodes were silent for a moment."""
    made.tick(made.now + LIMIT)
    for node in made.nodes.values():
        tell(made, node.name, *node.checkpoints, disk=60_000)
        made.hello(node.name)


def test_a_version_that_serves_is_brought_to_the_node_with_the_emptiest_disk():
    made = deployed(cluster(9_000, 20_000, 20_000))
    (command,) = made.sent(cmd.SendIngest)
    assert command.node == "far-1"
    assert command.body.checkpoint == CheckpointSpec("org/model", digest=DIGEST)
    assert command.body.ahead
    settle(made)
    assert holders(made) == {"home", "far-1"}
    assert not made.machine.state.copies


def test_a_start_that_brings_it_to_another_place_is_enough():
    made = deployed(cluster(9_000, 20_000))
    made.feed(ev.NodeCordoned("home", True))
    made.feed(ev.GatewayUp("g", "1"))
    made.to_nodes.clear()  # a start is quicker than the copy
    made.demand("g", Target("app", "chat", 1), 1)
    (instance,) = made.machine.state.instances.values()
    assert asked(made) == ["far-1"]
    made.feed(ev.InstanceSeen(instance.node, InstanceReport(instance.id, 1, instance.target, "ready")))
    assert holders(made) == {"home", instance.node}
    assert not made.machine.state.copies


def test_as_many_as_are_wanted_one_after_another():
    made = deployed(cluster(9_000, 20_000, 30_000, copies=3))
    assert asked(made) == ["far-2"]
    settle(made)
    assert asked(made) == ["far-2", "far-1"]
    assert holders(made) == {"home", "far-2", "far-1"}


def test_nothing_is_brought_where_that_is_off():
    made = deployed(cluster(9_000, copies=1))
    settle(made)
    assert not asked(made) and not made.machine.state.copies
    assert not alarms(made)


def test_nodes_of_one_machine_share_their_disk():
    made = cluster()
    join(made, ModelNode("beside", 5000), 50_000)
    settle(deployed(made))
    assert not asked(made)
    join(made, ModelNode("far", 5000, joined=True), 9_000)
    assert asked(made) == ["far"]


@pytest.mark.parametrize(
    ("disk", "memory_mb", "spec"),
    [
        (1_400, 5_000, CHAT),  # of the disk 1024 MiB stay free, and source and object take 256 each
        (9_000, 300, CHAT),
        (9_000, 5_000, app(llm("chat", memory_mb=100, gpus=1))),
    ],
)
def test_not_to_a_node_without_room_or_that_could_not_run_it(disk, memory_mb, spec):
    assert asked(deployed(cluster(disk, memory_mb=memory_mb), spec)) == []


def test_room_on_a_disk_is_taken_when_it_is_told_of():
    made = deployed(cluster(1_400))
    made.feed(ev.NodeStatsSeen("far-0", NodeStats(0, 1_500, 0)))
    assert asked(made) == []
    made.feed(ev.NodeStatsSeen("far-0", NodeStats(0, 3_000, 0)))
    assert asked(made) == ["far-0"]


def test_a_cordoned_node_is_asked_when_it_is_open_again():
    made = cluster(9_000)
    deployed(made)
    settle(made)
    made.feed(ev.NodeCordoned("far-0", True))
    made.feed(ev.NodeLeft("home"))
    join(made, ModelNode("third", 5000, joined=True), 9_000, cordoned=True)
    made.tick(made.now + PATIENCE + 1)
    assert asked(made) == ["far-0"]
    made.feed(ev.NodeCordoned("third", False))
    assert asked(made) == ["far-0", "third"]


@pytest.mark.parametrize("event", [ev.NodeCordoned("far-0", True), ev.NodeDrained("far-0"), ev.NodeLeaving("far-0")])
def test_a_node_that_takes_nothing_new_any_more_gives_way_to_the_next(event):
    made = deployed(cluster(30_000, 20_000))
    made.feed(event)
    assert called_off(made) == ["far-0"]
    made.tick(made.now + RETRY)
    assert asked(made) == ["far-0", "far-1"]


# -- what has left a disk ------------------------------------------------------------------------------------


def test_what_has_left_a_disk_is_not_brought_again_and_again():
    made = deployed(cluster(30_000, 20_000))
    settle(made)
    tell(made, "far-0")
    assert holders(made) == {"home"}
    much_later(made)
    assert asked(made) == ["far-0"]
    (copy,) = Views(made.machine.ledger).describe_function("app", "chat", made.now)["copies"]
    assert (copy["next"], copy["error"]) == (None, "it has left the disk of far-0")


@pytest.mark.parametrize("number", [1, 2])
def test_what_has_left_a_disk_is_brought_again_by_the_next_deployment_that_wants_it(number):
    """The same anew, or a version with other code."""
    made = deployed(cluster(30_000, 20_000))
    settle(made)
    tell(made, "far-0")
    made.feed(ev.NodeCordoned("far-0", True))
    made.feed(ev.NodeCordoned("far-1", True))
    made.feed(ev.VersionAdded("app", 2, app(llm("chat", memory_mb=100 * number))))
    made.feed(ev.NodeCordoned("far-1", False))
    assert len(asked(made)) == 1
    made.feed(ev.VersionChecked("home", Checked("app", 2, None, {"chat": DIGEST})))
    assert len(asked(made)) == 2
    assert bool(made.to_machine) == (number == 2), "it is not switched to itself"


def test_what_has_left_a_disk_is_brought_to_a_node_that_joins():
    made = deployed(cluster(30_000))
    settle(made)
    tell(made, "far-0")
    join(made, ModelNode("third", 5000, joined=True), 9_000)
    assert asked(made) == ["far-0", "third"]
    assert holders(made) == {"home"}


def test_what_leaves_a_disk_while_another_node_brings_it_is_brought_nowhere_else():
    made = deployed(cluster(30_000, 20_000))
    tell(made, "home")
    settle(made)
    much_later(made)
    assert asked(made) == ["far-0"]
    assert holders(made) == {"far-0"}


def test_nothing_rests_because_one_of_three_left():
    made = deployed(cluster(30_000, 20_000))
    settle(made)
    made.feed(ev.CheckpointPulled("far-1", Ingested("pull-1", DIGEST, 2**28)))
    tell(made, "far-0")
    assert not made.machine.state.copies


def test_a_node_without_room_is_not_asked_again_before_the_next_deployment():
    made = deployed(cluster(30_000, 20_000))
    assert fail(made, "storage_full") == "far-0"
    made.tick(made.now + RETRY)
    assert fail(made, "storage_full") == "far-1"
    much_later(made)
    assert asked(made) == ["far-0", "far-1"]
    made.feed(ev.VersionActivated("app", 1))
    assert len(asked(made)) == 3


def test_each_node_brings_one_at_a_time_and_the_next_when_that_is_over():
    made = cluster(9_000)
    two = app(llm("chat", memory_mb=100), llm("more", source="org/two", memory_mb=100))
    made.feed(ev.VersionAdded("app", 1, two))
    made.feed(ev.VersionChecked("home", Checked("app", 1, None, {"chat": DIGEST, "more": OTHER})))
    made.feed(made.to_machine.pop())
    made.feed(ev.NodeCordoned("far-0", False))
    assert asked(made) == ["far-0"]
    for sources in (["org/model", "org/two"], ["org/model", "org/two"]):
        made.obey(len(made.to_nodes) - 1)
        made.feed(made.to_machine.pop())
        assert [command.body.checkpoint.source for command in made.sent(cmd.SendIngest)] == sources
    assert not made.machine.state.copies


def test_a_node_that_refuses_is_passed_over_with_back_off():
    made = deployed(cluster(30_000, 20_000))
    assert fail(made) == "far-0"
    made.tick(made.now + RETRY - 1)
    assert asked(made) == ["far-0"]
    made.tick(made.now + 1)
    assert asked(made) == ["far-0", "far-1"]
    settle(made)
    assert holders(made) == {"home", "far-1"}


@pytest.mark.parametrize("joins", [True, False])
def test_a_checkpoint_that_nobody_can_bring_is_given_up_until_a_deployment_or_a_new_node(joins):
    made = deployed(cluster(20_000))
    fails = 0
    while len(asked(made)) > fails:
        fail(made)
        fails += 1
        made.tick(made.now + RETRY * 2**TRIES)
    assert fails == TRIES
    shown = Views(made.machine.ledger).describe_function("app", "chat", made.now)["copies"]
    assert shown == [
        {
            "checkpoint": "chat",
            "digest": DIGEST,
            "nodes": ["home"],
            "coming": None,
            "tries": TRIES,
            "next": None,
            "error": "not there",
        }
    ]
    much_later(made)
    assert len(asked(made)) == TRIES
    if joins:
        join(made, ModelNode("third", 5000, joined=True), 9_000)
        assert asked(made)[-1] == "third"
    else:
        made.feed(ev.VersionActivated("app", 1))
    assert len(asked(made)) == TRIES + 1


def test_another_digest_is_not_what_was_wanted_and_nobody_else_will_have_it():
    made = deployed(cluster(20_000, 20_000))
    (command,) = made.sent(cmd.SendIngest)
    made.feed(ev.CheckpointPulled("far-0", Ingested(command.body.request, "b" * 64, 5)))
    (copy,) = made.machine.state.copies.values()
    assert copy.error is not None and "bbbbbbbbbbbb by now" in copy.error.message
    much_later(made)
    assert asked(made) == ["far-0"]


@pytest.mark.parametrize("end", ["deleted", "another"])
def test_what_nobody_needs_any_more_is_called_off(end):
    made = deployed(cluster(20_000))
    if end == "deleted":
        made.feed(ev.AppDeleted("app"))
    else:
        made.feed(ev.VersionAdded("app", 2, app(llm("chat", source="org/other", memory_mb=100))))
        made.feed(ev.VersionChecked(made.sent(cmd.SendCheck)[-1].node, Checked("app", 2, None, {"chat": OTHER})))
        made.feed(made.to_machine.pop())
    assert called_off(made) == ["far-0"]
    assert DIGEST not in made.machine.state.copies
    assert holders(made) == {"home"}


def test_a_rollback_has_the_checkpoints_of_what_it_goes_back_to_copied():
    made = deployed(cluster(20_000))
    made.feed(ev.VersionAdded("app", 2, app(llm("chat", source="org/other", memory_mb=100))))
    made.feed(ev.VersionChecked(made.sent(cmd.SendCheck)[-1].node, Checked("app", 2, None, {"chat": OTHER})))
    made.feed(made.to_machine.pop())
    assert set(made.machine.state.copies) == {OTHER}
    made.feed(ev.VersionActivated("app", 1))
    assert set(made.machine.state.copies) == {DIGEST}


def test_a_copy_that_came_otherwise_ends_the_pull():
    made = deployed(cluster(20_000, 9_000))
    made.feed(ev.CheckpointPulled("far-1", Ingested("pull-1", DIGEST, 2**28)))
    assert called_off(made) == ["far-0"]
    assert holders(made) == {"home", "far-1"}


def test_a_node_that_is_gone_for_good_is_replaced_and_one_that_is_silent_is_not():
    made = deployed(cluster(30_000, 20_000))
    settle(made)
    made.die("far-0")
    made.tick(made.now + FORGET_NODE - 1)
    assert asked(made) == ["far-0"]
    made.tick(made.now + 2)
    assert asked(made) == ["far-0", "far-1"]


@pytest.mark.parametrize("back", [True, False])
def test_a_node_that_left_has_some_time_to_come_back(back):
    made = deployed(cluster(30_000, 20_000))
    settle(made)
    made.feed(ev.NodeLeft("far-0"))
    if back:
        made.nodes["far-0"].life += 1
        join(made, made.nodes["far-0"], 30_000)
    made.tick(made.now + PATIENCE + 1)
    assert asked(made) == (["far-0"] if back else ["far-0", "far-1"])
    assert holders(made)


def test_a_node_that_dies_while_it_brings_one_gives_way_to_the_next():
    made = deployed(cluster(30_000, 20_000))
    made.die("far-0")
    made.tick(made.now + RETRY)
    assert asked(made) == ["far-0", "far-1"]


def test_a_node_that_only_missed_us_is_told_again_and_one_with_another_life_fails():
    made = deployed(cluster(30_000))
    made.hello("far-0")
    first, second = made.sent(cmd.SendIngest)
    assert first == second
    made.nodes["far-0"].life += 1
    made.hello("far-0")
    (copy,) = made.machine.state.copies.values()
    assert copy.state == "resting" and copy.error is not None and "started anew" in copy.error.message


def test_one_that_takes_for_ever_is_called_off():
    made = deployed(cluster(30_000))
    made.tick(made.now + LIMIT)
    assert called_off(made) == ["far-0"]
    made.tick(made.now + RETRY)
    assert asked(made) == ["far-0", "far-0"]


def test_an_adapter_follows_its_base():
    spec = llm("chat", memory_mb=100, adapters=(AdapterSpec("legal", CheckpointSpec("org/legal")),))
    made = cluster(20_000)
    made.feed(ev.VersionAdded("app", 1, app(spec)))
    made.feed(ev.VersionChecked("home", Checked("app", 1, None, {"chat": DIGEST, "chat:legal": ADAPTER})))
    made.feed(made.to_machine.pop())
    made.feed(ev.NodeCordoned("far-0", False))
    (base,) = made.sent(cmd.SendIngest)
    assert (base.body.checkpoint.digest, base.body.base) == (DIGEST, "")
    made.feed(ev.CheckpointPulled("far-0", Ingested(base.body.request, DIGEST, 5)))
    adapter = made.sent(cmd.SendIngest)[-1].body
    assert (adapter.checkpoint.source, adapter.base) == ("org/legal", DIGEST)


def test_a_controller_that_was_restarted_waits_for_those_that_have_it():
    made = World(Machine("abc", migrate=True, copies=2))
    stored = ev.StoredVersion("app", 1, CHAT, True, 0.0, True, digests={"chat": DIGEST})
    made.feed(ev.Restored((stored,)))
    home = ModelNode("home", 5000, checkpoints={DIGEST})
    join(made, home, 9_000)
    join(made, ModelNode("far-0", 5000, joined=True), 30_000)
    join(made, ModelNode("far-1", 5000, joined=True, checkpoints={DIGEST}), 20_000)
    made.tick(made.now + PATIENCE + 1)
    assert not asked(made)
    assert holders(made) == {"home", "far-1"}


def test_a_snapshot_goes_on_where_it_was():
    made = deployed(cluster(30_000, 20_000, copies=3))
    other = Machine.restore(made.machine.snapshot(), migrate=True, copies=3)
    (command,) = made.sent(cmd.SendIngest)
    event = ev.CheckpointPulled(command.node, Ingested(command.body.request, DIGEST, 2**28))
    assert other.handle(event, made.now) == made.machine.handle(event, made.now) != []
    assert other.snapshot() == made.machine.snapshot()


def test_a_snapshot_without_these_records_or_of_another_goal_is_restored():
    made = deployed(cluster(30_000))
    whole = made.machine.snapshot()
    state = msgspec.json.decode(whole)
    del state["copies"], state["ingests"]
    later = Machine.restore(msgspec.json.encode(state), migrate=True, copies=2)
    later.validate()
    (ingest,) = [each for each in later.handle(ev.Tick(), made.now + PATIENCE) if isinstance(each, cmd.SendIngest)]
    assert ingest.node == "far-0"
    off = Machine.restore(whole, migrate=True)
    off.validate()
    assert not off.state.copies
