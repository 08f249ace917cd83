"""Predicted and actual start-up times of real instances.

Two invokers on this machine; a counting model, two models of random weights (110M, bf16) of which the DRAM tier of a
node holds one, a plain function and a class with a slow enter. Starts come one, two and four at once; invokers are
killed so that instances start from every layer of warmth. The estimator begins knowing nothing; what it says of the
first LEARNING starts is not counted.

A start is held against the largest of 40 ms, a tenth of it, and 1.2 times the spread (95th percentile of the distance
from the median) of identical ones: same function, tier, warmth and number at once; the nodes are one machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import ROOT, Platform, Report, arguments, percentile, platform_up, table
from benchmarks.models import build

APP = "starts"
LEARNING = 20
NODES = ("node-0", "node-1")
BODIES: dict[str, tuple[str, Any]] = {
    "plain": ("/v1/functions/starts/plain", {"value": 1}),
    "Slow": ("/v1/functions/starts/Slow.value", {"value": 1}),
    **{
        name: ("/v1/completions", {"model": f"{APP}/{name}", "prompt": "1 2", "max_tokens": 1})
        for name in ("counting", "model-a", "model-b")
    },
}
DRAM_MB = 384
"""Of each node: one of the two models, and a slab to spare."""
REST = 1.0
"""Seconds before each round without a request: an idle function is what starts cold."""
SETTLE = 0.2
"""Seconds until the controller knows that nothing runs any more: what is stopped then is not started anew."""
HEADER = [
    "function",
    "tier",
    "warmth",
    "at once",
    "starts",
    "predicted ms",
    "actual",
    "error p95",
    "spread p95",
]
FLOOR, PART, SPREAD = 0.04, 0.1, 1.2


Kind = tuple[str, str, str, int]


@dataclass(frozen=True)
class Started:
    """One start as the controller recorded it, and how many were begun at once."""

    function: str
    node: str
    tier: str
    warmth: str
    at_once: int
    predicted: float
    actual: float
    record: dict[str, Any]

    @property
    def kind(self) -> Kind:
        return (self.function, self.tier, self.warmth, self.at_once)

    @property
    def error(self) -> float:
        return abs(self.predicted - self.actual)


class Driver:
    def __init__(self, platform: Platform, client: httpx.AsyncClient, rng: random.Random) -> None:
        self.platform, self.client, self.rng = platform, client, rng
        self.seen: set[str] = set()
        self.starts: list[Started] = []

    async def round(self, functions: list[str]) -> None:
        """Start one instance of each at the same moment, call it once, stop all of them."""
        await asyncio.gather(*(self._call(name) for name in functions))
        await asyncio.sleep(SETTLE)
        instances = (await self._get("/v1/instances"))["instances"]
        for name in functions:
            for record in (await self._get(f"/v1/functions/{APP}/{name}"))["starts"]:
                if record["instance"] not in self.seen:
                    self.seen.add(record["instance"])
                    if record["state"] != "ready":
                        raise SystemExit(f"a start of {name} {record['state']}: {record['error']}")
                    keys = ("node", "tier", "warmth")
                    known = [record[key] for key in keys]
                    times = (record["predicted"], record["actual"])
                    self.starts.append(Started(name, *known, len(functions), *times, record))
        await asyncio.gather(*(self._stop(each["instance"]) for each in instances))
        while (await self._get("/v1/instances"))["instances"]:
            await asyncio.sleep(0.02)

    async def only(self, node: str | None) -> None:
        """Have instances placed there; None: anywhere."""
        for name in NODES:
            verb = "uncordon" if node in (None, name) else "cordon"
            (await self.client.post(f"/v1/nodes/{name}/{verb}")).raise_for_status()

    async def renew(self, node: str) -> None:
        """Restart the invoker: the node has nothing but its disk then."""
        before = await self._life(node)
        os.kill(self.platform.child(node), signal.SIGKILL)
        while await self._life(node) in ("", before):
            await asyncio.sleep(0.1)
        await asyncio.sleep(SETTLE)

    async def _life(self, node: str) -> str:
        nodes = (await self._get("/v1/nodes"))["nodes"]
        return next((each["life"] for each in nodes if each["name"] == node and each["state"] == "up"), "")

    async def _call(self, name: str) -> None:
        path, body = BODIES[name]
        answer = await self.client.post(path, json=body)
        if answer.status_code != 200:
            raise SystemExit(f"{name} answered {answer.status_code}: {answer.text[:500]}")

    async def _stop(self, instance: str) -> None:
        await self.client.delete(f"/v1/instances/{instance}")

    async def _get(self, path: str) -> Any:
        return (await self.client.get(path)).raise_for_status().json()


async def drive(platform: Platform, count: int, limit: float) -> tuple[list[Started], float]:
    """At least `count` starts, or as many as `limit` seconds allow; and how many errors /metrics has counted."""
    rng = random.Random(7)
    async with httpx.AsyncClient(base_url=platform.url, headers=platform.headers, timeout=120) as client:
        driver = Driver(platform, client, rng)
        names = list(BODIES)
        began, number = time.monotonic(), 0
        while len(driver.starts) < count and time.monotonic() - began < limit:
            number += 1
            if number % 6 == 0:
                await driver.renew(rng.choice(NODES))
            await driver.only(rng.choice((*NODES, None)))
            await asyncio.sleep(REST)
            await driver.round(rng.sample(names, rng.choice((1, 1, 2, 4))))
        text = (await client.get("/metrics")).raise_for_status().text
        exported = next(line for line in text.splitlines() if line.startswith("sllm_start_error_seconds_count"))
        return driver.starts, float(exported.split()[-1])


def spreads(starts: list[Started]) -> dict[Kind, float]:
    """Kind -> spread of identical starts."""
    kinds: dict[Kind, list[float]] = defaultdict(list)
    for start in starts:
        kinds[start.kind].append(start.actual)
    return {
        kind: percentile([abs(value - statistics.median(values)) for value in values], 95)
        for kind, values in kinds.items()
    }


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--dump", metavar="PATH", help="write every start with its timeline")
    args = parser.parse_args()
    count, limit = (60, 120.0) if args.quick else (480, 900.0)
    report = Report("starts")
    with tempfile.TemporaryDirectory() as name:
        build("110M", Path(name) / "a", variants=(Path(name) / "b",))
        os.environ["SLLM_BENCH_MODELS"] = name
        with platform_up("--invokers", str(len(NODES)), "--dram-mb", str(DRAM_MB * len(NODES))) as platform:
            platform.sllm("deploy", str(ROOT / "benchmarks/apps/starts.py"))
            starts, exported = asyncio.run(drive(platform, count, limit))
    if args.dump:
        whole = [{**start.record, "function": start.function, "at_once": start.at_once} for start in starts]
        Path(args.dump).write_text(json.dumps(whole))
    spread = spreads(starts)
    counted = starts[LEARNING:]
    rows = []
    for kind in sorted({start.kind for start in counted}):
        of = [start for start in counted if start.kind == kind]
        predicted, actual = (statistics.median(s.predicted for s in of), statistics.median(s.actual for s in of))
        figures = (predicted, actual, percentile([s.error for s in of], 95), spread[kind])
        rows.append([*kind, len(of), *(f"{1e3 * value:.0f}" for value in figures)])
    table(HEADER, rows)
    ratio = [s.error / max(FLOOR, PART * s.actual, SPREAD * spread[s.kind]) for s in counted]
    print(f"\n{len(starts)} starts, the first {LEARNING} not counted")
    report.figure("error p50, ms", 1e3 * percentile([s.error for s in counted], 50))
    report.figure("error p95, ms", 1e3 * percentile([s.error for s in counted], 95))
    report.figure("p95 of error / allowed, first half", percentile(ratio[: len(ratio) // 2], 95))
    report.figure("p95 of error / allowed, second half", percentile(ratio[len(ratio) // 2 :], 95))
    report.at_least("starts", len(starts), 50 if args.quick else 200)
    report.at_least("starts in the exported error histogram", exported, len(starts))
    report.at_most("p95 of error / allowed", percentile(ratio, 95), 1.0)
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
