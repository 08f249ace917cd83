"""Many cold functions: twenty asked for at once, and a hundred in turn over memory that holds twenty.

**At once.** Twenty functions, each with a checkpoint of its own (110M, random bf16), none running, none in memory,
nothing in the page cache; one request to each, at the same moment, over HTTP. Time to first token; the least that two
cores and one disk need is the larger of reading them all and computing them all.

**In turn.** A hundred checkpoints of that size, asked for in Zipf order (s = 1), one after the other, by the real store
process with room for twenty: once with its policy, once with least-recently-used. A start here is until the bytes
are in memory, checked; the rest of a start is the same for both. The hundred are one file under a hundred digests, read
past the page cache: each read is a real one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sllm_invoker.checkpoints.object import CheckpointObject, identity, open_object, write_manifest
from sllm_invoker.containers.tree import Tree
from sllm_invoker.memory_tier import MemoryTier

from benchmarks import models
from benchmarks.coldstart import Client
from benchmarks.common import Report, arguments, percentile, platform_up, table
from benchmarks.disk import drop, fio, limit

APP = """
import sllm

app = sllm.App("cold")
for number, path in enumerate({paths!r}):
    app.llm(f"f{{number}}", checkpoint=sllm.Checkpoint(path), concurrency=1, scaledown_window=3600, max_containers=1)
"""
SHAPE = "110M"
FUNCTIONS, ROOM = 100, 20
SLAB_MB = 16


def spread(seconds: list[float]) -> list[float]:
    """p50, p95, p99 in milliseconds."""
    return [percentile(seconds, q) * 1e3 for q in (50, 95, 99)]


def at_once(count: int, root: Path, scratch: Path, report: Report) -> CheckpointObject:
    """The burst; one of its checkpoints, for the other part."""
    paths = [root / f"{SHAPE}-{number}" for number in range(count)]
    models.build(SHAPE, paths[0], variants=paths[1:])
    size = (paths[0] / "model.safetensors").stat().st_size
    with platform_up("--no-prefetch", "--dram-mb", str(count * (size // 2**20 + 128))) as platform:
        app = platform.state / "burst_app.py"
        app.write_text(APP.format(paths=[str(path) for path in paths]))
        platform.sllm("deploy", str(app))
        client = Client(platform)
        parts = list((platform.state / "checkpoints" / "objects").glob("*/*.safetensors"))
        drop(parts)
        disk = limit([fio(parts[0])])
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            began = time.perf_counter()
            starts = list(pool.map(client.first_token, [f"f{number}" for number in range(count)]))
            whole = time.perf_counter() - began
        warm = statistics.median(client.first_token("f0").seconds for _ in range(5))
        if not all(start.cold and start.tier == "disk" for start in starts):
            raise SystemExit("not every start was cold and from disk")
        kept = scratch / "original"
        shutil.copytree(parts[0].parent, kept)
    read, compute = count * size / (disk * 1e9), count * warm
    p50, p95, p99 = spread([start.seconds for start in starts])
    print(f"\n{count} cold {SHAPE} functions at once: time to first token, ms")
    table(["p50", "p95", "p99", "all", "read at fio's speed", "computed one by one"],
          [[f"{value:.0f}" for value in (p50, p95, p99, whole * 1e3, read * 1e3, compute * 1e3)]])  # fmt: skip
    for name, value in (("p50", p50), ("p95", p95), ("p99", p99), ("all", whole * 1e3)):
        report.figure(f"burst_{name}_ms", value)
    report.figure("burst_bytes_read", count * size)
    report.figure("burst_over_floor", whole / max(read, compute))
    return open_object(kept)


def copies(original: CheckpointObject, root: Path, count: int) -> list[CheckpointObject]:
    """The same bytes under other digests."""
    made = []
    for number in range(count):
        manifest = original.manifest
        parts = tuple(dataclasses.replace(part, digest=f"{number:064x}") for part in manifest.parts)
        manifest = dataclasses.replace(
            manifest, parts=parts, digest=identity(manifest.layout, parts, manifest.files, manifest.base)
        )
        directory = root / manifest.digest
        directory.mkdir(parents=True)
        for file in original.directory.iterdir():
            if file.name != "manifest.json":
                os.link(file, directory / file.name)
        write_manifest(directory, manifest)
        made.append(CheckpointObject(directory, manifest))
    return made


async def in_turn(
    policy: str, objects: list[CheckpointObject], order: list[int], root: Path
) -> tuple[list[float], int]:
    """Seconds of every start, bytes read."""
    size = -(-objects[0].manifest.total_bytes // (SLAB_MB * 2**20)) * SLAB_MB
    options = ("--slab-mb", str(SLAB_MB), "--policy", policy)
    tier = MemoryTier(root, ROOM * size, Tree(root), options=options)
    tier.start()
    seconds, read = [], 0
    try:
        for number in order:
            began = time.perf_counter()
            loaded = await tier.open(objects[number].digest, objects[number].directory, prefetch=True).loaded
            seconds.append(time.perf_counter() - began)
            read += loaded.bytes
    finally:
        await tier.close()
    return seconds, read


def zipf(requests: int) -> list[int]:
    rng = random.Random(1)
    weights = [1 / (rank + 1) for rank in range(FUNCTIONS)]
    return rng.choices(range(FUNCTIONS), weights, k=requests)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--directory", type=Path, help="where models are made, and kept, on the disk to measure")
    parser.add_argument("--functions", type=int, default=0, help="asked for at once; default: 20, --quick: 4")
    parser.add_argument("--requests", type=int, default=0, help="in turn; default: 600, --quick: 150")
    options = parser.parse_args()
    count = options.functions or (4 if options.quick else 20)
    requests = options.requests or (150 if options.quick else 600)
    report = Report("burst")
    with tempfile.TemporaryDirectory(prefix="sllm-burst-", dir=options.directory) as scratch:
        original = at_once(count, options.directory or Path(scratch), Path(scratch), report)
        objects = copies(original, Path(scratch) / "copies", FUNCTIONS)
        order, rows = zipf(requests), []
        for policy in ("cost", "lru"):
            drop([original.part_path()])
            seconds, read = asyncio.run(in_turn(policy, objects, order, Path(scratch)))
            rows.append(
                [policy, *(f"{value:.1f}" for value in spread(seconds)), f"{sum(seconds):.1f}", f"{read / 1e9:.1f}"]
            )
            for name, value in zip(("p50", "p95", "p99"), spread(seconds), strict=True):
                report.figure(f"zipf_{policy}_{name}_ms", value)
            report.figure(f"zipf_{policy}_gb_read", read / 1e9)
    print(f"\n{requests} starts over {FUNCTIONS} checkpoints, Zipf, memory for {ROOM}: ms until in memory")
    table(["policy", "p50", "p95", "p99", "all, s", "GB read"], rows)
    ratio = report.figures["zipf_cost_gb_read"] / report.figures["zipf_lru_gb_read"]
    report.at_most("bytes read, cost-aware / LRU", ratio, 1.0)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
