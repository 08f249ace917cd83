"""Cancelling: code stops where it can be stopped, and the invocation ends only when it has."""

from __future__ import annotations

import pytest

from sllm_faas.wire.header import Type
from tests.runner.harness import Runner

Instances = dict[str, Runner]
EVERY = ["One", "Many", "Loop"]


def test_a_sleep_is_interrupted(instances: Instances) -> None:
    """Only in the main thread: nothing but a signal ends a blocking system call."""
    r = instances["One"]
    call = r.invoke(method="sleep")
    r.wait_log("asleep", call)
    r.cancel(call)
    assert r.end(call).header.type is Type.CANCELLED
    r.wait_log("awake", call)


@pytest.mark.parametrize("name", ["One", "Many"])
def test_a_busy_loop_is_interrupted(instances: Instances, name: str) -> None:
    r = instances[name]
    call = r.invoke(method="spin")
    r.wait_log("spinning", call)
    r.cancel(call)
    assert r.end(call).header.type is Type.CANCELLED
    assert r.call(1, method="add") == 2


def test_only_the_cancelled_one_of_several_threads_is_interrupted(instances: Instances) -> None:
    r = instances["Many"]
    calls = [r.invoke(method="spin") for _ in range(3)]
    for call in calls:
        r.wait_log("spinning", call)
    r.cancel(calls[1])
    assert r.end(calls[1]).header.type is Type.CANCELLED
    assert not r.frames[calls[0]]
    assert not r.frames[calls[2]]
    for call in (calls[0], calls[2]):
        r.cancel(call)
        r.end(call)


def test_async_code_is_cancelled_and_cleans_up(instances: Instances) -> None:
    r = instances["Loop"]
    call = r.invoke(method="hold")
    r.wait_log("holding", call)
    r.cancel(call)
    assert r.end(call).header.type is Type.CANCELLED
    r.wait_log("let go", call)


@pytest.mark.parametrize("name", ["One", "Loop"])
def test_code_that_swallows_the_cancellation_ends_as_it_likes(instances: Instances, name: str) -> None:
    r = instances[name]
    call = r.invoke(method="swallow")
    r.wait_log("holding", call)
    r.cancel(call)
    assert r.result(call) == "went on"


@pytest.mark.parametrize("name", EVERY)
def test_a_stream_that_waits_for_credit_is_cancelled_where_it_yielded(instances: Instances, name: str) -> None:
    r = instances[name]
    call = r.invoke(10, method="count", credit=1)
    r.wait_outputs(call, 1)
    r.cancel(call)
    assert r.end(call).header.type is Type.CANCELLED
    r.wait_log("generator closed", call)


@pytest.mark.parametrize("name", ["One", "Many"])
def test_a_generator_that_yields_on_after_its_cancellation_is_closed(instances: Instances, name: str) -> None:
    r = instances[name]
    call = r.invoke(method="stubborn", credit=1)
    r.wait_outputs(call, 1)
    r.cancel(call)
    assert r.end(call).header.type is Type.CANCELLED
    assert r.outputs(call) == [1]
    r.wait_log("not now", call)


@pytest.mark.parametrize("name", EVERY)
def test_an_endless_generator_is_stopped_while_it_streams(instances: Instances, name: str) -> None:
    r = instances[name]
    call = r.invoke(10**9, method="count")
    r.wait_outputs(call, 1)
    r.cancel(call)
    assert r.end(call).header.type is Type.CANCELLED


def test_a_call_that_waits_behind_another_ends_at_once(instances: Instances) -> None:
    r = instances["One"]
    first = r.invoke(method="spin")
    second = r.invoke(method="spin")
    r.wait_log("spinning", first)
    r.cancel(second)
    assert r.end(second).header.type is Type.CANCELLED
    assert not r.frames[first]
    r.cancel(first)
    r.end(first)
    assert not any(record.invocation == second.hex() for record in r.logs)


def test_an_async_call_beyond_the_limit_waits_and_can_be_cancelled(instances: Instances) -> None:
    r = instances["Loop"]
    running = [r.invoke(method="hold") for _ in range(4)]
    waiting = r.invoke(method="hold")
    for call in running:
        r.wait_log("holding", call)
    r.cancel(waiting)
    assert r.end(waiting).header.type is Type.CANCELLED
    assert not any(record.invocation == waiting.hex() for record in r.logs)
    for call in running:
        r.cancel(call)
        r.end(call)


@pytest.mark.parametrize("name", EVERY)
def test_cancelling_again_and_after_the_end_is_harmless(instances: Instances, name: str) -> None:
    r = instances[name]
    call = r.invoke(1, method="add")
    assert r.result(call) == 2
    r.cancel(call)
    unknown = r.new_id()
    r.cancel(unknown)
    assert r.end(unknown).header.type is Type.CANCELLED
    spinning = r.invoke(10**9, method="count")
    r.wait_outputs(spinning, 1)
    for _ in range(3):
        r.cancel(spinning)
    r.end(spinning)
    assert r.call(1, method="add") == 2


@pytest.mark.parametrize("name", EVERY)
def test_cancellations_at_any_moment_end_every_call_once(instances: Instances, name: str) -> None:
    """The race of a cancellation with the call's own end: one terminal frame each, and never another's."""
    r = instances[name]
    for _ in range(60):
        calls = [r.invoke(3, method="count") for _ in range(3)]
        r.cancel(calls[1])
        for call in calls:
            end = r.wait(lambda call=call: next((f for f in r.frames[call] if f.header.type >= Type.DONE), None))
            if call != calls[1]:
                assert (end.header.type, r.outputs(call)) == (Type.DONE, [0, 1, 2])
            else:
                assert end.header.type in (Type.DONE, Type.CANCELLED)
    assert r.call(1, method="add") == 2
