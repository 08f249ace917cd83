"""Functions of benchmarks/fidelity.py whose engine is declared to be paced: it takes the times its spec names
instead of computing, so that what is measured is the platform and not this machine's cores."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator

import sllm

PACE = json.loads(os.environ["SLLM_BENCH_PACE"])
app = sllm.App("paced")


def _define(number: int) -> None:
    class Paced:
        @sllm.enter
        def enter(self) -> None:
            time.sleep(PACE["enter"])

        @sllm.method
        async def generate(self, input: int, output: int) -> AsyncIterator[int]:
            at = time.monotonic() + PACE["per_input"] * input
            for token in range(output):
                await asyncio.sleep(at - time.monotonic())
                yield token
                at += PACE["per_output"]

    Paced.__name__ = Paced.__qualname__ = name = f"Model{number}"
    Paced.__module__ = __name__
    globals()[name] = app.cls(
        memory=PACE["memory_mb"],
        max_containers=PACE["max_containers"],
        scaledown_window=PACE["scaledown_window"],
        max_queue=10_000,
    )(Paced)


for _number in range(PACE["functions"]):
    _define(_number)
