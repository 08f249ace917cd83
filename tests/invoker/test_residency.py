"""What stays on a GPU between instances: whatever happens, a group is given as whole only if one that lived said so."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sllm_invoker.containers.residency import GRAIN, Range, Residency, grains

from sllm_faas.errors import IllegalTransition

THREE = ((0, GRAIN), (GRAIN, 3 * GRAIN), (3 * GRAIN, 4 * GRAIN))


def left(device: Residency, checkpoint: str, ranges: tuple[Range, ...] = THREE, whole: int = 3) -> None:
    """An instance came, finished so many groups, and ended."""
    device.open(checkpoint, ranges)
    for group in ranges[:whole]:
        if group not in device.kept(checkpoint):
            device.whole(group)
    device.end()


def test_what_was_whole_stays_and_what_was_not_is_gone() -> None:
    device = Residency(100 * GRAIN)
    left(device, "a", whole=2)
    assert device.open("a", THREE) == []
    assert (device.kept("a"), device.held("a"), device.used) == (THREE[:2], 3 * GRAIN, 3 * GRAIN)
    assert device.whole_checkpoints() == ()
    device.whole(THREE[2])
    assert device.whole_checkpoints() == ("a",)


def test_room_is_made_from_the_least_recently_used_and_from_its_last_layers_first() -> None:
    device = Residency(100 * GRAIN)
    for checkpoint in ("a", "b", "a"):
        left(device, checkpoint)
    device.open("c", THREE)
    assert device.make_room(2 * GRAIN) == [("b", THREE[2]), ("b", THREE[1])]
    assert device.make_room(GRAIN + 1) == [("b", THREE[0]), ("a", THREE[2])]
    assert device.kept("a") == THREE[:2]
    assert device.make_room(0) == []


def test_a_group_under_a_lease_stays_whoever_needs_room() -> None:
    device = Residency(100 * GRAIN)
    left(device, "a")
    device.open("a", THREE)
    assert device.make_room(100 * GRAIN) == []
    assert device.kept("a") == THREE


def test_no_more_is_kept_than_the_budget_allows() -> None:
    device = Residency(4 * GRAIN)
    left(device, "a")
    device.open("b", (*THREE, (4 * GRAIN, 5 * GRAIN)))
    assert device.whole(THREE[0]) == [("a", THREE[2])]
    assert device.whole(THREE[1]) == [("a", THREE[1])]
    assert device.whole(THREE[2]) == [("a", THREE[0])]
    assert device.whole((4 * GRAIN, 5 * GRAIN)) == [("b", (4 * GRAIN, 5 * GRAIN))]
    assert (device.kept("b"), device.used) == (THREE, 4 * GRAIN)


def test_groups_cut_in_another_way_are_none_of_the_checkpoint() -> None:
    device = Residency(100 * GRAIN)
    left(device, "a")
    assert device.open("a", (THREE[0], (GRAIN, 4 * GRAIN))) == [("a", THREE[1]), ("a", THREE[2])]
    assert device.kept("a") == THREE[:1]


def test_one_lease_at_a_time_and_groups_of_it_alone() -> None:
    device = Residency(100 * GRAIN)
    with pytest.raises(IllegalTransition, match="nobody may report"):
        device.whole(THREE[0])
    device.open("a", THREE)
    with pytest.raises(IllegalTransition, match="checkpoint a has the lease: b"):
        device.open("b", THREE)
    device.whole(THREE[0])
    assert device.whole(THREE[0]) == [], "made again"
    assert device.used == GRAIN
    with pytest.raises(IllegalTransition, match="not one that a may report"):
        device.whole((0, 5))


@pytest.mark.parametrize("ranges", [((0, 0),), ((5, 4),), ((-1, 4),), ((0, 5), (4, 8)), ((4, 8), (0, 4))])
def test_ranges_out_of_order_are_refused(ranges: tuple[Range, ...]) -> None:
    device = Residency(100 * GRAIN)
    with pytest.raises(IllegalTransition, match="not in order"):
        device.open("a", ranges)
    assert device.leased is None


class Histories(RuleBasedStateMachine):
    """Against a device whose memory is a plain dictionary: what instances map, and what the keeper was handed."""

    CUTS = (THREE, ((0, 3 * GRAIN), (3 * GRAIN, 4 * GRAIN)))

    def __init__(self) -> None:
        super().__init__()
        self.device = Residency(9 * GRAIN)
        self.handed: set[tuple[str, Range]] = set()
        """Whole by the word of one that lived, and not let go of since."""
        self.cut: tuple[Range, ...] = ()
        self.given: set[tuple[str, Range]] = set()

    def dropped(self, groups: list[tuple[str, Range]]) -> None:
        assert len(set(groups)) == len(groups)
        assert set(groups) <= self.handed
        assert not set(groups) & self.given, "an instance maps it"
        self.handed -= set(groups)

    @precondition(lambda self: self.device.leased is None)
    @rule(checkpoint=st.sampled_from("abc"), cut=st.sampled_from(CUTS))
    def begin(self, checkpoint: str, cut: tuple[Range, ...]) -> None:
        self.dropped(self.device.open(checkpoint, cut))
        self.cut = cut
        self.given = {(checkpoint, group) for group in self.device.kept(checkpoint)}
        assert self.given <= self.handed
        assert all(group in cut for _, group in self.given)

    @precondition(lambda self: self.device.leased is not None)
    @rule(number=st.integers(0, 2))
    def whole(self, number: int) -> None:
        group = self.cut[min(number, len(self.cut) - 1)]
        checkpoint = self.device.leased
        assert checkpoint is not None
        self.handed.add((checkpoint, group))
        self.dropped(self.device.whole(group))
        self.given |= {(checkpoint, group)} & self.handed

    @rule()
    def end(self) -> None:
        self.device.end()
        self.given = set()

    @rule(wanted=st.integers(-1, 12))
    def room(self, wanted: int) -> None:
        before = self.device.used
        free = sum(grains(group) for name, group in self.handed if name != self.device.leased)
        self.dropped(self.device.make_room(wanted * GRAIN))
        assert before - self.device.used >= min(wanted * GRAIN, free)

    @precondition(lambda self: self.device.leased is None)
    @rule()
    def clear(self) -> None:
        self.dropped(self.device.clear())
        assert self.device.used == 0

    @invariant()
    def what_is_kept_is_what_was_handed_over(self) -> None:
        kept = {(name, group) for name in "abc" for group in self.device.kept(name)}
        assert kept == self.handed
        assert self.device.used == sum(grains(group) for _, group in kept) <= self.device.budget
        assert self.given <= kept


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
