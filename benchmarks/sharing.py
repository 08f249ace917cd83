"""What eight instances of one model take beside what one takes.

Each instance has generated 64 tokens, all eight at once. Memory is the proportional set size (PSS, smaps_rollup) of
every process that could hold a page of the model: instances, zygotes, the checkpoint store. Summed up it counts each
page once, so it is what the machine really spends. Cache rows are given back when a generation has ended, so no key or
value is in it. The store may hold this one checkpoint and nothing else: it keeps no memory ready for others.

Limit: the weights once, and what a process needs for itself eight times.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import models
from benchmarks.common import Platform, Report, arguments, memory_kb, platform_up, table

APP = """
import sllm

app = sllm.App("share")
options = dict(checkpoint=sllm.Checkpoint({path!r}), concurrency=1, scaledown_window=3600)
app.llm("m", max_containers={instances}, **options)
"""
INSTANCES = 8
TOKENS = 64
LIMIT = 1.15
SLAB = 64 * 1024 * 1024


@dataclass(frozen=True)
class Memory:
    """MiB by kind of process: its PSS, and of that what is private."""

    pss: dict[str, float]
    private: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.pss.values())


def ask(platform: Platform, method: str, path: str, body: object = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(platform.url + path, data=data, method=method, headers=platform.headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        content: bytes = answer.read()
        return content


def generate(platform: Platform, at_once: int) -> None:
    """`at_once` generations of TOKENS tokens at the same time, each with an instance of its own."""
    body = {"model": "share/m", "prompt": models.PROMPT, "max_tokens": TOKENS, "temperature": 0}

    def one(_: int) -> int:
        return int(json.loads(ask(platform, "POST", "/v1/completions", body))["usage"]["completion_tokens"])

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        counts = list(pool.map(one, range(at_once)))
    if counts != [TOKENS] * at_once:
        raise SystemExit(f"asked for {TOKENS} tokens each, got {counts}")


def instances(platform: Platform) -> dict[int, str]:
    found = json.loads(ask(platform, "GET", "/v1/instances"))["instances"]
    return {each["pid"]: each["instance"] for each in found if each["state"] == "ready"}


def tree(platform: Platform) -> Iterator[tuple[int, str]]:
    """The processes of the platform that hold weights or what instances are forked from: pid, kind."""
    ready = instances(platform)
    state = platform.state.name
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            ours = state in command or state in (entry / "environ").read_bytes().decode(errors="replace")
            if not ours:
                continue
            if int(entry.name) in ready:
                yield int(entry.name), "instance"
            elif "checkpoints.store_process" in command:
                yield int(entry.name), "store"
            elif "containers.zygote" in command:
                yield int(entry.name), "zygote"


def measure(platform: Platform) -> Memory:
    pss: dict[str, float] = {"instance": 0.0, "zygote": 0.0, "store": 0.0}
    private = dict(pss)
    for pid, kind in tree(platform):
        fields = memory_kb(pid)
        pss[kind] += fields["Pss"] / 1024
        private[kind] += (fields["Private_Clean"] + fields["Private_Dirty"]) / 1024
    return Memory(pss, private)


def run(shape: str, root: Path, report: Report) -> None:
    source = models.build(shape, root / shape)
    size = (source / "model.safetensors").stat().st_size
    slabs = -(-(size + SLAB // 2) // SLAB)
    with platform_up("--dram-mb", str(slabs * SLAB // 2**20)) as platform:
        app = platform.state / "sharing_app.py"
        app.write_text(APP.format(path=str(source), instances=INSTANCES))
        platform.sllm("deploy", str(app))
        found: dict[int, Memory] = {}
        for count in (1, INSTANCES):
            began = time.monotonic()
            while len(instances(platform)) < count or count not in found:
                generate(platform, count)
                time.sleep(1.5)  # until the controller has heard of the last start
                if len(instances(platform)) == count:
                    found[count] = measure(platform)
                elif time.monotonic() - began > 300:
                    raise SystemExit(f"{len(instances(platform))} of {count} instances after 300 s")
    show(shape, size, found, report)


def show(shape: str, size: int, found: dict[int, Memory], report: Report) -> None:
    print(f"\n{shape}, {size / 2**20:.0f} MiB of weights: MiB after {TOKENS} tokens each")
    table(
        ["instances", "total PSS", "instances'", "zygotes'", "store's", "private to an instance"],
        [
            [
                count,
                *(f"{value:.0f}" for value in (memory.total, *memory.pss.values(), memory.private["instance"] / count)),
            ]
            for count, memory in found.items()
        ],
    )
    one, many = found[1].total, found[INSTANCES].total
    report.figure(f"{shape}_one_mb", one)
    report.figure(f"{shape}_{INSTANCES}_mb", many)
    report.figure(f"{shape}_each_further_mb", (many - one) / (INSTANCES - 1))
    print(f"{INSTANCES} take {many / one:.3f} times what one takes; each further one {(many - one) / 7:.0f} MiB")
    if shape == "1.1B":
        report.at_most(f"{shape}: PSS of {INSTANCES} instances / of one", many / one, LIMIT)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--models", default="", help="some of 110M, 1.1B by comma; default: 1.1B, --quick: 110M")
    parser.add_argument("--directory", type=Path, help="where models are made, and kept")
    options = parser.parse_args()
    names = options.models.split(",") if options.models else ["110M"] if options.quick else ["1.1B"]
    report = Report("sharing")
    with tempfile.TemporaryDirectory(prefix="sllm-sharing-") as scratch:
        for shape in names:
            run(shape, options.directory or Path(scratch), report)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
