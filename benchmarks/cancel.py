"""From the client's disconnect to the work's end.

A thousand streams dropped by their client at random points: 250 async generators, 250 silent synchronous calls, 250
language-model streams, 250 calls still queued; and, apart, synchronous code that ignores its cancellation. When the
work stopped is taken from the work itself where it can tell (its `finally` writes the time), from the death of its
process where it ignores everything, and otherwise from the next caller: with one slot, the dispatch of the stream
queued behind is an upper bound; with one place in the queue, so is the moment the next call is let in.

Afterwards every slot must be free, every container as many as before, and nothing may run without an owner.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT, Platform, Report, arguments, percentile, platform_up, table, wait_http


@dataclass
class Connection:
    """One HTTP request on a connection of its own, dropped when wanted."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int = 0

    @classmethod
    async def post(cls, platform: Platform, path: str, body: object) -> Connection:
        host, port = platform.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {platform.token}\r\n"
        head += "Content-Type: application/json\r\nAccept: text/event-stream\r\n"
        writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return cls(reader, writer)

    async def head(self) -> int:
        """The status, once the head of the answer is there."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        self.status = int(head.split(b" ", 2)[1])
        return self.status

    async def event(self, mark: bytes) -> None:
        """Until `mark` has come; raises IncompleteReadError when the stream ends before."""
        await self.reader.readuntil(mark)

    def drop(self) -> float:
        self.writer.transport.abort()
        return time.time()


def notes(path: Path) -> dict[str, tuple[int, float]]:
    """what -> (pid, time)."""
    lines = path.read_text().split("\n") if path.exists() else []
    return {what: (int(pid), float(at)) for what, pid, at in (line.split() for line in lines if line)}


async def until(path: Path, what: str, seconds: float) -> tuple[int, float]:
    deadline = time.monotonic() + seconds
    while what not in (seen := notes(path)):
        if time.monotonic() > deadline:
            raise SystemExit(f"{path.name} did not note {what!r} within {seconds} s: work left without an owner")
        await asyncio.sleep(0.005)
    return seen[what]


async def self_told(platform: Platform, function: str, directory: Path, number: int, rng: random.Random) -> float:
    """Seconds from the drop to the work's own `finally`."""
    path = directory / f"{function}-{number}"
    call = await Connection.post(platform, f"/v1/functions/cancel/{function}", {"path": str(path)})
    await until(path, "began", 60)
    await asyncio.sleep(rng.uniform(0, 0.2))
    dropped = call.drop()
    _, stopped = await until(path, "stopped", 30)
    return max(0.0, stopped - dropped)


async def many(platform: Platform, function: str, directory: Path, count: int, at_once: int) -> list[float]:
    rng = random.Random(1)
    gate = asyncio.Semaphore(at_once)

    async def one(number: int) -> float:
        async with gate:
            return await self_told(platform, function, directory, number, rng)

    return list(await asyncio.gather(*(one(number) for number in range(count))))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


async def ignoring(platform: Platform, directory: Path, count: int) -> list[float]:
    """Seconds from the drop to the death of the container."""

    async def one(number: int) -> float:
        path = directory / f"deaf-{number}"
        call = await Connection.post(platform, "/v1/functions/cancel/deaf", {"path": str(path)})
        pid, _ = await until(path, "began", 60)
        dropped = call.drop()
        while alive(pid):
            if time.time() - dropped > 30:
                raise SystemExit("code that ignores its cancellation was not killed")
            await asyncio.sleep(0.005)
        return time.time() - dropped

    return [seconds for _ in range(0, count, 4) for seconds in await asyncio.gather(*(one(_ + i) for i in range(4)))]


async def llm(platform: Platform, model: str, count: int) -> list[float]:
    """One slot, the next stream always queued behind: seconds from a drop to the next one's dispatch, which is
    possible only once the engine has really stopped. When that was, its timeline tells."""
    rng = random.Random(2)
    body = {"model": model, "prompt": "roll:", "max_tokens": 3500, "stream": True}
    now = await Connection.post(platform, "/v1/completions", body)
    await now.event(b'"text"')
    drops: list[tuple[float, str]] = []
    for _ in range(count):
        after = await Connection.post(platform, "/v1/completions", body)
        await asyncio.sleep(rng.uniform(0, 0.2))
        dropped = now.drop()
        head = (await after.reader.readuntil(b"\r\n\r\n")).decode().lower()
        drops.append((dropped, head.split("x-invocation-id: ")[1].split("\r\n")[0]))
        await after.event(b'"text"')
        now = after
    now.drop()
    return [await asyncio.to_thread(_dispatched, platform, invocation) - at for at, invocation in drops]


def _dispatched(platform: Platform, invocation: str) -> float:
    """Unix time at which the invocation left the queue."""
    request = urllib.request.Request(f"{platform.url}/v1/invocations/{invocation}", headers=platform.headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        record = json.load(answer)
    queue = next(span for span in record["timeline"] if span["name"] == "queue")
    return float(record["began"] + queue["seconds"])


async def queued(platform: Platform, directory: Path, count: int) -> list[float]:
    """One place in the queue: seconds from dropping the call in it until another is let in."""
    rng = random.Random(3)
    path = directory / "narrow"

    async def submit() -> Connection:
        return await Connection.post(platform, "/v1/functions/cancel/narrow", {"path": str(path)})

    async def refused(call: Connection) -> bool:
        """A full queue answers at once; a call that waits is not answered yet."""
        try:
            async with asyncio.timeout(0.02):
                return await call.head() == 429
        except TimeoutError:
            return False

    holder = await submit()
    await holder.event(b"event: output")
    waiting = await submit()
    if await refused(waiting) or not await refused(await submit()):
        raise SystemExit("the queue does not hold exactly one call")
    out = []
    for _ in range(count):
        await asyncio.sleep(rng.uniform(0, 0.05))
        dropped = waiting.drop()
        while True:
            at = time.time()
            waiting = await submit()
            if not await refused(waiting):
                break
            waiting.drop()
            if at - dropped > 10:
                raise SystemExit("a dropped call still holds its place in the queue")
        out.append(at - dropped)
    waiting.drop()
    holder.drop()
    if len((directory / "narrow").read_text().split("\n")) != 2:
        raise SystemExit("a call that was dropped while queued has run")
    return out


def counts(platform: Platform) -> dict[str, int]:
    status = json.loads(platform.sllm("status", "--json"))
    return {name: status["counts"][name] for name in ("waiting", "running")}


async def settle(platform: Platform) -> dict[str, int]:
    """waiting and running once they are zero, or after ten seconds."""
    for _ in range(50):
        seen = counts(platform)
        if not any(seen.values()):
            break
        await asyncio.sleep(0.2)
    return seen


async def run(platform: Platform, directory: Path, each: int, deaf: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}

    def note_progress(kind: str) -> None:
        print(f"{kind}: {len(seconds[kind])} dropped", flush=True)

    seconds["async generator"] = await many(platform, "agen", directory, each, 32)
    note_progress("async generator")
    seconds["silent sync"] = await many(platform, "silent", directory, each, 4)
    note_progress("silent sync")
    pairs = await asyncio.gather(*(llm(platform, f"llm-{number}", each // 2) for number in range(2)))
    seconds["llm stream"] = [value for values in pairs for value in values]
    note_progress("llm stream")
    seconds["queued"] = await queued(platform, directory, each)
    note_progress("queued")
    seconds["ignores it"] = await ignoring(platform, directory, deaf)
    note_progress("ignores it")
    return seconds


def main() -> int:
    args = arguments(__doc__).parse_args()
    each, deaf = (50, 4) if args.quick else (250, 20)
    report = Report("cancel")
    with platform_up() as platform, tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        platform.sllm("deploy", str(ROOT / "benchmarks/apps/cancel.py"))
        for number in range(2):
            body = json.dumps({"model": f"llm-{number}", "prompt": "1 2", "max_tokens": 1}).encode()
            wait_http(f"{platform.url}/v1/completions", 60, headers=platform.headers, body=body)
        seconds = asyncio.run(run(platform, directory, each, deaf))
        left = asyncio.run(settle(platform))
        told = [notes(path) for path in directory.iterdir() if path.name.split("-")[0] in ("agen", "silent")]

    rows = []
    for kind, values in seconds.items():
        p50, p99 = percentile(values, 50) * 1e3, percentile(values, 99) * 1e3
        rows.append([kind, len(values), f"{p50:.1f}", f"{p99:.1f}", f"{max(values) * 1e3:.1f}"])
        report.figure(f"{kind}.p50_ms", p50)
        report.figure(f"{kind}.p99_ms", p99)
        if kind == "ignores it":
            report.at_most("p99 until code that ignores it is dead, ms (grace 2 s)", p99, 2500)
        else:
            report.at_most(f"p99 from disconnect to stopped, {kind}, ms", p99, 200)
    table(["kind", "dropped", "p50 ms", "p99 ms", "max ms"], rows)
    report.at_most("invocations left waiting or running", sum(left.values()), 0)
    report.at_most("work begun and not stopped", sum("stopped" not in each for each in told), 0)
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
