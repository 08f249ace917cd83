"""Many cold functions: twenty asked for at once, and a hundred in turn over memory that holds twenty.

Each has a checkpoint of its own, none runs, and time is that of a client over HTTP, to the first token.

**At once.** Twenty functions (110M, random bf16), nothing of them in memory or in the page cache; one request to each,
at the same moment. Every start is from disk and from its template, by its own timeline. The least that two cores and
one disk need is the larger of reading them all and computing them all.

**In turn.** A hundred functions asked for in Zipf order (s = 1), one after the other, the instance stopped after each,
so that each request is a start. Memory holds a fifth of the checkpoints. The same order twice, each time on an invoker
begun anew: its store keeps what its cost-aware policy says, and what was used last. Bytes read are what the kernel
counts for the store process, past the page cache. A start begins from whatever layer is there: the table says which.
The checkpoints are files of their own, and differ by a setting, not by weights: so their sources need no room. They
take 27 GB; where a disk has less, `--shape 35M` has as many smaller ones.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import models
from benchmarks.coldstart import Client, Start
from benchmarks.common import Platform, Report, arguments, percentile, platform_up, process, table
from benchmarks.disk import drop, fio, limit

APP = """
import sllm

app = sllm.App("cold")
for number, path in enumerate({paths!r}):
    app.llm(f"f{{number}}", checkpoint=sllm.Checkpoint(path), concurrency=1, scaledown_window=3600, max_containers=1)
"""
INGEST = """
import sys
from pathlib import Path
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.store import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
for source in sys.argv[2:]:
    ingest(store, source, Path(source).name)
"""
SHAPE = "110M"
SHARE = 5
"""Memory holds one of so many checkpoints."""
SLAB_MB = 16
"""Slabs small enough that memory for twenty is not memory for nineteen and a half."""
POLICIES = {"cost": "cost-aware", "lru": "least recently used"}
QUANTILES = (50, 95, 99)


def spread(seconds: list[float]) -> list[float]:
    """p50, p95, p99 in milliseconds."""
    return [percentile(seconds, q) * 1e3 for q in QUANTILES]


def deploy(platform: Platform, paths: list[Path]) -> None:
    app = platform.state / "burst_app.py"
    app.write_text(APP.format(paths=[str(path) for path in paths]))
    platform.sllm("deploy", str(app))


def parts(platform: Platform) -> list[Path]:
    return list((platform.state / "checkpoints" / "objects").glob("*/*.safetensors"))


# -- at once -------------------------------------------------------------------------------------------------


def at_once(count: int, root: Path, report: Report) -> None:
    paths = [root / f"{SHAPE}-{number}" for number in range(count)]
    models.build(SHAPE, paths[0], variants=paths[1:])
    size = (paths[0] / "model.safetensors").stat().st_size
    with platform_up("--no-prefetch", "--dram-mb", str(count * (size // 2**20 + 128))) as platform:
        deploy(platform, paths)
        client = Client(platform)
        drop(parts(platform))
        disk = limit([fio(parts(platform)[0])])
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            began = time.perf_counter()
            starts = list(pool.map(client.first_token, [f"f{number}" for number in range(count)]))
            whole = time.perf_counter() - began
        warm = statistics.median(client.first_token("f0").seconds for _ in range(5))
    found = Counter((start.tier, start.warmth) for start in starts if start.cold)
    if found != {("disk", "template"): count}:
        raise SystemExit(f"wanted {count} cold starts from disk and template, got {dict(found)}")
    read, compute = count * size / (disk * 1e9), count * warm
    p50, p95, p99 = spread([start.seconds for start in starts])
    print(f"\n{count} cold {SHAPE} functions at once, all from disk and template: time to first token, ms")
    table(["p50", "p95", "p99", "all", "read at fio's speed", "computed one by one"],
          [[f"{value:.0f}" for value in (p50, p95, p99, whole * 1e3, read * 1e3, compute * 1e3)]])  # fmt: skip
    for name, value in (("p50", p50), ("p95", p95), ("p99", p99), ("all", whole * 1e3)):
        report.figure(f"burst_{name}_ms", value)
    report.figure("burst_bytes_read", count * size)
    report.figure("burst_over_floor", whole / max(read, compute))


# -- in turn -------------------------------------------------------------------------------------------------


def sources(shape: str, root: Path, count: int) -> list[Path]:
    """Folders of one model; their configurations differ, and so do the digests of what is made from them."""
    original = models.build(shape, root / "original")
    config = json.loads((original / "config.json").read_text())
    found = [root / f"in-turn-{number}" for number in range(count)]
    for number, folder in enumerate(found):
        folder.mkdir()
        for file in original.iterdir():
            os.link(file, folder / file.name)
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps({**config, "copy": number}))
    return found


@contextlib.contextmanager
def invoker(platform: Platform, policy: str) -> Iterator[int]:
    """One whose store has that policy; the pid of the store process."""
    config = platform.state / "run" / "config.json"
    options = f"--slab-mb,{SLAB_MB},--policy,{policy}"
    command = [sys.executable, "-m", "benchmarks.invoker", options, "--config", str(config), "--name", "node-0"]
    client = Client(platform)

    def up() -> bool:
        return any(node["state"] == "up" for node in client.call("/v1/nodes")["nodes"])

    with process(command) as server:
        deadline = time.monotonic() + 60
        while not up():
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the invoker with {options} is not up")
            time.sleep(0.1)
        stores = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if b"store_process" in (said := _read(path)) and str(platform.state).encode() in said
        ]
        if len(stores) != 1:
            raise SystemExit(f"wanted one store process, found {stores}")
        yield stores[0]
    while up():
        time.sleep(0.1)


def _read(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def bytes_read(pid: int) -> int:
    """From the disk by that process, as the kernel counts."""
    lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(lines["read_bytes"])


@dataclass(frozen=True)
class Turns:
    """`start_up`: seconds from the order to start to an instance that serves with all of its weights in memory."""

    starts: list[Start]
    start_up: list[float]
    bytes: int

    def seconds(self, what: str) -> list[float]:
        return self.start_up if what == "start-up" else [start.seconds for start in self.starts]


def started(client: Client, function: str, seen: set[str]) -> float:
    """Seconds of the start that is not among those seen, by the controller's record of it."""
    while True:
        for record in client.call(f"/v1/functions/cold/{function}")["starts"]:
            if record["instance"] not in seen:
                if record["state"] != "ready":
                    raise SystemExit(f"a start of {function} {record['state']}: {record['error']}")
                seen.add(record["instance"])
                return float(record["actual"])
        time.sleep(0.01)


def in_turn(platform: Platform, policy: str, order: list[int], seen: set[str]) -> Turns:
    client = Client(platform)
    with invoker(platform, policy) as store:
        least = f"f{max(order)}"
        client.first_token(least)  # not counted: it finds no libraries imported
        started(client, least, seen)
        client.stop_all()
        drop(parts(platform))
        starts, start_up, before = [], [], bytes_read(store)
        for number in order:
            starts.append(client.first_token(f"f{number}"))
            start_up.append(started(client, f"f{number}", seen))
            client.stop_all()
        if not all(start.cold for start in starts):
            raise SystemExit("not every request was a cold start")
        return Turns(starts, start_up, bytes_read(store) - before)


def zipf(count: int, requests: int) -> list[int]:
    rng = random.Random(1)
    return rng.choices(range(count), [1 / (rank + 1) for rank in range(count)], k=requests)


def turns(shape: str, count: int, requests: int, root: Path, report: Report) -> None:
    paths, order, room = sources(shape, root, count), zipf(count, requests), count // SHARE
    size = (paths[0] / "model.safetensors").stat().st_size
    slabs = -(-size // (SLAB_MB * 2**20))
    with platform_up("--invokers", "0", "--no-prefetch", "--dram-mb", str(room * slabs * SLAB_MB)) as platform:
        free = shutil.disk_usage(platform.state).free
        if free < count * size * 1.1:
            what = f"{count} checkpoints of {size} bytes do not fit: {free} are free under {platform.state}"
            raise SystemExit(f"{what}; --shape 35M has smaller ones")
        models.run(sys.executable, "-c", INGEST, str(platform.state / "checkpoints"), *map(str, paths))
        with invoker(platform, "cost"):
            deploy(platform, paths)
        seen: set[str] = set()
        found = {policy: in_turn(platform, policy, order, seen) for policy in POLICIES}
    for what in ("first token", "start-up"):
        print(f"\n{requests} starts over {count} checkpoints ({shape}), Zipf, memory for {room}: {what}, ms")
        rows = []
        for policy, made in found.items():
            seconds = made.seconds(what)
            tiers = Counter(start.tier for start in made.starts)
            kinds = Counter(start.warmth for start in made.starts)
            rows.append(
                [
                    POLICIES[policy], *(f"{value:.0f}" for value in spread(seconds)), f"{sum(seconds):.1f}",
                    f"{made.bytes / 1e9:.2f}", tiers["disk"], tiers["dram"], kinds["template"], kinds["libs"],
                ]
            )  # fmt: skip
            for q, value in zip(QUANTILES, spread(seconds), strict=True):
                report.figure(f"zipf_{policy}_{what.replace(' ', '_').replace('-', '_')}_p{q}_ms", value)
            report.figure(f"zipf_{policy}_gb_read", made.bytes / 1e9)
        header = ["policy", "p50", "p95", "p99", "all, s", "GB read", "from disk", "DRAM", "template", "libs"]
        table(header, rows)
    ratio = found["cost"].bytes / found["lru"].bytes
    report.at_most("bytes read, cost-aware / LRU", round(ratio, 3), 1.0)  # a process reads a page of its own, too


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--directory", type=Path, help="where models are made, and kept, on the disk to measure")
    parser.add_argument("--functions", type=int, default=0, help="asked for at once; default: 20, --quick: 4")
    parser.add_argument("--in-turn", type=int, default=0, help="functions asked for in turn; default: 100, --quick: 20")
    parser.add_argument("--shape", choices=(*models.SMALL, SHAPE), default=SHAPE, help="of those asked for in turn")
    parser.add_argument("--requests", type=int, default=0, help="in turn; default: 600, --quick: 40")
    options = parser.parse_args()
    report = Report("burst")
    with tempfile.TemporaryDirectory(prefix="sllm-burst-", dir=options.directory) as scratch:
        at_once(options.functions or (4 if options.quick else 20), options.directory or Path(scratch), report)
        count = options.in_turn or (20 if options.quick else 100)
        turns(options.shape, count, options.requests or (40 if options.quick else 600), Path(scratch), report)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
