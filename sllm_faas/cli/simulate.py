"""`sllm simulate`: run scenarios on a virtual clock and compare policies. Needs no server."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sllm_faas.cli import output
from sllm_faas.cli.common import Misconfigured
from sllm_faas.errors import BadRequest, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sllm_faas.sim.results import Result, Samples
    from sllm_faas.sim.scenario import Scenario


def _known(_: click.Context, __: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    from sllm_faas.sim.policies import POLICIES

    for name in names:
        if name not in POLICIES:
            raise click.BadParameter(f"there is no policy {name!r}; allowed: {', '.join(POLICIES)}")
    return names


@click.command()
@click.argument("scenario", default="small")
@click.option(
    "--policy", "policies", multiple=True, callback=_known, help="Policy to run; repeat to compare. Default: ours."
)
@click.option("--all-policies", is_flag=True, help="Compare all policies.")
@click.option("--rate", "rates", type=float, multiple=True, help="Requests a second; repeat for a grid.")
@click.option("--grid", is_flag=True, help="The scenario's own grid of rates.")
@click.option("--seconds", type=float, help="Simulated seconds of arrivals.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs with seeds from --seed on.")
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV: TIMESTAMP,ContextTokens,GeneratedTokens; as it is, or with --rate scaled to that rate.",
)
@click.option("--plot", type=click.Path(file_okay=False, path_type=Path), help="Write PNG plots into this directory.")
@click.option("--list", "list_", is_flag=True, help="List the scenarios that come with it.")
@click.option("--show", is_flag=True, help="Print the scenario as a file to start from.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def simulate(
    scenario: str,
    policies: tuple[str, ...],
    all_policies: bool,
    rates: tuple[float, ...],
    grid: bool,
    seconds: float | None,
    seed: int,
    seeds: int,
    trace: Path | None,
    plot: Path | None,
    list_: bool,
    show: bool,
    as_json: bool,
) -> None:
    """Simulate SCENARIO: the name of one that comes with it, or a TOML file."""
    from sllm_faas.sim import plots, presets
    from sllm_faas.sim import scenario as scenarios
    from sllm_faas.sim.policies import POLICIES
    from sllm_faas.sim.results import COLUMNS, row
    from sllm_faas.sim.simulation import Simulation

    if list_:
        columns = ("scenario", "nodes", "functions", "arrivals", "rate", "minutes")
        rows = [
            (
                item.name,
                sum(node.count for node in item.nodes),
                sum(function.count for function in item.functions),
                item.load.arrivals,
                item.load.rate,
                round(item.seconds / 60),
            )
            for item in presets.PRESETS.values()
        ]
        if as_json:
            output.emit_json([dict(zip(columns, line, strict=True)) for line in rows])
        else:
            output.table(columns, rows, "none")
        return
    with _usage():
        found = _find(scenario)
        asked = rates or (found.rates if grid else ())
        chosen = _with_options(found, seconds, trace, own_rate=not asked)
        grid_rates = asked or (chosen.load.rate,)
        for rate in grid_rates:
            scenarios.check(chosen.at(rate))
    if show:
        click.echo(scenarios.to_toml(chosen), nl=False)
        return
    if plot:
        plots.check()
    names = tuple(POLICIES) if all_policies else policies or ("ours",)
    progress = output.Progress(as_json)
    done: list[tuple[Result, Samples]] = []
    total = len(names) * len(grid_rates) * seeds
    for rate in grid_rates:
        for name in names:
            for number in range(seed, seed + seeds):
                progress.update("simulating", len(done), total, f"{name}, {rate:g} req/s")
                with _usage():
                    simulation = Simulation(chosen.at(rate), name, number)
                    done.append((simulation.run(), simulation.samples))
    progress.clear()
    results = [result for result, _ in done]
    drawn = plots.draw(done, plot) if plot else []
    if as_json:
        from msgspec import to_builtins

        output.emit_json([to_builtins(result) for result in results])
        return
    output.table(COLUMNS, map(row, results), "nothing was run")
    click.echo("Times in seconds. start-up: from arrival until an instance took the request.")
    for note in chosen.assumptions:
        click.echo(f"- {note}")
    for path in drawn:
        click.echo(f"wrote {path}")


def _find(name: str) -> Scenario:
    from sllm_faas.sim import presets
    from sllm_faas.sim import scenario as scenarios

    if name in presets.PRESETS:
        return presets.PRESETS[name]
    if name.endswith(".toml") or "/" in name:
        return scenarios.read(Path(name))
    raise NotFound(
        f"there is no scenario {name!r}", hint=f"There are {', '.join(presets.PRESETS)}; or give the path of a file."
    )


@contextmanager
def _usage() -> Iterator[None]:
    """What cannot be simulated is a wrong use, as a wrong option is."""
    try:
        yield
    except BadRequest as error:
        raise Misconfigured(error) from None


def _with_options(scenario: Scenario, seconds: float | None, trace: Path | None, *, own_rate: bool) -> Scenario:
    """`own_rate`: the trace's, instead of the scenario's."""
    from sllm_faas.sim.workload import read_trace

    if seconds is not None:
        scenario = replace(scenario, seconds=seconds)
    if trace is not None:
        functions = tuple(replace(f, input="trace", output="trace") if f.per_output else f for f in scenario.functions)
        found = read_trace(trace)  # whatever the rate: what is wrong with it is said now
        rate = found.rate if own_rate else scenario.load.rate
        load = replace(scenario.load, arrivals="trace", trace=str(trace), rate=rate)
        scenario = replace(scenario, load=load, functions=functions)
    return scenario
