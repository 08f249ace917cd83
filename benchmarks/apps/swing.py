"""Work of benchmarks/swing.py: 200 ms of waiting, so that two cores are not what is measured."""

import asyncio
from collections.abc import AsyncIterator

import sllm

app = sllm.App("swing")
PARTS = 4


@app.cls(memory=64, max_containers=32, scaledown_window=8, max_queue=1000)
class Work:
    @sllm.method
    async def call(self) -> int:
        await asyncio.sleep(0.2)
        return PARTS

    @sllm.method
    async def stream(self) -> AsyncIterator[int]:
        for number in range(PARTS):
            await asyncio.sleep(0.2 / PARTS)
            yield number
