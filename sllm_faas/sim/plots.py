"""PNG plots of results: the distributions of start-up time and time to first token, one line per policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sllm_faas.errors import BadRequest
from sllm_faas.sim.results import Result, Samples


def check() -> None:
    """Raises BadRequest when matplotlib is not installed: better said before a long run than after."""
    try:
        import matplotlib
    except ImportError:
        raise BadRequest("plots need matplotlib, which is not installed", hint="pip install 'sllm-faas[sim]'") from None
    matplotlib.use("agg")


def draw(results: Sequence[tuple[Result, Samples]], directory: Path) -> list[Path]:
    """One file per scenario and rate. Raises BadRequest when matplotlib is not installed."""
    check()
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for scenario, rate in sorted({(result.scenario, result.rate) for result, _ in results}):
        figure: Any = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots(1, 2)
        for result, samples in results:
            if (result.scenario, result.rate) != (scenario, rate):
                continue
            label = f"{result.policy}, seed {result.seed}"
            for axis, values in zip(axes, (samples.startup, samples.ttft), strict=True):
                ordered = sorted(values)
                axis.plot(ordered, [(index + 1) / len(ordered) for index in range(len(ordered))], label=label)
        for axis, what in zip(axes, ("start-up time", "time to first token"), strict=True):
            axis.set_xlabel(f"{what}, s")
            axis.set_ylabel("part of requests")
            axis.set_ylim(0, 1)
            axis.grid(alpha=0.3)
        axes[1].legend(fontsize="small")
        figure.suptitle(f"{scenario}, {rate:g} req/s")
        path = directory / f"{scenario}-{rate:g}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written
