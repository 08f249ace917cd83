"""A rolling restart under full load: every node in turn is drained, restarted and used again, five times over.

All the while each of a number of clients calls again as soon as it has its answer: streams of the counting model, a
plain function, and a generator. Every answer is checked in full: a stream must count on without a gap or a repetition
to its last token and its terminal event, a sum must be right. Nothing may fail and no stream may end early.

The pause that a client sees is the longest time between two outputs of one stream, beside what it is while nothing is
restarted. What a restart takes is bounded below by the start of the instances elsewhere and of the invoker itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.common import ROOT, Platform, Report, arguments, percentile, platform_up, table

NODES, ROUNDS = 2, 5
TOKENS, ITEMS = 150, 40
APP = f"""
import asyncio, time
import sllm

app = sllm.App("drain")
counting = app.llm(
    "counting",
    checkpoint={str(ROOT / "examples/counting/model")!r},
    concurrency=8,
    max_containers=4,
    scaledown_window=60,
)


@app.function(max_containers=4, scaledown_window=60)
@sllm.concurrent(max_inputs=8)
async def add(x: int, y: int) -> int:
    await asyncio.sleep(0.05)
    return x + y


@app.function(max_containers=4, scaledown_window=60)
@sllm.concurrent(max_inputs=8)
async def numbers(start: int, count: int):
    for number in range(start, start + count):
        yield number
        await asyncio.sleep(0.05)
"""


@dataclass
class Seen:
    """What the clients of one kind saw."""

    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    pauses: list[tuple[float, float]] = field(default_factory=list)
    """(when it ended, seconds): the longest of each answer."""

    def fail(self, what: str) -> None:
        self.failed[what] += 1


class Clients:
    def __init__(self, platform: Platform) -> None:
        self.http = httpx.AsyncClient(
            base_url=platform.url,
            headers=platform.headers,
            timeout=httpx.Timeout(120.0),
            limits=httpx.Limits(max_connections=None),
        )
        self.seen = {kind: Seen() for kind in ("counting", "add", "numbers")}
        self.stop = asyncio.Event()
        self.turns = itertools.count()

    async def run(self, kind: str) -> None:
        seen, call = self.seen[kind], getattr(self, kind)
        while not self.stop.is_set():
            try:
                await call(seen, next(self.turns) % 900)
            except httpx.HTTPError as error:
                seen.fail(f"connection: {type(error).__name__}")

    async def add(self, seen: Seen, number: int) -> None:
        began = time.monotonic()
        answer = await self.http.post("/v1/functions/drain/add", json={"x": number, "y": 1})
        seen.pauses.append((time.monotonic(), time.monotonic() - began))
        if answer.status_code != 200:
            seen.fail(f"{answer.status_code}: {answer.text[:200]}")
        elif answer.json() != number + 1:
            seen.fail("wrong sum")
        else:
            seen.answered += 1

    async def numbers(self, seen: Seen, number: int) -> None:
        got: list[int] = []
        ended = False
        async for event, data in self.events(seen, "/v1/functions/drain/numbers", {"start": number, "count": ITEMS}):
            if event == "error":
                seen.fail(data[:200])
                return
            ended = ended or event == "done"
            if event == "output":
                got.append(json.loads(data))
        self.judge(seen, got, list(range(number, number + ITEMS)), ended=ended)

    async def counting(self, seen: Seen, number: int) -> None:
        body = {
            "model": "drain/counting",
            "prompt": f"{number}",
            "max_tokens": TOKENS,
            "stream": True,
            "temperature": 0,
        }
        text, ended = "", False
        async for _, data in self.events(seen, "/v1/completions", body):
            if data == "[DONE]":
                ended = True
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                seen.fail(chunk["error"]["message"][:200])
                return
            text += "".join(choice["text"] for choice in chunk["choices"])
        want = [(number + 1 + step) % 1000 for step in range(TOKENS)]
        self.judge(seen, [int(word) for word in text.split()], want, ended=ended)

    def judge(self, seen: Seen, got: list[int], want: list[int], *, ended: bool) -> None:
        if got == want and ended:
            seen.answered += 1
        elif got == want[: len(got)]:
            seen.cut += 1
        else:
            seen.fail("wrong numbers")

    async def events(self, seen: Seen, path: str, body: object) -> AsyncIterator[tuple[str, str]]:
        """(event, data) of the stream; an answer that is no stream is a failure."""
        headers = {"Accept": "text/event-stream"}
        async with self.http.stream("POST", path, json=body, headers=headers) as answer:
            if answer.status_code != 200:
                await answer.aread()
                seen.fail(f"{answer.status_code}: {answer.text[:200]}")
                return
            event, last, longest = "message", time.monotonic(), 0.0
            async for line in answer.aiter_lines():
                if line.startswith("event: "):
                    event = line[7:]
                elif line.startswith("data: "):
                    now = time.monotonic()
                    longest, last = max(longest, now - last), now
                    yield event, line[6:]
                    event = "message"
            seen.pauses.append((last, longest))


def metric(platform: Platform, name: str) -> float:
    """The sum of a counter over its labels."""
    with urllib.request.urlopen(platform.url + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


async def roll(platform: Platform, rounds: int, clients: int) -> tuple[Clients, list[float], float, float]:
    """The clients, seconds of each restart, and when the first began and the last ended."""
    load = Clients(platform)
    work = [asyncio.create_task(load.run(kind)) for kind in load.seen for _ in range(clients)]
    await asyncio.sleep(15)  # undisturbed, for comparison
    began, took = time.monotonic(), []
    for number in range(rounds):
        for node in range(NODES):
            at = time.monotonic()
            await asyncio.to_thread(platform.sllm, "node", "restart", f"node-{node}")
            took.append(time.monotonic() - at)
            print(f"round {number + 1}: node-{node} restarted in {took[-1]:.1f} s", flush=True)
    ended = time.monotonic()
    load.stop.set()
    await asyncio.gather(*work)
    await load.http.aclose()
    return load, took, began, ended


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--clients", type=int, default=8, help="of each kind")
    options = parser.parse_args()
    rounds = 1 if options.quick else ROUNDS
    report = Report("drain")
    with tempfile.TemporaryDirectory() as directory:
        app = Path(directory) / "drain.py"
        app.write_text(APP)
        with platform_up("--invokers", str(NODES)) as platform:
            platform.sllm("deploy", str(app))
            load, took, began, ended = asyncio.run(roll(platform, rounds, options.clients))
            moves, resumes = metric(platform, "sllm_migrations_total"), metric(platform, "sllm_resumes_total")
    rows = []
    for kind, seen in load.seen.items():
        calm = [seconds for at, seconds in seen.pauses if at < began]
        rolling = [seconds for at, seconds in seen.pauses if began <= at <= ended]
        rows.append(
            (
                kind,
                seen.answered,
                sum(seen.failed.values()),
                seen.cut,
                *(f"{percentile(each, q):.2f}" for each in (calm, rolling) for q in (50, 100)),
            )
        )
        report.figure(f"{kind}: answered", seen.answered)
        report.figure(f"{kind}: longest pause, undisturbed (s)", percentile(calm, 100))
        report.figure(f"{kind}: longest pause, rolling (s)", percentile(rolling, 100))
        for what, count in seen.failed.most_common(5):
            print(f"{kind} failed {count} x {what}")
    print()
    table(("clients", "answered", "failed", "cut", "pause p50 s", "max s", "rolling p50 s", "max s"), rows)
    print(f"\n{len(took)} restarts, {percentile(took, 50):.1f} s each (p50), {moves:.0f} moves, {resumes:.0f} resumes")
    report.figure("restart p50 (s)", percentile(took, 50))
    report.figure("moves", moves)
    report.figure("resumes", resumes)
    report.at_most("failed requests", sum(sum(seen.failed.values()) for seen in load.seen.values()), 0)
    report.at_most("cut streams", sum(seen.cut for seen in load.seen.values()), 0)
    report.at_least("restarts", len(took), rounds * NODES)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
