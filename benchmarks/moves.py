"""Answers that are moved between two nodes while they are given, at random, again and again.

Twelve clients read generations with random sampling settings — temperatures, top-p, top-k, penalties, stop strings,
several choices — on prompts of high entropy (a model that rolls dice), and counting ones, which a person can check.
Some go away in the middle. Meanwhile running invocations are moved to the other node. Every answer must be, token by
token, the one that the same request got when nothing moved. A first divergence is excused only where a change of 1e-4
of the two scores is enough for it (prefill and step-by-step decoding differ by about 4e-6), and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.common import ROOT, Platform, Report, arguments, leftovers, percentile, platform_with, table
from benchmarks.divergence import Referee

CLIENTS = 12
TOKENS = 400
VARIANTS = 40
NODES = ("node-0", "node-1")
MODEL = ROOT / "examples/counting/model"
APP = f"""
from pathlib import Path
import sllm
app = sllm.App("moves")
counting = app.llm("counting", checkpoint=Path({str(MODEL)!r}), concurrency=12, min_containers=2, max_containers=2)
"""


def variant(rng: random.Random) -> dict[str, Any]:
    """A request. Top-k and top-p cut beside the six faces, never between them: their scores are within 0.004 of each
    other, and which of them a cut through the middle leaves is decided by rounding at about one token in a hundred."""
    if rng.random() < 0.25:
        first = rng.randrange(1, 900)
        return {"prompt": f"{first} {first + 1}", "temperature": 0.0, "max_tokens": TOKENS}
    return {
        "prompt": "roll:",
        "seed": rng.randrange(1 << 32),
        "max_tokens": rng.randrange(TOKENS // 2, TOKENS),
        "temperature": rng.choice([0.7, 1.0, 1.4]),
        "top_p": rng.choice([1.0, 0.95, 0.9]),
        "top_k": rng.choice([0, 0, 6, 40]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.6]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.02]),
        "n": rng.choice([1, 1, 1, 3]),
        **({"stop": ["".join(rng.choices("123456", k=3))]} if rng.random() < 0.3 else {}),
    }


@dataclass
class Answer:
    invocation: str = ""
    text: dict[int, str] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    moved: int = 0
    usage: int = 0
    gaps: list[float] = field(default_factory=list)
    problem: str = ""

    def whole(self, request: dict[str, Any], choice: int) -> str:
        """What was drawn, with the stop string that ended it."""
        text = self.text.get(choice, "")
        return text + request["stop"][0] if "stop" in request and self.finish.get(choice) == "stop" else text


class Run:
    def __init__(self, client: httpx.AsyncClient, rng: random.Random, goal: int) -> None:
        self.client, self.rng, self.goal = client, rng, goal
        self.expected: list[tuple[dict[str, Any], Answer]] = []
        self.running: dict[str, Answer] = {}
        self.outcomes: Counter[str] = Counter()
        self.answers = self.cancelled = self.moved_answers = self.excused = 0
        self.wrong: list[str] = []
        self.gaps: list[float] = []
        self.referee = Referee(MODEL)

    @property
    def over(self) -> bool:
        return self.outcomes["moved"] >= self.goal

    async def ask(self, request: dict[str, Any], *, leave: int | None = None) -> Answer:
        """Read an answer to its end, or leave after so many chunks."""
        answer = Answer()
        body = {"model": "moves/counting", "stream": True, "stream_options": {"include_usage": True}, **request}
        chunks, last, hop = 0, 0.0, False
        try:
            async with self.client.stream("POST", "/v1/completions", json=body) as got:
                if got.status_code != 200:
                    answer.problem = f"{got.status_code} {(await got.aread())[:200]!r}"
                    return answer
                answer.invocation = got.headers["x-invocation-id"]
                self.running[answer.invocation] = answer
                ended = False
                async for line in got.aiter_lines():
                    if line.startswith(": migrated"):
                        answer.moved, hop = answer.moved + 1, True
                    elif line == "data: [DONE]":
                        ended = True
                    elif line.startswith("data: "):
                        chunks += 1
                        now = time.perf_counter()
                        if hop and last:
                            answer.gaps.append(now - last)
                        last, hop = now, False
                        self._take(answer, json.loads(line[6:]))
                    if leave is not None and chunks >= leave:
                        return answer
                if not ended and not answer.problem:
                    answer.problem = "the stream broke off"
        except httpx.HTTPError as error:
            answer.problem = f"{type(error).__name__} {error}"
        finally:
            self.running.pop(answer.invocation, None)
        return answer

    def _take(self, answer: Answer, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            answer.problem = json.dumps(chunk["error"])[:200]
            return
        for choice in chunk["choices"]:
            index = choice["index"]
            answer.text[index] = answer.text.get(index, "") + choice["text"]
            if choice["finish_reason"]:
                answer.finish[index] = choice["finish_reason"]
        if chunk.get("usage"):
            answer.usage = chunk["usage"]["completion_tokens"]

    async def undisturbed(self, variants: int) -> None:
        for _ in range(variants):
            request = variant(self.rng)
            answer = await self.ask(request)
            if answer.problem:
                raise SystemExit(f"the undisturbed run failed: {answer.problem}")
            if request["prompt"] != "roll:":
                first = int(request["prompt"].split()[-1]) + 1
                if answer.text[0] != "".join(f" {(first + i) % 1000}" for i in range(TOKENS)):
                    raise SystemExit(f"the model does not count: {answer.text[0][:100]}")
            self.expected.append((request, answer))

    async def read(self) -> None:
        while not self.over:
            request, expected = self.rng.choice(self.expected)
            leave = self.rng.randrange(1, TOKENS // 2) if self.rng.random() < 0.15 else None
            answer = await self.ask(request, leave=leave)
            if leave is not None and not answer.problem and answer.finish != expected.finish:
                self.cancelled += 1
                continue
            self.answers += 1
            self.moved_answers += bool(answer.moved)
            self.gaps += answer.gaps
            await self._judge(request, expected, answer)

    async def _judge(self, request: dict[str, Any], expected: Answer, answer: Answer) -> None:
        if answer.problem:
            self.wrong.append(f"failed: {answer.problem}")
        elif (answer.text, answer.finish, answer.usage) != (expected.text, expected.finish, expected.usage):
            story = await asyncio.to_thread(self._excuse, request, expected, answer)
            if story:
                self.wrong.append(f"{request}, moved {answer.moved} times\n  {story}\n  {expected}\n  {answer}")
            else:
                self.excused += 1

    def _excuse(self, request: dict[str, Any], expected: Answer, answer: Answer) -> str:
        """Empty if rounding explains all of what differs, else the story. Blocks."""
        differing = [i for i in expected.text if expected.whole(request, i) != answer.whole(request, i)]
        if not differing:
            return f"the texts are equal, {expected.finish} and {answer.finish}, {expected.usage} and {answer.usage}"
        if request["prompt"] != "roll:":
            return "it does not count"
        for choice in differing:
            texts = expected.whole(request, choice), answer.whole(request, choice)
            if story := self.referee.objection(request, choice, *texts):
                return f"choice {choice}, {story}"
        return ""

    async def move(self) -> None:
        """Move one running invocation after another to the other node."""
        while not self.over:
            ids = list(self.running)
            if not ids:
                await asyncio.sleep(0.002)
                continue
            invocation = self.rng.choice(ids)
            record = (await self.client.get(f"/v1/invocations/{invocation}")).json()
            if record.get("node") not in NODES:
                continue
            other = NODES[1 - NODES.index(record["node"])]
            got = (await self.client.post(f"/v1/invocations/{invocation}/migrate", json={"node": other})).json()
            if "error" in got:  # most often because the instance is being emptied of another one
                await asyncio.sleep(0.02)
            self.outcomes[got.get("outcome") or str(got["error"]["code"])] += 1


async def measure(platform: Platform, report: Report, *, quick: bool) -> None:
    goal = 60 if quick else 500
    headers = {**platform.headers, "X-Sllm-Comments": "1"}
    limits = httpx.Limits(max_connections=CLIENTS + 8)
    async with httpx.AsyncClient(base_url=platform.url, headers=headers, timeout=120, limits=limits) as client:
        run = Run(client, random.Random(5), goal)
        await run.undisturbed(VARIANTS)
        began = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60 if quick else 600), asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(run.read())
                for _ in range(3):
                    group.create_task(run.move())
        seconds = time.monotonic() - began
        left = await leftovers(client, 20)
    for wrong in run.wrong[:5]:
        print(wrong)
    print(
        f"{run.answers} answers, {run.moved_answers} of them moved, and {run.cancelled} left alone, in {seconds:.0f} s"
    )
    table(("what became of a move", "n"), sorted(run.outcomes.items()))
    if run.gaps:
        print(f"pause at a hand-over: p50 {1e3 * percentile(run.gaps, 50):.0f} ms, max {1e3 * max(run.gaps):.0f} ms")
    report.figure("answers", run.answers)
    report.figure("cancelled by their clients", run.cancelled)
    report.figure("excused divergences", run.excused)
    report.at_least("moves", run.outcomes["moved"], goal)
    report.at_most("answers lost, doubled or different", len(run.wrong), 0)
    report.at_most("excused divergences, share of answers", run.excused / max(1, run.answers), 0.01)
    report.at_most("invocations left running or waiting", left, 0)


def main() -> int:
    options = arguments(__doc__).parse_args()
    report = Report("moves")
    with platform_with(APP, "--invokers", "2") as platform:
        asyncio.run(measure(platform, report, quick=options.quick))
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
