"""What a node measures of its disk and memory: when it is idle, for a week, never in the way of a start."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sllm_invoker import calibration, node
from sllm_invoker.calibration import QUIET, STEP, WEEK, Calibration, Kept, kept, measure


def never() -> bool:
    return False


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it takes a moment, on any machine."""
    monkeypatch.setattr(calibration, "SIZE", 4 * STEP)
    monkeypatch.setattr(node, "memory_available_mb", lambda: 10_000)
    monkeypatch.setattr(calibration, "SPARE_MB", 64)


def test_disk_and_memory_are_measured_and_nothing_is_left_behind(tmp_path: Path) -> None:
    found = measure(tmp_path, never)
    assert found is not None
    assert set(found) == {"disk", "dram"}
    assert all(1e6 < value < 1e13 for value in found.values())
    assert list(tmp_path.iterdir()) == []


def test_no_more_calls_are_made_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "LIMIT", 0.0)
    offsets: list[int] = []

    class Slow:
        size = 4 * STEP

        def read(self, view: memoryview, offset: int) -> int:
            offsets.append(offset)
            return len(view)

        def close(self) -> None:
            pass

    monkeypatch.setattr(calibration, "open_direct", lambda _path: Slow())
    assert measure(tmp_path, never) is not None
    assert offsets == [0], "one call's worth was written, and is read"


def test_a_disk_that_refuses_direct_writes_is_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused, real = [], os.open

    def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT and flags & os.O_WRONLY:
            refused.append(path)
            raise OSError(errno.EINVAL, "no direct access")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", opened)
    assert measure(tmp_path, never) is not None
    assert len(refused) == 1


@pytest.mark.parametrize("calls", [0, 1, 9, 13, 16])
def test_it_gives_up_wherever_it_is(tmp_path: Path, calls: int) -> None:
    left = iter(range(calls))
    assert measure(tmp_path, lambda: next(left, None) is None) is None


def test_of_the_nodes_of_a_directory_one_measures_at_a_time(tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert measure(tmp_path, never) is None
    os.close(other)
    assert measure(tmp_path, never) is not None


def test_what_is_young_and_of_this_device_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "bandwidth.json"
    assert kept(path, 7, 1000.0) == {}
    path.write_bytes(msgspec.json.encode(Kept(1000.0, 7, {"disk": 2e9})))
    assert kept(path, 7, 1000.0 + WEEK - 1) == {"disk": 2e9}
    assert kept(path, 7, 1000.0 + WEEK) == {}, "too old"
    assert kept(path, 7, 999.0) == {}, "of the future"
    assert kept(path, 8, 1000.0) == {}, "another device"
    for wrong in (b"", b"[]", b'{"at": 1000, "device": 7, "bandwidth": {"disk": 0}}', b'{"bandwidth": {"tape": 1}}'):
        path.write_bytes(wrong)
        assert kept(path, 7, 1000.0) == {}


async def ticks(one: Calibration, count: int) -> None:
    for _ in range(count):
        one.tick()
    while one._task is not None:
        await asyncio.wait([one._task])


async def test_a_node_measures_once_it_was_idle_for_a_while_and_the_next_life_knows(tmp_path: Path) -> None:
    busy = True
    one = Calibration(tmp_path, tmp_path, lambda: not busy)
    await ticks(one, 3 * QUIET)
    assert one.bandwidth == {}
    busy = False
    await ticks(one, QUIET - 1)
    assert one.bandwidth == {}
    one.interrupt()
    await ticks(one, QUIET - 1)
    assert one.bandwidth == {}
    await ticks(one, 1)
    assert set(one.bandwidth) == {"disk", "dram"}
    await one.close()
    again = Calibration(tmp_path, tmp_path, lambda: True)
    assert again.bandwidth == one.bandwidth
    await ticks(again, 2 * QUIET)
    assert again.bandwidth == one.bandwidth


async def test_a_start_interrupts_it_and_it_is_done_another_time(tmp_path: Path, monkeypatch: Any) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(directory: Path, stopped: Any) -> Any:
        begun.set()
        go_on.wait(10)
        return None if stopped() else {"disk": 1e9}

    monkeypatch.setattr(calibration, "measure", slow)
    one = Calibration(tmp_path, tmp_path, lambda: True)
    for _ in range(QUIET):
        one.tick()
    await asyncio.to_thread(begun.wait, 10)
    one.interrupt()
    go_on.set()
    await ticks(one, 0)
    assert one.bandwidth == {}
    await ticks(one, QUIET)
    assert one.bandwidth == {"disk": 1e9}
    await one.close()


@pytest.mark.parametrize("what", ["memory", "disk", "refused"])
async def test_where_it_cannot_that_is_said_once_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    said: list[dict[str, Any]] = []

    class Log:
        def warning(self, _event: str, **values: Any) -> None:
            said.append(values)

    monkeypatch.setattr(calibration.logging, "get", lambda _name: Log())
    if what == "memory":
        monkeypatch.setattr(node, "memory_available_mb", lambda: 10)
    elif what == "disk":
        monkeypatch.setattr(calibration, "SPARE_MB", 10**9)
        monkeypatch.setattr(node, "memory_available_mb", lambda: 10**10)
    else:
        monkeypatch.setattr(calibration, "open_direct", _refuse)
    one = Calibration(tmp_path, tmp_path, lambda: True)
    await ticks(one, QUIET)
    await ticks(one, 3 * QUIET)
    assert one.bandwidth == {}
    assert len(said) == 1
    assert str(tmp_path) in said[0]["directory"]
    assert said[0]["error"]
    await one.close()


def _refuse(path: Path) -> Any:
    raise OSError(errno.EIO, "the disk is broken", str(path))
