"""Functions of every kind and every misbehaviour, for the end-to-end tests."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import sllm

app = sllm.App("zoo")


class OutOfLuck(Exception):
    """A user's own exception type."""


@dataclass
class Point:
    x: int
    y: int


@app.function()
def add(a: int, b: int = 1) -> int:
    return a + b


@app.function()
@sllm.concurrent(max_inputs=16)
async def echo(value: object) -> object:
    return value


@app.function()
def mirror(point: Point) -> Point:
    return Point(point.y, point.x)


@app.function()
def counter(n: int) -> Iterator[int]:
    yield from range(n)


async def counted(first: int, until: str, period: float) -> AsyncIterator[int]:
    """Up from `first` until the file `until` is there, then -1."""
    for i in itertools.count(first):
        yield i
        if Path(until).exists():
            break
        await asyncio.sleep(period)
    yield -1


@app.function(max_containers=4)
@sllm.concurrent(max_inputs=4)
async def ticks(until: str, period: float = 0.02) -> AsyncIterator[int]:
    async for i in counted(0, until, period):
        yield i


@app.function(max_containers=2, resumable=True)
@sllm.concurrent(max_inputs=2)
async def strides(until: str, period: float = 0.02) -> AsyncIterator[int]:
    last = sllm.resumed()
    if last != -1:
        async for i in counted(0 if last is None else last + 1, until, period):
            yield i


@app.function()
def unlucky(number: int) -> None:
    raise OutOfLuck("no luck with", number)


@app.function()
def unencodable() -> object:
    return object()


@app.function()
def leaves() -> None:
    os._exit(3)


@app.function()
def exits() -> None:
    sys.exit(3)


@app.function()
def forks() -> int:
    """Leaves a grandchild in a session of its own behind."""
    return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid


@app.function()
def chatty(word: str) -> None:
    print(f"out {word}")
    print(f"err {word}", file=sys.stderr)


@app.function(timeout=sllm.Timeouts(execution=0.5))
def slow() -> None:
    time.sleep(60)


@app.function(timeout=sllm.Timeouts(first_output=0.5))
async def silent() -> AsyncIterator[int]:
    await asyncio.sleep(60)
    yield 1


@app.function(timeout=sllm.Timeouts(idle=0.5))
async def pauses() -> AsyncIterator[int]:
    yield 1
    await asyncio.sleep(60)


@app.function(timeout=sllm.Timeouts(queue=0.5), max_containers=1)
async def busy(seconds: float) -> None:
    await asyncio.sleep(seconds)


@app.function(max_queue=1, max_containers=1)
async def narrow(seconds: float) -> None:
    await asyncio.sleep(seconds)


@app.cls(max_containers=2)
class Greeter:
    greeting: str = sllm.parameter(default="hello")

    @sllm.enter()
    def prepare(self) -> None:
        self.calls = 0

    @sllm.method()
    def greet(self, name: str) -> str:
        self.calls += 1
        return f"{self.greeting} {name} #{self.calls}"
