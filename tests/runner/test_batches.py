"""Batched methods: several calls become one over lists, and come apart again."""

from __future__ import annotations

import pytest

from sllm_faas.wire.header import Type
from tests.runner.harness import Runner

Instances = dict[str, Runner]
BOTH = ["double", "double_async"]


@pytest.mark.parametrize("method", BOTH)
def test_a_full_batch_does_not_wait(instances: Instances, method: str) -> None:
    r = instances["Batched"]
    calls = [r.invoke(i, factor=10, method=method) for i in range(4)]
    assert [r.result(call) for call in calls] == [[0, 4], [10, 4], [20, 4], [30, 4]]


def test_a_batch_that_does_not_fill_goes_after_its_wait(instances: Instances) -> None:
    assert instances["Batched"].call(1, method="soon") == 1


@pytest.mark.parametrize("method", BOTH)
def test_an_exception_in_the_results_fails_its_call_alone(instances: Instances, method: str) -> None:
    r = instances["Batched"]
    calls = [r.invoke(value, 1, method=method) for value in (12, 13, 14, 15)]
    assert r.error(calls[1]).type == "app:Shortage"
    assert [r.result(call)[0] for call in (calls[0], *calls[2:])] == [12, 14, 15]


@pytest.mark.parametrize("method", BOTH)
def test_arguments_that_do_not_fit_fail_their_call_alone(instances: Instances, method: str) -> None:
    r = instances["Batched"]
    calls = [r.invoke(1, 1, method=method), r.invoke(method=method), r.invoke(2, 1, method=method)]
    calls.append(r.invoke(3, 1, method=method))
    assert r.error(calls[1]).code == "bad_request"
    assert [r.result(call) for call in (calls[0], *calls[2:])] == [[1, 3], [2, 3], [3, 3]]


def test_a_list_of_the_wrong_length_fails_all_and_says_why(instances: Instances) -> None:
    r = instances["Batched"]
    error = r.error(r.invoke(1, method="short"))
    assert error.code == "function_error"
    assert "0 results for 1 calls" in error.message


@pytest.mark.parametrize("method", BOTH)
def test_a_waiting_call_is_cancelled_out_of_its_batch(instances: Instances, method: str) -> None:
    r = instances["Batched"]
    gone = r.invoke(0, 1, method="double_async")
    r.cancel(gone)
    assert r.end(gone).header.type is Type.CANCELLED
    calls = [r.invoke(i, 1, method="double_async") for i in range(4)]
    assert [r.result(call)[1] for call in calls] == [4] * 4


@pytest.mark.parametrize("method", ["sleep", "sleep_async"])
def test_a_running_batch_stops_when_all_of_it_is_cancelled(instances: Instances, method: str) -> None:
    r = instances["Batched"]
    first, second = r.invoke(1, method=method), r.invoke(2, method=method)
    r.wait_log("asleep", first)
    r.cancel(first)
    r.cancel(r.new_id())
    r.wait(lambda: len(r.frames) and r.frames[(r.calls).to_bytes(16, "big")])
    assert not r.frames[first], "the other one still needs the batch"
    r.cancel(second)
    assert {r.end(first).header.type, r.end(second).header.type} == {Type.CANCELLED}
