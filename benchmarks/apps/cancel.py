"""Functions of benchmarks/cancel.py: each notes in a file of its own when it really stopped."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import sllm

MODEL = Path(__file__).parents[2] / "examples/counting/model"
app = sllm.App("cancel")


def note(path: str, what: str) -> None:
    """Append `what pid time` in one write."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"{what} {os.getpid()} {time.time():.6f}\n".encode())


@app.function(scaledown_window=3600, max_containers=2, max_queue=1000)
@sllm.concurrent(max_inputs=16)
async def agen(path: str) -> AsyncIterator[int]:
    note(path, "began")
    try:
        for i in range(1_000_000):
            yield i
            await asyncio.sleep(0.005)
    finally:
        note(path, "stopped")


@app.function(scaledown_window=3600, max_containers=4, max_queue=1000)
def silent(path: str) -> None:
    """Says nothing and sleeps, or computes, for a minute."""
    note(path, "began")
    try:
        if os.getpid() % 2:
            time.sleep(60)
        else:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                sum(range(1000))
    finally:
        note(path, "stopped")


@app.function(scaledown_window=3600, max_containers=4, max_queue=1000, cancel_grace=2.0)
def deaf(path: str) -> None:
    """Ignores its cancellation for a minute."""
    note(path, "began")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(BaseException):
            time.sleep(60)


@app.function(scaledown_window=3600, max_containers=1, max_queue=1)
async def narrow(path: str) -> AsyncIterator[int]:
    """One runs, one may wait."""
    note(path, "began")
    yield 0
    await asyncio.sleep(600)


for _number in range(2):
    app.llm(
        f"llm-{_number}", checkpoint=sllm.Checkpoint(str(MODEL)), concurrency=1, scaledown_window=3600, max_containers=1
    )
