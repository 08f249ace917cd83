"""What every benchmark shares: servers started and stopped, load from wrk, one JSON object at the end.

A benchmark prints a table and, with `--json PATH`, writes
`{"benchmark", "machine", "date", "figures": {name: value}, "bars": {name: {"value", "limit", "holds"}}}`.
A bar is a promise of the documentation. Nothing here asserts: a missed bar is reported and gives exit code 1, and so
does one that could not be shown (`value` and `limit` null, and `why`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

ROOT = Path(__file__).parents[1]
PEERS = Path(os.environ.get("SLLM_BENCH_ENV", ROOT / ".venv-bench"))


@dataclass
class Report:
    """Collects figures and bars, prints them, writes them."""

    benchmark: str
    figures: dict[str, Any] = field(default_factory=dict)
    bars: dict[str, dict[str, Any]] = field(default_factory=dict)

    def figure(self, name: str, value: float) -> None:
        self.figures[name] = round(value, 4)

    def at_least(self, name: str, value: float, limit: float) -> None:
        self.bars[name] = {"value": round(value, 4), "limit": limit, "holds": value >= limit}

    def at_most(self, name: str, value: float, limit: float) -> None:
        self.bars[name] = {"value": round(value, 4), "limit": limit, "holds": value <= limit}

    def not_shown(self, name: str, why: str) -> None:
        """A bar that this run has nothing to hold against: as good as missed."""
        self.bars[name] = {"value": None, "limit": None, "holds": False, "why": why}

    def finish(self, path: str | None) -> int:
        """Print the bars, write the JSON; the exit code."""
        print()
        for name, bar in self.bars.items():
            if bar["value"] is None:
                print(f"NOT SHOWN  {name}: {bar['why']}")
                continue
            print(f"{'holds ' if bar['holds'] else 'MISSED'}  {name}: {bar['value']:g} (limit {bar['limit']:g})")
        if path:
            whole = {
                "benchmark": self.benchmark,
                "machine": machine(),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "figures": self.figures,
                "bars": self.bars,
            }
            Path(path).write_text(json.dumps(whole, indent=1) + "\n")
        return 0 if all(bar["holds"] for bar in self.bars.values()) else 1


def machine() -> str:
    model = ""
    with contextlib.suppress(OSError):
        model = next(
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} x {model}, {memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"
    )


def arguments(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH", help="write the figures to PATH")
    parser.add_argument("--quick", action="store_true", help="the same figures from fewer repetitions")
    return parser


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for number, row in enumerate(cells):
        print(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
        if number == 0:
            print("  ".join("-" * width for width in widths))


def percentile(values: Sequence[float], q: float) -> float:
    """Nearest-rank percentile, q in 0..100."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(q / 100 * len(ordered) + 0.5) - 1))]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_http(
    url: str,
    seconds: float,
    process: subprocess.Popen[bytes] | None = None,
    headers: dict[str, str] | None = None,
    body: bytes | None = None,
) -> None:
    """Until `url` answers 200."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            request = urllib.request.Request(url, data=body, headers=headers or {})
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError as error:
            last: object = error
        if process is not None and process.poll() is not None:
            raise SystemExit(f"the server behind {url} ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise SystemExit(f"{url} did not answer within {seconds} s: {last}")
        time.sleep(0.05)


@contextlib.contextmanager
def process(command: Sequence[str], **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, all of which is gone afterwards."""
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env={**os.environ, **env}, cwd=ROOT
        )
        try:
            yield child
        except BaseException:
            output.seek(0)
            sys.stderr.write(output.read()[-4000:].decode(errors="replace"))
            raise
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(15)
                    if number is signal.SIGTERM:
                        break


@dataclass(frozen=True)
class Platform:
    """A running sllm-faas with a state directory of its own."""

    url: str
    token: str
    state: Path
    env: dict[str, str]

    def sllm(self, *args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "sllm_faas.cli", *args], env=self.env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"sllm {' '.join(args)} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
        return done.stdout

    def child(self, name: str) -> int:
        """The pid of that process, as last started by the supervisor."""
        lines = (self.state / "logs/platform.jsonl").read_text().splitlines()
        started = [json.loads(line) for line in lines if '"child"' in line and f'"{name}"' in line]
        return int(started[-1]["child"])

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}


@contextlib.contextmanager
def platform_up(*flags: str) -> Iterator[Platform]:
    state = Path(tempfile.mkdtemp(prefix="sllm-bench-"))
    port = free_port()
    env = {
        **os.environ,
        "SLLM_STATE_DIR": str(state),
        "SLLM_PORT": str(port),
        "SLLM_SERVER": f"http://127.0.0.1:{port}",
        "NO_COLOR": "1",
    }
    here = Platform(f"http://127.0.0.1:{port}", "", state, env)
    try:
        here.sllm("up", "--daemon", *flags)
        yield Platform(here.url, (state / "admin.token").read_text().strip(), state, env)
    finally:
        subprocess.run([sys.executable, "-m", "sllm_faas.cli", "down"], env=env, capture_output=True, check=False)
        shutil.rmtree(state, ignore_errors=True)


@contextlib.contextmanager
def platform_with(app: str, *flags: str) -> Iterator[Platform]:
    """`platform_up` with an app deployed, given as its source."""
    with platform_up(*flags) as platform, tempfile.TemporaryDirectory(prefix="sllm-bench-") as folder:
        path = Path(folder) / "app.py"
        path.write_text(app)
        platform.sllm("deploy", str(path))
        yield platform


RUNNING = ("queued", "backoff", "dispatched", "streaming", "cancelling")


async def leftovers(client: httpx.AsyncClient, seconds: float) -> int:
    """Invocations that still run or wait when all clients have had their answers, or left, for so long. They are shown:
    one that is late tells another story than one that is never cancelled."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        counts = (await client.get("/v1/status")).json()["counts"]
        if not (left := int(counts["running"] + counts["waiting"])):
            return 0
        await asyncio.sleep(0.1)
    records = (await client.get("/v1/invocations", params={"limit": 1000})).json()["invocations"]
    for record in [each for each in records if each["state"] in RUNNING]:
        print(f"left: {record}")
    return left


def memory_kb(pid: int) -> dict[str, int]:
    """The process's `smaps_rollup`, in KiB by field: Pss, Private_Clean and so on. Raises OSError when it is gone."""
    fields = re.findall(r"^(\w+): +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return {name: int(value) for name, value in fields}


@dataclass(frozen=True)
class Load:
    """What wrk saw: requests per second, latency percentiles in milliseconds, answers that were not 2xx."""

    rate: float
    p50: float
    p99: float
    errors: int


_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


def wrk(url: str, connections: int, seconds: float, script: Path) -> Load:
    if not shutil.which("wrk"):
        raise SystemExit("wrk is needed (Debian: apt-get install wrk)")
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "--timeout", "30s", "-s", str(script), url],
        capture_output=True,
        text=True,
        check=True,
    )

    def latency(name: str) -> float:
        found = re.search(rf"^\s*{name}%\s+([\d.]+)(us|ms|s|m)", done.stdout, re.MULTILINE)
        return float(found[1]) * _UNITS[found[2]] if found else float("nan")

    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    lost = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", done.stdout)
    errors = (int(bad[1]) if bad else 0) + (sum(map(int, lost.groups())) if lost else 0)
    return Load(float(rate[1]) if rate else 0.0, latency("50"), latency("99"), errors)


def wrk_script(directory: Path, body: str, headers: dict[str, str], paths: Sequence[str] = ()) -> Path:
    """A POST of `body`; over `paths` round robin when there are several."""
    lines = ['wrk.method = "POST"', f"wrk.body = {json.dumps(body)}"]
    lines += [f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in headers.items()]
    if paths:
        lines += [
            "local paths = {" + ", ".join(json.dumps(path) for path in paths) + "}",
            "local ready = {}",
            "local turn = 0",
            "function init(args) for i, p in ipairs(paths) do ready[i] = wrk.format(nil, p) end end",
            "function request() turn = turn % #ready + 1; return ready[turn] end",
        ]
    path = directory / f"load-{len(list(directory.iterdir()))}.lua"
    path.write_text("\n".join(lines) + "\n")
    return path
