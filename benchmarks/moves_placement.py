"""A large model must start on a node that is busy with a small one's stream: moving it away, waiting, preempting.

Two invokers. A stream runs on node-0; node-1 is so full that the small model still fits there and the large one does
not. Both have 110M parameters and random weights, so that a stream lasts; what makes one large is what it is promised.
Then one request for the large model comes. Three ways, interleaved:

    moving       what the platform does: the small one starts on node-1, its stream goes on there, the large one starts
    waiting      node-1 takes nothing new, so the stream has to end first
    preempting   the small one's instance is stopped at once; its stream is resumed elsewhere as after a crash

Shown of each: time to the large model's first token, and the longest pause in the small one's stream, which must come
to its end with every token in every case. Memory is what is promised to functions, so that a small machine can stand
for a full one.
The floor of the first is the large model's own start on a node that has room, measured in the same run.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from benchmarks.common import Platform, Report, arguments, percentile, platform_up, table
from benchmarks.models import PROMPT, build

NODE_MB, SMALL_MB, LARGE_MB, FILLER_MB = 4000, 1500, 2600, 2000
TOKENS = 500
WAYS = ("moving", "waiting", "preempting")
APP = """
import asyncio
import sllm

app = sllm.App("busy")
one = {{"max_containers": 1, "scaledown_window": 600}}
small = app.llm("small", checkpoint={small!r}, memory={small_mb}, concurrency=1, **one)
large = app.llm("large", checkpoint={large!r}, memory={large_mb}, concurrency=1, **one)


@app.function(memory={filler_mb}, **one)
async def filler(seconds: float) -> None:
    await asyncio.sleep(seconds)
"""


class Driver:
    def __init__(self, platform: Platform) -> None:
        self.http = httpx.AsyncClient(base_url=platform.url, headers=platform.headers, timeout=httpx.Timeout(180.0))

    async def get(self, path: str) -> dict[str, object]:
        answer = (await self.http.get(path)).raise_for_status()
        return dict(answer.json())

    async def post(self, path: str) -> None:
        (await self.http.post(path)).raise_for_status()

    async def only(self, node: str) -> None:
        """New instances start there and nowhere else; empty: anywhere."""
        for name in ("node-0", "node-1"):
            await self.post(f"/v1/nodes/{name}/{'uncordon' if node in ('', name) else 'cordon'}")

    async def instances(self) -> list[dict[str, object]]:
        listed = (await self.get("/v1/instances"))["instances"]
        assert isinstance(listed, list)
        return listed

    async def ready(self, function: str) -> dict[str, object]:
        return await self.until(
            lambda found: next((i for i in found if i["function"] == function and i["state"] == "ready"), None)
        )

    async def until(self, want: Callable[[list[dict[str, object]]], dict[str, object] | None]) -> dict[str, object]:
        deadline = time.monotonic() + 120
        while (seen := want(await self.instances())) is None:
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"the platform did not come to the state that the benchmark needs: {await self.instances()}"
                )
            await asyncio.sleep(0.05)
        return seen

    async def clear(self) -> None:
        """No instance is left. Demand is told with a delay, so one that was stopped may be replaced once."""
        while found := await self.instances():
            for instance in found:
                await self.http.delete(f"/v1/instances/{instance['instance']}")
            await asyncio.sleep(0.3)

    async def stream(self) -> float:
        """The small model's stream: its longest pause. Ends the benchmark when tokens are missing."""
        tokens, longest, last, ended = 0, 0.0, 0.0, False
        body = {"model": "busy/small", "prompt": PROMPT, "max_tokens": TOKENS, "stream": True, "temperature": 0}
        body["stream_options"] = {"include_usage": True}
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                now = time.monotonic()
                longest, last = max(longest, now - last if last else 0.0), now
                if line[6:] == "[DONE]":
                    ended = True
                    break
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise SystemExit(f"the small model's stream failed: {chunk['error']['message']}")
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        if not ended or tokens != TOKENS:
            raise SystemExit(f"the small model's stream ended with {tokens} of {TOKENS} tokens")
        return longest

    async def large(self) -> float:
        """Seconds to its first token."""
        began = time.monotonic()
        body = {"model": "busy/large", "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
        answer = await self.http.post("/v1/completions", json=body)
        if answer.status_code != 200:
            raise SystemExit(f"the large model did not answer: {answer.text[:300]}")
        return time.monotonic() - began

    async def alone(self) -> float:
        """Its first token where there is room."""
        await self.clear()
        await self.only("node-0")
        return await self.large()

    async def round(self, way: str) -> tuple[float, float]:
        """(the large one's first token, the small one's longest pause) in seconds."""
        await self.clear()
        await self.only("node-1")
        filler = asyncio.create_task(self.http.post("/v1/functions/busy/filler", json={"seconds": 100}))
        await self.ready("filler")
        await self.only("node-0")
        stream = asyncio.create_task(self.stream())
        small = await self.ready("small")
        await asyncio.sleep(6)  # an instance is not moved in its first seconds
        await self.only("node-0" if way == "waiting" else "")
        large = asyncio.create_task(self.large())
        if way == "preempting":
            await asyncio.sleep(0.05)
            await self.http.request("DELETE", f"/v1/instances/{small['instance']}", params={"drain": "0"})
        times = await large, await stream
        filler.cancel()
        await asyncio.gather(filler, return_exceptions=True)
        return times


async def measure(platform: Platform, rounds: int) -> dict[str, list[tuple[float, float]]]:
    driver = Driver(platform)
    seen: dict[str, list[tuple[float, float]]] = {"alone": [], **{way: [] for way in WAYS}}
    await driver.alone()  # layers and disk cache of node-0
    await driver.clear()
    await driver.only("node-1")
    await driver.stream()  # layers of node-1
    for number in range(rounds):
        for way in WAYS:
            seen[way].append(await driver.round(way))
            first, pause = seen[way][-1]
            print(f"round {number + 1}: {way} {first:.2f} s, longest pause {pause:.2f} s", flush=True)
        seen["alone"].append((await driver.alone(), 0.0))
    await driver.http.aclose()
    return seen


def main() -> int:
    options = arguments(__doc__).parse_args()
    report = Report("moves_placement")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        large = build("110M", root / "large", variants=(root / "small",))
        app = root / "app" / "busy.py"
        app.parent.mkdir()
        app.write_text(
            APP.format(
                small=str(root / "small"), large=str(large),
                small_mb=SMALL_MB, large_mb=LARGE_MB, filler_mb=FILLER_MB,
            )
        )  # fmt: skip
        with platform_up("--invokers", "2", "--memory-mb", str(2 * NODE_MB), "--layers-mb", "1024") as platform:
            platform.sllm("deploy", str(app))
            seen = asyncio.run(measure(platform, 1 if options.quick else 5))
    rows = []
    for way, times in seen.items():
        first, pause = ([one[index] for one in times] for index in (0, 1))
        rows.append((way, len(times), *(f"{percentile(each, q):.2f}" for each in (first, pause) for q in (50, 100))))
        report.figure(f"{way}: first token p50 (s)", percentile(first, 50))
        report.figure(f"{way}: longest pause of the stream p50 (s)", percentile(pause, 50))
    print()
    table(("way", "rounds", "first token p50 s", "max s", "pause p50 s", "max s"), rows)
    median = {way: percentile([first for first, _ in times], 50) for way, times in seen.items()}
    report.at_most("moving beside waiting (first token, ratio)", median["moving"] / median["waiting"], 1.0)
    pauses = {way: percentile([pause for _, pause in times], 50) for way, times in seen.items()}
    report.at_most("moving beside preempting (pause, ratio)", pauses["moving"] / max(1e-9, pauses["preempting"]), 1.0)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
