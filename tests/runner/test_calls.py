"""Calls of user code in every executor, in real processes over a real link."""

from __future__ import annotations

from typing import Any

import pytest

from sllm_faas.wire.codec import encode
from sllm_faas.wire.exceptions import info_to_exception
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Invoke
from sllm_faas.wire.payload import encode_call
from tests.runner.harness import Runner

Instances = dict[str, Runner]
EVERY = ["One", "Many", "Loop"]
SYNC = ["One", "Many"]


# -- arguments and results -------------------------------------------------------------------------------------


def test_a_plain_function_gives_its_result(instances: Instances) -> None:
    assert instances["echo"].call("a", y=b"\0") == ["a", b"\0"]


def test_a_plain_function_is_called_by_its_name_too(instances: Instances) -> None:
    assert instances["echo"].call("a", method="echo") == ["a", 2]


@pytest.mark.parametrize("body", [{"x": 1, "y": None}, [1, None]])
def test_json_in_gives_json_out(instances: Instances, body: Any) -> None:
    r = instances["echo"]
    assert r.result(r.invoke_json(body), "json") == [1, None]


@pytest.mark.parametrize("name", EVERY)
def test_methods_run_in_every_executor(instances: Instances, name: str) -> None:
    assert instances[name].call(1, b=2, method="add") == 3


@pytest.mark.parametrize(("name", "main"), [("One", True), ("Many", False), ("Loop", False)])
def test_sync_code_has_the_main_thread_only_when_it_runs_alone(instances: Instances, name: str, main: bool) -> None:
    assert instances[name].call(method="blocking" if name == "Loop" else "thread") is main


def test_large_payloads_travel_out_of_band(instances: Instances) -> None:
    r = instances["One"]
    assert r.call(bytes(3_000_000), method="size") == 3_000_000
    call = r.invoke(3_000_000, method="big")
    assert r.result(call) == bytes(3_000_000)
    assert r.end(call).body.payload == b""


def test_user_types_come_as_themselves(instances: Instances) -> None:
    import sys

    sys.path.insert(0, str(__import__("tests.runner.harness", fromlist=["APPS"]).APPS))
    try:
        from app import Point  # type: ignore[import-not-found]

        assert instances["One"].call(Point(1, 5), method="move") == Point(2, 5)
    finally:
        sys.path.pop(0)


# -- whose fault it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("args", "kwargs", "names"), [((), {}, "'a'"), ((1,), {"c": 1}, "'c'"), ((1, 2, 3), {}, "too many")]
)
def test_arguments_that_do_not_fit_are_the_callers_fault(
    instances: Instances, name: str, args: Any, kwargs: Any, names: str
) -> None:
    r = instances[name]
    error = r.error(r.invoke(*args, method="add", **kwargs))
    assert (error.code, error.status) == ("bad_request", 400)
    assert names in error.message


def test_generators_refuse_arguments_that_do_not_fit(instances: Instances) -> None:
    for name in EVERY:
        r = instances[name]
        assert r.error(r.invoke(method="count")).code == "bad_request"


@pytest.mark.parametrize("payload", [b"{", b"3", b'"text"', b'{"x": NaN}'])
def test_a_body_that_is_no_call_is_the_callers_fault(instances: Instances, payload: bytes) -> None:
    r = instances["echo"]
    assert r.error(r.invoke_raw(payload, encoding="json")).code == "bad_request"


def test_a_type_error_inside_the_function_is_the_functions_fault(instances: Instances) -> None:
    r = instances["One"]
    error = r.error(r.invoke(method="own_type_error"))
    assert error.code == "function_error"
    assert error.type == "builtins:TypeError"
    assert "len(5)" in error.traceback


@pytest.mark.parametrize("name", EVERY)
def test_an_exception_keeps_its_type_and_traceback(instances: Instances, name: str) -> None:
    r = instances[name]
    error = r.error(r.invoke(method="fail"))
    assert (error.code, error.status, error.type) == ("function_error", 500, "app:Shortage")
    assert 'File "app.py"' in error.traceback
    assert "sllm_invoker" not in error.traceback
    remote = info_to_exception(error, lambda _module, _name: ValueError)
    assert remote.args == ("bolts", 3)


def test_an_error_of_our_own_tree_raised_by_user_code_is_still_the_functions(instances: Instances) -> None:
    r = instances["One"]
    error = r.error(r.invoke(method="refuse"))
    assert (error.code, error.status) == ("function_error", 500)


@pytest.mark.parametrize("name", EVERY)
def test_exit_is_a_function_error_and_the_instance_stays(instances: Instances, name: str) -> None:
    r = instances[name]
    assert r.error(r.invoke(method="leave")).type == "builtins:SystemExit"
    assert r.call(1, method="add") == 2


def test_an_interrupt_raised_by_user_code_is_a_function_error(instances: Instances) -> None:
    for name in SYNC:
        r = instances[name]
        assert r.error(r.invoke(method="break_off")).type == "builtins:KeyboardInterrupt"


def test_exit_in_a_task_of_user_code_does_not_end_the_loop(instances: Instances) -> None:
    r = instances["Loop"]
    assert r.call(method="leave_in_task") == "still here"
    assert r.call(1, method="add") == 2


def test_a_cancellation_that_user_code_raised_itself_is_a_function_error(instances: Instances) -> None:
    r = instances["Loop"]
    assert r.error(r.invoke(method="raise_cancelled")).type.endswith("CancelledError")


def test_tasks_that_user_code_left_are_not_waited_for(instances: Instances) -> None:
    assert instances["Loop"].call(method="leave_task_behind") == "done"


@pytest.mark.parametrize("name", SYNC)
def test_a_result_that_cannot_be_encoded_is_named(instances: Instances, name: str) -> None:
    r = instances[name]
    error = r.error(r.invoke(method="odd"))
    assert error.code == "result_not_encodable"
    assert "lock" in error.message


def test_a_generator_returned_by_mistake_is_explained(instances: Instances) -> None:
    r = instances["One"]
    error = r.error(r.invoke(method="generator_by_mistake"))
    assert error.code == "result_not_encodable"
    assert "generator" in error.message


@pytest.mark.parametrize("name", EVERY)
def test_an_output_that_cannot_be_encoded_ends_the_stream_after_those_before_it(
    instances: Instances, name: str
) -> None:
    r = instances[name]
    call = r.invoke(method="odd_output")
    assert r.error(call).code == "result_not_encodable"
    assert r.outputs(call) == [1]


# -- streams ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_generator_streams_in_order_and_says_how_many(instances: Instances, name: str) -> None:
    r = instances[name]
    call = r.invoke(3000, method="count")
    end = r.end(call)
    assert r.outputs(call) == list(range(3000))
    assert (end.header.type, end.header.seq, end.body.payload) == (Type.DONE, 3000, b"")
    assert len(r.frames[call]) < 1500, "outputs of one wake-up travel together"


@pytest.mark.parametrize("name", EVERY)
def test_outputs_before_a_failure_arrive(instances: Instances, name: str) -> None:
    r = instances[name]
    call = r.invoke(3, method="count_then_fail")
    assert r.error(call).type == "app:Shortage"
    assert r.outputs(call) == [0, 1, 2]


@pytest.mark.parametrize("name", EVERY)
def test_a_producer_stops_at_its_credit_and_goes_on_with_more(instances: Instances, name: str) -> None:
    r = instances[name]
    call = r.invoke(10, method="count", credit=3)
    assert r.wait_outputs(call, 3) == [0, 1, 2]
    other = r.invoke(1, method="add")  # runs behind it, or beside it
    r.credit(call, 5)
    assert r.wait_outputs(call, 5) == list(range(5))
    r.credit(call, 4)  # late and lower: changes nothing
    r.credit(call, 10)
    r.end(call)
    assert r.outputs(call) == list(range(10))
    assert r.result(other) == 2


@pytest.mark.parametrize("name", EVERY)
def test_a_stream_never_exceeds_its_credit(instances: Instances, name: str) -> None:
    r = instances[name]
    call = r.invoke(10, method="count", credit=2)
    r.wait_outputs(call, 2)
    r.cancel(call)
    r.end(call)
    assert r.outputs(call) == [0, 1]


# -- what user code knows and says -----------------------------------------------------------------------------


def test_code_knows_which_invocation_it_serves(instances: Instances) -> None:
    for name in SYNC:
        r = instances[name]
        call = r.invoke(method="who")
        assert r.result(call) == [f"inv-{call.hex()}", "test", name, "who", "i-1", "n-1"]


@pytest.mark.parametrize("name", SYNC)
def test_prints_are_attributed_to_their_invocation_even_without_a_line_end(instances: Instances, name: str) -> None:
    r = instances[name]
    call = r.invoke("one\ntwo\nthr", method="say")
    r.end(call)
    last = r.wait_log("thr", call)
    assert last.stream == "stdout"
    assert [record.text for record in r.logs if record.invocation == call.hex()] == ["one", "two", "thr"]


# -- bad frames ------------------------------------------------------------------------------------------------


def test_an_unknown_method_is_not_found(instances: Instances) -> None:
    r = instances["One"]
    error = r.error(r.invoke(method="nothing"))
    assert (error.code, error.param) == ("not_found", "method")


def test_an_invoke_that_cannot_be_read_still_ends(instances: Instances) -> None:
    r = instances["One"]
    call = r.new_id()
    r.send_raw([Header(Type.INVOKE, call, fence=1).pack() + b"\xc1"])
    assert r.error(call).code == "bad_frame"


def test_garbage_is_dropped_and_the_link_goes_on(instances: Instances) -> None:
    r = instances["One"]
    for parts in ([b""], [b"garbage"], [Header(Type.CREDIT, b"x" * 16).pack() + b"body"], [b"\xff" * 40]):
        r.send_raw(parts)
    assert r.call(1, method="add") == 2


def test_a_repeated_invoke_is_one_invocation(instances: Instances) -> None:
    r = instances["Loop"]
    call = r.new_id()
    for _ in range(2):
        r.send(Header(Type.INVOKE, call, fence=1), Invoke("hold", payload=encode_call((), {})))
    r.wait_log("holding", call)
    r.cancel(call)
    assert r.end(call).header.type is Type.CANCELLED
    r.call(1, method="add")
    assert len(r.frames[call]) == 1


def test_an_invoke_under_another_fence_is_refused_while_the_first_runs(instances: Instances) -> None:
    r = instances["Loop"]
    call = r.invoke(method="hold")
    r.wait_log("holding", call)
    r.send_raw(encode(Header(Type.INVOKE, call, fence=2), Invoke("hold")))
    frame = r.end(call)
    assert (frame.header.type, frame.header.fence, frame.body.error.code) == (Type.FAILED, 2, "conflict")
    r.frames[call].clear()
    r.cancel(call)
    assert (r.end(call).header.type, r.end(call).header.fence) == (Type.CANCELLED, 1)
