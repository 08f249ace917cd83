"""Layered warmth on and off: start-up times and memory-seconds over a trace of conversations.

A trace in the Azure LLM 2023 format (TIMESTAMP,ContextTokens,GeneratedTokens) is mapped to fifty functions by a Zipf
law; each is a language model with a checkpoint of its own. Three ways to keep things warm:

    off       whole instances only, kept for ten minutes (what platforms without layers do); a start imports everything
    fixed     instances for a minute, every layer for ten
    layered   instances for a minute, every layer for as long as `containers.keepalive` says

The first three have room for all layers. Then `layered` in less of it: where the libraries and a few templates fit,
with one budget for all and with one for each kind, and where not even one template fits beside the libraries.

Simulated over the whole trace by the production pool (`containers.pool`) on a virtual clock, with costs that are
measured first on a running platform: what a layer takes to make and holds, what a start from each layer takes, what an
instance holds for itself. Assumed there: an instance runs eight requests at once, a token takes `TOKEN` seconds, and
starts do not slow each other down. With `--real SECONDS` that much of the trace is then sent to a platform, `off` and
`layered`, with the generated tokens cut to `CUT`, and the starts that happened and the memory that was held are taken
from the platform itself.
"""

from __future__ import annotations

import asyncio
import csv
import datetime
import heapq
import json
import os
import random
import shutil
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import httpx
from sllm_invoker.containers.keepalive import Cost, Fixed
from sllm_invoker.containers.pool import Pool
from sllm_invoker.containers.tree import private_mb

from benchmarks.common import ROOT, Platform, Report, arguments, percentile, platform_up, table
from sllm_faas import layers
from sllm_faas.spec import CheckpointSpec, FunctionSpec, Warmth

FUNCTIONS = 50
ZIPF = 1.0
TOKEN = 0.02
CONCURRENCY = 8
CUT = 32
LONG, SHORT = 600.0, 60.0
ROOM = 10
"""Templates that fit beside the libraries where room is short."""
LLM = FunctionSpec("model", kind="llm", checkpoint=CheckpointSpec("x"))


@dataclass(frozen=True)
class Request:
    at: float
    function: int
    tokens: int


def trace(path: Path, limit: float) -> list[Request]:
    """The requests of the trace's first `limit` seconds, mapped to functions by one seeded Zipf draw each."""
    rng = random.Random(1)
    weights = [1 / rank**ZIPF for rank in range(1, FUNCTIONS + 1)]
    found: list[Request] = []
    began: datetime.datetime | None = None
    with path.open() as file:
        for row in csv.DictReader(file):
            when = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26])
            began = began or when
            at = (when - began).total_seconds()
            if at > limit:
                break
            found.append(Request(at, rng.choices(range(FUNCTIONS), weights)[0], int(row["GeneratedTokens"])))
    return found


@dataclass(frozen=True)
class Costs:
    """Measured. `start`: seconds of a start by the layer it begins from; MiB an instance holds for itself, by mode."""

    layer: dict[str, Cost]
    start: dict[str, float]
    instance: dict[str, float]


@dataclass
class Outcome:
    starts: list[float] = field(default_factory=list)
    warmth: Counter[str] = field(default_factory=Counter)
    mb_seconds: float = 0.0
    requests: int = 0
    made: int = 0
    """Layers above base that were made."""


# -- simulated -----------------------------------------------------------------------------------------------


Pages = tuple[str, int]
"""What a layer holds that was made once: its key, and which making. Held until all that was forked from it is gone."""


@dataclass(eq=False)
class Instance:
    running: int = 0
    idle: float = 0.0
    ready: float = 0.0
    memory_mb: float = 0.0
    """For itself alone."""
    pages: frozenset[Pages] = frozenset()
    """Of the layers that it was forked through."""


def simulate(requests: Sequence[Request], costs: Costs, pool: Pool, window: float) -> Outcome:
    """One node with room for all instances, and as much for layers as `pool` says."""
    outcome = Outcome(requests=len(requests))
    pool.admit(layers.path(LLM, "")[0], costs.layer["base"], 0.0)
    instances: dict[int, list[Instance]] = defaultdict(list)
    pages: dict[str, frozenset[Pages]] = {layers.BASE: frozenset()}
    """Held by each layer that was made last."""
    order = count()
    ends: list[tuple[float, int, int, Instance]] = []
    now = 0.0

    def advance(to: float) -> None:
        """Second by second: the invoker's own tidying, and the memory held meanwhile."""
        nonlocal now
        while now < to:
            step = min(1.0, to - now)
            alive = [one for known in instances.values() for one in known]
            held = {*chain(*(one.pages for one in alive), *(pages[key] for key in pool.layers()))}
            shared = sum(costs.layer[key.split(":")[0]].memory_mb for key, _ in held)
            outcome.mb_seconds += step * (shared + sum(one.memory_mb for one in alive))
            now += step
            for key in pool.surplus(now):
                pool.leave(key)
            for function, known in instances.items():
                instances[function] = [
                    one for one in known if one.running or one.ready > now or now - one.idle < window
                ]

    def finish_until(to: float) -> None:
        while ends and ends[0][0] <= to:
            at, _, _, one = heapq.heappop(ends)
            advance(at)
            one.running -= 1
            one.idle = at

    for request in requests:
        finish_until(request.at)
        advance(request.at)
        known = instances[request.function]
        one = next((one for one in known if one.running < CONCURRENCY), None)
        if one is None:
            path = layers.path(LLM, f"model-{request.function}")
            one = _start(pool, path, pages, costs, now, outcome)
            known.append(one)
        one.running += 1
        done = max(now, one.ready) + request.tokens * TOKEN
        heapq.heappush(ends, (done, next(order), request.function, one))
    finish_until(float("inf"))
    return outcome


def _start(
    pool: Pool,
    path: Sequence[layers.Layer],
    pages: dict[str, frozenset[Pages]],
    costs: Costs,
    now: float,
    outcome: Outcome,
) -> Instance:
    """A start through `path`. It makes the missing layers that are worth it; what the others would have done for it
    takes it as long, and is memory of its own."""
    if not pool.budget_mb:
        seconds, memory, warmth = costs.start["off"], costs.instance["off"], "off"
        held = frozenset[Pages]()
    else:
        warmest = pool.warmest(path)
        assert warmest is not None
        seconds, memory, warmth = costs.start["template"], costs.instance["layered"], warmest.warmth
        through, held = pool.wanted(path, now), pages[warmest.key]
        for layer in path[path.index(warmest) + 1 :]:
            cost = costs.layer[layer.warmth]
            seconds += cost.seconds
            if layer in through:
                pool.admit(layer, cost, now)
                outcome.made += 1
                held = pages[layer.key] = held | {(layer.key, outcome.made)}
            else:
                memory += cost.memory_mb
        pool.use(path, now)
    outcome.starts.append(seconds)
    outcome.warmth[warmth] += 1
    return Instance(ready=now + seconds, memory_mb=memory, pages=held)


def pools(costs: Costs) -> dict[str, tuple[Pool, float]]:
    """What is simulated: how layers are kept, and for how many seconds instances are."""
    libs, template = costs.layer["libs"].memory_mb, costs.layer["template"].memory_mb
    room, short = libs + ROOM * template, libs + template / 2
    few: dict[Warmth, float] = {"libs": libs, "template": room - libs}
    fewer: dict[Warmth, float] = {"template": (room - libs) / 2}
    return {
        "off": (Pool(budget_mb=0.0), LONG),
        "off, one minute": (Pool(budget_mb=0.0), SHORT),
        "fixed": (Pool(keep=Fixed(LONG)), SHORT),
        "layered": (Pool(), SHORT),
        f"layered, {room:.0f} MiB": (Pool(budget_mb=room), SHORT),
        f"{room:.0f} MiB, split": (Pool(budget_mb=room, budgets=few), SHORT),
        f"{room:.0f} MiB, half for templates": (Pool(budget_mb=room, budgets=fewer), SHORT),
        f"layered, {short:.0f} MiB": (Pool(budget_mb=short), SHORT),
    }


# -- real ----------------------------------------------------------------------------------------------------


def models(directory: Path, number: int) -> Path:
    """Copies of the counting model that differ in one setting, so that each is its own checkpoint."""
    source = ROOT / "examples/counting/model"
    for index in range(number):
        target = directory / f"model-{index}"
        shutil.copytree(source, target)
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "copy": index}))
    return directory


def deploy(platform: Platform, directory: Path, window: float) -> None:
    platform.env.update(SLLM_WARMTH_MODELS=str(directory), SLLM_WARMTH_WINDOW=str(window))
    platform.sllm("deploy", "benchmarks/apps/warmth.py")


def call(platform: Platform, function: int) -> float:
    body = {"model": f"warmth/model-{function}", "prompt": "1 2 3", "max_tokens": 4}
    request = urllib.request.Request(
        platform.url + "/v1/completions", data=json.dumps(body).encode(), headers=platform.headers
    )
    began = time.monotonic()
    with urllib.request.urlopen(request, timeout=300) as answer:
        answer.read()
    return time.monotonic() - began


def get(platform: Platform, path: str) -> Any:
    request = urllib.request.Request(platform.url + path, headers=platform.headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def zygotes(platform: Platform) -> list[dict[str, Any]]:
    """What the invoker logged of its layers, in order."""
    lines = [line for path in (platform.state / "logs").glob("*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if '"zygote_' in line]


def measure() -> Costs:
    """Costs on a running platform, once with layers and once without."""
    layer: dict[str, Cost] = {}
    start: dict[str, float] = {}
    instance: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as where:
        directory = models(Path(where), 4)
        for mode, flags in (("layered", ()), ("off", ("--layers-mb", "0"))):
            with platform_up("--invokers", "1", *flags) as platform:
                deploy(platform, directory, 3600.0)
                for function in range(4):
                    call(platform, function)
                found = get(platform, "/v1/instances")["instances"]
                times = [item["actual"] for item in found]
                start["template" if mode == "layered" else "off"] = percentile(times, 50)
                instance[mode] = percentile([private_mb(item["pid"]) for item in found], 50)
                if mode == "layered":
                    for item in zygotes(platform):
                        if item["event"] == "zygote_ready":
                            kind = str(item["layer"]).split(":")[0]
                            layer.setdefault(kind, Cost(item["seconds"], float(item["memory_mb"])))
    return Costs(layer, start, instance)


async def replay(platform: Platform, requests: Sequence[Request]) -> None:
    """Every request at its time; waits for all answers. A request that fails ends the benchmark."""
    began = time.monotonic()

    async def one(client: httpx.AsyncClient, request: Request) -> None:
        await asyncio.sleep(max(0.0, began + request.at - time.monotonic()))
        body = {"model": f"warmth/model-{request.function}", "prompt": "1 2 3", "max_tokens": min(CUT, request.tokens)}
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            raise SystemExit(f"a request failed: {answer.status_code} {answer.text[:300]}")

    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=platform.url, headers=platform.headers, timeout=300, limits=limits) as client:
        await asyncio.gather(*(one(client, request) for request in requests))


async def watch(platform: Platform, outcome: Outcome, seen: dict[str, float]) -> None:
    """Every second: memory that instances and layers hold for themselves, and the starts there were."""
    last = time.monotonic()
    while True:
        await asyncio.sleep(1.0)
        found = (await asyncio.to_thread(get, platform, "/v1/instances"))["instances"]
        held = 0.0
        for item in found:
            held += private_mb(item["pid"]) if item["pid"] else 0.0
            if item["actual"] is not None and item["instance"] not in seen:
                seen[item["instance"]] = item["actual"]
                outcome.warmth[item["warmth"]] += 1
        live: dict[str, int] = {}
        for entry in zygotes(platform):
            if entry["event"] == "zygote_ready":
                live[entry["layer"]] = entry["pid"]
            else:
                live.pop(entry["layer"], None)
        held += sum(private_mb(pid) for key, pid in live.items() if key != layers.BASE)
        now = time.monotonic()
        outcome.mb_seconds += held * (now - last)
        last = now


def real(requests: Sequence[Request], layered: bool) -> Outcome:
    outcome = Outcome(requests=len(requests))
    seen: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as where:
        directory = models(Path(where), FUNCTIONS)
        flags = () if layered else ("--layers-mb", "0")
        with platform_up("--invokers", "1", *flags) as platform:
            deploy(platform, directory, SHORT if layered else LONG)

            async def run() -> None:
                watching = asyncio.create_task(watch(platform, outcome, seen))
                try:
                    await replay(platform, requests)
                    await asyncio.sleep(1.5)
                finally:
                    watching.cancel()
                if watching.done() and not watching.cancelled():
                    await watching

            asyncio.run(run())
    outcome.starts = list(seen.values())
    return outcome


# ------------------------------------------------------------------------------------------------------------


def row(name: str, outcome: Outcome) -> list[object]:
    starts = outcome.starts
    shown = [f"{percentile(starts, q):.3f}" for q in (50, 95, 99)]
    kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(outcome.warmth.items()))
    return [
        name,
        outcome.requests,
        len(starts),
        *shown,
        f"{sum(starts):.0f}",
        f"{outcome.mb_seconds / 1024:.0f}",
        outcome.made or "",
        kinds,
    ]


HEADER = ("", "requests", "starts", "p50 s", "p95 s", "p99 s", "sum s", "GiB·s", "made", "began from")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("trace", type=Path, help="a trace in the Azure LLM 2023 format")
    parser.add_argument("--real", type=float, default=0.0, metavar="SECONDS", help="also send this much of it")
    options = parser.parse_args()
    report = Report("warmth")
    os.chdir(ROOT)
    costs = measure()
    print("Measured:")
    for kind, cost in costs.layer.items():
        print(f"  {kind}: {cost.seconds:.3f} s to make, {cost.memory_mb:.0f} MiB")
    for kind, seconds in costs.start.items():
        print(f"  a start from {kind}: {seconds:.3f} s")
    print("  an instance: " + ", ".join(f"{mode} {mb:.0f} MiB" for mode, mb in costs.instance.items()) + "\n")
    requests = trace(options.trace, 900.0 if options.quick else float("inf"))
    results = {name: simulate(requests, costs, pool, window) for name, (pool, window) in pools(costs).items()}
    print(f"Simulated, {requests[-1].at:.0f} s of the trace, {FUNCTIONS} functions:")
    table(HEADER, [row(name, outcome) for name, outcome in results.items()])
    if options.real:
        some = trace(options.trace, options.real)
        print(f"\nReal, {options.real:.0f} s of the trace, {len(some)} requests:")
        for name in ("off", "layered"):
            results[f"real {name}"] = real(some, name == "layered")
        table(HEADER, [row(name, results[f"real {name}"]) for name in ("off", "layered")])
    for name, outcome in results.items():
        for q in (50, 95, 99):
            report.figure(f"{name}: start p{q} s", percentile(outcome.starts, q))
        report.figure(f"{name}: starts", len(outcome.starts))
        report.figure(f"{name}: GiB·s", outcome.mb_seconds / 1024)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
