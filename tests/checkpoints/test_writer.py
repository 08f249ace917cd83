"""Files written past the page cache: whole, in order, and an error of the disk is nobody's secret."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sllm_invoker.checkpoints.reader import ALIGNMENT
from sllm_invoker.checkpoints.writer import AT_ONCE, DirectWriter

BLOCK = 4 * ALIGNMENT


def view(size: int, number: int = 0) -> memoryview:
    """Of memory that a disk may take it from, with bytes of its own."""
    memory = mmap.mmap(-1, -(-size // ALIGNMENT) * ALIGNMENT)
    memory[:size] = (bytes(range(251)) * (size // 251 + 2))[number : number + size]
    return memoryview(memory)[:size]


@pytest.mark.parametrize("last", [1, 100, ALIGNMENT - 1, ALIGNMENT, BLOCK + 7])
def test_a_file_is_its_views_in_order(tmp_path, last):
    views = [view(BLOCK, number) for number in range(2 * AT_ONCE + 1)] + [view(last, 99)]
    with DirectWriter(tmp_path / "file") as writer:
        for each in views:
            writer.write(each)
    assert (tmp_path / "file").read_bytes() == b"".join(views)


def test_what_was_there_is_not_kept(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10 * BLOCK))
    with DirectWriter(tmp_path / "file") as writer:
        writer.write(view(5))
    assert (tmp_path / "file").read_bytes() == view(5)


@pytest.mark.parametrize("refused", ["open", "write"])
def test_where_it_may_not_pass_the_page_cache_it_goes_through_it(tmp_path, monkeypatch, refused):
    opened, put, calls = os.open, os.pwrite, []

    def open_(path, flags, *rest, **more):
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest, **more)

    def pwrite(fd, data, at):
        calls.append(at)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return put(fd, data, at)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with DirectWriter(tmp_path / "file") as writer:
        writer.write(view(BLOCK, 1))
        writer.write(view(100, 2))
    assert (tmp_path / "file").read_bytes() == bytes(view(BLOCK, 1)) + bytes(view(100, 2))
    assert calls == [0] * (2 if refused == "write" else 1) + [BLOCK]


def test_a_short_write_goes_on(tmp_path, monkeypatch):
    put = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: put(fd, data[:ALIGNMENT], at))
    with DirectWriter(tmp_path / "file") as writer:
        writer.write(view(BLOCK + 9))
    assert (tmp_path / "file").read_bytes() == view(BLOCK + 9)


@pytest.mark.parametrize("views", [1, AT_ONCE + 2])
def test_a_full_disk_is_an_error_in_the_block_or_at_its_end(tmp_path, monkeypatch, views):
    def full(fd, data, at):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"), DirectWriter(tmp_path / "file") as writer:
        for number in range(views):
            writer.write(view(BLOCK, number))


def test_few_views_wait_for_the_disk_and_none_is_written_after_an_error(tmp_path, monkeypatch):
    put, begun, gate = os.pwrite, threading.Semaphore(0), threading.Semaphore(0)

    def gated(fd, data, at):
        begun.release()
        gate.acquire()
        return put(fd, data, at)

    monkeypatch.setattr(os, "pwrite", gated)
    with ThreadPoolExecutor(1) as other, pytest.raises(KeyboardInterrupt), DirectWriter(tmp_path / "file") as writer:
        for number in range(AT_ONCE):
            writer.write(view(BLOCK, number))
        one_more = other.submit(writer.write, view(BLOCK, AT_ONCE))
        begun.acquire()
        assert not one_more.done()
        gate.release()
        one_more.result()
        begun.acquire()  # the second is under way
        gate.release(10)
        raise KeyboardInterrupt
    assert (tmp_path / "file").stat().st_size % BLOCK == 0
    assert not any(each.name.startswith("checkpoint-writer") for each in threading.enumerate())
