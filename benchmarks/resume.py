"""Answers that outlive their container and their node.

Thirty-two language-model requests are always under way, streamed and whole, counting ones and sampled ones, while
containers and invokers are killed with SIGKILL at random moments; an invoker only while another node is up. Every
answer must be the one that the same request gets when nothing dies: counting is checked by counting, sampled rolls of a
die against a run before the kills. A first divergence is excused only where the two best scores are within 1e-4 of each
other (prefill and step-by-step decoding differ by about 4e-6), and counted.

The pause a client sees (from its last chunk to the first one behind the comment line that says `resumed`) is shown
beside the time to the first token of a warm call and of one that starts an instance, on the same machine before; apart
for those in whose time an invoker was killed, because that takes the warm layers of its node with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import ROOT, Platform, Report, arguments, leftovers, percentile, platform_with, table
from benchmarks.divergence import Referee

STREAMS = 32
TOKENS = 300
SEEDS = 96
"""Rolls there are. One with two scores that nearly tie differs whenever it is computed in other company: of few it
would be a large part."""
NEW_INVOKER = 10.0
"""Seconds in which a killed invoker is replaced and has made its layers again."""
MODEL = ROOT / "examples/counting/model"
APP = f"""
from pathlib import Path
import sllm
app = sllm.App("resume")
model = Path({str(MODEL)!r})
counting = app.llm("counting", checkpoint=model, concurrency=16, min_containers=2, max_containers=3)
cold = app.llm("cold", checkpoint=model, scaledown_window=0)
"""


@dataclass(frozen=True)
class Ask:
    """A request, and whether it is streamed."""

    prompt: str
    seed: int
    stream: bool

    def body(self, model: str = "resume/counting", tokens: int = TOKENS) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": self.prompt,
            "seed": self.seed,
            "temperature": 1.0 if self.prompt == "roll:" else 0.0,
            "max_tokens": tokens,
            "stream": self.stream,
        }


@dataclass(frozen=True)
class Gap:
    """No token between these two times, because of a resume."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Answer:
    text: str = ""
    problem: str = ""
    first: float = 0.0
    """Seconds to the first token."""
    gaps: list[Gap] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Send it, read it to its end, whatever that is."""
    answer, began = Answer(), time.perf_counter()
    try:
        if not body["stream"]:
            got = await client.post("/v1/completions", json=body)
            if got.status_code == 200:
                answer.text = got.json()["choices"][0]["text"]
            else:
                answer.problem = f"{got.status_code} {got.text[:200]}"
            return answer
        async with client.stream("POST", "/v1/completions", json=body) as got:
            if got.status_code != 200:
                answer.problem = f"{got.status_code} {(await got.aread())[:200]!r}"
                return answer
            last, resumed, ended = began, False, False
            async for line in got.aiter_lines():
                if line.startswith(": resumed"):
                    resumed = True
                elif line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        answer.problem = json.dumps(chunk["error"])[:200]
                        continue
                    now = time.perf_counter()
                    answer.first = answer.first or now - began
                    if resumed:
                        answer.gaps.append(Gap(last, now))
                        resumed = False
                    last = now
                    answer.text += chunk["choices"][0]["text"]
            if not ended and not answer.problem:
                answer.problem = "the stream broke off"
    except httpx.HTTPError as error:
        answer.problem = f"{type(error).__name__} {error}"
    return answer


def counted(prompt: str) -> str:
    """What the model answers to a number: the numbers after it."""
    return "".join(f" {(int(prompt) + 1 + i) % 1000}" for i in range(TOKENS))


# -- killing ---------------------------------------------------------------------------------------------------------


class Killer:
    """Kills a container or an invoker at random moments."""

    def __init__(self, platform: Platform, client: httpx.AsyncClient, rng: random.Random) -> None:
        self._platform = platform
        self._client = client
        self._rng = rng
        self.containers = 0
        self.invokers: list[float] = []
        """When they were killed."""

    @property
    def kills(self) -> int:
        return self.containers + len(self.invokers)

    def of_invoker(self, gap: Gap) -> bool:
        """Whether it fell into the time in which an invoker was dead, so that perhaps nothing warm was left."""
        return any(gap.began - NEW_INVOKER < at < gap.ended for at in self.invokers)

    async def run(self, pause: float) -> None:
        while True:
            await asyncio.sleep(self._rng.uniform(0.3, 1.7) * pause)
            if self.kills % 8 == 5:  # what it takes to start on a new invoker is most of the time
                await self._invoker()
            else:
                await self._container()

    async def _container(self) -> None:
        found = (await self._client.get("/v1/instances")).json()["instances"]
        ready = [each for each in found if each["function"] == "counting" and each["state"] == "ready" and each["pid"]]
        if ready and _kill(self._rng.choice(ready)["pid"]):
            self.containers += 1

    async def _invoker(self) -> None:
        nodes = (await self._client.get("/v1/nodes")).json()["nodes"]
        up = [each["name"] for each in nodes if each["state"] == "up"]
        if len(up) >= 2 and _kill(self._invoker_pid(self._rng.choice(up))):
            self.invokers.append(time.perf_counter())
        elif len(up) < 2:
            await self._container()

    def _invoker_pid(self, node: str) -> int:
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not entry.name.isdigit():
                    continue
                command = (entry / "cmdline").read_bytes().split(b"\0")
                ours = f"SLLM_STATE_DIR={self._platform.state}".encode() in (entry / "environ").read_bytes().split(
                    b"\0"
                )
                if ours and b"sllm_invoker" in command and node.encode() in command:
                    return int(entry.name)
        return 0


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL) if pid else None
    except ProcessLookupError:
        return False
    return bool(pid)


# -- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    done: int = 0
    failed: list[str] = field(default_factory=list)
    diverged: int = 0
    excused: int = 0
    seeds: set[int] = field(default_factory=set)
    """Of the rolls that differed."""
    gaps: list[Gap] = field(default_factory=list)


class Run:
    def __init__(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        self.client = client
        self.rng = rng
        self.rolls: dict[int, str] = {}
        self.tally = Tally()
        self.stop = False
        self.referee = Referee(MODEL)

    async def undisturbed(self) -> None:
        """Every sampled answer as it is when nothing dies; and that counting counts."""
        for seed in range(SEEDS):
            answer = await ask(self.client, Ask("roll:", seed, True).body())
            if answer.problem:
                raise SystemExit(f"the undisturbed run failed: {answer.problem}")
            self.rolls[seed] = answer.text

    async def worker(self) -> None:
        while not self.stop:
            rolls = self.rng.random() < 0.5
            prompt = "roll:" if rolls else str(self.rng.randrange(1, 1000))
            wanted = Ask(prompt, self.rng.randrange(SEEDS), self.rng.random() < 0.85)
            answer = await ask(self.client, wanted.body())
            await self._judge(wanted, answer)

    async def _judge(self, wanted: Ask, answer: Answer) -> None:
        tally = self.tally
        tally.done += 1
        tally.gaps += answer.gaps
        if answer.problem:
            tally.failed.append(answer.problem)
            print(f"FAILED {wanted}: {answer.problem}", flush=True)
            return
        expected = self.rolls[wanted.seed] if wanted.prompt == "roll:" else counted(wanted.prompt)
        if answer.text == expected:
            return
        tally.diverged += 1
        story = "it does not count"
        if wanted.prompt == "roll:":
            story = await asyncio.to_thread(self.referee.objection, wanted.body(), 0, expected, answer.text)
        tally.excused += not story
        tally.seeds.add(wanted.seed)
        if story:
            print(
                f"DIVERGED {wanted} (resumed {len(answer.gaps)} times), {story}:\n  {expected}\n  {answer.text}",
                flush=True,
            )


async def first_tokens(client: httpx.AsyncClient, model: str, count: int) -> list[float]:
    times = []
    for _ in range(count):
        answer = await ask(client, Ask("1", 0, True).body(model, 5))
        if answer.problem:
            raise SystemExit(f"{model}: {answer.problem}")
        times.append(answer.first)
        if model.endswith("cold"):  # its instance must be gone before the next
            while any(each["function"] == "cold" for each in (await client.get("/v1/instances")).json()["instances"]):
                await asyncio.sleep(0.02)
    return times


async def resumes(client: httpx.AsyncClient) -> int:
    """How often streams went on elsewhere, by the gateway's own count."""
    text = (await client.get("/metrics")).text
    return int(sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("sllm_resumes_total")))


async def measure(platform: Platform, report: Report, *, quick: bool) -> None:
    goal, least_kills, limit = (40, 6, 30.0) if quick else (200, 40, 200.0)
    rng = random.Random(11)
    timeout, limits = httpx.Timeout(120), httpx.Limits(max_connections=STREAMS + 8)
    headers = {**platform.headers, "X-Sllm-Comments": "1"}
    async with httpx.AsyncClient(base_url=platform.url, headers=headers, timeout=timeout, limits=limits) as client:
        run, killer = Run(client, rng), Killer(platform, client, rng)
        warm = await first_tokens(client, "resume/counting", 10)
        cold = await first_tokens(client, "resume/cold", 3 if quick else 8)
        await run.undisturbed()
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(STREAMS):
                group.create_task(run.worker())
            killing = group.create_task(killer.run(1.5 if quick else 2.0))
            while (await resumes(client) < goal or killer.kills < least_kills) and time.monotonic() - began < limit:
                await asyncio.sleep(0.25)
            killing.cancel()
            run.stop = True
        seconds, total = time.monotonic() - began, await resumes(client)
        left = await leftovers(client, 10)
    tally = run.tally
    print(
        f"{tally.done} answers in {seconds:.0f} s while {killer.containers} containers and {len(killer.invokers)} "
        f"invokers were killed; {total} resumes, {len(tally.failed)} failed, {tally.diverged} differ "
        f"({tally.excused} excused), of {len(tally.seeds)} of {SEEDS} rolls\n"
    )
    container = [gap.seconds for gap in tally.gaps if not killer.of_invoker(gap)]
    invoker = [gap.seconds for gap in tally.gaps if killer.of_invoker(gap)]
    rows = [
        ("first token, warm", warm),
        ("first token, cold start", cold),
        ("pause, a container was killed", container),
        ("pause, an invoker was killed", invoker),
    ]
    table(
        ("", "n", "p50 ms", "p90 ms", "max ms"),
        [
            (name, len(times), *(f"{1e3 * percentile(times, q):.0f}" for q in (50, 90, 100)))
            for name, times in rows
            if times
        ],
    )
    figures = {
        "warm_first_token": warm,
        "cold_first_token": cold,
        "resume_pause": container,
        "resume_pause_invoker": invoker,
    }
    for name, times in figures.items():
        if times:
            report.figure(f"{name}_p50_s", percentile(times, 50))
            report.figure(f"{name}_p90_s", percentile(times, 90))
    report.figure("answers", tally.done)
    report.figure("killed_containers", killer.containers)
    report.figure("killed_invokers", len(killer.invokers))
    report.figure("excused_divergences", tally.excused)
    report.at_least("resumes", total, goal)
    report.at_most("failures a client saw", len(tally.failed), 0)
    report.at_most("answers that differ, unexcused", tally.diverged - tally.excused, 0)
    report.at_most("excused divergences, share of answers", tally.excused / max(1, tally.done), 0.01)
    report.at_most("invocations left running or waiting", left, 0)


def main() -> int:
    args = arguments(__doc__).parse_args()
    report = Report("resume")
    with platform_with(APP, "--invokers", "2") as platform:
        asyncio.run(measure(platform, report, quick=args.quick))
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
