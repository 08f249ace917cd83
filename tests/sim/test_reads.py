"""The reads of a modelled node."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.sim.clock import Clock
from sllm_faas.sim.reads import Reads


def run(*asked: tuple[float, int, float]) -> list[tuple[int, float]]:
    """(when, bytes, seconds) each; which ended when, in order."""
    clock, ended = Clock(), list[tuple[int, float]]()
    reads = Reads(clock)

    def ask(which: int, size: int, seconds: float) -> None:
        reads.add(size, seconds, lambda: ended.append((which, clock.now)))

    for which, (when, size, seconds) in enumerate(asked):
        clock.at(when, lambda which=which, size=size, seconds=seconds: ask(which, size, seconds))
    clock.run(1e6)
    return ended


def test_equals_come_in_their_order() -> None:
    assert run((0.0, 10, 1.0), (0.0, 10, 1.0), (0.5, 10, 1.0)) == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_a_short_one_overtakes_what_has_more_left_and_that_goes_on_where_it_was() -> None:
    assert run((0.0, 100, 10.0), (4.0, 10, 1.0), (9.5, 60, 6.0)) == [(1, 5.0), (0, 11.0), (2, 17.0)]


@given(st.lists(st.tuples(st.floats(0.0, 10.0), st.integers(1, 100), st.floats(0.01, 5.0)), min_size=1, max_size=20))
def test_everything_is_read_once_and_the_tier_is_never_idle_meanwhile(asked: list[tuple[float, int, float]]) -> None:
    ended = run(*asked)
    assert sorted(which for which, _ in ended) == list(range(len(asked)))
    busy = 0.0
    for when, _, seconds in sorted(asked):
        busy = max(busy, when) + seconds
    assert ended[-1][1] == pytest.approx(busy)
