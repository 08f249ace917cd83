"""When the supervisor starts a dead process again, on a virtual clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.cli.restarts import DELAYS, Restarts


def test_the_first_restart_is_at_once_and_each_quick_death_waits_longer() -> None:
    restarts, now = Restarts(), 100.0
    delays = []
    for _ in range(9):
        restarts.started("node-0", now)
        now += 0.1
        delays.append(restarts.died("node-0", now))
    assert delays == [0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 30.0, 30.0]


def test_a_process_that_ran_long_enough_is_forgiven() -> None:
    restarts = Restarts()
    for now in (0.0, 1.0, 2.0):
        restarts.started("controller", now)
        restarts.died("controller", now)
    restarts.started("controller", 10.0)
    assert restarts.died("controller", 70.0) == 0.0


def test_one_process_dying_does_not_delay_another() -> None:
    restarts = Restarts()
    for now in (0.0, 1.0, 2.0):
        restarts.started("node-0", now)
        restarts.died("node-0", now)
    restarts.started("node-1", 3.0)
    assert restarts.died("node-1", 3.0) == 0.0


@given(st.lists(st.floats(0.0, 59.0), min_size=1, max_size=20))
def test_delays_never_shrink_while_a_process_keeps_dying_early(lifetimes: list[float]) -> None:
    restarts, now, delays = Restarts(), 0.0, []
    for lifetime in lifetimes:
        restarts.started("gateway-0", now)
        now += lifetime
        delays.append(restarts.died("gateway-0", now))
    assert delays == sorted(delays)
    assert set(delays) <= set(DELAYS)
