"""Slots: leases per instance, taken and given back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.dispatch.slots import SlotTable
from sllm_faas.errors import IllegalTransition
from sllm_faas.spec import Target
from sllm_faas.wire.messages import Grant, InstanceState

T = Target("app", "f", 1)


def grant(table: SlotTable, number: int, limit: int, state: InstanceState = "ready", node: str = "n", seq: int = 1):
    return table.grant(node, number, seq, Grant(f"{node}-{number}", T, limit, 4, node, state))


def test_a_slot_is_taken_and_given_back() -> None:
    table = SlotTable()
    instance = grant(table, 1, 2)
    assert table.reserve(T) is instance
    assert table.reserve(T) is instance
    assert table.reserve(T) is None
    assert not table.has_free(T)
    table.release(instance)
    assert table.has_free(T)
    assert table.in_flight() == 1
    table.validate()


def test_the_instance_used_last_is_taken_first_so_that_the_others_go_idle() -> None:
    table = SlotTable()
    first, second = grant(table, 1, 2), grant(table, 2, 2)
    assert [table.reserve(T), table.reserve(T)] == [second, second]
    assert table.reserve(T) is first
    table.release(second)
    assert table.reserve(T) is second


def test_a_grant_is_absolute_and_a_recall_waits_for_what_is_in_flight() -> None:
    table = SlotTable()
    instance = grant(table, 1, 3)
    table.reserve(T)
    table.reserve(T)
    grant(table, 1, 1, seq=2)
    assert table.reserve(T) is None
    table.release(instance)
    assert table.reserve(T) is None, "one is in flight and one allowed"
    table.release(instance)
    assert table.reserve(T) is instance
    table.validate()


@pytest.mark.parametrize("state", ["starting", "draining", "stopped", "failed"])
def test_only_ready_instances_are_used(state: InstanceState) -> None:
    table = SlotTable()
    grant(table, 1, 4, state)
    assert table.reserve(T) is None
    assert not table.has_ready(T)


def test_an_ended_instance_is_forgotten_once_nothing_is_in_flight() -> None:
    table = SlotTable()
    instance = grant(table, 1, 1)
    table.reserve(T)
    grant(table, 1, 0, "stopped", seq=2)
    assert len(table) == 1
    table.release(instance)
    assert len(table) == 0
    assert table.of(T) == []


def test_a_lost_node_takes_its_instances_along_and_late_releases_do_nothing() -> None:
    table = SlotTable()
    here, there = grant(table, 1, 1), grant(table, 1, 1, node="other")
    table.reserve(T)
    table.reserve(T)
    assert table.drop_node("other") == [there]
    table.release(there)
    table.release(here)
    assert table.in_flight() == 0
    table.validate()


def test_a_suspended_instance_is_left_alone_until_it_is_resumed_or_granted_again() -> None:
    table = SlotTable()
    instance = grant(table, 1, 2)
    table.suspend(instance)
    assert table.reserve(T) is None
    assert table.resume(instance, 2)
    assert table.reserve(T) is instance
    table.drop_node("n")
    assert not table.resume(instance, 2)


def test_an_instance_wants_what_waits_within_its_concurrency() -> None:
    instance = grant(SlotTable(), 1, 1)
    assert [instance.want(waiting) for waiting in (0, 1, 9)] == [0, 1, 3]
    assert grant(SlotTable(), 1, 0, "draining").want(9) == 0


def test_releasing_what_is_not_in_flight_is_illegal() -> None:
    table = SlotTable()
    with pytest.raises(IllegalTransition):
        table.release(grant(table, 1, 1))


def test_a_number_stands_for_one_instance() -> None:
    table = SlotTable()
    grant(table, 1, 1)
    with pytest.raises(IllegalTransition, match="which is n-1"):
        table.grant("n", 1, 2, Grant("another", T, 1, 1, "n"))


STATES = st.sampled_from(["starting", "ready", "draining", "stopped"])


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("grant"), st.integers(1, 3), st.integers(0, 3), STATES),
            st.tuples(st.sampled_from(["reserve", "release", "drop"]), st.integers(0, 5), st.just(0), STATES),
        ),
        max_size=60,
    )
)
def test_no_slot_is_lost_or_invented(steps: list[tuple[str, int, int, InstanceState]]) -> None:
    table = SlotTable()
    flying: list = []
    for verb, number, limit, state in steps:
        if verb == "grant":
            grant(table, number, limit, state)
        elif verb == "reserve":
            instance = table.reserve(T)
            if instance is not None:
                assert instance.in_flight <= instance.limit
                flying.append(instance)
        elif verb == "release" and flying:
            table.release(flying.pop(number % len(flying)))
        elif verb == "drop":
            gone = table.drop_node("n")
            flying = [instance for instance in flying if instance not in gone]
        table.validate()
        assert table.in_flight() == len(flying)
