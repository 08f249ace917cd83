"""SIGKILL of every part while sixteen streams run: who is hurt, who is not, and that it heals by itself.

Some streams are a plain generator's, which cannot go on elsewhere; a resumable one's and a language model's must.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.e2e.conftest import EXAMPLES, Platform, eventually, platform_at, select_nothing
from tests.e2e.fences import nothing_runs

pytestmark = pytest.mark.e2e
ZOO = Path(__file__).parent / "apps/zoo/zoo.py"
TOKENS = 500
MORE = 20
"""Outputs with which a stream shows that it goes on."""
ATTEMPTS = 20.0
"""Seconds for which a client tries to attach again."""


@dataclass
class Stream:
    """A client thread that reads one stream of `ticks` to its end, whatever the end is. It goes on until `enough`."""

    platform: Platform
    invocation: str = ""
    values: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    end: str = ""
    """done, error, or broken (the connection ended without a terminal event)."""
    problem: dict[str, Any] = field(default_factory=dict)
    attached: int = 0
    """How often it was attached to again."""
    _event: str = ""
    _number: int = -1
    _name: str = field(default_factory=lambda: uuid4().hex)

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self.read)
        thread.start()
        return thread

    function = "ticks"
    period = 0.03

    def read(self) -> None:
        url = f"{self.platform.url}/v1/functions/zoo/{self.function}"
        self._follow("POST", url, json={"until": str(self._until), "period": self.period})

    def enough(self) -> None:
        """It is to say goodbye."""
        self._until.touch()

    @property
    def _until(self) -> Path:
        return self.platform.state / f"enough-{self._name}"

    def again(self) -> None:
        """Attach until there is an end or nobody has it any more."""
        deadline = time.monotonic() + ATTEMPTS
        while self.end == "broken" or (self.end == "error" and self.problem["code"] in ("unavailable", "conflict")):
            if time.monotonic() > deadline:
                return
            select_nothing(0.2)
            self.problem = {}
            self.attach_again()

    def attach_again(self) -> None:
        self.attached += 1
        self.end = ""
        last = {"Last-Event-ID": str(self.ids[-1])} if self.ids else {}
        self._follow("GET", f"{self.platform.url}/v1/invocations/{self.invocation}/events", headers=last)

    def _follow(self, method: str, url: str, headers: dict[str, str] | None = None, **kwargs: Any) -> None:
        try:
            headers = {**self.platform.headers, **(headers or {})}
            with httpx.stream(method, url, headers=headers, timeout=60, **kwargs) as answer:
                if answer.status_code != 200:
                    self.end, self.problem = "error", json.loads(answer.read())["error"]
                    return
                self.invocation = answer.headers["x-invocation-id"]
                for line in answer.iter_lines():
                    name, _, value = line.partition(": ")
                    self._line(name, value)
        except httpx.HTTPError:
            self.end = self.end or "broken"
        self.end = self.end or "broken"

    def _line(self, name: str, value: str) -> None:
        if name == "event":
            self._event = value
        elif name == "id":
            self._number = int(value)
        elif name == "data" and self._event == "output":
            self.values.append(int(value))
            self.ids.append(self._number)
        elif name == "data" and self._event in ("done", "error"):
            self.end = self._event
            if self._event == "error":
                self.problem = json.loads(value)["error"]

    @property
    def whole(self) -> bool:
        """Every value once, the goodbye included."""
        number = len(self.values)
        return self.end == "done" and self.values == [*range(number - 1), -1] and self.ids == list(range(number))


class Strides(Stream):
    """One of a generator that is resumable."""

    function = "strides"


@dataclass
class Counting(Stream):
    """One that reads what a language model counts up, from a start of its own. It ends after `tokens`."""

    start_at = 0
    tokens: int = TOKENS
    model = "counting"

    def read(self) -> None:
        self.start_at = random.randrange(1, 1000)
        body = {
            "model": self.model,
            "stream": True,
            "max_tokens": self.tokens,
            "temperature": 0,
            "messages": [{"role": "user", "content": str(self.start_at - 1)}],
        }
        self._follow("POST", f"{self.platform.url}/v1/chat/completions", json=body)

    def _line(self, name: str, value: str) -> None:
        if name == "id":
            self._number = int(value)
        elif name == "data" and value == "[DONE]":
            self.end = self.end or "done"
        elif name == "data" and "error" in (chunk := json.loads(value)):
            self.end, self.problem = "error", chunk["error"]
        elif name == "data" and (text := chunk["choices"][0]["delta"].get("content")):
            self.values += map(int, text.split())
            self.ids.append(self._number)

    @property
    def whole(self) -> bool:
        return self.end == "done" and self.values == [(self.start_at + i) % 1000 for i in range(self.tokens)]


KINDS = {Stream: 8, Strides: 2, Counting: 6}


@pytest.fixture
def platform() -> Iterator[Platform]:
    with (
        tempfile.TemporaryDirectory(prefix="sllm-kill-") as state,
        platform_at(Path(state), "--gateways", "2", "--invokers", "2") as here,
    ):
        here.sllm("deploy", str(ZOO))
        here.sllm("deploy", str(EXAMPLES / "counting/app.py"))
        yield here


@pytest.fixture
def streams(platform: Platform) -> Iterator[list[Stream]]:
    """Sixteen streams of three kinds, each of which has already given something. Those that end by themselves
    begin when the others speak."""
    running: list[Stream] = []
    threads: list[threading.Thread] = []

    def speak() -> bool:
        return all(len(stream.values) >= 3 for stream in running)

    for kind, number in KINDS.items():
        begun = [kind(platform) for _ in range(number)]
        threads += [stream.start() for stream in begun]
        running += begun
        eventually(speak, why="every stream speaks")
    yield running
    for stream in running:
        stream.enough()
    for thread in threads:
        thread.join(60)


def finish(streams: list[Stream]) -> None:
    """Each goes on for a while, if it has no end yet, and then has one."""
    said = {id(stream): len(stream.values) for stream in streams}

    def over(stream: Stream) -> bool:
        return stream.end not in ("", "broken")

    def goes_on(stream: Stream) -> bool:
        return len(stream.values) >= said[id(stream)] + MORE

    eventually(lambda: all(over(stream) or goes_on(stream) for stream in streams), 60, "every stream goes on")
    for stream in streams:
        stream.enough()
    eventually(lambda: all(map(over, streams)), 60, "every stream has an end")


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


def containers(platform: Platform, function: str) -> list[dict[str, Any]]:
    return [row for row in platform.instances() if row["function"] == function and row["state"] == "ready"]


def jumps(values: list[int]) -> list[tuple[int, int]]:
    return [(a, b) for a, b in pairwise(values) if b != (a + 1) % 1000]


def claim(stream: Stream) -> None:
    """Attach to it again when its gateway is gone."""
    eventually(lambda: stream.end, 60, "it has an end")
    stream.again()


def unwhole(streams: list[Stream], *kinds: type[Stream]) -> list[Any]:
    """What is wrong with streams that should be whole: their end, length and jumps."""
    return [
        (
            stream.end,
            stream.problem,
            len(stream.values),
            [(a, b) for a, b in pairwise(stream.values) if b != (a + 1) % 1000],
        )
        for stream in streams
        if type(stream) in (kinds or KINDS) and not stream.whole
    ]


def resumed(platform: Platform) -> int:
    """How often the recent invocations of the language model went on elsewhere."""
    recent = platform.get("/v1/invocations?app=counting")["invocations"]
    return sum(each["resumes"] for each in recent)


def assert_healed(platform: Platform) -> None:
    """New work runs, and what the controller says is what the processes are."""

    def works() -> bool:
        try:
            answer = platform.call("zoo/add", {"a": 1})
        except httpx.HTTPError:
            return False
        return answer.status_code == 200 and answer.json() == 2

    eventually(works, 60, "a call is answered again")
    eventually(lambda: nothing_runs(platform), why="nothing runs any more")
    eventually(lambda: platform.get("/v1/status")["counts"]["running"] == 0, why="and that is known")
    for row in platform.instances():
        if row["state"] == "ready":
            assert Path(f"/proc/{row['pid']}").exists(), row
    status = platform.get("/v1/status")
    assert status["counts"]["waiting"] == 0
    assert {node["state"] for node in status["nodes"]} == {"up"}


def test_a_killed_container_ends_the_streams_it_alone_could_give_and_no_others(
    platform: Platform, streams: list[Stream]
) -> None:
    os.kill(containers(platform, "ticks")[0]["pid"], signal.SIGKILL)
    os.kill(containers(platform, "counting")[0]["pid"], signal.SIGKILL)
    finish(streams)
    assert unwhole(streams, Strides, Counting) == []
    assert resumed(platform) >= 1
    hurt = [stream for stream in streams if not stream.whole]
    assert 1 <= len(hurt) <= 4
    assert all(stream.end == "error" and stream.problem["code"] == "worker_lost" for stream in hurt)
    assert all(stream.values == list(range(len(stream.values))) for stream in hurt), "what came was in order"
    assert_healed(platform)


def test_a_killed_invoker_ends_the_streams_its_containers_alone_could_give_and_no_others(
    platform: Platform, streams: list[Stream]
) -> None:
    rows = [row for row in platform.instances() if row["state"] == "ready"]
    victim = next(row["node"] for row in rows if row["function"] == "counting")
    os.kill(pid_of(platform, "sllm_invoker", victim), signal.SIGKILL)
    finish(streams)
    assert unwhole(streams, Strides, Counting) == []
    assert resumed(platform) >= 1
    hurt = [stream for stream in streams if not stream.whole]
    assert all(stream.end == "error" and stream.problem["code"] == "worker_lost" for stream in hurt)
    assert len(hurt) <= sum(4 for row in rows if row["function"] == "ticks" and row["node"] == victim)
    eventually(
        lambda: not any(Path(f"/proc/{row['pid']}").exists() for row in rows if row["node"] == victim),
        why="its containers are gone",
    )
    assert_healed(platform)


def test_a_killed_controller_hurts_no_stream(platform: Platform, streams: list[Stream]) -> None:
    os.kill(pid_of(platform, "sllm_faas.controller"), signal.SIGKILL)
    finish(streams)
    assert unwhole(streams) == []
    assert_healed(platform)


def test_the_streams_of_a_killed_gateway_are_attached_to_again_without_a_gap(
    platform: Platform, streams: list[Stream]
) -> None:
    threads = [threading.Thread(target=claim, args=(stream,)) for stream in streams]
    os.kill(pid_of(platform, "sllm_gateway", "gateway-0"), signal.SIGKILL)
    for thread in threads:
        thread.start()
    finish(streams)
    for thread in threads:
        thread.join(60)
    assert unwhole(streams) == []
    assert any(stream.attached for stream in streams)
    assert_healed(platform)


def test_streams_of_a_killed_gateway_that_nobody_claims_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_ORPHAN_GRACE", "1")
    with (
        tempfile.TemporaryDirectory(prefix="sllm-kill-") as state,
        platform_at(Path(state), "--gateways", "2", "--invokers", "2") as platform,
    ):
        platform.sllm("deploy", str(ZOO))
        streams = [Stream(platform) for _ in range(4)]
        threads = [stream.start() for stream in streams]
        eventually(lambda: all(stream.values for stream in streams))
        for name in ("gateway-0", "gateway-1"):
            os.kill(pid_of(platform, "sllm_gateway", name), signal.SIGKILL)
        for thread in threads:
            thread.join(60)
        assert_healed(platform)
