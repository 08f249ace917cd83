"""Running answers move between two invokers on the real platform, and their clients notice nothing."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import test_kills as kills
from tests.e2e.conftest import EXAMPLES, Platform, eventually, platform_at

pytestmark = pytest.mark.e2e
NODES = ("node-0", "node-1")


class Strides(kills.Strides):
    """Resumable, and long enough to move there and back."""

    def read(self) -> None:
        url = f"{self.platform.url}/v1/functions/zoo/{self.function}"
        self._follow("POST", url, json={"n": 1000, "period": 0.01})

    @property
    def whole(self) -> bool:
        return self.end == "done" and self.values == list(range(1000)) == self.ids


class Counting(kills.Counting):
    tokens = 2000

    def read(self) -> None:
        self.start_at = 100
        body = {
            "model": "counting",
            "stream": True,
            "max_tokens": self.tokens,
            "temperature": 0,
            "messages": [{"role": "user", "content": "99"}],
        }
        self._follow("POST", f"{self.platform.url}/v1/chat/completions", json=body)

    @property
    def whole(self) -> bool:
        return self.end == "done" and self.values == [(100 + i) % 1000 for i in range(self.tokens)]


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with (
        tempfile.TemporaryDirectory(prefix="sllm-move-") as state,
        platform_at(Path(state), "--invokers", "2") as here,
    ):
        here.sllm("deploy", str(kills.ZOO))
        here.sllm("deploy", str(EXAMPLES / "counting/app.py"))
        yield here


def running(stream: kills.Stream) -> str:
    """The id of its invocation, once it speaks."""
    eventually(lambda: len(stream.values) >= 3 or stream.end, why="it speaks")
    return stream.invocation


def node_of(platform: Platform, invocation: str) -> str:
    return str(platform.get(f"/v1/invocations/{invocation}")["node"])


def move(platform: Platform, stream: kills.Stream) -> dict[str, Any]:
    """Move it to the other node. `outcome` "ended": it was over before."""
    there = NODES[node_of(platform, stream.invocation) == NODES[0]]
    answer = platform.post(f"/v1/invocations/{stream.invocation}/migrate", {"node": there})
    if answer.status_code == 409 and "does not run now" in answer.text:
        return {"outcome": "ended"}
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("kind", [Strides, Counting])
def test_a_stream_moves_there_and_back_and_its_client_notices_nothing(
    platform: Platform, kind: type[kills.Stream]
) -> None:
    for _ in range(5):  # a stream that ended first shows nothing; by then the other node is warm
        stream = kind(platform)
        thread = stream.start()
        invocation = running(stream)
        outcomes = [move(platform, stream)["outcome"], move(platform, stream)["outcome"]]
        if "ended" not in outcomes:
            break
        assert set(outcomes) <= {"ended", "moved"}
        thread.join(60)
        assert stream.whole, (stream.end, stream.problem, len(stream.values))
    assert outcomes == ["moved", "moved"]
    thread.join(60)
    assert stream.whole, (stream.end, stream.problem, len(stream.values), kills.jumps(stream.values))
    record = platform.get(f"/v1/invocations/{invocation}")
    assert (record["resumes"], record["state"]) == (0, "done"), record


def test_a_destination_that_dies_after_the_commit_is_a_lost_instance_and_before_it_nothing(platform: Platform) -> None:
    stream = Counting(platform)
    thread = stream.start()
    invocation = running(stream)
    eventually(lambda: sum(row["tokens"] for row in platform.json("ps")) > 3, why="it is known how long its context is")
    assert move(platform, stream)["outcome"] == "moved"
    instance = platform.get(f"/v1/invocations/{invocation}")["instance"]
    (pid,) = [row["pid"] for row in platform.json("ps") if row["instance"] == instance]
    os.kill(pid, signal.SIGKILL)
    thread.join(60)
    assert stream.whole, (stream.end, stream.problem, len(stream.values))
    assert platform.get(f"/v1/invocations/{invocation}")["resumes"] == 1
