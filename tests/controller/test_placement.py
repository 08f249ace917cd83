"""The choice of a node: least estimate, admission, eviction, an explanation; always the same for the same input."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.controller import placement
from sllm_faas.controller.estimate import Estimate
from sllm_faas.controller.placement import Candidate, Evict, Full, Idle, Movable, Move, OwnSlot, Placed, place
from sllm_faas.controller.service_times import ServiceTime, SlotWait


class Offered:
    """By a node: whoever is listed, and room that is there at once unless `freed` says otherwise."""

    def __init__(self, idle, movable, freed):
        self._idle, self.movable, self.freed = idle, movable, freed

    def idle(self):
        return list(self._idle)


def node(
    name="n", seconds=1.0, *, need=100, free=1000, total=1000, freeing=0, idle=(), movable=None, freed=None, **more
):
    guess = Estimate(0.0, seconds, 0.0, 0.0, "base", "disk")
    offers = Offered(idle, movable or (lambda _limit: ()), freed or (lambda _mb, _gpus: 0.0))
    return Candidate(name, need, free, total, freeing, guess, offers, **more)


def test_the_fastest_node_that_has_room_wins_and_says_why():
    choice = place([node("slow", 2.0), node("fast", 1.0), node("full", 0.1, free=50)])
    assert isinstance(choice, Placed)
    assert choice.node == "fast"
    assert choice.why.startswith("fast: 1.00 s = base container 1.00")
    assert "over slow 2.00 s" in choice.why
    assert "1 without room" in choice.why


def test_equal_estimates_go_to_the_emptier_node_then_by_name():
    assert place([node("a", free=200), node("b", free=900)]).node == "b"
    assert place([node("b"), node("a")]).node == "a"


def test_a_node_of_unknown_memory_admits_everything():
    assert isinstance(place([node(need=10**6, free=None, total=0)]), Placed)


def test_no_node_is_a_reason_to_wait():
    assert place([]) == Full("no node is up and open for instances")


def test_what_fits_no_node_is_never_placed():
    choice = place([node("a", need=2000), node("big", need=2000, total=1500, free=10)])
    assert isinstance(choice, Full)
    assert choice.never
    assert "needs 2000 MiB; the biggest node, big, has 1500 MiB" in choice.why


def test_what_needs_a_gpu_where_there_is_none_is_told_what_would_help():
    choice = place([node("a", need_gpus=1)])
    assert isinstance(choice, Full)
    assert choice.never
    assert choice.why == "it needs 1 GPU; no node has one"
    assert "without `gpu`" in choice.hint
    assert isinstance(place([node("a", need_gpus=1, total_gpus=1, free_gpus=1)]), Placed)


def test_as_few_idle_as_possible_go_the_longest_idle_first():
    idle = (Idle("young", 100, 0.5), Idle("old", 100, 5.0), Idle("older", 30, 6.0))
    choice = place([node("a", need=200, free=80, idle=idle)])
    assert isinstance(choice, Evict)
    assert choice.instances == ("older", "old")


def test_memory_that_is_being_freed_is_waited_for():
    """Evicting more while a drain is under way would stop instances for nothing."""
    choice = place([node("a", need=200, free=50, freeing=150, idle=(Idle("i", 500, 0.0),), freed=lambda *_: 0.01)])
    assert choice == Full("waits for room that is being freed on a, in about 0.01 s", again=0.05)


def test_room_that_is_long_in_coming_is_worth_no_more_than_room_elsewhere():
    """A node that is a little faster, but where an instance has work for another second."""
    draining = node("a", 1.0, need=200, free=50, freeing=150, freed=lambda *_: 1.0)
    choice = place([draining, node("b", 1.2)])
    assert isinstance(choice, Placed)
    assert choice.node == "b"
    assert "waiting for room on a 2.00 s" in choice.why
    choice = place([draining, node("b", 2.5)])
    assert isinstance(choice, Full)
    assert choice.why == "waits for room that is being freed on a, in about 1.00 s; not a start on b 2.50 s"


def test_where_room_is_long_in_coming_idle_instances_go():
    idle = (Idle("i", 100, 9.0), Idle("j", 200, 9.0))
    choice = place([node("a", 1.0, need=200, free=50, freeing=150, idle=idle, freed=lambda *_: 1.0)])
    assert isinstance(choice, Evict)
    assert choice.instances == ("j",), "enough without what is being freed"


def test_nobody_has_to_go_where_the_rest_of_the_room_is_long_in_coming():
    """What ends there is needed as well, and runs something for another minute."""
    idle = (Idle("i", 50, 90.0), Idle("j", 200, 9.0))
    draining = node("a", 1.0, need=200, free=0, freeing=150, idle=idle[:1], freed=lambda mb, _: 60.0 if mb else 0.0)
    assert isinstance(place([draining, node("b", 2.0)]), Placed)
    choice = place([node("a", 1.0, need=200, free=0, freeing=150, idle=idle, freed=lambda mb, _: 60.0 if mb else 0.0)])
    assert isinstance(choice, Evict)
    assert choice.instances == ("j",), "enough without what is being freed"


def test_nobody_has_to_move_where_the_rest_of_the_room_is_long_in_coming():
    movable = (Movable("i", 50, 0, "c", 0.2),)
    draining = node(
        "a", 1.0, need=200, free=0, freeing=150, movable=lambda _: movable, freed=lambda mb, _: 60.0 if mb else 0.0
    )
    assert isinstance(place([draining]), Move)
    assert isinstance(place([draining, node("b", 2.0)]), Placed)


def test_a_node_that_must_evict_much_loses_to_one_nearly_as_fast_that_need_not():
    many = tuple(Idle(f"i{k}", 10, 0.0, reload=3.0) for k in range(20))
    lone = (Idle("j", 100, 0.0, reload=3.0),)
    choice = place([node("fast", 1.0, free=0, idle=many), node("slow", 1.02, free=0, idle=lone)])
    assert isinstance(choice, Evict)
    assert choice.node == "slow"


def test_what_has_not_served_for_long_enough_is_waited_for_unless_another_node_is_sooner():
    """The wait counts as part of the start."""
    young = (Idle("young", 100, 0.0, rests=2.0),)
    choice = place([node("a", 1.0, free=0, idle=young)])
    assert isinstance(choice, Full)
    assert choice.again == 2.0
    choice = place([node("a", 1.0, free=0, idle=young), node("b", 2.5, free=0, idle=(Idle("old", 100, 9.0),))])
    assert isinstance(choice, Evict)
    assert choice.instances == ("old",)


def test_who_waits_though_there_is_room_elsewhere_looks_again_when_that_may_be_sooner():
    """A queue shortens by a second per second."""
    choice = place([node("a", 1.0, need=200, free=50, freeing=150, freed=lambda *_: 1.2), node("b", 2.5)])
    assert isinstance(choice, Full)
    assert choice.again == pytest.approx(0.3)


def waiting(seconds: float, waited: float = 0.0) -> OwnSlot:
    return lambda: SlotWait(seconds, waited, 1, 2, ServiceTime(2 * seconds, None, 9))


IDLE = (Idle("i", 100, 9.0),)
MOVABLE = Movable("i", 100, 0, "m", 0.5)


@pytest.mark.parametrize(
    "way", [{"idle": IDLE}, {"idle": (Idle("i", 100, 0.0, rests=2.0),)}, {"movable": lambda _: [MOVABLE]}]
)
def test_a_slot_of_its_own_is_waited_for_where_a_start_would_harm_others_for_longer(way):
    full = node("a", 1.0, free=0, **way)
    harmful = place([full])
    choice = place([full], own_slot=waiting(0.9))
    assert isinstance(choice, Full)
    assert choice.own_slot
    assert choice.again == 0.9
    assert choice.why.startswith("waits for a slot, about 0.90 s; 1 waits for 2 slots, kept for 1.80 s (mean of 9); ")
    assert choice.why.endswith(harmful.why)
    assert place([full], own_slot=waiting(9.0)) == harmful
    assert place([full], own_slot=waiting(0.9, waited=9.0)) == harmful, "it did not come"


def test_the_slot_is_not_asked_about_where_nobody_would_be_harmed():
    def asked() -> SlotWait:
        raise AssertionError

    assert isinstance(place([node("a")], own_slot=asked), Placed)
    assert isinstance(place([node("a", free=0, freeing=100)], own_slot=asked), Full)
    assert isinstance(place([node("a", free=0)], own_slot=asked), Full)
    assert isinstance(place([], own_slot=asked), Full)
    # There is a node with room, only not the fastest: as ever.
    assert isinstance(place([node("a", 1.0, free=0, idle=IDLE), node("b", 2.0)], own_slot=asked), Evict)


nodes = st.lists(
    st.builds(
        lambda name, seconds, need, free: node(f"n{name}", seconds, need=need, free=free),
        st.integers(0, 10**6),
        st.floats(0, 10),
        st.integers(1, 500),
        st.integers(0, 1000),
    ),
    max_size=12,
    unique_by=lambda candidate: candidate.name,
)


@given(nodes, st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order_of_the_nodes(candidates, rng: random.Random):
    before = place(candidates)
    shuffled = list(candidates)
    rng.shuffle(shuffled)
    assert place(shuffled) == before


@given(nodes)
def test_a_placed_instance_always_fits(candidates):
    choice = place(candidates)
    if isinstance(choice, placement.Placed):
        winner = next(candidate for candidate in candidates if candidate.name == choice.node)
        assert winner.fits()
        assert winner.estimate.total <= min(c.estimate.total for c in candidates if c.fits()) + 1e-5


def test_of_two_that_would_do_the_one_missed_least_goes():
    """What was needed a moment ago will be again; what starts again soon is missed little."""
    idle = (Idle("hot", 200, 0.1, reload=2.0), Idle("cold", 200, 60.0, reload=2.0))
    choice = place([node("a", need=200, free=0, idle=idle)])
    assert isinstance(choice, Evict)
    assert choice.instances == ("cold",)
    idle = (Idle("slow", 200, 1.0, reload=9.0), Idle("fast", 200, 1.0, reload=0.5))
    choice = place([node("a", need=200, free=0, idle=idle)])
    assert isinstance(choice, Evict)
    assert choice.instances == ("fast",)


def test_an_explanation_names_the_ways_that_lost():
    idle, slow = (Idle("i", 500, 9.0, reload=1.0),), (Idle("j", 500, 0.0, reload=2000.0),)
    nodes = [node("a", 1.0, free=0, idle=idle), node("b", 1.5, free=0, freeing=500), node("c", 1.2, free=0, idle=slow)]
    choice = place([*nodes, node("d", 4.0)])
    assert isinstance(choice, Evict)
    assert choice.why.startswith("a: stops 1 idle to free 100 MiB, then 1.00 s")
    assert choice.why.endswith("; not a start on d 4.00 s")
    choice = place([nodes[2], nodes[1], node("d", 4.0)])
    assert isinstance(choice, Full)
    assert choice.why == (
        "waits for room that is being freed on b, in about 0.00 s; not eviction on c 3.21 s, a start on d 4.00 s"
    )
    choice = place([nodes[2], node("d", 2.0)])
    assert isinstance(choice, placement.Placed)
    assert choice.why.endswith("; 1 without room; not eviction on c 3.21 s")


parts = st.lists(
    st.builds(
        lambda number, mb, gpus, cost: Idle(f"i{number}", mb, 0.0, gpus, rests=cost),
        st.integers(0, 10**6),
        st.integers(0, 50),
        st.integers(0, 3),
        st.integers(0, 20).map(float),
    ),
    max_size=6,
)


@given(parts, st.integers(0, 120), st.integers(0, 6))
def test_no_set_of_parts_that_is_enough_is_cheaper(found, mb, gpus):
    """All sets of up to six are tried."""

    def cost(chosen) -> float:
        return sum(item.rests for item in chosen)

    def enough(chosen) -> bool:
        return sum(item.memory_mb for item in chosen) >= mb and sum(item.gpus for item in chosen) >= gpus

    sets = [chosen for size in range(1, len(found) + 1) for chosen in combinations(found, size) if enough(chosen)]
    chosen = placement.cheapest(found, mb, gpus, lambda item: item.rests)
    assert bool(chosen) == bool(sets)
    if sets:
        assert enough(chosen)
        assert cost(chosen) == min(map(cost, sets))
        assert len(set(chosen)) == len(chosen) or len(set(found)) < len(found)


def test_two_that_are_cheaper_together_go_instead_of_one_that_is_enough():
    few = (Idle("big", 200, 0.0, rests=9.0), Idle("one", 100, 0.0, rests=2.0), Idle("two", 100, 0.0, rests=3.0))
    chosen = placement.cheapest(few, 200, 0, lambda item: item.rests)
    assert [item.instance for item in chosen] == ["one", "two"]


@given(st.lists(st.integers(1, 10**6), min_size=20, max_size=40))
def test_many_different_parts_are_enough_when_all_of_them_are(sizes):
    few = [Idle(f"i{number}", mb, 0.0, rests=float(mb % 7)) for number, mb in enumerate(sizes)]
    chosen = placement.cheapest(few, sum(sizes) // 2, 0, lambda item: item.rests)
    assert sum(item.memory_mb for item in chosen) >= sum(sizes) // 2


def test_two_do_not_move_to_where_there_is_room_for_one():
    """Then another goes, or none."""

    def movable(name: str, seconds: float, place: str, room: int) -> Movable:
        return Movable(name, 100, 0, place, seconds, place, (100, 0), (room, 0))

    first, second, third = movable("i", 1.0, "x", 150), movable("j", 1.1, "x", 150), movable("k", 2.0, "y", 150)
    full = node("a", need=200, free=0, movable=lambda _limit: [first, second, third])
    assert placement.cheapest_moves(full) == (first, third)
    full = node("a", need=200, free=0, movable=lambda _limit: [first, second])
    assert placement.cheapest_moves(full) == ()
    roomy = [movable("i", 1.0, "x", 200), movable("j", 1.1, "x", 200)]
    assert placement.cheapest_moves(node("a", need=200, free=0, movable=lambda _limit: roomy)) == tuple(roomy)
