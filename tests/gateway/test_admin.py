"""Administration, access, and the gateway's own pages."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest

from sllm_faas.errors import ErrorInfo
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import TokenEntry
from tests.gateway.fakes import Rig, bearer

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROOT = bearer("root")


@pytest.mark.parametrize(
    ("method", "path", "op", "body", "status"),
    [
        ("GET", "/v1/apps/app", "app.get", {"app": "app"}, 200),
        ("DELETE", "/v1/apps/app", "app.delete", {"app": "app"}, 200),
        ("GET", "/v1/instances?app=app", "instance.list", {"app": "app"}, 200),
        ("DELETE", "/v1/instances/i-1", "instance.stop", {"instance": "i-1"}, 202),
        ("GET", "/v1/nodes", "node.list", {}, 200),
        ("GET", "/v1/nodes/n", "describe.node", {"node": "n"}, 200),
        ("POST", "/v1/nodes/n/drain", "node.drain", {"node": "n"}, 200),
        ("GET", "/v1/functions/app/echo", "describe.function", {"app": "app", "function": "echo"}, 200),
        ("GET", "/v1/status", "status", {}, 200),
        ("GET", "/v1/tokens", "token.list", {}, 200),
        ("DELETE", "/v1/tokens/t", "token.delete", {"name": "t"}, 200),
    ],
)
async def test_each_path_is_one_operation_of_the_controller(
    gateway: Rig, method: str, path: str, op: str, body: dict[str, object], status: int
) -> None:
    gateway.controller.answers[op] = {"instances": [], "fine": True}
    answer = await gateway.http.request(method, path, headers=ROOT)
    assert answer.status_code == status, answer.text
    assert answer.json()["fine"]
    assert gateway.controller.asked[-1][:2] == (op, body)


async def test_bodies_are_passed_on_with_what_the_path_names(gateway: Rig) -> None:
    await gateway.http.post("/v1/apps/app/rollback", json={"version": 3}, headers=ROOT)
    assert gateway.controller.asked[-1][:2] == ("app.rollback", {"version": 3, "app": "app"})
    made = await gateway.http.post("/v1/tokens", json={"name": "t", "scopes": ["read"]}, headers=ROOT)
    assert made.status_code == 201
    wrong = await gateway.http.post("/v1/apps/app/rollback", json={"app": "other"}, headers=ROOT)
    assert wrong.status_code == 400
    assert (await gateway.http.post("/v1/tokens", content=b"[", headers=ROOT)).status_code == 400


async def test_an_operations_error_keeps_its_status(gateway: Rig) -> None:
    gateway.controller.answers["app.get"] = ErrorInfo("not_found", "no app 'x'", status=404)
    answer = await gateway.http.get("/v1/apps/x", headers=ROOT)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "no app 'x'"


async def test_a_deployments_progress_comes_as_events_and_its_failure_too(gateway: Rig) -> None:
    spec = {"spec": {"name": "app"}}
    stage = {"stage": "check", "done": 1, "total": 2, "text": ""}
    gateway.controller.answers["app.deploy"] = [stage, {"app": "app", "version": 2}]
    events = {**ROOT, "Accept": "text/event-stream"}
    answer = await gateway.http.post("/v1/apps/app/deployments", json=spec, headers=events)
    assert [line for line in answer.text.splitlines() if line.startswith("event")] == [
        "event: progress",
        "event: result",
    ]
    plain = await gateway.http.post("/v1/apps/app/deployments", json=spec, headers=ROOT)
    assert plain.json() == {"app": "app", "version": 2}
    failure = ErrorInfo("import_failed", "no module 'x'", status=503, traceback="Traceback: x")
    gateway.controller.answers["app.deploy"] = [stage, failure]
    answer = await gateway.http.post("/v1/apps/app/deployments", json=spec, headers=events)
    assert answer.text.count("event: error") == 1
    assert json.loads(answer.text.rsplit("data: ", 1)[1])["error"]["traceback"] == "Traceback: x"
    plain = await gateway.http.post("/v1/apps/app/deployments", json=spec, headers=ROOT)
    assert plain.status_code == 503
    wrong = await gateway.http.post("/v1/apps/other/deployments", json=spec, headers=ROOT)
    assert wrong.status_code == 400


async def test_a_bundle_is_asked_for_and_uploaded_out_of_band(gateway: Rig) -> None:
    digest = "a" * 64
    gateway.controller.answers["bundle.has"] = {"present": False}
    assert (await gateway.http.head(f"/v1/bundles/{digest}", headers=ROOT)).status_code == 404
    gateway.controller.answers["bundle.has"] = {"present": True}
    assert (await gateway.http.head(f"/v1/bundles/{digest}", headers=ROOT)).status_code == 200
    answer = await gateway.http.put(f"/v1/bundles/{digest}", content=b"zip", headers=ROOT)
    assert answer.status_code == 201
    assert gateway.controller.asked[-1] == ("bundle.put", {"digest": digest}, (b"zip",))
    assert (await gateway.http.put(f"/v1/bundles/{digest}", headers=ROOT)).status_code == 400


async def test_logs_are_lines_sorted_and_cut_or_events_that_go_on(gateway: Rig) -> None:
    asked = []

    def read(body: dict[str, object]) -> list[object]:
        asked.append(body)
        return [{"records": [{"time": 3.0, "text": "c"}, {"time": 1.0, "text": "a"}]}, {"records": [{"time": 2.0}]}]

    gateway.invoker.operations["logs.read"] = read
    answer = await gateway.http.get("/v1/logs?app=app&lines=2&invocation=inv-ab", headers=ROOT)
    assert [json.loads(line)["time"] for line in answer.text.splitlines()] == [2.0, 3.0]
    assert asked[-1]["invocation"] == "ab"
    assert asked[-1]["follow"] is False
    async with gateway.http.stream("GET", "/v1/logs?follow=1", headers=ROOT) as stream:
        lines = stream.aiter_lines()
        assert [await anext(lines) for _ in range(2)] == ["event: log", 'data: {"time":3.0,"text":"c"}']
    assert (await gateway.http.get("/v1/logs?lines=x", headers=ROOT)).status_code == 400


async def test_a_node_that_is_gone_before_its_answer_is_here_has_left_as_it_was_asked(gateway: Rig) -> None:
    def leave(_body: dict[str, object]) -> list[object]:
        for peer in gateway.invoker.gateways:
            gateway.invoker.router.send(peer, [Header(Type.BYE).pack()])
        return []

    gateway.invoker.operations["node.leave"] = leave
    before = len(gateway.invoker.got[Type.HELLO])
    answer = await gateway.http.post("/v1/nodes/node-0/restart", headers=ROOT)
    assert (answer.status_code, answer.json()) == (202, {"leaving": True})
    await gateway.invoker.until(lambda: len(gateway.invoker.got[Type.HELLO]) > before)
    await gateway.invoker.granted()  # it is a node of this gateway again, for the tests that follow


async def test_checkpoints_are_asked_of_every_invoker(gateway: Rig) -> None:
    gateway.invoker.operations["checkpoint.list"] = lambda body: [{"checkpoints": [{"digest": "d"}]}]
    gateway.invoker.operations["checkpoint.pin"] = lambda body: [{"ref": body["ref"]}]
    found = await gateway.http.get("/v1/checkpoints", headers=ROOT)
    assert found.json() == {"checkpoints": [{"digest": "d", "node": "node-0"}]}
    pinned = await gateway.http.post("/v1/checkpoints/org/model/pin", headers=ROOT)
    assert pinned.json() == {"ref": "org/model", "nodes": {"node-0": {"ref": "org/model"}}}


@pytest.mark.parametrize(
    ("who", "method", "path", "status"),
    [
        ("", "GET", "/v1/apps", 401),
        ("", "GET", "/v1/models", 200),
        ("", "POST", "/v1/functions/app/echo", 200),
        ("unknown", "GET", "/v1/apps", 401),
        ("unknown", "POST", "/v1/functions/app/echo", 401),
        ("caller", "GET", "/v1/apps", 403),
        ("caller", "POST", "/v1/functions/app/echo", 200),
        ("viewer", "GET", "/v1/apps", 200),
        ("viewer", "POST", "/v1/functions/app/echo", 403),
        ("viewer", "DELETE", "/v1/apps/app", 403),
        ("ci", "DELETE", "/v1/apps/app", 200),
        ("ci", "GET", "/v1/tokens", 403),
        ("root", "GET", "/v1/tokens", 200),
    ],
)
async def test_scopes(gateway: Rig, who: str, method: str, path: str, status: int) -> None:
    gateway.controller.answers |= {"app.list": {"apps": []}, "app.delete": {}, "token.list": {"tokens": []}}
    answer = await gateway.http.request(method, path, headers=bearer(who) if who else {})
    assert answer.status_code == status, answer.text
    if status == 401:
        assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_a_gateway_that_knows_no_tokens_yet_refuses_none(gateway: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.service.dispatcher.routes, "seq", -1)
    for who, path in (("root", "/v1/tokens"), ("caller", "/v1/functions/app/echo")):
        answer = await gateway.http.request("GET" if who == "root" else "POST", path, headers=bearer(who))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), answer.text


async def test_where_invocation_is_open_any_foreign_key_will_do(gateway: Rig) -> None:
    for text in ("Bearer sk-unused", "Basic eDp5", "Bearer"):
        answer = await gateway.http.post("/v1/functions/app/echo", headers={"Authorization": text})
        assert answer.status_code == 200, text


async def test_a_token_for_some_apps_reaches_and_sees_only_them_and_expires(gateway: Rig) -> None:
    def entry(name: str, expires: float | None) -> TokenEntry:
        sha = hashlib.sha256(f"sllm_{name}".encode()).hexdigest()
        return TokenEntry(name, sha, ("admin",), ("other",), expires)

    gateway.controller.delta(tokens=(entry("narrow", None), entry("old", time.time() - 1)))
    routes = gateway.service.dispatcher.routes
    await gateway.controller.until(lambda: routes.seq == gateway.controller.seq)
    gateway.controller.answers["app.list"] = {"apps": [{"name": "app"}, {"name": "other"}]}
    seen = await gateway.http.get("/v1/apps", headers=bearer("narrow"))
    assert seen.json() == {"apps": [{"name": "other"}]}
    for method, path in (("GET", "/v1/apps/app"), ("POST", "/v1/functions/app/echo"), ("GET", "/v1/tokens")):
        answer = await gateway.http.request(method, path, headers=bearer("narrow"))
        assert answer.status_code == 403, path
    assert (await gateway.http.get("/v1/models", headers=bearer("narrow"))).json()["data"] == []
    assert (await gateway.http.get("/v1/apps", headers=bearer("old"))).status_code == 401


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}])
async def test_a_web_page_elsewhere_can_neither_administrate_nor_invoke(gateway: Rig, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/v1/apps"), ("POST", "/v1/functions/app/echo")):
        answer = await gateway.http.request(method, path, headers={**ROOT, **headers})
        assert answer.status_code == 403, path


async def test_its_own_origin_and_every_name_of_this_machine_are_fine(gateway: Rig) -> None:
    for host in ("localhost", "127.0.0.1:99", "[::1]:8700"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        assert (await gateway.http.post("/v1/functions/app/echo", headers=headers)).status_code == 200, host


async def test_health_metrics_and_documentation(gateway: Rig) -> None:
    assert (await gateway.http.get("/livez")).status_code == 200
    ready = await gateway.http.get("/readyz")
    assert ready.json() == {"status": "ready", "routes": True, "controller": True, "invokers": 1, "stopping": False}
    await gateway.http.post("/v1/functions/app/echo")
    metrics = (await gateway.http.get("/metrics")).text
    assert 'sllm_invocations_total{app="app",code="ok",function="echo"}' in metrics
    assert "inv-" not in metrics
    document = (await gateway.http.get("/openapi.json")).json()
    assert set(document["paths"]["/v1/apps/{app}"]) == {"get", "delete"}
    page = (await gateway.http.get("/docs")).text
    assert "/v1/chat/completions" in page
    assert "http://" not in page
    assert "https://" not in page


async def test_an_unknown_path_is_a_404_and_a_wrong_method_a_405_in_the_same_shape(gateway: Rig) -> None:
    missing = await gateway.http.get("/v1/nothing")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"
    wrong = await gateway.http.put("/v1/apps", headers=ROOT)
    assert wrong.status_code == 405
    assert "GET" in wrong.headers["allow"]
    assert wrong.json()["error"]["code"] == "method_not_allowed"


async def test_a_gap_in_the_routes_asks_for_the_whole_table(gateway: Rig) -> None:
    peers = len(gateway.controller.peers)
    gateway.controller.functions = gateway.controller.functions[:-1]
    gateway.controller.delta(seq=gateway.controller.seq + 5)
    routes = gateway.service.dispatcher.routes
    await gateway.controller.until(lambda: routes.seq == gateway.controller.seq)
    assert ("app", "counting") not in routes.functions
    assert len(gateway.controller.peers) == peers


async def test_the_access_log_has_a_line_per_request_without_its_payload(gateway: Rig, tmp_path: Path) -> None:
    path = tmp_path / "log"
    access = gateway.service.gateway.access
    with path.open("wb") as file:
        access._fd = file.fileno()
        trace = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
        await gateway.http.post("/v1/functions/app/echo", json={"k": "xyzzy"}, headers={"traceparent": trace})
        await gateway.http.post("/v1/functions/app/fails", json={})
        access.flush()
        access._fd = None
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["event"] == "request"
    assert (first["app"], first["function"], first["version"], first["instance"]) == ("app", "echo", 1, "echo-1")
    assert first["status"] == 200
    assert first["trace"] == "ab" * 16
    assert first["invocation"].startswith("inv-")
    assert (second["status"], second["code"]) == (500, "function_error")
    assert "xyzzy" not in path.read_text()


async def test_the_controllers_questions_are_answered(gateway: Rig) -> None:
    await gateway.http.post("/v1/functions/app/echo")
    answers = gateway.service.dispatcher.answers.operations
    listed = answers["invocation.list"]({"app": "app", "limit": 1})["invocations"]
    assert len(listed) == 1
    found = answers["invocation.get"]({"id": listed[0]["invocation"]})["invocation"]
    assert found == listed[0]
    assert answers["invocation.get"]({"id": "inv-" + "0" * 32}) == {"invocation": None}
    assert gateway.invoker.got[Type.HELLO]
