"""A move between real processes, one of which is killed at one message of it; what became of the answer.

A stream counts on one node and is told to move to the other, which has to start an instance for it. `Scene.record`
tells which messages an undisturbed move has, `Scene.play` kills one process at one of them. Whoever it is, the client
sees every number once (of a killed gateway it attaches again), the answer ends migrated, not begun or resumed, and
afterwards nothing runs, nothing waits, and no process is left without an owner.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from sllm_invoker.containers import tree
from sllm_invoker.containers.zygote import STANDBY

from tests.e2e.conftest import EXAMPLES, Platform, eventually, platform_at, select_nothing
from tests.e2e.fences import nothing_runs
from tests.e2e.test_kills import Counting, jumps, pid_of

NODES = ("node-0", "node-1")
TOKENS = 800
WARMING = 6000
"""Of the stream that has a node started: its first start there imports the libraries."""
VICTIMS = ("controller", "source", "destination", "gateway")
QUIET = 40.0
"""Seconds in which everything has to be at rest again."""
APP = f"""
from pathlib import Path
import sllm
app = sllm.App("boundary")
counting = app.llm("counting", checkpoint=Path({str(EXAMPLES / "counting/model")!r}), concurrency=4, max_containers=2,
    scaledown_window=600)
"""


class Boundary(NamedTuple):
    """A message at one of the parties, which is about to send it or has just received it: the `number`th of its kind
    there. `link` is "peer", or "container" for the invoker's own one."""

    party: str
    direction: str
    link: str
    frame: str
    number: int

    def __str__(self) -> str:
        what = {"send": "about to send", "receive": "has received"}[self.direction]
        return f"{self.party} {what} {self.frame} {self.number}{' (container)' * (self.link == 'container')}"

    @property
    def victims(self) -> tuple[str, ...]:
        """Between parties a message is sent before it is received; only to its sender is that another boundary."""
        return (self.party,) if (self.direction, self.link) == ("send", "peer") else VICTIMS


LAST = (
    Boundary("controller", "receive", "peer", "MIGRATED", 1),
    Boundary("gateway", "receive", "peer", "REPLY", 1),
    Boundary("gateway", "receive", "peer", "OUTPUT'", 1),
)
"""When these have come a move is over for everybody."""
REPEATED = {"OUTPUT": 1, "OUTPUT'": 1, "SNAPSHOT": 2, "STATE": 2, "HOLD": 2, "HELD": 2}
"""What is sent as often as there are outputs or rounds, and how many of them are told apart: a third round is like the
second."""


@dataclass(frozen=True)
class Ending:
    """`outcome`: migrated, not begun, resumed, or what else it was. `reached`: the message came."""

    victim: str
    boundary: Boundary | None
    reached: bool
    outcome: str
    seconds: float
    wrong: tuple[str, ...]


@dataclass
class Moving(Counting):
    tokens: int = TOKENS
    model = "boundary/counting"


class Scene:
    """One platform for many kills, one after another."""

    def __init__(self, platform: Platform, folder: Path) -> None:
        self.platform = platform
        self.folder = folder
        self._warmed: dict[str, int] = {}
        """The invokers' processes that have once started an instance, by node."""

    def record(self) -> list[Boundary]:
        """The boundaries of an undisturbed move, in the order in which they came."""
        ending = self._run("", None)
        assert not ending.wrong and ending.outcome == "migrated", ending
        lines = (self.folder / "frames.jsonl").read_text().splitlines()
        found = [Boundary(self._roles[process], *rest) for process, *rest in map(json.loads, lines)]
        last = max(number for number, each in enumerate(found) if each in LAST)
        return [each for each in found[: last + 1] if each.number <= REPEATED.get(each.frame, sys.maxsize)]

    def play(self, victim: str, boundary: Boundary) -> Ending:
        """Kill `victim` at `boundary`."""
        return self._run(victim, boundary)

    def _run(self, victim: str, boundary: Boundary | None) -> Ending:
        platform = self.platform
        self._warm()
        began = time.monotonic()
        stream = Moving(platform)
        thread = stream.start()
        eventually(lambda: len(stream.values) >= 5 or stream.end, 60, "the stream speaks")
        record = platform.get(f"/v1/invocations/{stream.invocation}")
        source = record["node"]
        (destination,) = (node for node in NODES if node != source)
        self._roles = {source: "source", destination: "destination", "controller": "controller", "gateway-0": "gateway"}
        self._order(stream.invocation, destination, victim, boundary)
        asker = threading.Thread(target=self._ask, args=(stream.invocation, destination))
        asker.start()
        thread.join(90)
        reached = not (self.folder / "order.json").exists()
        if stream.end != "done" and victim == "gateway":
            stream.again()
        asker.join(60)
        wrong = [] if stream.whole else [f"stream: {stream.end} {stream.problem} {len(stream.values)}"]
        wrong += [f"jump {pair}" for pair in jumps(stream.values)[:3]]
        outcome = self._outcome(stream.invocation, source, destination)
        wrong += self._left()
        return Ending(victim, boundary, reached, outcome, time.monotonic() - began, tuple(wrong))

    def _warm(self) -> None:
        """Both nodes can start an instance fast, and one has it."""
        lives = {node: pid_of(self.platform, "sllm_invoker", node) for node in NODES}
        if self._warmed != lives or not self._rows():
            stream = Moving(self.platform, tokens=WARMING)
            thread = stream.start()
            eventually(lambda: stream.values or stream.end, 60, "an instance")
            while lacking := set(NODES) - {row["node"] for row in self._rows() if row["state"] == "ready"}:
                assert not stream.end, (stream.end, stream.problem)
                self._ask(stream.invocation, lacking.pop())
            self._delete(f"/v1/invocations/{stream.invocation}")
            thread.join(60)
            eventually(self._quiet, 30, "nothing runs")
            self._warmed = lives
        for row in sorted(self._rows(), key=lambda row: str(row["node"]))[1:]:
            self._delete(f"/v1/instances/{row['instance']}")
        eventually(lambda: len(self._rows()) == 1 and self._quiet(), 30, "one instance is left")

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._get("/v1/instances")["instances"]
        return rows

    def _delete(self, path: str) -> None:
        httpx.delete(self.platform.url + path, headers=self.platform.headers, timeout=30)

    def _ask(self, invocation: str, node: str) -> None:
        with contextlib.suppress(httpx.HTTPError):
            self.answer = self.platform.post(f"/v1/invocations/{invocation}/migrate", {"node": node}).text

    def _outcome(self, invocation: str, source: str, destination: str) -> str:
        try:
            record = self._get(f"/v1/invocations/{invocation}")
        except AssertionError as error:
            return f"unknown: {error}"
        if record["resumes"]:
            return "resumed"
        where = (record["fence"], record["node"])
        return {(1, source): "not begun", (2, destination): "migrated"}.get(where, f"fence {where[0]} at {where[1]}")

    def _get(self, path: str) -> Any:
        """With a gateway and a controller that may only just have been started again."""

        def got() -> Any:
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(self.platform.url + path, headers=self.platform.headers, timeout=30)
                assert answer.status_code in (200, 503), answer.text
                return answer.json() if answer.status_code == 200 else None

        return eventually(got, 30, path)

    def _left(self) -> list[str]:
        """What is left of it that should not be."""
        deadline = time.monotonic() + QUIET
        while not self._quiet():
            if time.monotonic() > deadline:
                rows = [(row["node"], row["state"], row["running"], row["pid"]) for row in self._rows()]
                counts = self._get("/v1/status")["counts"]
                return [f"left: {rows}, processes {self._containers()}, strays {self._strays()}, {counts}"]
            select_nothing(0.1)
        (self.folder / "order.json").unlink(missing_ok=True)
        return []

    def _quiet(self) -> bool:
        """Both nodes are up, nothing runs or waits, and the processes are those of the instances."""
        with contextlib.suppress(httpx.HTTPError, AssertionError):
            counts = self.platform.get("/v1/status")["counts"]
            rows = self.platform.get("/v1/instances")["instances"]
            return (
                nothing_runs(self.platform)
                and not counts["waiting"] + counts["running"]
                and {row["state"] for row in rows} <= {"ready"}
                and {row["pid"] for row in rows} == self._containers()
                and not self._strays()
            )
        return False

    def _zygotes(self) -> dict[int, tuple[int, int]]:
        """Zygotes and what was forked from them, with their parents and when they started, the first of them first."""
        found = {}
        for pid in self.platform.processes():
            with contextlib.suppress(OSError):
                standby = Path(f"/proc/{pid}/comm").read_text().strip() == STANDBY
                if not standby and b"sllm_invoker.containers.zygote" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
                    found[pid] = (int(fields[1]), int(fields[19]))
        return dict(sorted(found.items(), key=lambda item: item[1][1]))

    def _containers(self) -> set[int]:
        """Those that serve an instance: forked by a template, which the libraries' zygote forked, which a node's first
        one forked. They outlive their template, and are the invoker's children then. Those that stand by serve none."""
        generations: dict[int, int] = {}
        invokers: set[int] = set()
        for pid, (parent, _) in self._zygotes().items():
            first = parent not in generations and parent not in invokers
            generations[pid] = 0 if first else generations.get(parent, 2) + 1
            if first:
                invokers.add(parent)
        return {pid for pid, generation in generations.items() if generation >= 3}

    def _strays(self) -> set[int]:
        """Those that no invoker knows of."""
        known: set[int] = set()
        for directory in self.platform.state.glob("nodes/*"):
            known |= set(tree.recorded(directory))
        return set(self._zygotes()) - known

    def _order(self, invocation: str, destination: str, victim: str, boundary: Boundary | None) -> None:
        names = {role: name for name, role in self._roles.items()}
        module = {"controller": "sllm_faas.controller", "gateway": "sllm_gateway"}.get(victim, "sllm_invoker")
        order = {
            "invocation": invocation.removeprefix("inv-"),
            "destination": destination,
            "victim": pid_of(self.platform, module, names[victim]) if victim else 0,
            "at": [names[boundary.party], *boundary[1:]] if boundary else None,
        }
        for name in ("frames.jsonl", "done.json"):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / "new.json").write_text(json.dumps(order))
        (self.folder / "new.json").rename(self.folder / "order.json")


@contextlib.contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """Two nodes and a gateway whose messages are watched."""
    watched = folder / "boundaries"
    watched.mkdir()
    app = folder / "app.py"
    app.write_text(APP)
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "SLLM_BOUNDARIES")}
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parent / "boundary"), before["PYTHONPATH"]))
    )
    os.environ["SLLM_BOUNDARIES"] = str(watched)
    try:
        with platform_at(folder / "state", "--gateways", "1", "--invokers", "2") as platform:
            platform.sllm("deploy", str(app))
            yield Scene(platform, watched)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
