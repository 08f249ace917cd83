"""A move between two nodes, and every party killed at every message boundary of it.

Enumerated: whoever dies, whenever, the answer ends migrated, not begun (it stays), or resumed; each output comes once,
in order, and nobody who lives is left with anything."""

from __future__ import annotations

import pytest

from sllm_faas.wire.header import Type
from tests.invoker.moving_world import LENGTH, World

PARTIES = {"controller": "controller", "source": "node-0", "destination": "node-1", "gateway": "g-0"}


def begun() -> World:
    """A stream has said a few outputs and is told to move."""
    world = World()
    world.gateway.dispatch()
    world.run(turns=5)
    assert len(world.gateway.values) >= 3
    world.delivered.clear()
    world.migrate()
    return world


def undisturbed() -> list[Type]:
    world = begun()
    world.run(turns=LENGTH + 20)
    return world.delivered


BOUNDARIES = len(undisturbed())


def finish(world: World) -> None:
    world.run(turns=3 * LENGTH)
    for _ in range(4):
        world.later(11.0)
    world.run(turns=3 * LENGTH)


def assert_nothing_left(world: World) -> None:
    assert world.gateway.values == list(range(LENGTH))
    assert world.gateway.done
    assert not world.gateway.ghosts
    for node in world.living():
        assert not node.core.flights and not node.core.arrivals.holds and not node.container.calls
        assert node.core.credits.running(1) == 0
        assert not node.core.departures.nodes()


def test_an_undisturbed_move_goes_through_all_its_steps() -> None:
    world = begun()
    finish(world)
    assert_nothing_left(world)
    assert (world.gateway.moves, world.gateway.resumes, world.gateway.fence) == (1, 0, 2)
    ((result,),) = (migrated.results for migrated in world.migrated)
    assert (result.outcome, result.why) == ("moved", "")
    assert result.rounds >= 1
    order = [Type.SNAPSHOT, Type.HOLD, Type.HELD, Type.PAUSE, Type.MOVED, Type.COMMITTED]
    assert [kind for kind in world.delivered if kind in order and world.delivered.index(kind) >= 0][-1] in order
    places = [world.delivered.index(kind) for kind in order]
    assert places == sorted(places)


@pytest.mark.parametrize("party", PARTIES)
@pytest.mark.parametrize("noticed", ["at once", "late"])
def test_whoever_dies_at_whatever_boundary_the_answer_is_whole_and_nothing_is_left(party: str, noticed: str) -> None:
    outcomes = set()
    for boundary in range(1, BOUNDARIES + 1):
        world = begun()
        name = PARTIES[party]
        world.run(turns=LENGTH + 20, boundary=boundary)
        world.kill(name)
        if noticed == "late":
            world.run(turns=3)
        world.notice(name)
        finish(world)
        assert_nothing_left(world)
        gateway = world.gateway
        outcome = "resumed" if gateway.resumes else "migrated" if gateway.node == "node-1" else "not begun"
        outcomes.add(outcome)
    expected = {
        "controller": {"migrated"},
        "source": {"resumed", "migrated"},
        "destination": {"resumed", "not begun"},
        "gateway": {"migrated", "not begun", "resumed"},
    }
    assert outcomes == expected[party]
