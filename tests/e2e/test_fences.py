"""Nodes that are silent and not dead: asleep, or cut off in one direction. One of them is believed at a time.

An invoker that says nothing for three seconds counts as lost; its streams go on elsewhere under a raised fence. When it
is heard again, nothing that it says about them is believed, and it is told to stop. In `benchmarks/fences.py` the same
takes ten seconds and more.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import EXAMPLES, Platform, eventually, platform_at
from tests.e2e.fences import dropped, nothing_runs
from tests.e2e.test_kills import Counting, finish, pid_of, unwhole

pytestmark = pytest.mark.e2e


@pytest.fixture
def platform() -> Iterator[Platform]:
    with (
        tempfile.TemporaryDirectory(prefix="sllm-fence-") as state,
        platform_at(Path(state), "--gateways", "1", "--invokers", "2") as here,
    ):
        here.sllm("deploy", str(EXAMPLES / "counting/app.py"))
        yield here


def test_streams_of_an_invoker_that_sleeps_go_on_elsewhere_and_it_is_told_to_stop(platform: Platform) -> None:
    streams = [Counting(platform) for _ in range(4)]
    threads = [stream.start() for stream in streams]
    eventually(lambda: all(len(stream.values) >= 3 for stream in streams), why="every stream speaks")
    node = platform.instances()[0]["node"]
    pid = pid_of(platform, "sllm_invoker", node)
    os.kill(pid, signal.SIGSTOP)
    finish(streams)
    for thread in threads:
        thread.join(60)
    os.kill(pid, signal.SIGCONT)
    assert unwhole(streams, Counting) == []
    recent = platform.get("/v1/invocations?app=counting")["invocations"]
    assert {(each["fence"], each["resumes"], each["node"] != node) for each in recent} == {(2, 1, True)}
    eventually(lambda: nothing_runs(platform), 30, "the woken node runs nothing any more")
    assert dropped(platform, "forged") == 0
