"""The simulator at a scale no test bed has: 1,000 nodes, 5,000 functions, 500 requests a second for a simulated hour.

Each run has a process of its own, so its peak memory is its own. Beside it a tenth of everything for the same hour:
what a request costs, in processor time, and what memory is held as nodes, functions and rate grow tenfold together.
`--large N` goes on, to N times as much over half a simulated minute, in which much is cold: the thousand nodes run for
as long beside it. Setting up (every function deployed, every node joined) is timed apart from running; it grows faster
than the square of the size, as each node that joins looks at every version, and is what limits N: 3 takes minutes, 10
(10,000 nodes, 50,000 functions) far longer. `--quick` shortens the hour to two minutes.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.common import Report, arguments, table
from sllm_faas.sim.presets import PRESETS
from sllm_faas.sim.results import Result
from sllm_faas.sim.scenario import Scenario
from sllm_faas.sim.simulation import Simulation

MINUTES = 5.0
"""Real minutes that the full hour may take: "a few"."""
QUICK = 120.0
LARGE = 30.0
GROWTH = 2.0
"""Times the processor time that a request may take when everything is larger."""


@dataclass(frozen=True)
class Size:
    """Of one run. Times in seconds, memory in MiB; `empty` is what the process held before there was a simulation,
    `cpu` without setting up."""

    nodes: int
    functions: int
    seconds: float
    """Simulated."""
    result: Result
    setting_up: float
    running: float
    cpu: float
    empty: float
    peak: float

    @property
    def per_request(self) -> float:
        return self.cpu / max(1, self.result.requests)

    @property
    def own(self) -> float:
        return self.peak - self.empty


def sized(scenario: Scenario, factor: float, seconds: float) -> Scenario:
    """`factor` times the nodes, functions and rate."""
    nodes = tuple(replace(node, count=round(node.count * factor)) for node in scenario.nodes)
    functions = tuple(replace(each, count=round(each.count * factor)) for each in scenario.functions)
    return replace(scenario, nodes=nodes, functions=functions, seconds=seconds).at(scenario.load.rate * factor)


def measure(scenario: Scenario) -> Size:
    """In a process that does nothing else."""
    empty, began = peak_mib(), time.monotonic()
    simulation = Simulation(scenario)
    ready, cpu = time.monotonic(), time.process_time()
    result = simulation.run()
    return Size(
        sum(node.count for node in scenario.nodes),
        sum(function.count for function in scenario.functions),
        scenario.seconds,
        result,
        ready - began,
        time.monotonic() - ready,
        time.process_time() - cpu,
        empty,
        peak_mib(),
    )


def peak_mib() -> float:
    """Of this process since its program began: what getrusage tells may be its parent's."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def alone(scenario: Scenario) -> Size:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, scenario).result()


def row(size: Size) -> tuple[object, ...]:
    result = size.result
    return (
        f"{size.nodes:,}",
        f"{size.functions:,}",
        f"{result.rate:g}",
        f"{size.seconds:g}",
        f"{result.requests:,}",
        f"{result.cold:,}",
        *(f"{result.startup[name]:.3f}" for name in ("p50", "p95", "p99")),
        f"{result.ttft['p99']:.3f}",
        f"{size.setting_up:.1f}",
        f"{size.running:.1f}",
        f"{1e6 * size.per_request:.0f}",
        f"{size.empty:.0f}",
        f"{size.peak:.0f}",
    )


def show(sizes: list[Size], report: Report) -> None:
    """Two of them, as long simulated, the second larger."""
    header = (
        "nodes",
        "functions",
        "req/s",
        "simulated",
        "requests",
        "starts",
        "start-up p50",
        "p95",
        "p99",
        "ttft p99",
    )
    print()
    table((*header, "set up", "run", "CPU µs/request", "before", "peak"), [row(size) for size in sizes])
    for size in sizes:
        result, name = size.result, f"{size.nodes}_{size.seconds:g}"
        for what, value in (
            ("requests", result.requests),
            ("starts", result.cold),
            ("unfinished", result.unfinished),
            ("events", result.events),
            *((f"startup_{q}_s", value) for q, value in result.startup.items()),
            *((f"ttft_{q}_s", value) for q, value in result.ttft.items()),
            ("setting_up_s", size.setting_up),
            ("running_s", size.running),
            ("cpu_s", size.cpu),
            ("before_mib", size.empty),
            ("peak_mib", size.peak),
        ):
            report.figure(f"{what}_{name}", value)
    small, big = sizes
    name = f"{small.nodes} to {big.nodes} nodes"
    report.figure(f"memory, {name}", big.own / small.own)
    report.figure(f"setting up, {name}", big.setting_up / small.setting_up)
    report.at_most(f"processor time of a request, {name}", big.per_request / small.per_request, GROWTH)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--large", type=float, metavar="N", help="also N times as much, for half a simulated minute")
    options = parser.parse_args()
    report = Report("scale")
    scenario = PRESETS["scale"]
    seconds = QUICK if options.quick else scenario.seconds
    print("all times in seconds but the last; memory in MiB, before there was a simulation and at its peak")
    small, full = (alone(sized(scenario, factor, seconds)) for factor in (0.1, 1.0))
    show([small, full], report)
    report.at_most(f"real seconds of {seconds:g} simulated", full.setting_up + full.running, 60 * MINUTES)
    if options.large:
        show([alone(sized(scenario, factor, LARGE)) for factor in (1.0, options.large)], report)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
