"""Nodes are taken away under their callers, and nobody notices."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Platform, eventually, platform_at, write_app

pytestmark = pytest.mark.e2e
SOURCE = """
import asyncio
import sllm

app = sllm.App("steady")


@app.function(scaledown_window=60)
@sllm.concurrent(max_inputs=8)
async def add(x: int) -> int:
    await asyncio.sleep(0.02)
    return x + 1


@app.function(scaledown_window=60)
@sllm.concurrent(max_inputs=8)
async def count(n: int):
    for i in range(n):
        yield i
        await asyncio.sleep(0.02)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    app = write_app(tmp_path_factory.mktemp("code"), SOURCE, "steady.py")
    with (
        tempfile.TemporaryDirectory(prefix="sllm-drain-") as state,
        platform_at(Path(state), "--invokers", "2") as here,
    ):
        here.sllm("deploy", str(app))
        yield here


class Callers:
    """Threads that call again as soon as they have their answer."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.seen: Counter[str] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(kind,)) for kind in ("add", "count") * 3]

    def __enter__(self) -> Counter[str]:
        for thread in self._threads:
            thread.start()
        eventually(lambda: len(self.seen) > 1, why="both kinds are answered")
        return self.seen

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, kind: str) -> None:
        body, want = ({"x": 1}, 2) if kind == "add" else ({"n": 40}, list(range(40)))
        while not self._stop.is_set():
            answer = self.platform.call(f"steady/{kind}", body, headers={"Accept": "application/json"})
            good = answer.status_code == 200 and answer.json() == want
            self.seen[kind if good else f"{answer.status_code}: {answer.text[:200]}"] += 1


def lives(platform: Platform) -> dict[str, str]:
    return {node["name"]: node["life"] for node in platform.json("node", "list") if node["state"] == "up"}


def test_a_rolling_restart_fails_no_call_and_cuts_no_stream(two: Platform) -> None:
    before = lives(two)
    with Callers(two) as seen:
        for node in sorted(before):
            two.sllm("node", "restart", node)
    assert set(seen) == {"add", "count"}
    after = lives(two)
    assert set(after) == set(before)
    assert not set(after.values()) & set(before.values())
    assert not any(node["cordoned"] for node in two.json("node", "list"))


def test_an_invoker_that_is_given_notice_leaves_without_a_failed_call_and_comes_back(two: Platform) -> None:
    before = lives(two)
    busiest = max(two.json("node", "list"), key=lambda node: node["instances"])["name"]
    (invoker,) = [
        pid
        for pid in two.processes()
        if f"--name\0{busiest}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes() and os.getpgid(pid) == pid
    ]
    with Callers(two) as seen:
        os.kill(invoker, signal.SIGTERM)
        eventually(lambda: lives(two).get(busiest) not in (None, before[busiest]))
    assert set(seen) == {"add", "count"}
