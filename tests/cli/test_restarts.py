"""When the supervisor starts an ended process again, on a virtual clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.cli.restarts import DELAYS, SETTLED, Restarts
from sllm_faas.config import Config

NEVER = None
"""It ended before it was ready."""
STARTING = 1.0
Lives = list[float | None]
early = st.none() | st.integers(0, int(8 * SETTLED) - 1).map(lambda eighths: eighths / 8)
long = st.integers(int(8 * SETTLED), 8 * 3600).map(lambda eighths: eighths / 8)


def waits(lives: Lives, name: str = "gateway-0", restarts: Restarts | None = None) -> list[float]:
    """The waits after lives of which each served for so many seconds."""
    restarts, now, found = restarts or Restarts(), 100.0, []
    for served in lives:
        now += STARTING
        if served is not None:
            restarts.ready(name, now)
            now += served
        found.append(restarts.ended(name, now))
        now += found[-1]
    return found


@pytest.mark.parametrize(
    ("lives", "expected"),
    [
        ([NEVER], [0.0]),
        ([0.1], [0.0]),
        ([60.0], [0.0]),
        ([NEVER] * 9, [0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 30.0, 30.0]),
        ([0.1] * 9, [0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 30.0, 30.0]),
        ([SETTLED - 0.1, NEVER, 0.1], [0.0, 0.5, 1.0]),
        ([SETTLED] * 4, [0.0] * 4),
        ([*[NEVER] * 6, SETTLED, NEVER, NEVER], [0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 0.0, 0.5, 1.0]),
    ],
)
def test_only_what_ends_before_it_has_served_waits_and_longer_each_time(lives: Lives, expected: list[float]) -> None:
    assert waits(lives) == expected


def test_a_slow_start_is_no_service() -> None:
    restarts = Restarts()
    assert [restarts.ended("node-0", now) for now in (100.0, 200.0, 300.0)] == [0.0, 0.5, 1.0]


def test_one_process_dying_does_not_delay_another() -> None:
    restarts = Restarts()
    waits([NEVER, NEVER], "node-0", restarts)
    assert waits([NEVER], "node-1", restarts) == [0.0]


@given(st.lists(early, min_size=1, max_size=20))
def test_waits_never_shrink_while_a_process_keeps_ending_early(lives: Lives) -> None:
    found = waits(lives)
    assert found == sorted(found)
    assert set(found) <= set(DELAYS)


@given(st.lists(early, max_size=20), long)
def test_what_has_served_is_back_at_once_whatever_came_before(before: Lives, served: float) -> None:
    assert waits([*before, served])[-1] == 0.0


@given(st.lists(early | long, max_size=20))
def test_a_gateway_is_away_for_less_than_its_invocations_are_kept_unless_it_cannot_run(lives: Lives) -> None:
    """Five ends in a row that each came too early are what it takes."""
    found, in_a_row = waits(lives), 0
    for served, wait in zip(lives, found, strict=True):
        in_a_row = 1 if served is not None and served >= SETTLED else in_a_row + 1
        assert wait < Config().orphan_grace or in_a_row > 5
