"""Who holds which slab: no reader ever sees a byte that is not its checkpoint's."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sllm_invoker.checkpoints.slab_book import TRANSITIONS, IllegalMove, SlabBook

A, B, C = (letter * 64 for letter in "abc")


def book(slabs: int = 4) -> SlabBook:
    made = SlabBook()
    for slab in range(slabs):
        made.add(slab)
    return made


def full(made: SlabBook, digest: str, count: int = 2, holder: str = "") -> int:
    stay = made.reserve(digest, count * 100, count)
    if holder:
        made.lease(stay.number, holder)
        made.map(stay.number, holder)
    made.filled(stay.number)
    return stay.number


def test_the_table_is_complete():
    assert set(TRANSITIONS) == {"free", "filling", "full", "retiring"}
    assert {after for row in TRANSITIONS.values() for after in row.values()} == set(TRANSITIONS)


def test_a_stay_takes_its_slabs_and_gives_them_back():
    made = book()
    number = full(made, A)
    assert (len(made.free), made.held) == (2, 2)
    made.retire(number)
    assert (sorted(made.free), made.held, made.find(A)) == ([0, 1, 2, 3], 0, None)


def test_a_stay_may_get_its_name_while_it_is_filled_unless_another_has_it():
    made = book()
    number = full(made, A)
    stay = made.reserve("unnamed", 200, 2)
    for busy, name in ((stay.number, A), (number, B)):
        with pytest.raises(IllegalMove, match="rename"):
            made.rename(busy, name)
    made.rename(stay.number, B)
    assert (made.find(B), made.find("unnamed")) == (stay, None)
    made.validate()


def test_a_lease_keeps_a_checkpoint():
    made = book()
    number = full(made, A, holder="p")
    assert made.evictable() == {}
    with pytest.raises(IllegalMove, match="leased"):
        made.retire(number)


def test_a_pin_keeps_a_checkpoint():
    made = book()
    number = full(made, A)
    made.pins = {A}
    assert made.evictable() == {}
    with pytest.raises(IllegalMove, match="pinned"):
        made.retire(number)


def test_a_slab_is_not_reused_because_a_lease_ended():
    """A private map still sees what is written to the memory it maps."""
    made = book()
    number = full(made, A, holder="p")
    made.release("p")
    made.retire(number)
    assert len(made.free) == 2
    assert "retiring" in str(made)
    made.gone("p")
    assert len(made.free) == 4


def test_a_checkpoint_is_read_again_while_its_former_stay_is_still_mapped():
    made = book()
    first = full(made, A, holder="p")
    made.release("p")
    made.retire(first)
    again = made.reserve(A, 200, 2)
    assert again.number != first
    assert set(again.slabs).isdisjoint(made.residences[first].slabs)


def test_an_abandoned_read_frees_its_slabs_unless_they_are_mapped():
    made = book()
    made.abandon(made.reserve(A, 200, 2).number)
    assert len(made.free) == 4
    stay = made.reserve(A, 200, 2)
    made.lease(stay.number, "p")
    made.map(stay.number, "p")
    made.abandon(stay.number)
    assert len(made.free) == 2
    made.gone("p")
    assert len(made.free) == 4


def test_slabs_of_an_earlier_life_are_dropped_and_never_reused():
    made = book(0)
    number = made.adopt(A, 200, (7, 8), {"p"}).number
    made.gone("p")
    made.retire(number)
    assert (made.free, sorted(made.dropped)) == ([], [7, 8])


@pytest.mark.parametrize(
    "move",
    [
        lambda made: made.reserve(A, 1, 1),
        lambda made: made.reserve(B, 1, 3),
        lambda made: made.filled(1),
        lambda made: made.abandon(1),
        lambda made: made.map(1, "stranger"),
        lambda made: made.retire(99),
        lambda made: made.adopt(A, 1, (9,), set()),
    ],
)
def test_an_illegal_move_is_refused_and_changes_nothing(move):
    made = book()
    full(made, A)
    before = str(made)
    with pytest.raises(IllegalMove):
        move(made)
    assert str(made) == before
    made.validate()


class Machine:
    """A book beside a model of the memory it keeps: what is written where, and what each live process maps."""

    def __init__(self, slabs: int) -> None:
        self.book = book(slabs)
        self.memory: dict[int, str] = {}
        self.maps: dict[str, list[tuple[int, str]]] = {}
        self.processes = 0
        self.reused = 0

    def step(self, op: int, pick: int) -> None:
        made = self.book
        stays = list(made.residences.values())
        stay = stays[pick % len(stays)] if stays else None
        holders = sorted(self.maps)
        holder = holders[pick % len(holders)] if holders else ""
        match op:
            case 0:
                digest, count = "abcdef"[pick % 6] * 64, 1 + pick % 3
                if made.find(digest) is None and count <= len(made.free):
                    for slab in made.reserve(digest, count, count).slabs:
                        self.reused += slab in self.memory
                        self.memory[slab] = digest  # the read begins to overwrite at once
            case 1 if stay and stay.state == "filling":
                made.filled(stay.number)
            case 2 if stay and stay.state == "filling" and not pick % 4:
                made.abandon(stay.number)
            case 3 | 4 if stay and stay.state != "retiring":
                self.processes += 1
                name = f"p{self.processes}"
                made.lease(stay.number, name)
                made.map(stay.number, name)
                self.maps[name] = [(slab, stay.digest) for slab in stay.slabs]
            case 5 if holder:
                made.release(holder)
            case 6 if holder:
                del self.maps[holder]
                made.gone(holder)
            case 7 if stay and stay.state == "full" and not stay.leases:
                made.retire(stay.number)
            case _:
                pass
        made.validate()
        for seen in self.maps.values():
            for slab, digest in seen:
                assert self.memory[slab] == digest, "a reader sees another checkpoint's bytes"


def test_ten_thousand_histories_of_map_evict_reuse_and_kill():
    chance, reused = random.Random(20261121), 0
    for _ in range(10_000):
        machine = Machine(chance.randint(2, 6))
        for _ in range(64):
            machine.step(chance.randrange(8), chance.randrange(60))
        reused += machine.reused
    assert reused > 10_000, "the histories do not reuse slabs: they show nothing"


@settings(max_examples=200)
@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 60)), max_size=80))
def test_no_history_lets_a_reader_see_other_bytes(slabs, steps):
    machine = Machine(slabs)
    for step in steps:
        machine.step(*step)
    for holder in list(machine.maps):
        machine.book.gone(holder)
    assert len(machine.book.free) + machine.book.held == slabs
