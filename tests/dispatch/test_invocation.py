"""The invocation's state table and its five deadlines."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.dispatch import invocation as module
from sllm_faas.dispatch.invocation import TABLE, Due, Event, Invocation, State, TargetClock
from sllm_faas.errors import IllegalTransition
from sllm_faas.spec import RetryPolicy, Target, Timeouts

T = Target("app", "f", 1)
LIMITS = Timeouts(queue=10.0, startup=20.0, first_output=5.0, idle=3.0, execution=60.0)


def made(now: float = 100.0, **more: object) -> Invocation:
    return Invocation(b"i" * 16, T, now, timeouts=LIMITS, **more)  # type: ignore[arg-type]


def test_the_docstring_shows_the_very_table() -> None:
    assert module.__doc__ is not None
    shown = [line.split() for line in module.table().splitlines()]
    documented = [line.split() for line in module.__doc__.splitlines()]
    for row in shown:
        assert row in documented, row


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_a_step_follows_the_table_or_is_illegal_and_moves_nothing(state: State, event: Event) -> None:
    inv = made(state=state)
    to = TABLE[state].get(event)
    if to is not None:
        inv.step(event)
        assert inv.state is to
        return
    with pytest.raises(IllegalTransition, match=f"{state.name}; it cannot {event.name}"):
        inv.step(event)
    assert inv.state is state


def test_queue_time_counts_only_while_an_instance_is_ready_and_startup_only_while_none_is() -> None:
    clock = TargetClock(100.0)
    inv = made()
    inv.wait(100.0, clock)
    assert inv.due(100.0, clock) == Due(120.0, "startup")
    clock.set_ready(True, 115.0)
    assert inv.due(115.0, clock) == Due(125.0, "queue")
    clock.set_ready(False, 119.0)  # 15 s without, 4 s with
    assert inv.due(119.0, clock) == Due(124.0, "startup")
    clock.set_ready(True, 123.0)
    assert inv.due(123.0, clock) == Due(129.0, "queue")


def test_a_refusal_does_not_forget_the_time_already_waited() -> None:
    clock = TargetClock(100.0, ready=True)
    inv = made()
    inv.wait(100.0, clock)
    inv.dispatch(107.0, clock)
    inv.refuse(108.0, clock)
    assert inv.state is State.QUEUED
    assert inv.due(108.0, clock) == Due(111.0, "queue")


def test_a_running_invocation_is_due_at_the_earliest_of_its_limits() -> None:
    inv = made()
    inv.dispatch(200.0)
    assert inv.running_due() == Due(205.0, "first_output")
    inv.output(204.0, 1)
    assert inv.running_due() == Due(207.0, "idle")
    inv.output(258.0, 1)
    assert inv.running_due() == Due(260.0, "execution")


def test_waiting_for_the_clients_credit_is_not_idleness() -> None:
    inv = made(credit=2)
    inv.dispatch(200.0)
    inv.output(201.0, 2)
    assert inv.blocked
    assert inv.running_due() == Due(260.0, "execution")
    inv.consumed = 2
    assert inv.give_credit(230.0, window=2)
    assert inv.credit == 4
    assert inv.running_due() == Due(233.0, "idle")


def test_credit_is_given_when_half_the_window_is_used_up() -> None:
    inv = made(credit=8)
    inv.dispatch(1.0)
    inv.output(2.0, 6)
    inv.consumed = 3
    assert not inv.give_credit(3.0, 8)
    inv.consumed = 4
    assert inv.give_credit(3.0, 8)
    assert inv.credit == 12


def test_a_cancelled_invocation_keeps_asking_until_its_end_is_reported() -> None:
    clock = TargetClock(0.0)
    inv = made()
    inv.dispatch(200.0)
    inv.cancel(201.0)
    assert inv.state is State.CANCELLING
    assert inv.due(201.0, clock) == Due(202.0, "cancel")
    inv.output(201.5, 1)
    inv.cancel(202.0)
    assert inv.due(202.0, clock) == Due(203.0, "cancel")
    inv.finish(202.5)
    assert inv.due(202.5, clock) is None
    assert inv.ended == 202.5


def test_cancelling_what_waits_ends_it_at_once_and_a_refused_one_too() -> None:
    clock = TargetClock(100.0)
    waiting = made()
    waiting.cancel(101.0)
    assert waiting.state is State.ENDED
    refused = made()
    refused.dispatch(101.0)
    refused.cancel(102.0)
    refused.refuse(103.0, clock)
    assert refused.state is State.ENDED
    assert refused.ended == 103.0


def test_a_retry_raises_the_fence_waits_as_the_policy_says_and_is_bounded() -> None:
    clock = TargetClock(100.0, ready=True)
    inv = made(retries=RetryPolicy(2, initial_delay=1.0, backoff=3.0))
    for fence, delay in ((2, 1.0), (3, 3.0)):
        inv.dispatch(200.0)
        assert inv.may_retry
        inv.retry(201.0)
        assert inv.fence == fence
        assert inv.due(201.0, clock) == Due(201.0 + delay, "retry")
        inv.wake(210.0, clock)
        assert inv.due(210.0, clock) == Due(220.0, "queue")
    inv.dispatch(211.0)
    assert not inv.may_retry


def test_a_resume_raises_the_fence_keeps_what_came_and_is_bounded_while_nothing_comes() -> None:
    clock = TargetClock(100.0, ready=True)
    inv = made()
    inv.dispatch(200.0)
    inv.output(201.0, 2)
    for fence in (2, 3, 4):
        assert inv.may_resume
        inv.go_on(203.0, clock, b"state")
        assert (inv.state, inv.fence, inv.wanted, inv.resume) == (State.QUEUED, fence, 2, b"state")
        assert inv.due(203.0, clock) == Due(213.0, "queue")
        inv.dispatch(204.0, clock)
        assert inv.dispatched == 200.0
        assert inv.running_due() == Due(207.0, "idle"), "the client waits for its next output, not for a first"
    assert not inv.may_resume
    inv.output(205.0, 1)
    assert inv.may_resume
    inv.cancel(206.0)
    assert not inv.may_resume


def test_the_execution_limit_holds_for_what_waits_to_be_resumed() -> None:
    clock = TargetClock(100.0, ready=True)
    inv = made()
    inv.dispatch(200.0)
    inv.go_on(255.0, clock, b"")
    assert inv.due(255.0, clock) == Due(260.0, "execution")


def test_a_move_raises_the_fence_and_is_no_dispatch() -> None:
    inv = made()
    inv.dispatch(200.0)
    inv.output(201.0, 2)
    inv.move(202.0)
    assert (inv.state, inv.fence, inv.wanted, inv.dispatched) == (State.DISPATCHED, 2, 2, 200.0)
    assert inv.running_due() == Due(205.0, "idle")
    inv.output(203.0, 1)
    assert inv.state is State.STREAMING


def test_nothing_is_retried_after_its_first_output() -> None:
    inv = made(retries=RetryPolicy(3))
    inv.dispatch(200.0)
    inv.output(201.0, 1)
    assert not inv.may_retry


def test_a_limit_that_is_off_is_never_due() -> None:
    off = Timeouts(None, None, None, None, None)
    clock = TargetClock(0.0)
    inv = Invocation(b"i" * 16, T, 1.0, timeouts=off)
    assert inv.due(1.0, clock) is None
    inv.dispatch(2.0)
    assert inv.due(2.0, clock) is None


@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 10.0)), max_size=30))
def test_the_two_clocks_of_a_target_add_up_to_the_time_passed(changes: list[tuple[bool, float]]) -> None:
    clock, now = TargetClock(0.0), 0.0
    for ready, seconds in changes:
        now += seconds
        before = clock.seconds(True, now), clock.seconds(False, now)
        clock.set_ready(ready, now)
        assert (clock.seconds(True, now), clock.seconds(False, now)) == pytest.approx(before)
        assert sum(before) == pytest.approx(now)
