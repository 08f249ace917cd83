"""Functions of benchmarks/dataplane.py."""

from collections.abc import AsyncIterator

import sllm

app = sllm.App("plane")


@app.function(scaledown_window=3600, max_containers=1)
@sllm.concurrent(max_inputs=64)
async def echo(value: str) -> str:
    return value


@app.function(scaledown_window=3600, max_containers=1)
@sllm.concurrent(max_inputs=64)
async def count(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i
