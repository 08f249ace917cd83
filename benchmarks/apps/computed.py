"""Functions of benchmarks/fidelity.py that compute: the counting model, several times over."""

import json
import os
from pathlib import Path

import sllm

PACE = json.loads(os.environ["SLLM_BENCH_PACE"])
app = sllm.App("computed")

for _number in range(PACE["functions"]):
    app.llm(
        f"model-{_number}",
        checkpoint=Path(__file__).parents[2] / "examples/counting/model",
        concurrency=1,
        memory=PACE["memory_mb"],
        max_containers=PACE["max_containers"],
        scaledown_window=PACE["scaledown_window"],
        max_queue=10_000,
    )
