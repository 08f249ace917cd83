"""How many instances there should be, by numbers."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.controller import autoscale
from sllm_faas.controller.model import Pressure
from sllm_faas.spec import Scaling


@pytest.mark.parametrize(
    ("scaling", "concurrency", "waiting", "running", "expected"),
    [
        (Scaling(), 1, 0, 0, 0),
        (Scaling(), 1, 1, 0, 1),
        (Scaling(), 4, 3, 2, 2),
        (Scaling(), 4, 4, 4, 2),
        (Scaling(max_containers=3), 1, 50, 0, 3),
        (Scaling(min_containers=2), 1, 0, 0, 2),
        (Scaling(buffer_containers=1), 1, 0, 0, 0),
        (Scaling(buffer_containers=1), 1, 0, 1, 2),
        (Scaling(buffer_containers=5, max_containers=4), 1, 1, 0, 4),
    ],
)
def test_desired_is_the_clamped_need_and_a_buffer_while_there_is_load(scaling, concurrency, waiting, running, expected):
    assert autoscale.desired(scaling, concurrency, waiting, running) == expected


@pytest.mark.parametrize(
    ("waiting", "running", "tokens", "expected"),
    [(0, 4, 900, 1), (0, 4, 1001, 2), (2, 2, 3500, 4), (1, 1, 9000, 2), (0, 0, 0, 0), (9, 0, 10, 2)],
)
def test_tokens_ask_for_instances_too_at_most_one_for_each_request(waiting, running, tokens, expected):
    assert autoscale.desired(Scaling(target_tokens=1000), 8, waiting, running, tokens) == expected
    assert autoscale.desired(Scaling(), 8, waiting, running, tokens) == -(-(waiting + running) // 8)


@pytest.mark.parametrize(
    ("held", "least", "expected"), [(0, 0, 0), (1, 0, 0), (3, 0, 0), (4, 0, 2), (15, 0, 3), (9, 9, 0), (10, 9, 3)]
)
def test_by_as_many_as_random_load_varies_instances_outlast_their_peak(held, least, expected):
    """None where they are few, and none where there is nothing but the least number."""
    assert autoscale.spare(held, least) == expected


@pytest.mark.parametrize("seed", range(8))
def test_a_slow_decline_of_random_load_does_not_stop_and_start_by_turns(seed):
    """Poisson arrivals of 200 ms of work, from 30 a second to none in 30 s, instances kept for 8 s."""
    rng, now, window = Random(seed), 0.0, 8.0
    ends: list[float] = []
    peaks: list[autoscale.Peak] = []
    live, want, turns = 30, 0, 0
    while now < 45.0:
        now += rng.expovariate(30.0)
        ends = [end for end in ends if end > now]
        if rng.random() < 1.0 - now / 30.0:
            ends.append(now + 0.2)
        before, want = want, len(ends)
        if want != before:
            peaks = autoscale.note_peak(peaks, now, before, window)
        if want > live:
            live, turns = want, turns + 1
        keep = autoscale.held(peaks, now, want, window)
        if now > window:
            live = min(live, keep + autoscale.spare(keep, 0))
    assert (live, turns) == (0, 0)


def test_backoff_doubles_from_one_second_to_sixty():
    assert [autoscale.backoff(n) for n in range(9)] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert autoscale.backoff(10**6) == 60.0


@given(
    st.lists(st.tuples(st.floats(0.001, 5), st.integers(0, 9)), max_size=30),
    st.sampled_from([0.0, 1.0, 3.0, 10.0]),
)
def test_held_is_the_highest_within_the_window(changes, window):
    """The compacted peaks give what a scan of the whole past gives."""
    now, current = 0.0, 0
    peaks: list[autoscale.Peak] = []
    past: list[tuple[float, int]] = []
    for gap, value in changes:
        now += gap
        past.append((now, current))
        peaks = autoscale.note_peak(peaks, now, current, 10.0)
        current = value
        expected = max([current, *(number for until, number in past if until + window > now)])
        assert autoscale.held(peaks, now, current, window) == expected


# -- panic -------------------------------------------------------------------------------------------------------


def fed(*loads: tuple[float, int], capacity: int = 1, stable: float = 60.0) -> tuple[Pressure, list[int]]:
    """Of loads at times: what must stay after each."""
    pressure = Pressure()
    return pressure, [autoscale.note_load(pressure, at, load, capacity, load, stable) for at, load in loads]


def test_twice_the_ready_capacity_over_the_short_window_is_a_panic():
    _, kept = fed((0.0, 0), (10.0, 4), (12.0, 4), (20.0, 4))
    assert kept == [0, 0, 0, 4]


def test_a_spike_that_the_short_window_hardly_sees_is_none():
    _, kept = fed((0.0, 1), (10.0, 6), (10.5, 1), (11.0, 1), (70.0, 1))
    assert kept == [0] * 5


def test_a_first_start_is_no_panic():
    _, kept = fed((0.0, 10), (30.0, 10), capacity=0)
    assert kept == [0, 0]


@pytest.mark.parametrize(("stable", "until"), [(600.0, 80.0), (60.0, 80.0), (5.0, 25.0)])
def test_a_panic_outlasts_its_cause_by_the_stable_window_or_the_functions_own(stable, until):
    pressure, kept = fed((0.0, 8), (20.0, 2), stable=stable)
    assert (pressure.until, kept) == (until, [0, 2])
    assert autoscale.note_load(pressure, until - 0.01, 0, 100, 3, stable) == 3
    assert autoscale.note_load(pressure, until, 0, 100, 0, stable) == 0
    assert pressure.until == 0.0


def test_it_keeps_the_most_that_was_asked_for_in_it():
    _, kept = fed((0.0, 8), (20.0, 8), (21.0, 3), (22.0, 5))
    assert kept == [0, 8, 8, 8]


@given(
    st.lists(st.tuples(st.floats(0.01, 30.0), st.integers(0, 50)), min_size=1, max_size=20),
    st.integers(1, 10),
)
def test_who_looks_again_when_told_to_finds_the_panic(steps, capacity):
    pressure, now = Pressure(), 0.0
    for gap, load in steps:
        now += gap
        autoscale.note_load(pressure, now, load, capacity, load, 60.0)
    soon = autoscale.panics_in(pressure, capacity)
    if soon is not None:
        assert autoscale.note_load(pressure, now + soon, pressure.load, capacity, 1, 60.0) == 1


def test_time_that_stands_still_or_goes_back_changes_no_mean():
    pressure, _ = fed((5.0, 3), (8.0, 3))
    before = pressure.mean
    autoscale.note_load(pressure, 8.0, 9, 100, 9, 60.0)
    autoscale.note_load(pressure, 7.0, 9, 100, 9, 60.0)
    assert pressure.mean == before
