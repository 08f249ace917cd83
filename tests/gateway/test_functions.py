"""Functions over HTTP: encodings, streams, errors, limits, cancellation."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import httpx
import msgspec
import pytest
from sllm_gateway import note

from sllm_faas.errors import ErrorInfo, StartFailed, to_info
from sllm_faas.spec import Target
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Done, Invoke, Refused, TargetDemand, TargetFailed
from tests.gateway.fakes import SCRIPTS, FakeInvoker, Rig, Running, bearer

pytestmark = pytest.mark.asyncio(loop_scope="module")


def error(answer: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()["error"]
    assert set(found) >= {"message", "type", "param", "code", "hint", "request_id"}
    assert found["request_id"] == answer.headers["x-request-id"]
    return found


def records(data: bytes) -> list[dict[str, Any]]:
    found = []
    while data:
        (size,) = struct.unpack_from(">I", data)
        found.append(msgspec.msgpack.decode(data[4 : 4 + size]))
        data = data[4 + size :]
    return found


async def call(gateway: Rig, function: str, body: Any = None, **more: Any) -> httpx.Response:
    return await gateway.http.post(f"/v1/functions/app/{function}", json={} if body is None else body, **more)


async def test_json_arguments_pass_as_they_are_and_so_does_the_result(gateway: Rig) -> None:
    body = b'{"a": [1, 2.50, "\\u00e9"], "b": null}'
    answer = await gateway.http.post("/v1/functions/app/echo", content=body)
    assert answer.status_code == 200
    assert answer.content == body
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-invocation-id"].startswith("inv-")
    assert "queue;dur=" in answer.headers["server-timing"]
    assert (await gateway.http.post("/v1/functions/app/echo")).json() == {}
    assert (await call(gateway, "echo", [1, 2])).json() == [1, 2]


async def test_a_payload_above_the_inline_limit_travels_out_of_band(gateway: Rig) -> None:
    body = json.dumps({"a": "x" * 200_000}).encode()
    answer = await gateway.http.post("/v1/functions/app/echo", content=body)
    assert answer.content == body
    frame = gateway.invoker.got[Type.INVOKE][-1]
    assert frame.body.payload == b""
    assert frame.buffers == (body,)


async def test_the_sdks_encoding_passes_as_bytes(gateway: Rig) -> None:
    body = msgspec.msgpack.encode({"args": [b"\x00\xff"], "kwargs": {}})
    headers = {"Content-Type": "application/msgpack"}
    answer = await gateway.http.post("/v1/functions/app/echo", content=body, headers=headers)
    assert answer.content == body
    assert answer.headers["content-type"] == "application/msgpack"
    assert gateway.invoker.got[Type.INVOKE][-1].body.encoding == "msgpack"


@pytest.mark.parametrize(
    "body", [b"{", b'{"a": NaN}', b'"text"', b"\xff", b"12", b'{"a": "\xff"}', b"[" * 100_000 + b"]" * 100_000]
)
async def test_a_body_that_is_no_arguments_is_a_400_and_reaches_no_instance(gateway: Rig, body: bytes) -> None:
    before = len(gateway.invoker.got[Type.INVOKE])
    answer = await gateway.http.post("/v1/functions/app/echo", content=body)
    assert answer.status_code == 400
    assert error(answer)["type"] == "invalid_request_error"
    assert len(gateway.invoker.got[Type.INVOKE]) == before


async def test_a_generator_streams_events_with_integer_ids_and_a_terminal_event(gateway: Rig) -> None:
    answer = await call(gateway, "count", {"n": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == (
        'id: 0\nevent: output\ndata: 0\n\nid: 1\nevent: output\ndata: 1\n\nevent: done\ndata: {"seconds":0.5}\n\n'
    )


async def test_a_generator_is_collected_for_who_accepts_only_json(gateway: Rig) -> None:
    answer = await call(gateway, "count", {"n": 3}, headers={"Accept": "application/json"})
    assert answer.json() == [0, 1, 2]
    assert (await call(gateway, "count", {"n": 0}, headers={"Accept": "application/json"})).json() == []


async def test_a_plain_function_can_be_asked_for_as_a_stream_of_one_output(gateway: Rig) -> None:
    answer = await call(gateway, "echo", {"a": 1}, headers={"Accept": "text/event-stream"})
    assert 'id: 0\nevent: output\ndata: {"a":1}\n\nevent: done' in answer.text


async def test_the_sdks_stream_is_length_prefixed_records(gateway: Rig) -> None:
    answer = await call(gateway, "count", {"n": 2}, headers={"Accept": "application/x-sllm-stream"})
    assert answer.headers["content-type"] == "application/x-sllm-stream"
    assert records(answer.content) == [
        {"t": "output", "seq": 0, "data": b"0"},
        {"t": "output", "seq": 1, "data": b"1"},
        {"t": "done", "seconds": 0.5},
    ]


async def test_a_failed_function_keeps_its_status_code_and_traceback_for_the_owner_alone(gateway: Rig) -> None:
    answer = await call(gateway, "fails", {}, headers=bearer("ci"))
    assert answer.status_code == 500
    assert error(answer)["code"] == "function_error"
    assert error(answer)["traceback"] == "Traceback: line 1"
    answer = await call(gateway, "fails", {}, headers=bearer("caller"))
    assert "traceback" not in error(answer)


async def test_in_the_sdks_encoding_an_error_is_the_error_itself(gateway: Rig) -> None:
    headers = {"Content-Type": "application/msgpack"}
    body = msgspec.msgpack.encode({"args": [], "kwargs": {}})
    answer = await gateway.http.post("/v1/functions/app/fails", content=body, headers=headers)
    assert answer.status_code == 500
    info = msgspec.msgpack.decode(answer.content, type=ErrorInfo)
    assert info.type == "builtins:ValueError"
    assert info.args
    missing = await gateway.http.post("/v1/functions/app/nope", content=body, headers=headers)
    assert missing.status_code == 404
    assert msgspec.msgpack.decode(missing.content, type=ErrorInfo).code == "not_found"


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("bad_request", 400, "invalid_request_error"),
        ("context_length_exceeded", 400, "invalid_request_error"),
        ("result_not_encodable", 500, "function_error"),
        ("worker_lost", 502, "function_error"),
        ("start_failed", 503, "function_error"),
        ("no_capacity", 503, "server_error"),
        ("storage_full", 507, "server_error"),
        ("made_up", 200, "server_error"),
    ],
)
async def test_every_errors_status_comes_through(gateway: Rig, code: str, status: int, kind: str) -> None:
    answer = await call(gateway, "fails", {"code": code, "status": status})
    assert answer.status_code == (500 if status == 200 else status)
    assert error(answer)["code"] == code
    assert error(answer)["type"] == kind


async def test_an_unknown_name_is_a_404_with_the_nearest(gateway: Rig) -> None:
    answer = await call(gateway, "ecko")
    assert answer.status_code == 404
    assert "'echo'" in error(answer)["hint"]
    assert (await gateway.http.post("/v1/functions/apple/echo", json={})).status_code == 404
    assert (await call(gateway, "Box.gett")).status_code == 404


async def test_class_parameters_choose_the_target_and_are_checked(gateway: Rig) -> None:
    assert (await call(gateway, "Box.get", {"a": 1}, params={"parameters": '{"size": 3}'})).json() == {"a": 1}
    wrong = await call(gateway, "Box.get", params={"parameters": '{"size": "x"}'})
    assert wrong.status_code == 400
    assert error(wrong)["param"] == "size"
    assert (await call(gateway, "Box.get", params={"parameters": "{"})).status_code == 400
    assert (await call(gateway, "Box")).status_code == 400
    assert (await call(gateway, "counting")).status_code == 400


async def test_timeouts_can_be_lowered_by_header_and_are_checked(gateway: Rig) -> None:
    answer = await call(gateway, "hangs", headers={"X-Sllm-Timeout-Execution": "0.05"})
    assert answer.status_code == 504
    assert error(answer)["code"] == "deadline_exceeded"
    assert error(answer)["param"] == "execution"
    for name, value in (("Execution", "soon"), ("Execution", "0"), ("Naps", "1"), ("Queue", "nan")):
        wrong = await call(gateway, "echo", headers={f"X-Sllm-Timeout-{name}": value})
        assert wrong.status_code == 400, (name, value)
    await gateway.settled()


async def test_a_stream_that_does_not_begin_in_time_ends_with_an_error_event(gateway: Rig) -> None:
    gateway.invoker.scripts["count"] = lambda invoker, running: None
    try:
        answer = await call(gateway, "count", {"n": 1}, headers={"X-Sllm-Timeout-First-Output": "0.6"})
    finally:
        gateway.invoker.scripts["count"] = SCRIPTS["count"]
    assert answer.status_code == 200
    assert ": ping" in answer.text
    assert "event: error" in answer.text
    assert "first_output" in answer.text
    await gateway.settled()


async def test_an_error_before_the_first_output_has_its_own_status_and_after_it_an_event(gateway: Rig) -> None:
    def fail_later(invoker: FakeInvoker, running: Running) -> None:
        invoker.output(running, b"0")
        SCRIPTS["fails"](invoker, running)

    try:
        gateway.invoker.scripts["count"] = SCRIPTS["fails"]
        answer = await call(gateway, "count", {"n": 1})
        assert answer.status_code == 500
        assert error(answer)["code"] == "function_error"
        gateway.invoker.scripts["count"] = fail_later
        answer = await call(gateway, "count", {"n": 1})
        assert answer.status_code == 200
        assert "data: 0\n\nevent: error\ndata: " in answer.text
        assert json.loads(answer.text.rsplit("data: ", 1)[1])["error"]["code"] == "function_error"
    finally:
        gateway.invoker.scripts["count"] = SCRIPTS["count"]


async def test_a_client_that_leaves_a_stream_cancels_it_at_once(gateway: Rig) -> None:
    gateway.invoker.scripts["flood"], script = _endless, gateway.invoker.scripts["flood"]
    try:
        async with gateway.http.stream("POST", "/v1/functions/app/flood", json={}) as answer:
            async for line in answer.aiter_lines():
                if line == "data: 0":
                    break
    finally:
        gateway.invoker.scripts["flood"] = script
    await gateway.settled()
    assert gateway.invoker.got[Type.CANCEL]


def _endless(invoker: FakeInvoker, running: Running) -> None:
    invoker.output(running, b"0")


async def test_a_client_that_leaves_a_plain_call_cancels_it_too(gateway: Rig) -> None:
    before = len(gateway.invoker.got[Type.CANCEL])
    waiting = asyncio.ensure_future(call(gateway, "hangs"))
    await gateway.invoker.until(lambda: bool(gateway.invoker.running))
    waiting.cancel()
    await gateway.invoker.until(lambda: len(gateway.invoker.got[Type.CANCEL]) > before)
    await gateway.settled()


async def test_a_slow_client_slows_its_own_stream_by_credit(gateway: Rig) -> None:
    gateway.service.dispatcher.window, window = 8, gateway.service.dispatcher.window
    try:
        answer = await call(gateway, "flood")
    finally:
        gateway.service.dispatcher.window = window
    values = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert values[:100] == [str(number) for number in range(100)]
    invoke = gateway.invoker.got[Type.INVOKE][-1]
    assert invoke.header.credit == 8
    credits = [frame.header.credit for frame in gateway.invoker.got[Type.CREDIT] if frame.header.id == invoke.header.id]
    assert credits == sorted(credits)
    assert credits[-1] >= 100


async def test_what_waits_for_an_instance_is_demanded_and_runs_when_one_is_granted(gateway: Rig) -> None:
    controller, target = gateway.controller, Target("app", "cold", 1)
    waiting = asyncio.ensure_future(call(gateway, "cold", {"a": 1}))
    await controller.until(
        lambda: any(item.target == target and item.waiting == 1 for each in controller.demand for item in each.items)
    )
    gateway.invoker.grant("cold", 60, limit=1, concurrency=1)
    assert (await waiting).json() == {"a": 1}
    gateway.invoker.grant("cold", 60, limit=0, concurrency=1, state="stopped")
    await gateway.invoker.granted()

    def told() -> list[TargetDemand]:
        return [item for each in controller.demand for item in each.items if item.target == target]

    await controller.until(lambda: (told()[-1].waiting, told()[-1].running) == (0, 0))
    assert sum(item.served for item in told()) == 1
    assert 0.0 < sum(item.busy_seconds for item in told()) < 10.0


async def test_a_full_line_is_a_429_with_retry_after_and_the_rest_is_served(gateway: Rig) -> None:
    waiting = [asyncio.ensure_future(call(gateway, "cold", {"a": number})) for number in range(4)]
    done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    while len(done) < 2:
        more, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        done |= more
    for task in done:
        assert task.result().status_code == 429
        assert int(task.result().headers["retry-after"]) >= 1
        assert error(task.result())["type"] == "rate_limit_error"
    gateway.invoker.grant("cold", 61, limit=1, concurrency=1)
    assert [(await task).status_code for task in pending] == [200, 200]
    gateway.invoker.grant("cold", 61, limit=0, concurrency=1, state="stopped")
    await gateway.invoker.granted()


async def test_a_target_that_cannot_start_fails_what_waits_with_the_users_traceback(gateway: Rig) -> None:
    waiting = asyncio.ensure_future(call(gateway, "cold"))
    demand = gateway.controller.demand
    before = len(demand)
    await gateway.controller.until(lambda: len(demand) > before)
    failure = StartFailed("enter raised ValueError", traceback="Traceback: enter", retry_after=4.0)
    gateway.controller.send(Type.TARGET_FAILED, TargetFailed(Target("app", "cold", 1), to_info(failure)))
    answer = await waiting
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "4"
    assert error(answer)["traceback"] == "Traceback: enter"


async def test_a_refused_invocation_runs_elsewhere_and_its_caller_sees_nothing(gateway: Rig) -> None:
    refusals = []

    def refuse_once(invoker: FakeInvoker, running: Running) -> None:
        if not refusals:
            refusals.append(running.header)
            invoker.end(running, Type.REFUSED, Refused("no_slot"))
        else:
            assert running.header.id == refusals[0].id
            assert running.header.fence == refusals[0].fence
            invoker.end(running, Type.DONE, Done(running.payload))

    gateway.invoker.scripts["echo"], script = refuse_once, gateway.invoker.scripts["echo"]
    try:
        assert (await call(gateway, "echo", {"a": 1})).json() == {"a": 1}
    finally:
        gateway.invoker.scripts["echo"] = script
    assert len(refusals) == 1


async def test_a_request_id_is_kept_a_strange_one_replaced_and_a_body_too_large_not_read(gateway: Rig) -> None:
    answer = await call(gateway, "echo", headers={"X-Request-ID": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    answer = await call(gateway, "echo", headers={"X-Request-ID": "a b"})
    assert answer.headers["x-request-id"].startswith("inv-")
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.config.port)
    size = gateway.service.gateway.settings.max_body + 1
    writer.write(b"POST /v1/functions/app/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\nx" % size)
    refusal = await reader.read(-1)
    writer.close()
    assert refusal.startswith(b"HTTP/1.1 413 ")
    assert b'"payload_too_large"' in refusal


async def test_the_recent_invocations_show_their_timeline_and_no_payload(gateway: Rig) -> None:
    answer = await call(gateway, "echo", {"secret": "xyzzy"})
    identity = answer.headers["x-invocation-id"]
    found = (await gateway.http.get(f"/v1/invocations/{identity}", headers=bearer("viewer"))).json()
    assert found["state"] == "done"
    assert found["instance"] == "echo-1"
    assert [span["name"] for span in found["timeline"]] == ["queue", "run"]
    assert "xyzzy" not in json.dumps(found)
    gateway.controller.answers["invocation.get"] = {"invocation": None}
    missing = await gateway.http.get("/v1/invocations/inv-" + "0" * 32, headers=bearer("viewer"))
    assert missing.status_code == 404
    assert (await gateway.http.get("/v1/invocations/nonsense", headers=bearer("viewer"))).status_code == 400


async def test_deleting_an_invocation_ends_it_for_its_caller(gateway: Rig) -> None:
    waiting = asyncio.ensure_future(call(gateway, "hangs"))
    await gateway.invoker.until(lambda: bool(gateway.invoker.running))
    identity = next(iter(gateway.invoker.running))
    answer = await gateway.http.delete(f"/v1/invocations/inv-{identity.hex()}")
    assert answer.status_code == 202
    assert (await waiting).status_code == 499
    assert error(await waiting)["code"] == "cancelled"
    await gateway.settled()


async def test_a_lost_gateways_stream_is_taken_over_after_the_last_event_seen(gateway: Rig) -> None:
    identity = b"o" * 16
    invoke = Invoke("count", "json", True, context=note.FUNCTION)
    lost = Running(b"", Header(Type.INVOKE, identity, 3, 2, credit=1024), invoke, b"", 1024)
    gateway.invoker.orphans[identity] = (lost, [b"10", b"11", b"12"])
    answer = await gateway.http.get(f"/v1/invocations/inv-{identity.hex()}/events", headers={"Last-Event-ID": "0"})
    assert answer.text.startswith("id: 1\nevent: output\ndata: 11\n\nid: 2\nevent: output\ndata: 12\n\nevent: done")
    unknown = await gateway.http.get(f"/v1/invocations/inv-{'1' * 32}/events")
    assert unknown.status_code == 404
    wrong = await gateway.http.get(f"/v1/invocations/inv-{'1' * 32}/events", headers={"Last-Event-ID": "x"})
    assert wrong.status_code == 400
    await gateway.settled()
