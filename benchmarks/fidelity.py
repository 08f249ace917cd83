"""The same trace run for real and simulated, with the constants that the real run measured.

    paced       ten invokers; an engine that is declared to take its times instead of computing them
    computed    two invokers; the counting model, computing on this machine's cores; arrivals of CV 1 and not 3, because
                what nine starts at the same moment take is up to two cores

The trace is the simulator's own (Gamma arrivals, Zipf popularity); the real run replays it through the gateway.
Measured and handed to the simulation: how long the instances' starts took, one by one, what an answer's first output
takes with an instance at hand, and the pace of the outputs; and before the first case, how long a message takes. Where
starts compute, each core makes one at a time: then a start is counted from when a core was free for it, and the
simulated machine has as many at once.
Compared is what follows from decisions: how long requests that found no instance waited for one, and how many had their
first output within the limit. The simulation draws starts by chance from those measured; its figures are of DRAWS runs
over the same arrivals.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from random import Random
from typing import Any
from uuid import uuid4

import httpx

from benchmarks.common import ROOT, Platform, Report, arguments, percentile, platform_up, table
from sllm_faas.sim.scenario import FunctionModel, LoadModel, NodeModel, Scenario
from sllm_faas.sim.simulation import Simulation
from sllm_faas.sim.workload import Request, random_of, requests

SEED = 11
DRAWS = 20
WAITED = 0.01
"""Seconds above which a request is said to have waited for an instance."""
MESSAGES = 200
PAUSE = 0.05
"""Seconds before each message that is timed: whoever gets it has gone to sleep, as between two requests."""
MIB, GB = 2**20, 1e9
LAYERS_MB = 512
"""Of each node, for layers of warmth: room for those there are, as the simulation supposes."""


@dataclass(frozen=True)
class Case:
    """`pace`: what the app is told; `limit`: seconds to the first output that count as kept, None for what an instance
    at hand and half a start take."""

    name: str
    invokers: int
    node_mb: int
    functions: int
    rate: float
    cv: float
    input: str
    output: str
    limit: float | None
    pace: dict[str, Any]
    at_once: int = 0
    """Starts that the machine makes at a time; 0: they compute nothing."""
    seconds: float = 120.0
    """Of the trace; more where few requests find no instance."""

    def scenario(self, seconds: float) -> Scenario:
        node = NodeModel(
            count=self.invokers, memory_gb=self.node_mb * MIB / GB, at_once=self.at_once, one_machine=self.at_once > 0
        )
        function = FunctionModel(
            "model",
            count=self.functions,
            memory_mb=self.pace["memory_mb"],
            max_containers=self.pace["max_containers"],
            scaledown_window=self.pace["scaledown_window"],
            input=self.input,
            output=self.output,
        )
        load = LoadModel("gamma", rate=self.rate, cv=self.cv, popularity=0.8)
        return Scenario(self.name, (node,), (function,), load, seconds)


COMMON = {"max_containers": 8, "scaledown_window": 3.0}
PACED = Case(
    "paced", 10, 256, 8, 6.0, 3.0, "lognormal:100:300", "lognormal:20:60", 0.5,
    {**COMMON, "functions": 8, "memory_mb": 100, "enter": 0.8, "per_input": 0.0005, "per_output": 0.02},
)  # fmt: skip
COMPUTED = Case(
    "computed",
    2,
    2048,
    4,
    1.0,
    1.0,
    "fixed:8",
    "fixed:16",
    None,
    {**COMMON, "functions": 4, "memory_mb": 256},
    at_once=2,
    seconds=360.0,
)


Interval = tuple[float, float]
"""Begin and end, Unix time."""


@dataclass(frozen=True)
class Answer:
    """`waited`: seconds until an instance took it; `ttft`, `whole`: until the first and the last output."""

    request: Request
    waited: float
    ttft: float
    whole: float


def body(case: Case, request: Request) -> tuple[str, dict[str, Any]]:
    if case.name == "paced":
        path = f"/v1/functions/paced/Model{request.function}.generate"
        return path, {"input": request.input, "output": request.output}
    prompt = " ".join(str(number) for number in range(request.input))
    asked = {"model": f"computed/model-{request.function}", "prompt": prompt, "max_tokens": request.output}
    return "/v1/completions", {**asked, "stream": True}


async def ask(client: httpx.AsyncClient, case: Case, request: Request) -> Answer:
    path, asked = body(case, request)
    began, first = time.monotonic(), 0.0
    async with client.stream("POST", path, json=asked, headers={"Accept": "text/event-stream"}) as answer:
        answer.raise_for_status()
        text = ""
        async for chunk in answer.aiter_text():
            text += chunk
            if not first and "data:" in text:
                first = time.monotonic() - began
    whole = time.monotonic() - began
    if "event: error" in text or '"error"' in text:
        raise SystemExit(f"an answer of {case.name} failed: {text[-300:]}")
    record = (await client.get(f"/v1/invocations/{answer.headers['x-invocation-id']}")).raise_for_status().json()
    queue = next((span["seconds"] for span in record["timeline"] if span["name"] == "queue"), 0.0)
    return Answer(request, queue, first, whole)


async def real(platform: Platform, case: Case, trace: list[Request]) -> tuple[list[Answer], list[Interval]]:
    """The answers, and when the instances' starts began and ended."""
    limits = httpx.Limits(max_connections=1000)
    async with httpx.AsyncClient(base_url=platform.url, headers=platform.headers, timeout=120, limits=limits) as client:
        nodes = [f"node-{number}" for number in range(case.invokers)]
        for node in nodes:  # what a node makes once is there when time begins
            await asyncio.gather(*(_cordon(client, other, other != node) for other in nodes))
            await ask(client, case, Request(0.0, nodes.index(node) % case.functions, 1, 1))
        await asyncio.gather(*(_cordon(client, node, False) for node in nodes))
        await asyncio.sleep(case.pace["scaledown_window"] + 2.0)
        loop = asyncio.get_running_loop()
        since, began, tasks = time.time(), loop.time(), []
        for request in trace:
            await asyncio.sleep(max(0.0, began + request.at - loop.time()))
            tasks.append(asyncio.create_task(ask(client, case, request)))
        answers = list(await asyncio.gather(*tasks))
    return answers, starts(platform, since)


async def _cordon(client: httpx.AsyncClient, node: str, closed: bool) -> None:
    (await client.post(f"/v1/nodes/{node}/{'cordon' if closed else 'uncordon'}")).raise_for_status()


def starts(platform: Platform, since: float) -> list[Interval]:
    """The starts whose end was logged from then on, in order of their ends."""
    lines = (platform.state / "logs/platform.jsonl").read_text().splitlines()
    ready = [json.loads(line) for line in lines if '"instance_ready"' in line]
    ends = [(datetime.datetime.fromisoformat(entry["time"]).timestamp(), entry["actual"]) for entry in ready]
    return sorted(((end - took, end) for end, took in ends if end >= since), key=lambda each: each[1])


def lengths(intervals: list[Interval], at_once: int) -> list[float]:
    """Seconds of each since it began and fewer than `at_once` (0: any number) of those before it were left."""
    found: list[float] = []
    for number, (begin, end) in enumerate(intervals):
        free = intervals[number - at_once][1] if 0 < at_once <= number else begin
        found.append(end - max(begin, free))
    return found


def measured(case: Case, scenario: Scenario, delay: float, answers: list[Answer], begun: list[Interval]) -> Scenario:
    """The scenario with the constants of the real run, and the messages' delay."""
    took, whole = lengths(begun, case.at_once), statistics.median(lengths(begun, 0))
    declared = case.pace.get("per_input", 0.0)
    at_hand = [a.ttft - a.waited - declared * a.request.input for a in answers]
    paces = [(a.whole - a.ttft) / (a.request.output - 1) for a in answers if a.request.output > 1]
    node = replace(scenario.nodes[0], containers=tuple(took), delay=delay)
    first = max(0.0, statistics.median(at_hand))
    function = replace(
        scenario.functions[0],
        seconds=first,
        slo_ttft=first + whole / 2 if case.limit is None else case.limit,
        per_input=declared,
        per_output=statistics.median(paces),
    )
    return replace(scenario, nodes=(node,), functions=(function,))


def message() -> float:
    """Seconds that one takes between a gateway and an invoker that wait for it: half of what the gateway takes longer
    to ask the invoker for an invocation that nobody has than to answer by itself."""
    asked: list[float] = []
    alone: list[float] = []
    with (
        platform_up("--invokers", "1") as platform,
        httpx.Client(base_url=platform.url, headers=platform.headers, timeout=30) as client,
    ):
        for _ in range(MESSAGES):
            nobody = f"/v1/invocations/inv-{uuid4().hex}/events"
            for path, status, times in ((nobody, 404, asked), ("/v1/models", 200, alone)):
                time.sleep(PAUSE)
                began = time.perf_counter()
                answer = client.get(path)
                times.append(time.perf_counter() - began)
                if answer.status_code != status:
                    raise SystemExit(f"{path} was answered with {answer.status_code}, not {status}: {answer.text}")
    return max(0.0, statistics.median(asked) - statistics.median(alone)) / 2


def compare(case: Case, seconds: float, delay: float, report: Report) -> list[list[object]]:
    scenario = case.scenario(seconds)
    trace = list(requests(scenario, random_of(Random(SEED))))
    os.environ["SLLM_BENCH_PACE"] = json.dumps(case.pace)
    memory = ("--memory-mb", case.node_mb * case.invokers, "--layers-mb", LAYERS_MB * case.invokers)
    with platform_up("--invokers", str(case.invokers), *map(str, memory)) as platform:
        platform.sllm("deploy", str(ROOT / f"benchmarks/apps/{case.name}.py"))
        answers, took = asyncio.run(real(platform, case, trace))
    constants = measured(case, scenario, delay, answers, took)
    simulations = [Simulation(constants, "ours", seed, trace) for seed in range(DRAWS)]
    results = [simulation.run() for simulation in simulations]
    if any(result.requests != len(trace) for result in results):
        raise SystemExit(f"{len(trace)} requests were sent, {results[0].requests} simulated")
    rows: list[list[object]] = []
    waits = {
        "real": [a.waited for a in answers if a.waited > WAITED],
        "simulated": [value for one in simulations for value in one.samples.startup if value > WAITED],
    }
    limit = constants.functions[0].slo_ttft
    kept = {
        "real": sum(a.ttft <= limit for a in answers) / len(answers),
        "simulated": statistics.fmean(result.slo or 0.0 for result in results),
    }
    for name, cold, runs in (("real", len(took), 1), ("simulated", sum(r.cold for r in results) / DRAWS, DRAWS)):
        quantiles = [percentile(waits[name], q) for q in (50, 95)]
        figures = [*(f"{1e3 * q:.0f}" for q in quantiles), f"{100 * kept[name]:.1f} %"]
        rows.append([case.name, name, len(trace), round(cold), round(len(waits[name]) / runs), *figures])
    for q in (50, 95):
        ours, theirs = percentile(waits["simulated"], q), percentile(waits["real"], q)
        report.at_most(f"{case.name}: start-up p{q}, simulated against real, %", 100 * abs(ours / theirs - 1), 10)
    gap = 100 * abs(kept["real"] - kept["simulated"])
    report.at_most(f"{case.name}: SLO attainment apart, points", gap, 2)
    node, function = constants.nodes[0], constants.functions[0]
    report.figure(f"{case.name}: start p50, s", percentile(node.containers, 50))
    report.figure(f"{case.name}: start p95, s", percentile(node.containers, 95))
    report.figure(f"{case.name}: first output, s", function.seconds)
    report.figure(f"{case.name}: per output, s", function.per_output)
    return rows


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--case", choices=("paced", "computed"), help="only this one")
    args = parser.parse_args()
    report = Report("fidelity")
    rows = []
    delay = message()
    report.figure("message one way, ms", 1e3 * delay)
    for case in (PACED, COMPUTED):
        if args.case in (None, case.name):
            rows += compare(case, case.seconds / 5 if args.quick else case.seconds, delay, report)
    table(["case", "run", "requests", "starts", "waited", "start-up p50 ms", "p95", "SLO"], rows)
    for name, value in report.figures.items():
        print(f"{name}: {value:g}")
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
