"""Fifty language models, each a function with a checkpoint of its own: what benchmarks/warmth.py calls."""

import os
from pathlib import Path

import sllm

MODELS = Path(os.environ["SLLM_WARMTH_MODELS"])
WINDOW = float(os.environ["SLLM_WARMTH_WINDOW"])

app = sllm.App("warmth")
for _directory in sorted(MODELS.iterdir()):
    app.llm(_directory.name, checkpoint=sllm.Checkpoint(str(_directory)), memory=64, scaledown_window=WINDOW)
