"""What the runner's tests serve. `hold` ends when its caller cancels it, and says so in what it prints."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import sllm

app = sllm.App("test")


class Shortage(Exception):
    def __init__(self, item: str, missing: int) -> None:
        super().__init__(item, missing)
        self.item, self.missing = item, missing


@dataclass
class Point:
    x: int
    y: int = 0


@app.function
def echo(x: Any, y: Any = 2) -> Any:
    return [x, y]


class Sync:
    """Methods for every way in which synchronous code may behave."""

    @sllm.method
    def add(self, a: int, b: int = 1) -> int:
        return a + b

    @sllm.method
    def move(self, point: Point) -> Point:
        return Point(point.x + 1, point.y)

    @sllm.method
    def fail(self) -> None:
        raise Shortage("bolts", 3)

    @sllm.method
    def leave(self) -> None:
        sys.exit(7)

    @sllm.method
    def break_off(self) -> None:
        raise KeyboardInterrupt

    @sllm.method
    def own_type_error(self) -> int:
        return len(5)  # type: ignore[arg-type]

    @sllm.method
    def refuse(self) -> None:
        raise sllm.errors.QueueFull("no room in my own queue")

    @sllm.method
    def odd(self) -> object:
        return threading.Lock()

    @sllm.method
    def generator_by_mistake(self) -> object:
        return (x for x in range(3))

    @sllm.method
    def big(self, size: int) -> bytes:
        return bytes(size)

    @sllm.method
    def size(self, data: bytes) -> int:
        return len(data)

    @sllm.method
    def sleep(self) -> None:
        try:
            print("asleep")
            time.sleep(3600)
        finally:
            print("awake")

    @sllm.method
    def spin(self) -> None:
        print("spinning")
        while True:
            pass

    @sllm.method
    def swallow(self) -> str:
        ignored = 0
        while ignored < 1:
            try:
                print("holding")
                time.sleep(3600)
            except BaseException:
                ignored += 1
        return "went on"

    @sllm.method
    def count(self, n: int) -> Iterator[int]:
        try:
            yield from range(n)
        finally:
            print("generator closed")

    @sllm.method
    def count_then_fail(self, n: int) -> Iterator[int]:
        yield from range(n)
        raise Shortage("numbers", n)

    @sllm.method
    def stubborn(self) -> Iterator[int]:
        while True:
            try:
                yield 1
            except BaseException:
                print("not now")
                yield 2
                return

    @sllm.method
    def odd_output(self) -> Iterator[object]:
        yield 1
        yield threading.Lock()

    @sllm.method
    def who(self) -> list[str]:
        me = sllm.current_invocation()
        assert me is not None
        return [me.id, me.app, me.function, me.method, me.instance, me.node]

    @sllm.method
    def say(self, text: str) -> None:
        print(text, end="")

    @sllm.method
    def thread(self) -> bool:
        return threading.current_thread() is threading.main_thread()

    @sllm.method
    def die(self) -> None:
        os._exit(9)


@app.cls(name="One")
class One(Sync):
    """Runs in the main thread."""


@app.cls(name="Many")
@sllm.concurrent(max_inputs=4)
class Many(Sync):
    """Runs in threads."""


@app.cls(name="Loop")
@sllm.concurrent(max_inputs=4)
class Loop:
    @sllm.enter
    def prepare(self) -> None:
        self.open = asyncio.Event()

    @sllm.method
    async def add(self, a: int, b: int = 1) -> int:
        return a + b

    @sllm.method
    async def fail(self) -> None:
        raise Shortage("bolts", 3)

    @sllm.method
    async def leave(self) -> None:
        sys.exit(7)

    @sllm.method
    async def leave_in_task(self) -> str:
        task = asyncio.create_task(self.leave.local())
        await asyncio.wait([task])
        return "still here"

    @sllm.method
    async def raise_cancelled(self) -> None:
        raise asyncio.CancelledError

    @sllm.method
    async def hold(self) -> None:
        print("holding")
        try:
            await asyncio.Event().wait()
        finally:
            print("let go")

    @sllm.method
    async def swallow(self) -> str:
        print("holding")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "went on"
        return ""

    @sllm.method
    async def wait_for_opening(self) -> str:
        print("waiting")
        await self.open.wait()
        return "open"

    @sllm.method
    async def unlock(self) -> None:
        self.open.set()

    @sllm.method
    async def count(self, n: int) -> AsyncIterator[int]:
        try:
            for i in range(n):
                yield i
        finally:
            print("generator closed")

    @sllm.method
    async def count_then_fail(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i
        raise Shortage("numbers", n)

    @sllm.method
    async def odd_output(self) -> AsyncIterator[object]:
        yield 1
        yield threading.Lock()

    @sllm.method
    async def leave_task_behind(self) -> str:
        self.task = asyncio.create_task(asyncio.Event().wait())
        return "done"

    @sllm.method
    def blocking(self) -> bool:
        return threading.current_thread() is threading.main_thread()


def _double(values: list[int], factor: list[int]) -> list[Any]:
    results: list[Any] = [value * by for value, by in zip(values, factor, strict=True)]
    return [Shortage("luck", 13) if result == 13 else [result, len(values)] for result in results]


@app.cls(name="Batched")
class Batched:
    @sllm.method
    @sllm.batched(max_batch_size=4, wait_ms=60_000.0)
    def double(self, value: list[int], factor: list[int]) -> list[Any]:
        return _double(value, factor)

    @sllm.method
    @sllm.batched(max_batch_size=4, wait_ms=60_000.0)
    async def double_async(self, value: list[int], factor: list[int]) -> list[Any]:
        return _double(value, factor)

    @sllm.method
    @sllm.batched(max_batch_size=4, wait_ms=1.0)
    def soon(self, value: list[int]) -> list[int]:
        return [len(value)] * len(value)

    @sllm.method
    @sllm.batched(max_batch_size=4, wait_ms=1.0)
    def short(self, value: list[int]) -> list[int]:
        return []

    @sllm.method
    @sllm.batched(max_batch_size=2, wait_ms=60_000.0)
    def sleep(self, value: list[int]) -> list[int]:
        print("asleep")
        while True:
            time.sleep(0.01)

    @sllm.method
    @sllm.batched(max_batch_size=2, wait_ms=60_000.0)
    async def sleep_async(self, value: list[int]) -> list[int]:
        print("asleep")
        await asyncio.Event().wait()
        return value


class Steps:
    @sllm.enter
    def first(self) -> None:
        self.steps = ["enter base"]


@app.cls(name="Hooks")
class Hooks(Steps):
    language: str = sllm.parameter(default="en")
    size: int = sllm.parameter(default=1)

    def __init__(self) -> None:
        self.made_with = (self.language, self.size)

    @sllm.enter
    async def second(self) -> None:
        await asyncio.sleep(0)
        self.steps.append("enter async")

    @sllm.method
    def show(self) -> list[Any]:
        return [*self.steps, self.made_with]

    @sllm.method
    async def hold(self) -> None:
        print("holding")
        await asyncio.Event().wait()

    @sllm.exit
    def close(self) -> None:
        print("exit sync")
        raise Shortage("nothing", 0)

    @sllm.exit
    async def close_async(self) -> None:
        print("exit async")


@app.cls(name="BadEnter")
class BadEnter:
    @sllm.enter
    def prepare(self) -> None:
        raise Shortage("everything", 1)

    @sllm.method
    def nothing(self) -> None: ...
