"""Reading parts: every byte checked, in order, and never a write after the end."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash
from sllm_invoker.checkpoints import reader as reading_module
from sllm_invoker.checkpoints.object import CHUNK_BYTES, Part
from sllm_invoker.checkpoints.reader import DirectFile, File, Reader, open_direct

from sllm_faas.errors import Cancelled, CheckpointCorrupt, CheckpointError, CheckpointUnavailable

SIZE = 2 * CHUNK_BYTES + 12_345


@pytest.fixture(scope="module")
def data() -> bytes:
    block = os.urandom(1 << 20)
    return (block * (SIZE // len(block) + 1))[:SIZE]


@pytest.fixture
def path(tmp_path: Path, data: bytes) -> Path:
    found = tmp_path / "part.safetensors"
    found.write_bytes(data)
    return found


def part_of(data: bytes, size: int | None = None) -> Part:
    chunks = [xxhash.xxh3_64_hexdigest(data[i : i + CHUNK_BYTES]) for i in range(0, len(data), CHUNK_BYTES)]
    return Part("part.safetensors", len(data) if size is None else size, 4096, "", tuple(chunks), (), ())


def memory(pieces: int = 3) -> list[memoryview]:
    return [memoryview(mmap.mmap(-1, CHUNK_BYTES)) for _ in range(pieces)]


@pytest.fixture
def make() -> Iterator[Callable[..., Reader]]:
    made: list[Reader] = []

    def build(**options: object) -> Reader:
        made.append(Reader(piece=CHUNK_BYTES, **{"at_once": 1, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for each in made:
        each.close()


class Gated:
    """A file whose reads wait to be let through; `failing` maps a piece to an OSError or to bytes to leave out."""

    def __init__(self, path: Path, failing: dict[int, OSError | int] | None = None) -> None:
        self._file = DirectFile(path, direct=False)
        self.size = self._file.size
        self.order: list[str] = []
        self.failing = failing or {}
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def read(self, view: memoryview, offset: int) -> int:
        self.entered.release()
        self.gate.acquire()
        wrong = self.failing.get(offset // CHUNK_BYTES)
        if isinstance(wrong, OSError):
            raise wrong
        count = self._file.read(view, offset)
        return count - wrong if wrong else count

    def close(self) -> None:
        self._file.close()


def test_what_lands_is_the_file_and_the_watermark_never_goes_back(make, path, data):
    target, seen = memory(), []
    reading = make().read(path, part_of(data), target, on_progress=seen.append)
    assert reading.done.result(30).bytes == SIZE
    assert b"".join(target)[:SIZE] == data
    assert seen == [CHUNK_BYTES, 2 * CHUNK_BYTES, SIZE]


def test_what_lands_out_of_order_is_checked_in_order(make, path, data):
    target, seen = memory(), []
    overtaken = threading.Event()

    class Slow(DirectFile):
        """Its first chunk lands after the second."""

        def read(self, view: memoryview, offset: int) -> int:
            if offset == 0:
                assert overtaken.wait(30)
            count = super().read(view, offset)
            if offset == CHUNK_BYTES:
                overtaken.set()
            return count

    reading = make(at_once=2, open_file=Slow).read(path, part_of(data), target, on_progress=seen.append)
    reading.done.result(30)
    assert b"".join(target)[:SIZE] == data
    assert seen == [CHUNK_BYTES, 2 * CHUNK_BYTES, SIZE]


def test_a_failing_call_lets_the_other_one_end_before_its_reading_is_over(make, path, data):
    inside, fail = threading.Event(), threading.Event()

    class Failing(DirectFile):
        def read(self, view: memoryview, offset: int) -> int:
            if offset == 0:
                assert inside.wait(30)
                raise OSError(errno.EIO, "the disk failed")
            inside.set()
            assert fail.wait(30)
            return super().read(view, offset)

    reading = make(at_once=2, open_file=Failing).read(path, part_of(data), memory())
    assert inside.wait(30)
    while reading.error is None:
        pass
    assert not reading.done.done(), "somebody still writes to its memory"
    fail.set()
    with pytest.raises(CheckpointError, match="cannot be read"):
        reading.done.result(30)


def test_where_direct_reads_are_refused_it_reads_through_the_page_cache(make, data, monkeypatch):
    """tmpfs, some overlays and network file systems refuse them, at open or at the first read."""
    real = os.open

    def refusing(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads here")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    shm = Path("/dev/shm") / f"sllm-test-{os.getpid()}"
    shm.write_bytes(data)
    try:
        target = memory()
        make().read(shm, part_of(data), target).done.result(30)
        assert b"".join(target)[:SIZE] == data
    finally:
        shm.unlink()


def test_a_read_that_direct_io_refuses_is_repeated_through_the_page_cache(path, data):
    file = DirectFile(path)
    buffer = mmap.mmap(-1, CHUNK_BYTES)
    # An odd offset is what every device refuses.
    assert file.read(memoryview(buffer)[:1000], 77) == 1000
    assert buffer[:1000] == data[77:1077]
    assert not file.direct
    file.close()


def test_with_no_memory_given_the_bytes_are_checked_on_their_way_to_the_page_cache(make, path, data):
    assert make().read(path, part_of(data), None).done.result(30).bytes == SIZE
    changed = bytearray(data)
    changed[SIZE - 1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(CheckpointCorrupt, match="chunk 2"):
        make().read(path, part_of(data), None).done.result(30)


@pytest.mark.parametrize("at", [0, CHUNK_BYTES - 1, CHUNK_BYTES, SIZE - 1])
def test_a_flipped_bit_is_found_and_the_chunk_named(make, path, data, at):
    changed = bytearray(data)
    changed[at] ^= 0x10
    path.write_bytes(changed)
    reading = make().read(path, part_of(data), memory())
    with pytest.raises(CheckpointCorrupt, match=f"chunk {at // CHUNK_BYTES} "):
        reading.done.result(30)
    assert reading.watermark <= at


@pytest.mark.parametrize("size", [0, 100, SIZE - 1, SIZE + 1])
def test_a_file_of_another_size_is_corrupt(make, path, data, size):
    path.write_bytes((data + b"x")[:size])
    with pytest.raises(CheckpointCorrupt, match=f"it has {size} bytes"):
        make().read(path, part_of(data), memory()).done.result(30)


def test_a_file_that_is_not_there_is_unavailable(make, path, data):
    path.unlink()
    with pytest.raises(CheckpointUnavailable):
        make().read(path, part_of(data), memory()).done.result(30)


def test_a_failing_disk_is_an_error_of_ours_and_the_reader_goes_on(make, path, data):
    file = Gated(path, {1: OSError(errno.EIO, "Input/output error")})
    files = iter([file])
    reader = make(open_file=lambda where: next(files, None) or open_direct(where))
    reading = reader.read(path, part_of(data), memory())
    file.gate.release(2)
    with pytest.raises(CheckpointError, match="Input/output error"):
        reading.done.result(30)
    assert reader.read(path, part_of(data), memory()).done.result(30).bytes == SIZE


def test_a_short_read_is_corrupt(make, path, data):
    file = Gated(path, {1: 4096})
    reading = make(open_file=lambda _: file).read(path, part_of(data), memory())
    file.gate.release(3)
    with pytest.raises(CheckpointCorrupt, match="could be read"):
        reading.done.result(30)


def test_a_cancelled_read_ends_after_the_piece_under_way(make, path, data):
    """Until that piece has landed its memory is still written to, so it is not over before."""
    file = Gated(path)
    target = memory()
    reading = make(open_file=lambda _: file).read(path, part_of(data), target)
    assert file.entered.acquire(timeout=30)
    reading.cancel()
    assert not reading.done.done()
    file.gate.release()
    with pytest.raises(Cancelled):
        reading.done.result(30)
    assert not any(target[1]), "a piece was read after the cancellation"


class Noted:
    """Two gated files that note the order in which their chunks are read."""

    def __init__(self, *paths: Path) -> None:
        self.order: list[str] = []
        self.files = {where: Gated(where) for where in paths}

    def open(self, where: Path) -> File:
        inner, order = self.files[where], self.order

        class One:
            size = inner.size

            def read(self, view: memoryview, offset: int) -> int:
                order.append(where.name[0])
                return inner.read(view, offset)

            def close(self) -> None:
                inner.close()

        return One()

    def go(self) -> None:
        for file in self.files.values():
            file.gate.release(3)


def test_the_more_urgent_read_goes_first_from_the_next_piece_on(make, path, data, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(data)
    noted = Noted(path, other)
    reader = make(open_file=noted.open)
    slow = reader.read(path, part_of(data), memory())
    assert noted.files[path].entered.acquire(timeout=30)
    urgent = reader.read(other, part_of(data), memory(), priority=5)
    noted.go()
    slow.done.result(30)
    assert urgent.done.done()
    assert "".join(noted.order) == "pooopp"


def test_a_short_read_overtakes_what_has_more_left_and_equals_come_in_their_order(make, path, data, tmp_path):
    small, like = tmp_path / "small.safetensors", tmp_path / "like.safetensors"
    small.write_bytes(data[:10_000])
    like.write_bytes(data)
    noted = Noted(path, like, small)
    reader = make(open_file=noted.open)
    first = reader.read(path, part_of(data), memory())
    assert noted.files[path].entered.acquire(timeout=30)
    last = reader.read(like, part_of(data), memory())
    short = reader.read(small, part_of(data[:10_000]), memory(1))
    noted.go()
    last.done.result(30)
    assert first.done.done() and short.done.done()
    assert "".join(noted.order) == "pspplll"


def test_a_read_under_way_that_becomes_more_urgent_goes_first_from_the_next_piece_on(make, path, data):
    files = [Gated(path), Gated(path)]
    left = iter(files)
    reader = make(open_file=lambda _: next(left))
    first, second = (reader.read(path, part_of(data), memory()) for _ in range(2))
    assert files[0].entered.acquire(timeout=30)
    second.hasten(1)
    files[0].gate.release()
    files[1].gate.release(3)
    assert second.done.result(30).bytes == SIZE
    assert not first.done.done(), "two pieces of it are left"
    files[0].gate.release(3)
    assert first.done.result(30).bytes == SIZE


def test_memory_that_is_too_small_is_refused_before_anything_is_read(make, path, data):
    with pytest.raises(ValueError, match="piece 2 is too small"):
        make().read(path, part_of(data), memory(2))


def test_closing_ends_what_is_under_way(path, data):
    file = Gated(path)
    reader = Reader(piece=CHUNK_BYTES, open_file=lambda _: file)
    readings = [reader.read(path, part_of(data), memory()) for _ in range(2)]
    assert file.entered.acquire(timeout=30)
    file.gate.release(10)
    reader.close()
    assert all(isinstance(reading.done.exception(30), Cancelled) or reading.done.result() for reading in readings)
    with pytest.raises(Cancelled):
        reader.read(path, part_of(data), memory())


def test_the_largest_call_is_a_multiple_of_the_chunk():
    assert reading_module.PIECE % CHUNK_BYTES == 0
    with pytest.raises(ValueError, match="allowed: multiples"):
        Reader(piece=CHUNK_BYTES + 4096)


def test_two_that_go_into_the_page_cache_at_once_do_not_share_a_buffer(
    make: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the one has read is checked after the other has been read."""
    contents = {name: os.urandom(4096) * 4 for name in "ab"}
    read = {name: threading.Event() for name in "ab"}

    class Late(DirectFile):
        def __init__(self, where: Path) -> None:
            super().__init__(where, direct=False)
            self.name = where.name

        def read(self, view: memoryview, offset: int) -> int:
            count = super().read(view, offset)
            read[self.name].set()
            assert read["a" if self.name == "b" else "b"].wait(30)
            return count

    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(reading_module, "open_cached", Late)
    reader = make(at_once=2)
    readings = [reader.read(tmp_path / name, part_of(content), None) for name, content in contents.items()]
    assert [reading.done.result(30).bytes for reading in readings] == [4 * 4096] * 2


def test_more_than_the_buffers_hold_goes_into_the_page_cache_one_after_the_other(
    make: Callable[..., Reader], path: Path, data: bytes
) -> None:
    reader = make(at_once=2)
    readings = [reader.read(path, part_of(data), None) for _ in range(5)]
    readings[2].cancel()
    ended = [reading.done.exception(30) for reading in readings]
    assert [error for number, error in enumerate(ended) if number != 2] == [None] * 4
    assert len(reader.scratch) == 4
