"""A simulation as data: the cluster, the functions, the load, and what is assumed. Can be read from a TOML file.

Sizes in GB (1e9 bytes), rates in GB/s, times in seconds. Values that come from a publication say so in `assumptions`,
which every result repeats.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

import msgspec

from sllm_faas.errors import BadRequest

Arrivals = Literal["gamma", "bursts", "minutes", "poisson", "trace"]
GB = 1e9
TIERS = ("remote", "disk", "dram")


@dataclass(frozen=True, slots=True)
class NodeModel:
    """`count` equal machines. Bandwidths are what one load gets alone; loads of one tier queue for it."""

    count: int = 1
    memory_gb: float = 64.0
    gpus: int = 0
    dram_gb: float = 0.0
    """Cache of checkpoints in DRAM; 0: only what running instances share."""
    remote: float = 1.0
    disk: float = 2.0
    dram: float = 20.0
    container: float = 0.05
    """Seconds to a process that can load, whatever it is to load: workers are warm."""
    containers: tuple[float, ...] = ()
    """Such seconds as they were measured, to be drawn from instead (empirical, by inverse CDF)."""
    jitter: float = 0.0
    """Spread of a load's or start's time around its median: standard deviation of its logarithm, so about that part."""
    at_once: int = 0
    """Processes that are started at the same time, the others wait for their turn; 0: any number."""
    one_machine: bool = False
    """All of them are on one machine, where their processes are started in turn."""
    delay: float = 0.0005
    """Seconds a message takes, each way."""


@dataclass(frozen=True, slots=True)
class FunctionModel:
    """`count` functions of one kind, each with a checkpoint of its own."""

    name: str
    count: int = 1
    checkpoint_gb: float = 0.0
    memory_mb: int = 256
    gpus: int = 0
    concurrency: int = 1
    max_containers: int = 8
    scaledown_window: float = 60.0
    max_queue: int = 100_000
    seconds: float = 0.0
    """Fixed part of an invocation."""
    per_input: float = 0.0
    """Seconds per prompt token, before the first output."""
    per_output: float = 0.0
    """Seconds per generated token."""
    input: str = "fixed:128"
    output: str = "fixed:128"
    """Token lengths: `fixed:N`, `lognormal:MEAN:P99`, or `trace` (empirical, by inverse CDF)."""
    slo_ttft: float = 0.0
    """Seconds to the first token that were promised; 0: nothing was."""
    app: str = ""
    """App it belongs to, for shares between apps; empty: one for all."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LoadModel:
    """`rate` requests a second over all functions; a trace's times are scaled to it.

    `popularity`: Zipf exponent over all functions, 0 is uniform.
    """

    arrivals: Arrivals = "gamma"
    rate: float = 1.0
    cv: float = 1.0
    popularity: float = 0.0
    per_function: bool = False
    """Each function has arrivals of its own with this CV, instead of drawing functions for one stream of arrivals."""
    on: float = 10.0
    off: float = 40.0
    """Mean seconds of a burst and of the quiet between two (`bursts`); `rate` is the mean over both."""
    trace: str = ""
    """Path of a CSV with TIMESTAMP,ContextTokens,GeneratedTokens (`trace`, and lengths by `trace`)."""


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    nodes: tuple[NodeModel, ...]
    functions: tuple[FunctionModel, ...]
    load: LoadModel
    seconds: float = 600.0
    placement: Literal["everywhere", "spread", "remote"] = "everywhere"
    """Where checkpoints are on disk at first: on every node, each on `copies` of them in turn, or on none."""
    copies: int = 1
    migrate: bool = True
    rates: tuple[float, ...] = ()
    """The grid of `rate`; empty: only `load.rate`."""
    assumptions: tuple[str, ...] = field(default=())

    def at(self, rate: float) -> Scenario:
        return replace(self, load=replace(self.load, rate=rate))


def read(path: Path) -> Scenario:
    """Raises BadRequest for what is not a scenario."""
    try:
        return parse(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BadRequest(f"cannot read the scenario {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} is not TOML: {error}") from None


def parse(value: dict[str, Any]) -> Scenario:
    try:
        scenario = msgspec.convert(value, Scenario)
    except msgspec.ValidationError as error:
        raise BadRequest(
            f"not a scenario: {error}", hint="`sllm simulate --show paper` prints one to start from."
        ) from None
    check(scenario)
    return scenario


def check(scenario: Scenario) -> None:
    """Raises BadRequest with the value that cannot be."""
    for what, value, least in (
        ("seconds", scenario.seconds, 0.001),
        ("rate", scenario.load.rate, 1e-9),
        ("cv", scenario.load.cv, 0.0),
        ("popularity", scenario.load.popularity, 0.0),
        ("on", scenario.load.on, 1e-3),
        ("off", scenario.load.off, 0.0),
        ("copies", scenario.copies, 1),
        *((f"bandwidth of {tier}", getattr(n, tier), 1e-6) for n in scenario.nodes for tier in TIERS),
        *(("count of nodes", node.count, 1) for node in scenario.nodes),
        *(("starts at once", node.at_once, 0) for node in scenario.nodes),
        *((f"count of {f.name}", f.count, 1) for f in scenario.functions),
        *((f"time of {f.name}", min(f.seconds, f.per_input, f.per_output), 0.0) for f in scenario.functions),
        *(("rate", rate, 1e-9) for rate in scenario.rates),
    ):
        if not least <= value < inf:
            raise BadRequest(f"{what} is {value!r}; allowed: a number, at least {least:g}")
    if not scenario.nodes or not scenario.functions:
        raise BadRequest("a scenario needs at least one kind of node and one of function")
    if scenario.load.arrivals == "trace" and not scenario.load.trace:
        raise BadRequest("arrivals are 'trace' and there is none", hint="Give its path with --trace.")


def to_toml(scenario: Scenario) -> str:
    """The file that `read` takes."""
    whole = msgspec.to_builtins(scenario)
    lines = [f"{key} = {_toml(value)}" for key, value in whole.items() if key not in ("nodes", "functions", "load")]
    lines += ["", "[load]", *(f"{key} = {_toml(value)}" for key, value in whole["load"].items())]
    for kind in ("nodes", "functions"):
        for item in whole[kind]:
            lines += ["", f"[[{kind}]]", *(f"{key} = {_toml(value)}" for key, value in item.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return msgspec.json.encode(value).decode()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)
