"""An app for the tests of the local platform. `seen` and `gates` are shared, because it runs in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import sllm

app = sllm.App("shop")
other = sllm.App("other")
changed = sllm.App("shop")
seen: list[Any] = []
gate = threading.Event()


def wait() -> None:
    """Until the test opens the gate, or the code is interrupted."""
    while not gate.wait(0.005):
        pass


@dataclass
class Item:
    name: str
    data: bytes = b""


class OutOfStock(Exception):
    def __init__(self, item: str, left: int) -> None:
        super().__init__(item, left)
        self.left = left


@app.function
def square(x: int) -> int:
    return x * x


@other.function
def cube(x: int) -> int:
    return square.remote(x) * x


@changed.function(name="square")
def fourfold(x: int) -> int:
    return x * 4


@app.function
def wrap(item: Item) -> Item:
    item.name += "!"
    return item


@app.function
def sell(item: str) -> None:
    raise OutOfStock(item, 3)


@app.function
def leave() -> None:
    raise SystemExit(3)


@app.function
def strange() -> object:
    return object()


@app.function
def count(n: int) -> Iterator[int]:
    try:
        yield from range(n)
    finally:
        seen.append("count ended")


@app.function
async def acount(n: int) -> AsyncIterator[int]:
    try:
        for i in range(n):
            await asyncio.sleep(0)
            yield i
    finally:
        seen.append("acount ended")


@app.function(max_containers=1, resumable=True)
async def steps(item: Item, n: int) -> AsyncIterator[tuple[int, Item]]:
    """Halts before its third step, for ever, unless it has been resumed."""
    last = sllm.resumed()
    for step in range(0 if last is None else last[0] + 1, n):
        if step == 2 and last is None:
            await asyncio.Event().wait()
        yield step, item if last is None else last[1]


@app.function(max_containers=1, cancel_grace=5.0)
def hold(name: str) -> str:
    seen.append(name)
    try:
        wait()
    except sllm.Cancelled:
        seen.append(f"{name} cancelled")
        raise
    return name


@app.function(max_containers=1, max_queue=1)
def narrow() -> None:
    wait()


@app.function(max_containers=1)
@sllm.concurrent(max_inputs=2)
def pair(barrier_wait: float) -> int:
    return meet.wait(barrier_wait)


meet = threading.Barrier(2)


@app.function(max_containers=2)
def two() -> int:
    return meet.wait(5.0)


@app.function(timeout=sllm.Timeouts(execution=0.05), cancel_grace=5.0)
def too_long() -> None:
    wait()


@app.function(timeout=sllm.Timeouts(first_output=0.05))
def silent() -> Iterator[int]:
    wait()
    yield 1


@app.function(timeout=sllm.Timeouts(idle=0.05))
def stalls() -> Iterator[int]:
    yield 1
    wait()
    yield 2


@app.function(max_containers=1, timeout=sllm.Timeouts(queue=0.05))
def queued() -> None:
    seen.append("queued runs")
    wait()


@app.cls(timeout=sllm.Timeouts(startup=0.05))
class SlowStart:
    @sllm.enter()
    def enter(self) -> None:
        wait()

    @sllm.method
    def hello(self) -> str:
        return "hello"


@app.cls(scaledown_window=0.0)
class Greeter:
    language: str = sllm.parameter(default="en")

    @sllm.enter()
    async def enter(self) -> None:
        seen.append(f"enter {self.language}")

    @sllm.exit()
    def exit(self) -> None:
        seen.append(f"exit {self.language}")
        left.set()

    @sllm.method
    def hello(self, name: str) -> str:
        return f"{self.language}: {name}"

    @sllm.method
    async def spell(self, name: str) -> AsyncIterator[str]:
        for letter in name:
            yield letter


left = threading.Event()


@app.cls
class Broken:
    @sllm.enter()
    def enter(self) -> None:
        raise RuntimeError("no licence")

    @sllm.method
    def hello(self) -> str:
        return "hello"


@app.function(retries=sllm.Retries(max_retries=3, initial_delay=0.0))
def flaky(times: int) -> int:
    seen.append("try")
    if len(seen) <= times:
        raise ValueError("not yet")
    return len(seen)


@app.function(max_containers=1)
@sllm.batched(max_batch_size=4, wait_ms=1000)
def double(x: list[int]) -> list[int]:
    seen.append(len(x))
    return [value * 2 for value in x]


@app.function(max_containers=1, cancel_grace=0.05, timeout=sllm.Timeouts(execution=0.05))
def deaf(first: bool) -> str:
    while first and not gate.is_set():
        try:
            wait()
        except sllm.Cancelled:
            seen.append("ignored")
    return "second"
