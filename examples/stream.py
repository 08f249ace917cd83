"""A stream: an async generator whose outputs arrive while it runs.

    sllm run examples/stream.py

prints a line every tenth of a second, 5 to 1 and then "lift-off". After `sllm deploy examples/stream.py`

    curl -N localhost:8700/v1/functions/stream/countdown -H 'content-type: application/json' -d '{"start": 5}'

shows the same as server-sent events. Whoever stops listening stops the generator: its `finally` runs at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import sllm

app = sllm.App("stream")


@app.function
async def countdown(start: int, pause: float = 0.1) -> AsyncIterator[str]:
    try:
        for number in range(start, 0, -1):
            yield str(number)
            await asyncio.sleep(pause)
        yield "lift-off"
    finally:
        print("the countdown has ended")


@app.local_entrypoint
def main(start: int = 5) -> None:
    for line in countdown.stream(start):
        print(line)
