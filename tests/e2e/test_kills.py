"""SIGKILL of every part while sixteen streams run: who is hurt, who is not, and that it heals by itself."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Platform, eventually, platform_at

pytestmark = pytest.mark.e2e
ZOO = Path(__file__).parent / "apps/zoo/zoo.py"
STREAMS = 16
LENGTH = 150


@dataclass
class Stream:
    """A client thread that reads one stream of `ticks` to its end, whatever the end is."""

    platform: Platform
    invocation: str = ""
    values: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    end: str = ""
    """done, error, or broken (the connection ended without a terminal event)."""
    problem: dict[str, Any] = field(default_factory=dict)

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self.read)
        thread.start()
        return thread

    def read(self) -> None:
        url = f"{self.platform.url}/v1/functions/zoo/ticks"
        self._follow("POST", url, json={"n": LENGTH, "period": 0.03})

    def attach_again(self) -> None:
        self.end = ""
        last = {"Last-Event-ID": str(self.ids[-1])} if self.ids else {}
        self._follow("GET", f"{self.platform.url}/v1/invocations/{self.invocation}/events", headers=last)

    def _follow(self, method: str, url: str, headers: dict[str, str] | None = None, **kwargs: Any) -> None:
        event, number = "", -1
        try:
            headers = {**self.platform.headers, **(headers or {})}
            with httpx.stream(method, url, headers=headers, timeout=60, **kwargs) as answer:
                if answer.status_code != 200:
                    self.end, self.problem = "error", json.loads(answer.read())["error"]
                    return
                self.invocation = answer.headers["x-invocation-id"]
                for line in answer.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "event":
                        event = value
                    elif name == "id":
                        number = int(value)
                    elif name == "data" and event == "output":
                        self.values.append(int(value))
                        self.ids.append(number)
                    elif name == "data" and event in ("done", "error"):
                        self.end = event
                        if event == "error":
                            self.problem = json.loads(value)["error"]
        except httpx.HTTPError:
            self.end = self.end or "broken"
        self.end = self.end or "broken"

    @property
    def whole(self) -> bool:
        return self.end == "done" and self.values == list(range(LENGTH)) == self.ids


@pytest.fixture
def platform() -> Iterator[Platform]:
    with (
        tempfile.TemporaryDirectory(prefix="sllm-kill-") as state,
        platform_at(Path(state), "--gateways", "2", "--invokers", "2") as here,
    ):
        here.sllm("deploy", str(ZOO))
        yield here


@pytest.fixture
def streams(platform: Platform) -> Iterator[list[Stream]]:
    """Sixteen streams over four containers, each of which has already given something."""
    running = [Stream(platform) for _ in range(STREAMS)]
    threads = [stream.start() for stream in running]
    eventually(lambda: all(len(stream.values) >= 3 for stream in running), why="every stream speaks")
    yield running
    for thread in threads:
        thread.join(60)


def finish(streams: list[Stream]) -> None:
    eventually(lambda: all(stream.end for stream in streams), 60, "every stream has an end")


def pid_of(platform: Platform, *words: str) -> int:
    """The one process of the platform whose command line has all `words` and which leads it."""
    for pid in sorted(platform.processes()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if all(word in command for word in words):
            return pid
    raise AssertionError(f"no process with {words}")


def containers(platform: Platform) -> list[dict[str, Any]]:
    return [row for row in platform.json("ps") if row["function"] == "ticks" and row["state"] == "ready"]


def assert_healed(platform: Platform) -> None:
    """New work runs, and what the controller says is what the processes are."""

    def works() -> bool:
        try:
            answer = platform.call("zoo/add", {"a": 1})
        except httpx.HTTPError:
            return False
        return answer.status_code == 200 and answer.json() == 2

    eventually(works, 60, "a call is answered again")
    eventually(lambda: platform.get("/v1/status")["counts"]["running"] == 0, why="nothing runs any more")
    for row in platform.json("ps"):
        if row["state"] == "ready":
            assert Path(f"/proc/{row['pid']}").exists(), row
    status = platform.get("/v1/status")
    assert status["counts"]["waiting"] == 0
    assert {node["state"] for node in status["nodes"]} == {"up"}


def test_a_killed_container_ends_its_own_streams_with_an_error_and_no_others(
    platform: Platform, streams: list[Stream]
) -> None:
    victim = containers(platform)[0]
    os.kill(victim["pid"], signal.SIGKILL)
    finish(streams)
    hurt = [stream for stream in streams if not stream.whole]
    assert 1 <= len(hurt) <= 4
    assert all(stream.end == "error" and stream.problem["code"] == "worker_lost" for stream in hurt)
    assert all(stream.values == list(range(len(stream.values))) for stream in hurt), "what came was in order"
    assert_healed(platform)


def test_a_killed_invoker_ends_the_streams_of_its_containers_and_no_others(
    platform: Platform, streams: list[Stream]
) -> None:
    rows = containers(platform)
    nodes = {row["node"] for row in rows}
    os.kill(pid_of(platform, "sllm_invoker", "node-0"), signal.SIGKILL)
    finish(streams)
    hurt = [stream for stream in streams if not stream.whole]
    assert all(stream.end == "error" and stream.problem["code"] == "worker_lost" for stream in hurt)
    if "node-0" in nodes:
        assert hurt
    expected = sum(1 for row in rows if row["node"] == "node-0") * 4
    assert len(hurt) <= expected
    eventually(
        lambda: not any(Path(f"/proc/{row['pid']}").exists() for row in rows if row["node"] == "node-0"),
        why="its containers are gone",
    )
    assert_healed(platform)


def test_a_killed_controller_hurts_no_stream(platform: Platform, streams: list[Stream]) -> None:
    os.kill(pid_of(platform, "sllm_faas.controller"), signal.SIGKILL)
    finish(streams)
    assert [stream for stream in streams if not stream.whole] == []
    assert_healed(platform)


def test_the_streams_of_a_killed_gateway_are_attached_to_again_without_a_gap(
    platform: Platform, streams: list[Stream]
) -> None:
    os.kill(pid_of(platform, "sllm_gateway", "gateway-0"), signal.SIGKILL)
    finish_or_broken = list(streams)
    eventually(lambda: any(stream.end == "broken" for stream in finish_or_broken), why="its streams broke")
    broken = [stream for stream in streams if stream.end == "broken"]
    threads = [threading.Thread(target=stream.attach_again) for stream in broken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    finish(streams)
    assert [(stream.end, stream.problem, len(stream.values)) for stream in streams if not stream.whole] == []
    assert_healed(platform)


def test_streams_of_a_killed_gateway_that_nobody_claims_are_stopped(platform: Platform) -> None:
    streams = [Stream(platform) for _ in range(4)]
    threads = [stream.start() for stream in streams]
    eventually(lambda: all(stream.values for stream in streams))
    for name in ("gateway-0", "gateway-1"):
        os.kill(pid_of(platform, "sllm_gateway", name), signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert_healed(platform)
