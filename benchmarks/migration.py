"""What a client sees of a live migration: the gap at the hand-over, beside stopping and beside starting anew.

Two invokers on this machine, each with its containers on a core of its own, serve a random-weight Llama of 112M
parameters in float32. For every context length and number of concurrent requests, which both nodes share, one request
after another is moved to the other node while its neighbours there and here go on.

    gap        between the last output of the old instance and the first of the new one, as the client sees it
    silent     its first part: from that last output to the gateway's word (the source rests, and says so)
    wake       its second part: from the gateway's word to the first output there (the step that runs there, the
               recompute of what was missing, on its way to the gateway)
    moving     a step of that request while it was being moved: the source draws, the destination recomputes, and they
               share the machine's memory bandwidth
    total      from the order to its end
    stop       the gap when the container is killed instead and another one recomputes all that it had
    anew       a new request for the same: the start of this one, and a step for each token said until it was moved

The step is the median interval of the same stream before the move. The slope of the gap over the context is fitted to
the gaps less their steps, of one request; the recompute of a token is that of `stop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import Platform, Report, arguments, percentile, platform_up, table

NODES = ("node-0", "node-1")
READ = 10
"""Outputs that are read undisturbed before each move."""
BUDGET = 4096
"""Tokens that may be recomputed by the moves of a cell; two moves there are in any case."""
VOCABULARY = 40000
MAKE = """
import sys, torch, transformers
from tokenizers import Tokenizer, models, pre_tokenizers
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(int(sys.argv[2]))}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
torch.manual_seed(1)
config = transformers.LlamaConfig(
    vocab_size=len(words.get_vocab()), hidden_size=768, intermediate_size=2048,
    num_hidden_layers=8, num_attention_heads=12,
    num_key_value_heads=4, max_position_embeddings=8192, tie_word_embeddings=False, bos_token_id=None,
    eos_token_id=None,
)
model = transformers.LlamaForCausalLM(config)
print(sum(parameter.numel() for parameter in model.parameters()))
model.save_pretrained(sys.argv[1])
transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(sys.argv[1])
"""
APP = """
import sllm
app = sllm.App("move")
model = app.llm("model", checkpoint={model!r}, concurrency=8, memory=3500, scaledown_window=600, min_containers=2)
"""


@dataclass
class Stream:
    """A client of one generation. `times` are those of its outputs."""

    began: float = field(default_factory=time.perf_counter)
    invocation: str = ""
    times: list[float] = field(default_factory=list)
    handovers: list[tuple[str, int]] = field(default_factory=list)
    """(what the comment line said, outputs before it)."""
    problem: str = ""

    def gap(self, kind: str) -> float | None:
        """The longest silence around the last hand-over of a kind."""
        places = [at for what, at in self.handovers if what.startswith(kind)]
        return self.times[places[-1]] - self.times[places[-1] - 1] if places and len(self.times) > places[-1] else None

    def step(self, since: int, until: int | None = None) -> float:
        """The median interval."""
        times = self.times[since:until]
        return statistics.median([b - a for a, b in pairwise(times)] or [0.0])


class Bench:
    def __init__(self, platform: Platform, client: httpx.AsyncClient) -> None:
        self.platform, self.client = platform, client
        self.random = random.Random(7)

    async def read(self, stream: Stream, prompt: list[int]) -> None:
        body = {
            "model": "move/model",
            "prompt": prompt,
            "max_tokens": 3500,
            "stream": True,
            "seed": 1,
            "temperature": 1.0,
        }
        headers = {"x-sllm-comments": "1"}
        with contextlib.suppress(httpx.HTTPError):
            async with self.client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
                if answer.status_code != 200:
                    stream.problem = (await answer.aread()).decode()
                    return
                stream.invocation = answer.headers["x-invocation-id"]
                async for line in answer.aiter_lines():
                    if line.startswith(": ") and ("migrated" in line or "resumed" in line):
                        stream.handovers.append((line[2:], len(stream.times)))
                    elif line.startswith("data: {") and "error" in json.loads(line[6:]):
                        stream.problem = line
                    elif line.startswith("data: {"):
                        stream.times.append(time.perf_counter())

    async def record(self, stream: Stream) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get(f"/v1/invocations/{stream.invocation}")).json()
        return found

    async def node(self, stream: Stream) -> str:
        return str((await self.record(stream))["node"])

    async def move(self, stream: Stream, node: str) -> dict[str, Any]:
        answer = await self.client.post(f"/v1/invocations/{stream.invocation}/migrate", json={"node": node})
        found: dict[str, Any] = answer.json()
        if "error" in found:
            raise SystemExit(f"a stream did not move: {found['error']['message']}")
        return found

    async def outputs(self, streams: list[Stream], more: int) -> None:
        """Until every stream has said so many more."""
        goals = [(stream, len(stream.times) + more) for stream in streams]
        while not all(len(stream.times) >= goal for stream, goal in goals):
            if bad := next((stream.problem for stream in streams if stream.problem), ""):
                raise SystemExit(f"a stream failed: {bad[:300]}")
            await asyncio.sleep(0.01)

    async def cell(self, context: int, streams: int, moves: int) -> Cell:
        """One context length and number of requests."""
        prompts = [[self.random.randrange(VOCABULARY) for _ in range(context)] for _ in range(streams)]
        running = [Stream() for _ in prompts]
        tasks = [asyncio.ensure_future(self.read(*each)) for each in zip(running, prompts, strict=True)]
        cell = Cell(context, streams)
        try:
            await self.outputs(running, 2)
            for _ in range(moves):
                await self.handover(running, cell)
            start = statistics.median([stream.times[0] - stream.began for stream in running])
            cell.anew = start + (len(running[0].times) - 1) * cell.step
            await self.stop(running, cell)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return cell

    async def handover(self, running: list[Stream], cell: Cell) -> None:
        """Move one from the node that has more of them."""
        at = [await self.node(stream) for stream in running]
        home = max(NODES, key=at.count)
        stream = self.random.choice([stream for stream, node in zip(running, at, strict=True) if node == home])
        since = len(stream.times)
        await self.outputs([stream], READ)
        step, asked = stream.step(since), len(stream.times)
        found = await self.move(stream, NODES[1 - NODES.index(home)])
        await self.outputs([stream], 3)
        gap, spans = stream.gap("migrated"), (await self.record(stream))["timeline"]
        wake = [span["seconds"] for span in spans if span["name"] == "migration"][-1]
        assert gap is not None
        cell.steps.append(step)
        cell.gaps.append(gap / step)
        cell.silent.append(max(0.0, gap - wake) / step)
        cell.wakes.append(wake / step)
        cell.moving.append(stream.step(asked - 1, stream.handovers[-1][1]) / step)
        cell.totals.append(found["seconds"])
        cell.rounds.append(found["rounds"])
        cell.tokens.append(found["tokens"])

    async def stop(self, running: list[Stream], cell: Cell) -> None:
        """Kill the container under one, and its neighbours."""
        instance = (await self.record(running[0]))["instance"]
        os.kill(next(row["pid"] for row in await self.instances() if row["instance"] == instance), signal.SIGKILL)
        while not (running[0].handovers and running[0].handovers[-1][0].startswith("resumed")):
            await asyncio.sleep(0.02)
        await self.outputs(running[:1], 1)
        gap = running[0].gap("resumed")
        assert gap is not None
        cell.stop = gap
        while sum(row["state"] == "ready" for row in await self.instances()) < len(NODES):
            await asyncio.sleep(0.05)

    async def instances(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.client.get("/v1/instances")).json()["instances"]
        return found


@dataclass
class Cell:
    """`gaps`, `silent`, `wakes` and `moving` in steps, one for each hand-over; else seconds."""

    context: int
    streams: int
    steps: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    silent: list[float] = field(default_factory=list)
    wakes: list[float] = field(default_factory=list)
    moving: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stop: float = 0.0
    anew: float = 0.0

    @property
    def step(self) -> float:
        return statistics.median(self.steps)

    def figures(self) -> dict[str, float]:
        figures = {
            "step (ms)": 1e3 * self.step,
            "gap p50 (steps)": statistics.median(self.gaps),
            "gap p99 (steps)": percentile(self.gaps, 99),
        }
        parts: dict[str, Sequence[float]] = {
            "silent (steps)": self.silent, "wake (steps)": self.wakes, "moving (steps)": self.moving,
            "total (s)": self.totals, "rounds": self.rounds, "tokens sent": self.tokens,
        }  # fmt: skip
        figures |= {name: statistics.median(values) for name, values in parts.items()}
        return figures | {"stop (s)": self.stop, "anew (s)": self.anew}


def pin(platform: Platform) -> None:
    """Each invoker, and all that it starts, on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    mark = f"SLLM_STATE_DIR={platform.state}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if mark not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            node = node_of(int(entry.name))
            if node in NODES:
                for thread in (entry / "task").iterdir():
                    os.sched_setaffinity(int(thread.name), {cores[NODES.index(node) % len(cores)]})


def node_of(pid: int) -> str:
    """The invoker that a process is, or belongs to."""
    while pid > 1:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        if "sllm_invoker" in words and "--name" in words:
            return words[words.index("--name") + 1]
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return ""


async def measure(platform: Platform, quick: bool) -> list[Cell]:
    contexts = (128, 768) if quick else (128, 512, 1024, 2048, 4096)
    async with httpx.AsyncClient(base_url=platform.url, headers=platform.headers, timeout=600) as client:
        bench = Bench(platform, client)
        cells = []
        for streams in (1, 4) if quick else (1, 4, 8):
            for context in contexts:
                moves = 3 if quick else min(8, max(2, BUDGET // context))
                pin(platform)  # containers that took the place of killed ones, too
                cells.append(await bench.cell(context, streams, moves))
                print(f"context {context} x {streams}: {len(cells[-1].gaps)} hand-overs", flush=True)
    return cells


def show(cells: list[Cell]) -> None:
    rows = [(cell.context, cell.streams, *(f"{value:.2f}" for value in cell.figures().values())) for cell in cells]
    table(("context", "requests", *cells[0].figures()), rows)


def main() -> int:
    parser = arguments(__doc__)
    options = parser.parse_args()
    report = Report("migration")
    with tempfile.TemporaryDirectory() as directory:
        model, app = Path(directory) / "model", Path(directory) / "move.py"
        made = subprocess.run(
            [sys.executable, "-c", MAKE, str(model), str(VOCABULARY)], check=True, capture_output=True, text=True
        )
        report.figure("parameters", int(made.stdout))
        app.write_text(APP.format(model=str(model)))
        with platform_up("--invokers", "2") as platform:
            pin(platform)
            platform.sllm("deploy", str(app))
            cells = asyncio.run(measure(platform, options.quick))
    print()
    show(cells)
    for cell in cells:
        for name, value in cell.figures().items():
            report.figure(f"context {cell.context} x {cell.streams}: {name}", value)
    alone = [cell for cell in cells if cell.streams == 1]
    contexts = [float(cell.context) for cell in alone]
    gaps = [(statistics.median(cell.gaps) - 1) * cell.step for cell in alone]
    totals = [statistics.median(cell.totals) for cell in alone]
    growth, recompute, whole = (
        statistics.linear_regression(contexts, values).slope for values in (gaps, [c.stop for c in alone], totals)
    )
    report.figure("recompute (ms per token)", recompute * 1e3)
    report.figure("total (ms per token)", whole * 1e3)
    report.figure("total over context, correlation", statistics.correlation(contexts, totals))
    worst = max(statistics.median(cell.gaps) for cell in cells)
    report.at_most("gap p50, worst cell (steps)", worst, 2.0)
    report.at_most("gap growth / recompute per token", growth / recompute, 0.02)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
