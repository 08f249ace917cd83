"""Caps of apps: what may run, and who may run more after a change."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.dispatch.caps import Caps


def test_an_app_without_a_cap_has_room_for_all() -> None:
    caps = Caps()
    caps.started("a")
    assert caps.room("a", 7) == 7
    assert not caps.capped("a")


def test_there_is_room_up_to_the_cap_and_again_when_something_ends() -> None:
    caps = Caps()
    caps.replace({"a": 2})
    caps.started("a")
    assert caps.room("a", 7) == 1
    caps.started("a")
    assert caps.room("a", 7) == 0
    caps.stopped("a")
    assert caps.room("a", 7) == 1


def test_a_lowered_cap_lets_what_runs_run() -> None:
    caps = Caps()
    for _ in range(3):
        caps.started("a")
    caps.replace({"a": 1})
    assert caps.room("a", 1) == 0
    caps.stopped("a")
    assert caps.room("a", 1) == 0


def test_a_change_says_which_apps_may_run_more() -> None:
    caps = Caps()
    assert caps.replace({"a": 1, "b": 2, "c": 3}) == set()
    assert caps.replace({"a": 2, "b": 1, "d": 1}) == {"a", "c"}


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.booleans())), st.dictionaries(st.sampled_from("ab"), st.integers(1, 3))
)
def test_whoever_asks_first_never_exceeds_a_cap(steps: list[tuple[str, bool]], limits: dict[str, int]) -> None:
    caps, running = Caps(), Counter[str]()
    caps.replace(limits)
    for app, begins in steps:
        if begins and caps.room(app, 1):
            caps.started(app)
            running[app] += 1
        elif not begins and running[app]:
            caps.stopped(app)
            running[app] -= 1
        caps.validate({name: count for name, count in running.items() if count})
        assert all(running[name] <= limit for name, limit in limits.items())
