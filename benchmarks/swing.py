"""0 to 30 to 0 requests a second, again and again, of 200 ms of work at one request per instance.

Poisson arrivals whose rate goes up, stays and comes down, then silence until the instances are gone; half of the
requests are streams. Every answer is checked in full. The instance count is read from the controller's log: each
start is one up, each stop one down; a swing should change direction once, at its top. Memory is that of all processes
of the platform, by what they are: before the first request, and after each swing once no instance is left. What is kept
on purpose then, zygotes of warm layers and the process forked ahead of need, is there at the start too for a function
without libraries; so memory is to be back where it began, but for a tenth that the servers' own heaps may have grown.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import ROOT, Platform, Report, arguments, memory_kb, percentile, platform_up, table

RATE, RAMP, HOLD = 30.0, 16.0, 8.0
"""Requests a second at the top; seconds up (and down), and at the top. Down takes twice as long as idle instances are
kept, so that they are stopped while others serve."""
SILENCE = 12.0
"""Seconds without a request: the function keeps idle instances for eight."""
PARTS = 4
PROCESSES = ("supervisor", "controller", "gateway", "invoker", "zygote", "standby", "instance")
"""Of the platform, in the order shown. Warm layers are zygotes; a process forked ahead of need is a standby."""


def arrivals(rng: random.Random) -> Iterator[float]:
    """Times of one swing's requests: Poisson with the rate of the moment, by thinning."""
    now, end = 0.0, 2 * RAMP + HOLD
    while (now := now + rng.expovariate(RATE)) < end:
        if rng.random() < min(1.0, now / RAMP, (end - now) / RAMP):
            yield now


async def request(client: httpx.AsyncClient, stream: bool) -> tuple[str, float]:
    """What was wrong with the answer, empty for nothing; and the seconds it took."""
    began = time.monotonic()
    method, accept = ("stream", "text/event-stream") if stream else ("call", "application/json")
    try:
        answer = await client.post(f"/v1/functions/swing/Work.{method}", json={}, headers={"Accept": accept})
    except httpx.HTTPError as error:
        return repr(error), time.monotonic() - began
    seconds = time.monotonic() - began
    if answer.status_code != 200:
        return f"status {answer.status_code}: {answer.text[:200]}", seconds
    if not stream:
        return "" if answer.json() == PARTS else f"answered {answer.text[:100]}", seconds
    events = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    return "" if events == ["output"] * PARTS + ["done"] else f"stream ended as {events}", seconds


async def swing(client: httpx.AsyncClient, rng: random.Random) -> list[tuple[bool, str, float]]:
    loop = asyncio.get_running_loop()
    began, tasks = loop.time(), []
    for number, at in enumerate(arrivals(rng)):
        await asyncio.sleep(max(0.0, began + at - loop.time()))
        tasks.append((bool(number % 2), asyncio.create_task(request(client, bool(number % 2)))))
    return [(stream, *(await task)) for stream, task in tasks]


def counts(log: Path, since: float) -> list[int]:
    """The number of instances after each start and stop logged from then on."""
    found, instances = [0], 0
    for line in log.read_text().splitlines():
        entry: dict[str, Any] = json.loads(line)
        if entry.get("component") == "controller" and entry["event"] in ("start", "stop") and _at(entry) >= since:
            instances += 1 if entry["event"] == "start" else -1
            found.append(instances)
    return found


def _at(entry: dict[str, Any]) -> float:
    return datetime.datetime.fromisoformat(entry["time"]).timestamp()


def turns(values: list[int]) -> int:
    """How often a sequence changes its direction."""
    steps = [after - before for before, after in pairwise(values) if after != before]
    return sum(a * b < 0 for a, b in pairwise(steps))


def memory_mb(platform: Platform) -> dict[str, float]:
    """Proportional memory of the platform's processes, by what they are."""
    root = json.loads((platform.state / "run/supervisor.json").read_text())["pid"]
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(path.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(path.parent.name))
    parts, open_ = dict.fromkeys(PROCESSES, 0.0), [root]
    while open_:
        pid = open_.pop()
        open_ += children.get(pid, [])
        with contextlib.suppress(OSError):  # it is gone
            name = part(pid)
            parts[name] = parts.get(name, 0.0) + memory_kb(pid).get("Pss", 0) / 1024
    return parts


def part(pid: int) -> str:
    """The name a forked process gave itself, or the last word of the module it runs. Raises OSError when it is gone."""
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    if name.startswith("sllm-"):
        return name.removeprefix("sllm-")
    command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    module = command[command.index("-m") + 1] if "-m" in command else name
    return module.rsplit(".", 1)[-1].removeprefix("sllm_")


async def instances(client: httpx.AsyncClient) -> int:
    return len((await client.get("/v1/instances")).raise_for_status().json()["instances"])


async def run(platform: Platform, swings: int, report: Report) -> None:
    rng = random.Random(4)
    limits = httpx.Limits(max_connections=500)
    rows, wrong, cut, most_turns, left = [], 0, 0, 0, 0
    async with httpx.AsyncClient(base_url=platform.url, headers=platform.headers, timeout=60, limits=limits) as client:
        await asyncio.sleep(SILENCE)
        held_mb = [memory_mb(platform)]
        for number in range(swings):
            began = time.time()
            answers = await swing(client, rng)
            await asyncio.sleep(SILENCE)
            held = counts(platform.state / "logs/platform.jsonl", began)
            bad = [(stream, text) for stream, text, _ in answers if text]
            for stream, text in bad[:5]:
                print(f"{'stream' if stream else 'call'}: {text}")
            wrong += len(bad)
            cut += sum(stream for stream, _ in bad)
            most_turns = max(most_turns, turns(held))
            left = max(left, await instances(client))
            held_mb.append(memory_mb(platform))
            seconds = [value for _, text, value in answers if not text]
            rows.append(
                [number + 1, len(answers), len(bad), max(held), turns(held), held[-1]]
                + [f"{1e3 * percentile(seconds, q):.0f}" for q in (50, 99)]
                + [f"{sum(held_mb[-1].values()):.0f}"]
            )  # fmt: skip
    table(["swing", "requests", "lost", "most instances", "turns", "at the end", "p50 ms", "p99", "MiB"], rows)
    needed = math.ceil(RATE * 0.2)
    print(f"\n{RATE:g} requests a second of 200 ms keep {needed} instances busy on the average")
    report.at_most("requests lost", wrong, 0)
    report.at_most("streams cut", cut, 0)
    report.at_most("most changes of direction in a swing", most_turns, 1)
    report.at_most("instances left after a swing", left, 0)
    totals = [sum(parts.values()) for parts in held_mb]
    print("\nMiB by process, without an instance:")
    names = list(dict.fromkeys(name for parts in held_mb for name in parts))
    lines = [[name, *(f"{parts.get(name, 0.0):.1f}" for parts in held_mb)] for name in names]
    heads = ["at the start", *(f"swing {number + 1}" for number in range(swings))]
    table(["process", *heads], [*lines, ["all", *(f"{total:.1f}" for total in totals)]])
    report.figure("memory_mib_at_the_start", totals[0])
    report.figure("memory_mib_after_the_first_swing", totals[1])
    report.figure("memory_mib_after_the_last_swing", totals[-1])
    report.at_most("memory after the last swing / at the start", totals[-1] / totals[0], 1.1)
    report.at_most("memory after the last swing / after the first", totals[-1] / totals[1], 1.1)


def main() -> int:
    args = arguments(__doc__).parse_args()
    report = Report("swing")
    with platform_up() as platform:
        platform.sllm("deploy", str(ROOT / "benchmarks/apps/swing.py"))
        asyncio.run(run(platform, 2 if args.quick else 5, report))
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
