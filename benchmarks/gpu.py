"""From memory to a GPU, and to the first token: ours, transformers and safetensors, on one device in one run.

    copy     bytes in slabs → the device: through locked buffers (what instances do), and from slabs locked first;
             limit: a copy of a large locked buffer, measured in the same rounds
    attach   DRAM tier → a model on the device → the first token of a 16-token prompt, in a process that is ready for it
    peers    the same model and prompt by `from_pretrained` and by safetensors' `load_file`, each in a new process whose
             clock starts when everything is imported, the context made and the file in the page cache
    served   the same over HTTP: no instance runs, the checkpoint is in the DRAM tier, a worker waits on the GPU; and in
             turn with that, starts for which the instance before left the layers on the GPU

A section that fails says so and the others go on: device time is short. Random bf16 Llamas, made on the spot.
Without a CUDA device nothing is measured, and that is no error.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from sllm_invoker.checkpoints.object import CheckpointObject
from sllm_invoker.checkpoints.slabs import SLAB_BYTES, SlabPool, fault
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.containers.tree import Tree
from sllm_invoker.memory_tier import MemoryTier

from benchmarks import models
from benchmarks.common import Report, arguments, platform_up, table
from benchmarks.disk import fill

BAR = 0.85
GB = 1e9
LIMIT_BYTES = 1 << 30
SLABS = 64
APP = """
import sllm

app = sllm.App("cold")
app.llm("a", checkpoint=sllm.Checkpoint({path!r}), gpu=1, concurrency=1, scaledown_window=3600, max_containers=1)

@app.function(gpu="any")
def empty(x: int) -> int:
    return x
"""
PEER = """
import json, os, sys, time
import torch, transformers
from transformers.models.llama import modeling_llama
name, path, prompt = sys.argv[1:]
device = torch.device("cuda", 0)
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
ids = tokenizer(prompt, return_tensors="pt").input_ids
tiny = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
(tiny @ tiny).sum().item()
began = time.perf_counter()
if name == "transformers":
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map={"": 0})
else:
    from safetensors.torch import load_file
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    found = load_file(os.path.join(path, "model.safetensors"), device="cuda:0")
    model.load_state_dict(found, assign=True)
    model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(config).to(device)
torch.cuda.synchronize()
loaded = time.perf_counter() - began
with torch.inference_mode():
    token = int(model.eval()(ids.to(device)).logits[0, -1].argmax())
print(json.dumps({"loaded": loaded, "first": time.perf_counter() - began, "token": token}), flush=True)
"""


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="", help="110M, 1.1B or 8B; default 8B, --quick: 1.1B")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where files are made: three times the model's size")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return 0
    shape = options.model or ("1.1B" if options.quick else "8B")
    rounds = options.rounds or (3 if options.quick else 5)
    report = Report("gpu")
    print(torch.cuda.get_device_name(0), f"torch {torch.__version__}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="sllm-gpu-", dir=options.directory) as directory:
        root = Path(directory)
        sections: list[tuple[str, Callable[[], None]]] = [
            ("copy", lambda: copies(rounds, report)),
            ("attach", lambda: attaches(shape, root, rounds, report)),
            ("peers", lambda: peers(shape, root, max(1, rounds // 2), report)),
            ("served", lambda: served(shape, root, rounds, report)),
        ]
        for name, section in sections:
            print(f"\n{name}", flush=True)
            began = time.perf_counter()
            try:
                section()
            except (Exception, SystemExit):
                failed += 1
                traceback.print_exc(file=sys.stdout)
                print(f"{name}: FAILED", flush=True)
            print(f"({name} took {time.perf_counter() - began:.0f} s)", flush=True)
            if options.json:
                report.finish(options.json)  # what there is, should this be cut off
    return max(report.finish(options.json), int(failed > 0))


# -- copy ----------------------------------------------------------------------------------------------------


def copies(rounds: int, report: Report) -> None:
    """Rates of 4 GiB in slabs, interleaved with the limit."""
    from sllm_invoker.checkpoints.mapping import map_slabs
    from sllm_invoker.runner import cuda

    stage = cuda.open_stage()
    device, size = stage.device, SLABS * SLAB_BYTES
    target = device.allocate(size)
    pinned = torch.empty(LIMIT_BYTES, dtype=torch.uint8, pin_memory=True)
    pool = SlabPool(SLABS)
    try:
        slabs = [slab for slab in (pool.create() for _ in range(SLABS)) if slab is not None]
        for number, slab in enumerate(slabs):
            fault(slab, SLAB_BYTES)
            torch.frombuffer(slab.view, dtype=torch.uint8).fill_(number + 1)
        fds = [slab.fd for slab in slabs]
        rates: dict[str, list[float]] = {}

        def note(name: str, count: int, began: float) -> None:
            rates.setdefault(name, []).append(count / (time.perf_counter() - began) / GB)

        for _ in range(rounds):
            began = time.perf_counter()
            device.copy(target[:LIMIT_BYTES], pinned)
            device.record().wait()
            note("limit: one locked buffer", LIMIT_BYTES, began)

            mapping = map_slabs(fds, SLAB_BYTES, size)
            host = torch.frombuffer(mapping.buffer, dtype=torch.uint8)
            for name in ("through locked buffers, first touch", "through locked buffers"):
                began = time.perf_counter()
                for start in range(0, size, stage.piece):
                    stage.send(target[start : start + stage.piece], host[start : start + stage.piece])
                device.record().wait()
                note(name, size, began)
            check(target, slabs)
            del host
            mapping.unmap()

            shared = map_slabs(fds, SLAB_BYTES, size, shared=True)
            began = time.perf_counter()
            if device.register(shared.address, size, read_only=True):
                note("locking a shared map of slabs", size, began)
                began = time.perf_counter()
                device.copy(target, torch.frombuffer(shared.buffer, dtype=torch.uint8))
                device.record().wait()
                note("from locked slabs", size, began)
                check(target, slabs)
                device.unregister(shared.address)
            else:
                print("the driver refuses to lock a read-only map")
            shared.unmap()
    finally:
        pool.close()
        del target, pinned
        device.trim()
    table(["GB/s", "median", "best"], [[n, f"{statistics.median(r):.1f}", f"{max(r):.1f}"] for n, r in rates.items()])
    for name, found in rates.items():
        report.figure(f"copy_{name.replace(' ', '_').replace(',', '').replace(':', '')}_gbs", statistics.median(found))
    fastest = statistics.median(rates["limit: one locked buffer"])
    ours = statistics.median(rates["through locked buffers"])
    report.figure("copy_locked_buffers", stage.locked)
    report.at_least("copy: slabs -> GPU / one locked buffer", ours / fastest, BAR)


def check(target: torch.Tensor, slabs: list[object]) -> None:
    firsts = target[::SLAB_BYTES].tolist()
    if firsts != [number % 256 for number in range(1, len(slabs) + 1)]:
        raise SystemExit(f"the device holds other bytes than the slabs: {firsts}")


# -- attach --------------------------------------------------------------------------------------------------


def ingested(shape: str, root: Path) -> tuple[Path, CheckpointObject]:
    """The model as a Hugging Face directory, and as an object."""
    source, store = root / shape, root / "store"
    if not (source / "config.json").exists():
        print(f"{shape}: making its files", flush=True)
        models.build(shape, source)
    if not store.exists():
        ingest = ["-m", "sllm_invoker.checkpoints.ingest", "--root", str(store), "--source", str(source)]
        models.run(sys.executable, *ingest, "--name", shape)
    return source, CheckpointStore(store).get(shape)


def attaches(shape: str, root: Path, rounds: int, report: Report) -> None:
    _, checkpoint = ingested(shape, root)
    asyncio.run(attaching(shape, checkpoint, root, rounds, report))
    shutil.rmtree(root / "store")  # the disk is small


async def attaching(shape: str, checkpoint: CheckpointObject, root: Path, rounds: int, report: Report) -> None:
    from sllm_invoker.runner import attach, cuda
    from sllm_invoker.runner.arriving import arriving

    cuda.warm()
    stage, size = cuda.open_stage(), checkpoint.manifest.total_bytes
    ids = torch.tensor([[17 * i + 5 for i in range(16)]], device=stage.device.place)
    tier = MemoryTier(root / "store", size * 5 // 4 // 2**20 + 256, Tree(root))
    tier.start()
    rows, tokens = [], set()
    try:
        began = time.perf_counter()
        loaded = await tier.open(checkpoint.digest, checkpoint.directory, prefetch=True).loaded
        print(f"read from {loaded.tier} in {time.perf_counter() - began:.2f} s", flush=True)
        for number in range(rounds + 1):
            skeleton = attach.prepare(checkpoint)
            skeleton.stage = stage
            torch.set_num_threads(len(os.sched_getaffinity(0)))
            opening = tier.open(checkpoint.digest, checkpoint.directory)
            skeleton.channel = os.dup(opening.channel)
            opening.close()
            began = time.perf_counter()
            await asyncio.to_thread(attach.attach, skeleton)
            bound = time.perf_counter() - began
            with torch.inference_mode(), arriving(skeleton.weights):
                token = int(skeleton.model(ids).logits[0, -1].argmax())
            first = time.perf_counter() - began
            assert skeleton.weights is not None
            skeleton.weights.wait()
            torch.cuda.synchronize()
            whole = time.perf_counter() - began
            with torch.inference_mode():
                again = time.perf_counter()
                token_again = int(skeleton.model(ids).logits[0, -1].argmax())
                warm = time.perf_counter() - again
            tokens |= {token, token_again}
            if skeleton.weights.tier != "dram":
                raise SystemExit(f"wanted an attach from dram, got one from {skeleton.weights.tier}")
            print(f"{number}: bound {bound:.3f} s, first token {first:.3f} s, whole {whole:.3f} s, warm {warm:.3f} s")
            if number:  # the first loads kernels
                rows.append((bound, first, whole, warm))
            del skeleton
            gc.collect()
            torch.cuda.empty_cache()
    finally:
        await tier.close()
    if len(tokens) != 1:
        raise SystemExit(f"the first forward pass, behind the copy, does not agree with the next: {tokens}")
    bound, first, whole, warm = (statistics.median(column) for column in zip(*rows, strict=True))
    report.figure(f"{shape}_token", tokens.pop())
    report.figure(f"{shape}_bytes", size)
    report.figure(f"{shape}_dram_to_gpu_gbs", size / whole / GB)
    report.figure(f"{shape}_attach_bound_ms", bound * 1e3)
    report.figure(f"{shape}_attach_first_token_ms", first * 1e3)
    report.figure(f"{shape}_warm_forward_ms", warm * 1e3)
    print(f"{shape}: {size / GB:.2f} GB at {size / whole / GB:.1f} GB/s; first token {first * 1e3:.0f} ms")
    fastest = report.figures.get("copy_limit_one_locked_buffer_gbs")
    if fastest:
        report.figure(f"{shape}_first_token_over_floor", first / (size / fastest / GB))
        report.at_least(f"{shape}: DRAM tier -> GPU / one locked buffer", size / whole / GB / fastest, BAR)


# -- peers and HTTP ------------------------------------------------------------------------------------------


def peers(shape: str, root: Path, rounds: int, report: Report) -> None:
    source = root / shape
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name in ("transformers", "safetensors"):
            fill(source / "model.safetensors")
            done = subprocess.run(
                [sys.executable, "-c", PEER, name, str(source), models.PROMPT],
                capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, runs in found.items():
        loaded, first = (statistics.median(run[key] for run in runs) for key in ("loaded", "first"))
        report.figure(f"{shape}_{name}_loaded_ms", loaded * 1e3)
        report.figure(f"{shape}_{name}_first_token_ms", first * 1e3)
        rows.append([name, f"{loaded * 1e3:.0f}", f"{first * 1e3:.0f}"])
        ours = report.figures.get(f"{shape}_attach_first_token_ms")
        if ours:
            report.figure(f"{shape}_{name}_over_ours", first * 1e3 / ours)
        token = report.figures.get(f"{shape}_token")
        if token is not None and {run["token"] for run in runs} != {token}:
            print(f"{name} draws another first token than we do: {runs[0]['token']:.0f}, not {token:.0f}")
    table(["page cache → first token, ms", "loaded", "first token"], rows)


def served(shape: str, root: Path, rounds: int, report: Report) -> None:
    from benchmarks.coldstart import Client

    source = root / shape
    size = (source / "model.safetensors").stat().st_size // 2**20
    starts: dict[bool, list[float]] = {False: [], True: []}
    """By whether the layers were on the GPU."""
    warm = []
    with platform_up("--dram-mb", str(size * 5 // 4 + 256)) as platform:
        app = platform.state / "gpu_app.py"
        app.write_text(APP.format(path=str(source)))
        platform.sllm("deploy", str(app))
        client = Client(platform)
        for number in range(2 * rounds + 2):
            cold = client.first_token("a")
            spans = {name: f"{at * 1e3:.0f}+{took * 1e3:.0f} {note}" for name, (at, took, note) in cold.spans.items()}
            print(f"{number}: {cold.seconds * 1e3:.0f} ms", spans, flush=True)
            there = "tier=gpu" in cold.spans["attach"][2]
            if there and number % 2 == 0:
                raise SystemExit("wanted a start from dram, and the layers were on the GPU")
            if number > 1:
                if not there and cold.tier != "dram":
                    raise SystemExit(f"wanted a start from dram, got one from {cold.tier}")
                starts[there].append(cold.seconds)
            warm.append(client.first_token("a").seconds)
            client.stop_all()
            if number % 2:
                platform.sllm("invoke", "cold/empty", '{"x": 1}')  # code that takes the GPU finds it empty
                client.stop_all()
            time.sleep(10.0)  # the next worker comes up
    figures = {"dram": starts[False], "gpu_tier": starts[True], "warm": warm}
    for name, seconds in figures.items():
        if not seconds:
            print("nothing was kept on the GPU between instances")
            continue
        report.figure(f"{shape}_served_{name}_first_token_ms", statistics.median(seconds) * 1e3)
        print(f"{shape} over HTTP, {name}: {statistics.median(seconds) * 1e3:.0f} ms")


if __name__ == "__main__":
    sys.exit(main())
