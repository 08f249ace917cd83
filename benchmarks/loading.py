"""How fast weights come from disk and from memory, beside every loader we know.

One machine, one run, interleaved rounds. Every loader has the same end: each tensor summed up, so that lazy maps pay
for what they put off. Imports are done before the clock starts. Cold: nothing of the file in the page cache and
nothing in the store's memory. Warm: the file in the page cache; for sllm-faas the checkpoint in the DRAM tier.
The weights are random, bf16, of a Llama's shape. Loaders that the peers' environment lacks are left out; that sllm-faas
is ahead of every one is not shown then.

Limit: what fio reads from the same file with O_DIRECT, large blocks, is what the disk gives.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from sllm_invoker.checkpoints.channel import Loaded
from sllm_invoker.checkpoints.object import CheckpointObject
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.containers.tree import Tree
from sllm_invoker.memory_tier import MemoryTier

from benchmarks import models
from benchmarks.common import PEERS, ROOT, Report, arguments, table
from benchmarks.disk import drop, fill, fio, limit

SCRIPT = ROOT / "benchmarks/peers/load.py"
FOREIGN = {
    "runai-model-streamer": "runai_model_streamer",
    "fastsafetensors": "fastsafetensors",
    "tensorizer": "tensorizer",
}
NATIVE = ("sllm", "safetensors", "torch.load", "transformers")
MAKE_TENSORIZER = """
import sys, tensorizer, torch
serializer = tensorizer.TensorSerializer(sys.argv[1] + "/model.tensors")
serializer.write_state_dict(torch.load(sys.argv[1] + "/model.pt", weights_only=True))
serializer.close()
"""


@dataclass(frozen=True)
class Model:
    name: str
    source: Path
    checkpoint: CheckpointObject

    @property
    def bytes(self) -> int:
        return self.checkpoint.manifest.total_bytes


@dataclass(frozen=True)
class Run:
    seconds: float
    checksum: tuple[int, int]
    stages: dict[str, float]
    loaded: Loaded | None


def build(name: str, root: Path, loaders: dict[str, str]) -> Model:
    """The model as files for every loader, and ingested."""
    source, store = root / f"source-{name}", root / "store"
    print(f"{name}: making its files", flush=True)
    models.build(name, source, pickle=True)
    if "tensorizer" in loaders:
        models.run(loaders["tensorizer"], "-c", MAKE_TENSORIZER, str(source))
    ingest = ["-m", "sllm_invoker.checkpoints.ingest", "--root", str(store), "--source", str(source), "--name", name]
    models.run(sys.executable, *ingest)
    os.sync()
    return Model(name, source, CheckpointStore(store).get(name))


def files(model: Model) -> list[Path]:
    return [*model.source.glob("model.*"), model.checkpoint.part_path()]


class Loader:
    """One loader in a new process of its own; `run` is timed from "go" to the checksum."""

    def __init__(self, name: str, python: str, model: Model, tier: MemoryTier) -> None:
        self.name, self.model, self.tier = name, model, tier
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = model.checkpoint.directory if name == "sllm" else model.source
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        with theirs, tempfile.TemporaryFile() as output:
            self._process = subprocess.Popen(
                [python, str(SCRIPT), name, str(path), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), env=env, stdout=output, stderr=output,
            )  # fmt: skip
            self._output = os.dup(output.fileno())
        self._control.setblocking(False)

    async def _hear(self) -> bytes:
        answer = await asyncio.get_running_loop().sock_recv(self._control, 1 << 16)
        if not answer:
            raise SystemExit(f"{self.name} failed:\n{os.pread(self._output, 4000, 0).decode(errors='replace')}")
        return answer

    async def ready(self) -> None:
        """Until it waits for `run`: then caches can be dropped or filled."""
        await self._hear()

    async def run(self) -> Run:
        began = time.perf_counter()
        opening = None
        if self.name == "sllm":
            checkpoint = self.model.checkpoint
            opening = self.tier.open(checkpoint.digest, checkpoint.directory)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [opening.channel]))]
            self._control.sendmsg([b"go"], rights)
            opening.close()
        else:
            self._control.send(b"go")
        answer = await self._hear()
        seconds = time.perf_counter() - began
        found = json.loads(answer)
        loaded = await opening.loaded if opening is not None else None
        return Run(seconds, (found["bytes"], found["checksum"]), found["stages"], loaded)

    async def close(self) -> None:
        self._control.close()
        await asyncio.to_thread(self._process.wait)
        os.close(self._output)


async def settle(tier: MemoryTier, digest: str) -> None:
    """Until the last reader is known to be gone; then out of the store's memory with it."""
    while any(each.leases for each in (await tier.look()).residents):
        await asyncio.sleep(0.01)
    tier.forget(digest)
    await tier.look()


async def measure(model: Model, loaders: dict[str, str], rounds: int, root: Path, report: Report) -> None:
    room = 3 * model.bytes // 2**20 + 256
    tier = MemoryTier(root / "store", room, Tree(root))
    tier.start()
    runs: dict[tuple[str, str], list[Run]] = {}
    disk: list[dict[str, float]] = []
    try:
        # The first read pays for memory that later ones find ready: not measured, as for a store that has run a while.
        await tier.open(model.checkpoint.digest, model.checkpoint.directory, prefetch=True).loaded
        for _ in range(rounds):
            drop(files(model))
            disk.append(fio(model.checkpoint.part_path()))
            for name, python in loaders.items():
                await settle(tier, model.checkpoint.digest)
                loader = Loader(name, python, model, tier)
                await loader.ready()
                drop(files(model))
                cold = await loader.run()
                await loader.ready()
                if name != "sllm":
                    fill(model.source / _file_of(name))
                warm = await loader.run()
                await loader.close()
                runs.setdefault((name, "cold"), []).append(cold)
                runs.setdefault((name, "warm"), []).append(warm)
                print(f"{model.name} {name}: cold {cold.seconds:.2f} s, warm {warm.seconds:.2f} s", flush=True)
    finally:
        await tier.close()
    sums = {run.checksum for each in runs.values() for run in each}
    if len(sums) != 1:
        raise SystemExit(f"the loaders do not agree on the bytes: {sums}")
    show(model, loaders, runs, disk, report)


def _file_of(loader: str) -> str:
    return {"torch.load": "model.pt", "tensorizer": "model.tensors"}.get(loader, "model.safetensors")


def show(
    model: Model,
    loaders: dict[str, str],
    runs: dict[tuple[str, str], list[Run]],
    disk: list[dict[str, float]],
    report: Report,
) -> None:
    name = model.name

    def rate(loader: str, state: str) -> float:
        return model.bytes / statistics.median(run.seconds for run in runs[loader, state]) / 1e9

    print(f"\n{name}, {model.bytes / 1e9:.2f} GB: GB/s to every tensor summed up, median of {len(disk)}")
    table(
        ["loader", "cold", "warm", "cold ms", "warm ms"],
        [
            [
                loader,
                *(f"{rate(loader, state):.2f}" for state in ("cold", "warm")),
                *(
                    f"{statistics.median(run.seconds for run in runs[loader, state]) * 1e3:.0f}"
                    for state in ("cold", "warm")
                ),
            ]
            for loader in loaders
        ],
    )
    for loader in loaders:
        for state in ("cold", "warm"):
            report.figure(f"{name}_{loader}_{state}_gbs", rate(loader, state))
    read = [run.loaded for run in runs["sllm", "cold"] if run.loaded is not None]
    ours = statistics.median(each.bytes / each.seconds / 1e9 for each in read)
    fastest = limit(disk)
    report.figure(f"{name}_disk_to_dram_gbs", ours)
    report.figure(f"{name}_fio_gbs", fastest)
    warm = [run.stages for run in runs["sllm", "warm"]]
    attach = statistics.median(s["map"] + s["assign"] + s["wait"] for s in warm) * 1e3
    mapped = statistics.median(s["map"] + s["assign"] + s["wait"] + s["populate"] for s in warm) * 1e3
    report.figure(f"{name}_dram_attach_ms", attach)
    report.figure(f"{name}_dram_attach_mapped_ms", mapped)
    print(f"disk -> DRAM {ours:.2f} GB/s, fio {fastest:.2f} GB/s")
    print("sllm warm, ms by stage:", *({k: round(v * 1e3, 1) for k, v in stages.items()} for stages in warm))
    print(f"DRAM -> attached {attach:.1f} ms, with its pages mapped {mapped:.1f} ms")
    report.at_least(f"{name}: disk -> DRAM / fio", ours / fastest, 0.95)
    missing = [loader for loader in (*NATIVE, *FOREIGN) if loader not in loaders]
    for state in ("cold", "warm"):
        bar, others = f"{name}: {state}, sllm / best other", [rate(each, state) for each in loaders if each != "sllm"]
        if missing:
            report.not_shown(bar, f"without {', '.join(missing)}")
        else:
            report.at_least(bar, rate("sllm", state) / max(others), 1.0)
    if name == "1.1B":
        report.at_most("1.1B: DRAM -> attached, ms", attach, 50)
        report.at_most("1.1B: DRAM -> attached and mapped, ms", mapped, 250)


def has(python: str, module: str) -> bool:
    done = subprocess.run([python, "-c", f"import torch, {module}"], capture_output=True, check=False)
    return done.returncode == 0


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--models", default="", help=f"some of {', '.join(models.SHAPES)}; default: all, --quick: 110M")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: the system's")
    parser.add_argument("--loaders", default="", help="some of them, by comma; sllm is always there")
    options = parser.parse_args()
    names = options.models.split(",") if options.models else ["110M"] if options.quick else list(models.SHAPES)
    rounds = options.rounds or (1 if options.quick else 3)
    python = str(PEERS / "bin/python")
    loaders = dict.fromkeys(NATIVE, sys.executable)
    for loader, module in FOREIGN.items():
        if Path(python).exists() and has(python, module):
            loaders[loader] = python
        else:
            print(f"left out: {loader} is not in {PEERS}")
    if options.loaders:
        loaders = {name: loaders[name] for name in loaders if name in ("sllm", *options.loaders.split(","))}
    report = Report("loading")
    with tempfile.TemporaryDirectory(prefix="sllm-loading-", dir=options.directory) as directory:
        for name in names:
            model = build(name, Path(directory), loaders)
            asyncio.run(measure(model, loaders, rounds, Path(directory), report))
            shutil.rmtree(model.source)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
