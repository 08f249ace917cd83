"""The price of the platform on the path of a request.

One machine, one run, interleaved rounds: the same echo payload at 1, 16 and 64 connections from wrk, answered by
sllm-faas (authentication, metrics and logs on; gateway -> invoker -> container and back), by bare Starlette on
uvicorn, by LitServe and by Ray Serve. Then 100 functions in 100 containers called round robin beside one
function, and SSE events per second over 8 streams, one event for each `yield`.

Limits: bare Starlette is the floor of one process. Every request of ours crosses three, on the same cores that also
run the load generator: the floor of that is the bare chain (peers/chain.py), the same hops with nothing on them. With a
hundred containers every call wakes a process that has been out of the processor's caches for a hundred calls; what the
bare chain loses by that is what any chain of these processes loses.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import (
    PEERS,
    ROOT,
    Load,
    Platform,
    Report,
    arguments,
    free_port,
    platform_up,
    process,
    table,
    wait_http,
    wrk,
    wrk_script,
)

BODY = json.dumps({"value": "x" * 100})
JSON = {"Content-Type": "application/json"}
CONNECTIONS = (1, 16, 64)
Server = Callable[[Path], AbstractContextManager[tuple[str, Path]]]


@contextlib.contextmanager
def ours(directory: Path) -> Iterator[tuple[str, Path]]:
    with platform_up() as platform:
        platform.sllm("deploy", str(ROOT / "benchmarks/apps/plane.py"))
        url = f"{platform.url}/v1/functions/plane/echo"
        wait_http(url, 30, headers=platform.headers, body=BODY.encode())
        yield url, wrk_script(directory, BODY, platform.headers)


def peer(python: str, script: str, path: str, seconds: float, *args: str) -> Server:
    @contextlib.contextmanager
    def server(directory: Path) -> Iterator[tuple[str, Path]]:
        port = free_port()
        with process([python, str(ROOT / "benchmarks/peers" / script), str(port), *args]) as child:
            url = f"http://127.0.0.1:{port}{path}"
            wait_http(url, seconds, child, JSON, BODY.encode())
            yield url, wrk_script(directory, BODY, JSON)

    return server


def rounds(servers: dict[str, Server], count: int, seconds: float, directory: Path) -> dict[str, dict[int, list[Load]]]:
    seen: dict[str, dict[int, list[Load]]] = {name: {c: [] for c in CONNECTIONS} for name in servers}
    for number in range(count):
        for name, server in servers.items():
            with server(directory) as (url, script):
                wrk(url, 16, 1, script)
                for connections in CONNECTIONS:
                    load = wrk(url, connections, seconds, script)
                    seen[name][connections].append(load)
                    print(
                        f"round {number + 1}  {name:10} c={connections:<3} {load.rate:9.0f} req/s  "
                        f"p50 {load.p50:7.2f} ms  p99 {load.p99:7.2f} ms  errors {load.errors}",
                        flush=True,
                    )
    return seen


@dataclass
class Many:
    """Rates of one function, and of a hundred round robin, by round."""

    url: str
    single: Path
    hundred: Path
    one: list[float] = field(default_factory=list)
    all: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, url: str, headers: dict[str, str], path: str, directory: Path) -> Many:
        """`path` with a number behind it is a function, and each of them answers."""
        paths = [f"{path}{number}" for number in range(100)]
        for each in paths:
            wait_http(url + each, 60, headers=headers, body=BODY.encode())
        single, hundred = (wrk_script(directory, BODY, headers, some) for some in (paths[:1], paths))
        return cls(url, single, hundred)

    def measure(self, seconds: float) -> None:
        for script, rates in ((self.single, self.one), (self.hundred, self.all)):
            load = wrk(self.url, 16, seconds, script)
            if load.errors:
                raise SystemExit(f"{load.errors} errors while calling {script.name} at {self.url}")
            rates.append(load.rate)

    @property
    def loss(self) -> float:
        return 1 - statistics.median(a / b for a, b in zip(self.all, self.one, strict=True))


def many_functions(platform: Platform, count: int, seconds: float, directory: Path) -> tuple[Many, Many]:
    """(ours, those of the bare chain), interleaved."""
    ours = Many.of(platform.url, platform.headers, "/v1/functions/many/echo_", directory)
    with peer(sys.executable, "chain.py", "/echo/0", 30, "100")(directory) as (url, _):
        chain = Many.of(url.removesuffix("/echo/0"), JSON, "/echo/", directory)
        for _ in range(count):
            ours.measure(seconds)
            chain.measure(seconds)
    return ours, chain


def sse_rate(platform: Platform, streams: int, events: int) -> float:
    """Events per second over `streams` connections; every event is counted and the last checked."""
    host, port = platform.url.removeprefix("http://").split(":")
    body = json.dumps({"n": events})
    request = (
        f"POST /v1/functions/plane/count HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {platform.token}\r\n"
        f"Content-Type: application/json\r\nAccept: text/event-stream\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
    selector = selectors.DefaultSelector()
    seen = {}
    tails = {}
    began = time.perf_counter()
    for _ in range(streams):
        sock = socket.create_connection((host, int(port)))
        sock.sendall(request)
        selector.register(sock, selectors.EVENT_READ)
        seen[sock] = 0
        tails[sock] = b""
    open_streams = streams
    while open_streams:
        for key, _ in selector.select(30):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            data = sock.recv(1 << 20)
            chunk = tails[sock] + data
            seen[sock] += chunk.count(b"event: output")
            tails[sock] = chunk[-12:]
            if b"event: done" in chunk or not data:
                selector.unregister(sock)
                sock.close()
                open_streams -= 1
    seconds = time.perf_counter() - began
    wrong = [count for count in seen.values() if count != events]
    if wrong:
        raise SystemExit(f"streams were cut or repeated: {wrong} events instead of {events}")
    return streams * events / seconds


def main() -> int:
    args = arguments(__doc__).parse_args()
    count, seconds = (2, 2.0) if args.quick else (5, 4.0)
    peers_python = str(PEERS / "bin/python")
    servers: dict[str, Server] = {
        "sllm-faas": ours,
        "starlette": peer(sys.executable, "bare.py", "/echo", 30),
        "chain": peer(sys.executable, "chain.py", "/echo/0", 30),
        "litserve": peer(peers_python, "lit.py", "/predict", 60),
        "rayserve": peer(peers_python, "rayserve.py", "/", 120),
    }
    report = Report("dataplane")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        seen = rounds(servers, count, seconds, directory)
        with platform_up() as platform:
            platform.sllm("deploy", str(ROOT / "benchmarks/apps/many.py"))
            many, chain = many_functions(platform, count, seconds, directory)
            platform.sllm("delete", "--yes", "many")
            platform.sllm("deploy", str(ROOT / "benchmarks/apps/plane.py"))
            sse_rate(platform, 8, 1000)
            events = [sse_rate(platform, 8, 5000 if args.quick else 20000) for _ in range(count)]

    rows = []
    for system, by_connections in seen.items():
        for connections, loads in by_connections.items():
            rate, p50, p99 = (
                statistics.median(getattr(load, what) for load in loads) for what in ("rate", "p50", "p99")
            )
            errors = sum(load.errors for load in loads)
            rows.append([system, connections, f"{rate:.0f}", f"{p50:.2f}", f"{p99:.2f}", errors])
            report.figure(f"{system}.c{connections}.rate", rate)
            report.figure(f"{system}.c{connections}.p50_ms", p50)
            report.figure(f"{system}.c{connections}.p99_ms", p99)
    print()
    table(["system", "connections", "req/s", "p50 ms", "p99 ms", "errors"], rows)

    def ratio(other: str) -> float:
        """Median over the rounds of our rate over theirs at 16 connections."""
        pairs = zip(seen["sllm-faas"][16], seen[other][16], strict=True)
        return statistics.median(mine.rate / theirs.rate for mine, theirs in pairs)

    added = statistics.median(
        mine.p50 - bare.p50 for mine, bare in zip(seen["sllm-faas"][1], seen["starlette"][1], strict=True)
    )
    for system, rates in (("sllm-faas", many), ("chain", chain)):
        report.figure(f"{system}.one_function.rate", statistics.median(rates.one))
        report.figure(f"{system}.hundred_functions.rate", statistics.median(rates.all))
        report.figure(f"{system}.lost_with_hundred", rates.loss)
        one, hundred = statistics.median(rates.one), statistics.median(rates.all)
        print(f"{system}: one function {one:.0f} req/s, a hundred {hundred:.0f}, lost {rates.loss:.1%}")
    report.at_least("rate at 16 connections / LitServe", ratio("litserve"), 3.5)
    report.at_least("rate at 16 connections / Ray Serve", ratio("rayserve"), 20)
    report.at_least("rate at 16 connections / bare Starlette", ratio("starlette"), 0.35)
    report.at_most("unloaded p50 added to bare Starlette, ms", added, 1.5)
    report.at_most("rate lost with 100 functions in 100 containers", many.loss, 0.2)
    report.at_least("SSE events/s over 8 streams", statistics.median(events), 10_000)
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
