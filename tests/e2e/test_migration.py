"""Running answers move between two invokers on the real platform, and their clients notice nothing."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import test_kills as kills
from tests.e2e.conftest import EXAMPLES, Platform, eventually, platform_at

pytestmark = pytest.mark.e2e
NODES = ("node-0", "node-1")


class Strides(kills.Strides):
    period = 0.01


@dataclass
class Counting(kills.Counting):
    """Long enough by far where both nodes can start its model fast."""

    tokens: int = 2000


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with (
        tempfile.TemporaryDirectory(prefix="sllm-move-") as state,
        platform_at(Path(state), "--invokers", "2") as here,
    ):
        here.sllm("deploy", str(kills.ZOO))
        here.sllm("deploy", str(EXAMPLES / "counting/app.py"))
        for node in NODES:  # its first start there imports the libraries, which takes longer than a stream
            with here.only(node):
                Counting(here, tokens=1).read()
                eventually(here.cleared, why="the next one starts on the other node")
        yield here


def running(stream: kills.Stream) -> str:
    """The id of its invocation, once it speaks."""
    eventually(lambda: len(stream.values) >= 3 or stream.end, why="it speaks")
    return stream.invocation


def node_of(platform: Platform, invocation: str) -> str:
    return str(platform.get(f"/v1/invocations/{invocation}")["node"])


def move(platform: Platform, stream: kills.Stream) -> str:
    """Move it to the other node: what came of that."""
    there = NODES[node_of(platform, stream.invocation) == NODES[0]]
    answer = platform.post(f"/v1/invocations/{stream.invocation}/migrate", {"node": there})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["outcome"])


@pytest.mark.parametrize("kind", [Strides, Counting])
def test_a_stream_moves_there_and_back_and_its_client_notices_nothing(
    platform: Platform, kind: type[kills.Stream]
) -> None:
    stream = kind(platform)
    thread = stream.start()
    invocation = running(stream)
    assert [move(platform, stream), move(platform, stream)] == ["moved", "moved"]
    kills.finish([stream])
    thread.join(60)
    assert stream.whole, (stream.end, stream.problem, len(stream.values), kills.jumps(stream.values))
    record = platform.get(f"/v1/invocations/{invocation}")
    assert (record["resumes"], record["state"]) == (0, "done"), record


def test_a_destination_that_dies_after_the_commit_is_a_lost_instance_and_before_it_nothing(platform: Platform) -> None:
    stream = Counting(platform)
    thread = stream.start()
    invocation = running(stream)
    eventually(
        lambda: sum(row["tokens"] for row in platform.instances()) > 3, why="it is known how long its context is"
    )
    assert move(platform, stream) == "moved"
    instance = platform.get(f"/v1/invocations/{invocation}")["instance"]
    (pid,) = [row["pid"] for row in platform.instances() if row["instance"] == instance]
    os.kill(pid, signal.SIGKILL)
    thread.join(60)
    assert stream.whole, (stream.end, stream.problem, len(stream.values))
    assert platform.get(f"/v1/invocations/{invocation}")["resumes"] == 1
