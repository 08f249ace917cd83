"""An embedding model behind the OpenAI API: texts about near numbers get near vectors.

    sllm deploy examples/embedding/app.py
    python examples/embedding/nearest.py "40 44" 42 50 500 "a red cat"

prints the texts by their nearness to the first,

    0.995  42
    0.953  50
    0.100  500
    0.032  a red cat

The dot product of two texts is about exp(-d / 100), where d is the difference between the means of their numbers.
`train.py` says how a model of 250 kB learns that.
"""

from __future__ import annotations

from pathlib import Path

import sllm

app = sllm.App("embedding")

embedding = app.llm("embedding", checkpoint=Path(__file__).parent / "model", scaledown_window=30)
