"""Checkpoints under faults, in full: kills at random points of ingest and load, flipped bytes, histories of map, evict,
reuse and kill with real processes.

    python -m benchmarks.faults [--quick] [--json PATH]

Every figure that counts something wrong must be zero. The tests run the same experiments small; ten thousand histories
of the slab book alone are in `tests/checkpoints/test_slab_book.py`. Full: about five minutes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.store import CheckpointStore

from benchmarks.common import Report, arguments, table
from tests.checkpoints import faults
from tests.checkpoints.forks import Forks

COUNTED = {"kills", "readers", "flips"}
"""What a tally has of how much was done; the rest of it must be zero."""


def make_model(directory: Path) -> None:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


async def experiments(root: Path, scale: float) -> dict[str, tuple[Any, float]]:
    source = root / "source"
    make_model(source)
    store = CheckpointStore(root / "store")
    ingest(store, str(source), "model")
    forks = Forks()
    runs: dict[str, Callable[[int], Awaitable[Any]]] = {
        "ingest": lambda count: faults.kill_ingests(forks, source, root / "killed", count),
        "load": lambda count: faults.kill_loads(forks, root / "loads", count),
        "flip": lambda count: faults.flip_bytes(forks, store, root, count),
        "history": lambda count: faults.live_histories(forks, root / "lives", count),
    }
    counts = {"ingest": 100, "load": 100, "flip": 1000, "history": 200}
    done = {}
    try:
        for name, run in runs.items():
            began = time.monotonic()
            tally = await run(max(4, round(counts[name] * scale)))
            done[name] = (tally, time.monotonic() - began)
    finally:
        forks.close()
    return done


def main() -> int:
    options = arguments(__doc__).parse_args()
    report = Report("faults")
    with tempfile.TemporaryDirectory(prefix="sllm-faults-") as root:
        done = asyncio.run(experiments(Path(root), 0.1 if options.quick else 1.0))
    rows = []
    for name, (tally, seconds) in done.items():
        values = dataclasses.asdict(tally)
        rows.append((name, ", ".join(f"{value} {what}" for what, value in values.items()), f"{seconds:.0f} s"))
        for what, value in values.items():
            report.figure(f"{name}_{what}", value)
            if what not in COUNTED:
                report.at_most(f"{name}: {what}", value, 0)
    table(("experiment", "found", "took"), rows)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
