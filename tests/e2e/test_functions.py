"""Functions of every kind over HTTP and through the SDK, well behaved and not, on a running platform."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Platform, eventually

pytestmark = pytest.mark.e2e
ZOO = Path(__file__).parent / "apps/zoo"


@pytest.fixture(scope="module")
def zoo(platform: Platform) -> Platform:
    platform.sllm("deploy", str(ZOO / "zoo.py"))
    return platform


def error(answer: httpx.Response) -> dict[str, str]:
    found: dict[str, str] = answer.json()["error"]
    return found


def test_keyword_and_positional_arguments_are_json(zoo: Platform) -> None:
    assert zoo.call("zoo/add", {"a": 2, "b": 3}).json() == 5
    assert zoo.call("zoo/add", [2]).json() == 3


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b'{"a": NaN}', 400), (b'"text"', 400), (b"\xff", 400), (b'{"a": 1, "c": 2}', 400), (b"{}", 400)],
)
def test_wrong_json_or_arguments_are_the_callers_error(zoo: Platform, content: bytes, status: int) -> None:
    headers = {**zoo.headers, "Content-Type": "application/json"}
    answer = httpx.post(f"{zoo.url}/v1/functions/zoo/add", content=content, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    assert error(answer)["message"]
    assert error(answer)["request_id"] == answer.headers["x-request-id"]


def test_a_generator_streams_events_with_integer_ids_and_an_end(zoo: Platform) -> None:
    answer = zoo.call("zoo/counter", {"n": 5})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.splitlines() if line and not line.startswith(":")]
    ids = [int(line.removeprefix("id: ")) for line in lines if line.startswith("id: ")]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert ids[:5] == [0, 1, 2, 3, 4]
    assert data[:5] == ["0", "1", "2", "3", "4"]
    assert "event: done" in lines


def test_a_generator_is_an_array_for_who_accepts_only_json(zoo: Platform) -> None:
    assert zoo.call("zoo/counter", {"n": 3}, headers={"Accept": "application/json"}).json() == [0, 1, 2]


def test_a_class_keeps_its_state_and_its_parameters_choose_the_instance(zoo: Platform) -> None:
    def greet(parameters: str = "") -> str:
        answer = zoo.call(f"zoo/Greeter.greet{parameters}", {"name": "ann"})
        assert answer.status_code == 200, answer.text
        return str(answer.json())

    assert greet() == "hello ann #1"
    assert greet() == "hello ann #2"
    assert greet('?parameters={"greeting":"hi"}') == "hi ann #1"


@pytest.mark.parametrize(
    ("function", "status", "code", "text"),
    [
        ("unlucky", 500, "function_error", "no luck"),
        ("unencodable", 500, "result_not_encodable", "object"),
        ("exits", 500, "function_error", "3"),
        ("leaves", 502, "worker_lost", ""),
        ("slow", 504, "deadline_exceeded", "execution"),
    ],
)
def test_a_misbehaving_function_gives_its_status_and_the_platform_goes_on(
    zoo: Platform, function: str, status: int, code: str, text: str
) -> None:
    answer = zoo.call(f"zoo/{function}", {"number": 7} if function == "unlucky" else {})
    assert answer.status_code == status, answer.text
    assert error(answer)["code"] == code
    assert text in answer.text
    assert zoo.call("zoo/add", {"a": 1}).json() == 2


@pytest.mark.parametrize(("function", "phase"), [("silent", "first_output"), ("pauses", "idle")])
def test_a_stream_that_hangs_ends_with_an_error_event_that_names_the_phase(
    zoo: Platform, function: str, phase: str
) -> None:
    answer = zoo.call(f"zoo/{function}", {})
    assert "event: error" in answer.text
    assert phase in answer.text


def test_waiting_for_a_busy_slot_has_its_own_timeout(zoo: Platform) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(zoo.call, "zoo/busy", {"seconds": 3})
        eventually(lambda: [row for row in zoo.json("ps") if row["function"] == "busy" and row["running"]])
        second = zoo.call("zoo/busy", {"seconds": 0})
        assert second.status_code == 504
        assert error(second)["param"] == "queue"
        assert first.result().status_code == 200


def test_a_full_queue_is_a_429_with_retry_after(zoo: Platform) -> None:
    zoo.call("zoo/narrow", {"seconds": 0})
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda _: zoo.call("zoo/narrow", {"seconds": 0.5}), range(4)))
    codes = sorted(answer.status_code for answer in answers)
    assert codes.count(200) >= 2
    assert codes.count(429) >= 1
    full = next(answer for answer in answers if answer.status_code == 429)
    assert int(full.headers["retry-after"]) >= 1


def test_unknown_names_are_404_with_a_near_name(zoo: Platform) -> None:
    answer = zoo.call("zoo/ad", {})
    assert answer.status_code == 404
    assert "add" in error(answer)["hint"] + error(answer)["message"]
    assert zoo.call("zo/add", {}).status_code == 404
    assert zoo.call("zoo/Greeter.great", {}).status_code == 404


def test_without_a_token_invocation_is_open_on_loopback_and_administration_is_not(zoo: Platform) -> None:
    assert httpx.post(f"{zoo.url}/v1/functions/zoo/add", json={"a": 1}, timeout=60).status_code == 200
    for path in ("/v1/apps", "/v1/tokens", "/v1/nodes", "/v1/logs"):
        assert httpx.get(zoo.url + path).status_code == 401, path
    assert httpx.delete(f"{zoo.url}/v1/apps/zoo").status_code == 401
    strange = {**zoo.headers, "Host": "evil.example"}
    assert httpx.get(f"{zoo.url}/v1/apps", headers=strange).status_code in (400, 403)


def test_prints_are_attributed_to_their_invocation(zoo: Platform) -> None:
    answer = zoo.call("zoo/chatty", {"word": "qwertz"})
    invocation = answer.headers["x-invocation-id"]

    def lines() -> list[dict[str, str]]:
        text = zoo.sllm("logs", "zoo/chatty", "--json")
        return [record for record in map(json.loads, text.splitlines()) if "qwertz" in record.get("text", "")]

    found = eventually(lambda: [*lines()] if len(lines()) >= 2 else None)
    assert {record["stream"] for record in found} == {"stdout", "stderr"}
    assert {record["invocation"] for record in found} == {invocation.removeprefix("inv-")} or {
        record["invocation"] for record in found
    } == {invocation}


def test_a_grandchild_does_not_outlive_its_instance(zoo: Platform) -> None:
    pid = zoo.call("zoo/forks", {}).json()
    assert Path(f"/proc/{pid}").exists()
    instance = next(row for row in zoo.json("ps") if row["function"] == "forks")
    answer = httpx.delete(f"{zoo.url}/v1/instances/{instance['instance']}", headers=zoo.headers, timeout=30)
    assert answer.status_code in (200, 202), answer.text
    eventually(lambda: not Path(f"/proc/{pid}").exists(), why="the grandchild is gone")


def test_the_sdk_calls_streams_maps_and_raises_the_functions_own_types(zoo: Platform) -> None:
    script = """
import asyncio, sys
import zoo
assert zoo.add.remote(2, b=3) == 5
assert zoo.mirror.remote(zoo.Point(1, 2)) == zoo.Point(2, 1)
assert list(zoo.counter.stream(4)) == [0, 1, 2, 3]
assert list(zoo.add.map([1, 2, 3])) == [2, 3, 4]
assert zoo.echo.remote(b"\\x00\\xff") == b"\\x00\\xff"
assert asyncio.run(zoo.add.remote.aio(1)) == 2
greeter = zoo.Greeter(greeting="moin")
assert greeter.greet.remote("bob").startswith("moin bob")
try:
    zoo.unlucky.remote(7)
except zoo.OutOfLuck as error:
    assert error.args == ("no luck with", 7)
    assert "zoo.py" in "".join(getattr(error, "__notes__", []))
else:
    sys.exit("no exception")
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ZOO,
        env={**zoo.env, "SLLM_TOKEN": zoo.token, "PYTHONDONTWRITEBYTECODE": "1", "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
