"""Who calls what when, and how long it is. Generated from a seed, or read from a trace; nothing here knows nodes.

    gamma     Gamma renewal process of the given CV (1: Poisson), as in the ServerlessLLM paper's evaluation
    bursts    ON/OFF: Poisson while on, nothing while off; exponential periods
    minutes   Poisson whose rate is drawn anew each minute from a log-normal AR(1): load correlated over minutes
    poisson   Poisson
    trace     the file's arrivals, again and again if the run is longer

A function is drawn for each arrival with Zipf popularity, or each function has arrivals of its own (`per_function`).
Token lengths are drawn by inverse CDF, from the file's where there is one.
"""

from __future__ import annotations

import csv
import datetime
import heapq
import math
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import NamedTuple

from sllm_faas.errors import BadRequest
from sllm_faas.sim.scenario import FunctionModel, LoadModel, Scenario

WARM_UP = 200.0
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class Request(NamedTuple):
    at: float
    function: int
    input: int
    output: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals in seconds from the first one, with their lengths; sorted lengths for drawing."""

    arrivals: tuple[float, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Its own mean rate, requests a second. Raises BadRequest when all came at one moment: they have none."""
        if not self.arrivals or not self.arrivals[-1]:
            raise BadRequest(
                "the requests of the trace all have the same time, so it has no rate of its own", hint="Give --rate."
            )
        return (len(self.arrivals) - 1) / self.arrivals[-1]


def read_trace(path: Path) -> Trace:
    """Azure LLM 2023 format. Raises BadRequest with the line that is wrong."""
    rows: list[tuple[float, int, int]] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ())[:3] != COLUMNS:
                raise BadRequest(f"the first line of {path} is not that of a trace; needed: {','.join(COLUMNS)}")
            for number, row in enumerate(reader, 2):
                try:
                    rows.append((_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])))
                except (TypeError, ValueError) as error:
                    raise BadRequest(f"{path}, line {number}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"cannot read the trace {path}: {error}") from None
    if not rows:
        raise BadRequest(f"{path} has no requests in it")
    rows.sort()
    first = rows[0][0]
    return Trace(tuple(row[0] - first for row in rows), tuple(row[1] for row in rows), tuple(row[2] for row in rows))


def _seconds(text: str) -> float:
    head, _, fraction = text.strip().partition(".")  # seven digits, more than datetime takes
    moment = datetime.datetime.fromisoformat(head).replace(tzinfo=datetime.UTC)
    return moment.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)


# -- arrivals ------------------------------------------------------------------------------------------------


def gamma(rng: Random, rate: float, cv: float) -> Iterator[float]:
    """Times of a Gamma renewal process: intervals of mean 1/rate and that CV.

    It has been going on for WARM_UP intervals when time begins: starting at an arrival would start in a burst.
    """
    shape = 1.0 / cv**2 if cv > 0 else math.inf
    now = -WARM_UP / rate if cv > 0 else 0.0
    while True:
        now += rng.gammavariate(shape, 1.0 / (rate * shape)) if cv > 0 else 1.0 / rate
        if now > 0:
            yield now


def bursts(rng: Random, rate: float, on: float, off: float) -> Iterator[float]:
    peak = rate * (on + off) / on
    start = rng.expovariate(1.0 / off) if off else 0.0
    while True:
        end = start + rng.expovariate(1.0 / on)
        now = start
        while (now := now + rng.expovariate(peak)) < end:
            yield now
        start = end + (rng.expovariate(1.0 / off) if off else 0.0)


def minutes(rng: Random, rate: float, spread: float = 0.5, memory: float = 0.8) -> Iterator[float]:
    """`spread`: of the logarithm of a minute's rate; `memory`: its correlation with the minute before."""
    minute, level = 0, rng.gauss(0.0, 1.0)
    while True:
        here = rate * math.exp(spread * level - spread**2 / 2)
        now = 60.0 * minute
        while (now := now + rng.expovariate(here)) < 60.0 * (minute + 1):
            yield now
        minute += 1
        level = memory * level + math.sqrt(1 - memory**2) * rng.gauss(0.0, 1.0)


def replay(trace: Trace, rate: float) -> Iterator[tuple[float, int, int]]:
    """The file's requests, again and again, their times scaled so that the mean rate is `rate`."""
    scale = trace.rate / rate if trace.arrivals[-1] else 0.0
    start = 0.0
    while True:
        for at, tokens_in, tokens_out in zip(trace.arrivals, trace.inputs, trace.outputs, strict=True):
            yield start + at * scale, tokens_in, tokens_out
        start += len(trace.arrivals) / rate


def stream(rng: Random, load: LoadModel, rate: float) -> Iterator[float]:
    if load.arrivals == "gamma":
        return gamma(rng, rate, load.cv)
    if load.arrivals == "bursts":
        return bursts(rng, rate, load.on, load.off)
    if load.arrivals == "minutes":
        return minutes(rng, rate)
    return gamma(rng, rate, 1.0)


# -- popularity and lengths ----------------------------------------------------------------------------------


def zipf(count: int, exponent: float) -> list[float]:
    """Shares, the most popular first; they add up to 1."""
    weights = [1.0 / (rank**exponent) for rank in range(1, count + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def lengths(text: str, sample: Sequence[int], rng: Random) -> Callable[[], int]:
    """A source of token counts. Raises BadRequest for what is not one."""
    kind, _, rest = text.partition(":")
    try:
        if kind == "fixed":
            count = int(rest)
            return lambda: count
        if kind == "lognormal":
            mean, p99 = map(float, rest.split(":"))
            draw = _lognormal(mean, p99)
            return lambda: max(1, round(draw(rng.random())))
        if kind == "trace" and sample:
            ordered = sorted(sample)
            return lambda: ordered[int(rng.random() * len(ordered))]
    except ValueError:
        pass
    raise BadRequest(
        f"token lengths are {text!r}; allowed: fixed:N, lognormal:MEAN:P99 (P99 above MEAN), trace (with a trace)"
    )


def _lognormal(mean: float, p99: float) -> Callable[[float], float]:
    """Inverse CDF of the log-normal with that mean and 99th percentile."""
    normal = NormalDist()
    z = normal.inv_cdf(0.99)
    if not 0 < mean < p99 or (root := z**2 - 2 * math.log(p99 / mean)) < 0:
        raise ValueError("no such distribution")
    sigma = z - math.sqrt(root)
    mu = math.log(mean) - sigma**2 / 2
    return lambda u: math.exp(mu + sigma * normal.inv_cdf(min(max(u, 1e-12), 1 - 1e-12)))


# -- all of it -----------------------------------------------------------------------------------------------


def expand(functions: Iterable[FunctionModel]) -> list[FunctionModel]:
    """Every function by itself, in the order of the scenario."""
    return [model for model in functions for _ in range(model.count)]


def requests(scenario: Scenario, rng: Random) -> Iterator[Request]:
    """In order of time, up to the scenario's end."""
    load = scenario.load
    models = expand(scenario.functions)
    trace = read_trace(Path(load.trace)) if load.trace else Trace((), (), ())
    sizes = random_of(rng)
    sources = {
        model: (lengths(model.input, trace.inputs, sizes), lengths(model.output, trace.outputs, sizes))
        for model in scenario.functions
    }
    shares = zipf(len(models), load.popularity)
    order = list(range(len(models)))
    random_of(rng).shuffle(order)  # which function is the most popular one
    for at, function, known in _arrivals(scenario, rng, trace, shares, order):
        if at > scenario.seconds:
            return
        tokens_in, tokens_out = known or (source() for source in sources[models[function]])
        yield Request(at, function, tokens_in, tokens_out)


def random_of(rng: Random) -> Random:
    """A generator of its own, so that one part's draws do not shift another's."""
    return Random(rng.getrandbits(64))  # noqa: S311 - a model of chance, not a secret


def _arrivals(
    scenario: Scenario, rng: Random, trace: Trace, shares: Sequence[float], order: Sequence[int]
) -> Iterator[tuple[float, int, tuple[int, int] | None]]:
    load = scenario.load
    pick = random_of(rng)
    bounds = list(accumulate(shares))

    def drawn() -> int:
        return order[min(bisect(bounds, pick.random()), len(order) - 1)]

    if load.arrivals == "trace":
        for at, tokens_in, tokens_out in replay(trace, load.rate):
            yield at, drawn(), (tokens_in, tokens_out)
    elif load.per_function:
        heap: list[tuple[float, int, Iterator[float]]] = []
        for rank, share in enumerate(shares):
            times = stream(random_of(rng), load, load.rate * share)
            heap.append((next(times), order[rank], times))
        heapq.heapify(heap)
        while True:
            at, function, times = heap[0]
            heapq.heapreplace(heap, (next(times), function, times))
            yield at, function, None
    else:
        for at in stream(random_of(rng), load, load.rate):
            yield at, drawn(), None
