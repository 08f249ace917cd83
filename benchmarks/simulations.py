"""Published set-ups on the simulator: the platform's policy beside others, over a grid of request rates.

`paper`, `-13b`, `-30b`, `-mixed`: the ServerlessLLM paper's cluster (4 servers x 4 GPUs) with OPT-6.7B, 13B, 30B and
all three, start-up times; `hydraserve`: HydraServe's two pools of servers and 384 models, kept promises. Every policy
meets the same arrivals, seed by seed, so means are compared over the same seeds; the standard error beside is of the
difference to ours, seed by seed. Two policies that differ in a thousandth of a second here and there come out seconds
apart for one seed, this way or that: ours and ServerlessLLM's are compared over many, and one is worse when it is so
by more than two standard errors. Percentiles are of the requests that were answered within ten minutes of the last
arrival; where a policy leaves some unanswered, its percentiles are too low, and the table says how many. What a set-up
assumes is printed with it.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from benchmarks.common import Report, arguments, table
from sllm_faas.sim.policies import POLICIES
from sllm_faas.sim.presets import PRESETS
from sllm_faas.sim.results import Result
from sllm_faas.sim.scenario import Scenario
from sllm_faas.sim.simulation import Simulation

COMPARED = ("ours", "serverlessllm")
PAPER_RATE = 1.4
"""Requests a second at which the paper reports its factors over its baselines (assumed), with OPT-6.7B."""
BASELINES = ("availability", "preempt")
FACTOR = 1.3
CVS = (2, 4, 8)

Runs = dict[tuple[float, str], list[Result]]
"""By rate and policy, one result a seed."""


@dataclass(frozen=True)
class Setup:
    """A preset and how it is run: simulated seconds, policies, `seeds` for all and `many` for those that are compared
    with each other. What a seed costs decides: all of it is to take 25 minutes on two cores."""

    preset: str
    seconds: float
    policies: tuple[str, ...]
    seeds: int
    many: int

    @property
    def scenario(self) -> Scenario:
        return replace(PRESETS[self.preset], seconds=self.seconds)


SETUPS = (
    Setup("paper", 600.0, tuple(POLICIES), 8, 48),
    Setup("paper-13b", 600.0, (*COMPARED, *BASELINES), 8, 32),
    Setup("paper-30b", 1800.0, (*COMPARED, *BASELINES), 8, 48),
    Setup("paper-mixed", 600.0, (*COMPARED, *BASELINES), 4, 48),
)


def simulate(scenario: Scenario, rates: Sequence[float], policies: Sequence[str], seeds: range) -> Runs:
    cells = [(rate, policy) for rate in rates for policy in policies]
    with ProcessPoolExecutor() as pool:
        futures = {
            (rate, policy): [pool.submit(_run, scenario.at(rate), policy, seed) for seed in seeds]
            for rate, policy in cells
        }
        return {cell: [future.result() for future in futures[cell]] for cell in cells}


def _run(scenario: Scenario, policy: str, seed: int) -> Result:
    return Simulation(scenario, policy, seed).run()


def p99s(results: Sequence[Result]) -> list[float]:
    return [result.startup["p99"] for result in results]


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def assumed(scenario: Scenario) -> None:
    print(f"\n{scenario.name}:")
    for line in scenario.assumptions:
        print(f"  {line}")


def paper(setup: Setup, report: Report, quick: bool) -> None:
    scenario = setup.scenario
    rates, few, many = scenario.rates, setup.seeds, setup.many
    if quick:
        scenario, rates, few, many = replace(scenario, seconds=setup.seconds / 2), rates[2:3], 3, 3
    assumed(scenario)
    runs = simulate(scenario, rates, setup.policies, range(few))
    rows = []
    for (rate, policy), results in runs.items():
        ours, its = p99s(runs[rate, "ours"]), p99s(results)
        gap = [theirs - own for own, theirs in zip(ours, its, strict=True)]
        startup = [mean([result.startup[name] for result in results]) for name in ("p50", "p95")]
        moved, gone, open_, asked = (
            sum(getattr(r, name) for r in results) for name in ("migrations", "preemptions", "unfinished", "requests")
        )
        rows.append(
            (
                policy,
                rate,
                *(f"{value:.2f}" for value in startup),
                f"{mean(its):.2f}",
                f"{min(its):.1f}..{max(its):.1f}",
                f"{mean(its) / mean(ours):.2f}" if mean(ours) else "-",
                f"{mean(gap):+.2f} ± {error(gap):.2f}",
                moved,
                gone,
                f"{100 * open_ / max(1, asked):.1f} %",
            )
        )
        report.figure(f"{setup.preset}_p99_s_{policy}_{rate:g}", mean(its))
        report.figure(f"{setup.preset}_unanswered_{policy}_{rate:g}", open_ / max(1, asked))
        if policy in BASELINES and mean(ours):
            report.figure(f"{setup.preset}_factor_{policy}_{rate:g}", mean(its) / mean(ours))
    header = (
        "policy",
        "rate",
        "p50 s",
        "p95 s",
        "p99 s",
        "over seeds",
        "/ ours",
        "p99 - ours, s",
        "moves",
        "preempted",
        "unanswered",
    )
    table(header, rows)
    if setup.preset == "paper":
        best = mean(p99s(runs[PAPER_RATE, "ours"]))
        for policy in BASELINES:
            factor = mean(p99s(runs[PAPER_RATE, policy])) / best
            report.at_least(f"paper: p99 start-up of {policy} / ours at {PAPER_RATE:g}/s", factor, FACTOR)
    more = simulate(scenario, rates, COMPARED, range(few, many))
    compare(setup.preset, {cell: runs[cell] + results for cell, results in more.items()}, rates, report)


def compare(name: str, runs: Runs, rates: Sequence[float], report: Report) -> None:
    """Ours is to be no worse than ServerlessLLM's policy at any rate."""
    rows = []
    for rate in rates:
        ours, theirs = (p99s(runs[rate, policy]) for policy in COMPARED)
        noise = error([b - a for a, b in zip(ours, theirs, strict=True)]) / mean(theirs) if mean(theirs) else 0.0
        ratio = mean(ours) / mean(theirs) if mean(theirs) else 1.0
        rows.append((rate, f"{mean(ours):.2f}", f"{mean(theirs):.2f}", f"{ratio:.4f} ± {noise:.4f}"))
        report.figure(f"{name}_noise_{rate:g}", noise)
        report.at_most(f"{name}: p99 start-up of ours / serverlessllm at {rate:g}/s", ratio, 1.0 + 2.0 * noise)
    print(f"\n{name}: p99 start-up over {len(runs[rates[0], COMPARED[0]])} seeds:")
    table(("rate", "ours, s", "serverlessllm, s", "ours / serverlessllm"), rows)


def hydraserve(report: Report, quick: bool) -> None:
    rows = []
    for cv in CVS[-1:] if quick else CVS:
        scenario = replace(PRESETS[f"hydraserve-cv{cv}"], seconds=900.0 if quick else 1800.0)
        if not rows:
            assumed(scenario)
        runs = simulate(scenario, scenario.rates[:1] if quick else scenario.rates, COMPARED, range(2))
        for (rate, policy), results in runs.items():
            kept = 100 * mean([result.slo or 0.0 for result in results])
            ttft = mean([result.ttft["p99"] for result in results])
            rows.append((policy, cv, rate, f"{kept:.1f} %", f"{ttft:.1f}", sum(result.cold for result in results)))
            report.figure(f"hydraserve_slo_{policy}_cv{cv}_{rate:g}", kept)
    table(("policy", "CV", "rate", "SLO kept", "ttft p99 s", "starts"), rows)
    print("published: ServerlessLLM 45..62 %, HydraServe 72..84 %, with its cache 88 %")


def main() -> int:
    options = arguments(__doc__).parse_args()
    report = Report("simulations")
    began = time.monotonic()
    for setup in SETUPS:
        setup_began = time.monotonic()
        paper(setup, report, options.quick)
        report.figure(f"{setup.preset}_seconds", time.monotonic() - setup_began)
    hydraserve(report, options.quick)
    report.figure("seconds", time.monotonic() - began)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
