"""The wheel: nothing early, nothing lost, one deadline each."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.dispatch.timers import Wheel

TIMES = st.floats(0.0, 100.0, allow_nan=False)
STEPS = st.lists(st.tuples(st.sampled_from(["put", "remove", "due"]), st.integers(0, 8), TIMES), max_size=60)


@given(STEPS)
def test_items_are_due_once_never_early_and_at_most_one_bucket_late(steps: list[tuple[str, int, float]]) -> None:
    wheel: Wheel[int] = Wheel(0.5)
    model: dict[int, float] = {}
    now = 0.0
    for verb, item, value in steps:
        if verb == "put":
            wheel.put(item, now + value)
            model[item] = now + value
        elif verb == "remove":
            wheel.remove(item)
            model.pop(item, None)
        else:
            now += value
            due = wheel.due(now)
            assert len(due) == len(set(due))
            for each in due:
                assert model.pop(each) <= now, "early"
            assert all(when > now - 0.5 for when in model.values()), "late"
        wheel.validate()
        assert len(wheel) == len(model)
        following = wheel.next()
        assert (following is None) == (not model)
        if following is not None:
            assert 0.0 <= following - min(model.values()) < 0.5 + 1e-9


def test_due_items_come_in_order_of_their_deadlines() -> None:
    wheel: Wheel[str] = Wheel(0.1)
    for name, when in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        wheel.put(name, when)
    assert wheel.due(2.5) == ["a", "b"]
    assert wheel.due(2.5) == []


def test_many_short_deadlines_that_are_removed_leave_nothing_behind() -> None:
    wheel: Wheel[int] = Wheel(0.1)
    for number in range(1000):
        wheel.put(number, number * 0.01)
        wheel.remove(number)
    assert wheel.next() is None
    assert len(wheel) == 0
    wheel.validate()
