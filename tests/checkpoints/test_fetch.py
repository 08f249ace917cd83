"""Pieces of a file: in any order in memory, in order on disk, few at a time, and none twice."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import blake3
import pytest
from sllm_invoker.checkpoints import fetch as fetch_module
from sllm_invoker.checkpoints.fetch import fetch
from sllm_invoker.checkpoints.remote import Answer, Entry

from sllm_faas.errors import CheckpointIncomplete, CheckpointUnavailable

PIECE, CONNECTIONS = 1000, 4
CONTENT = bytes(number * 7 % 251 for number in range(12_345))
ENTRY = Entry("model.safetensors", len(CONTENT), '"tag"')
STARTS = range(0, len(CONTENT), PIECE)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "PIECE", PIECE)
    monkeypatch.setattr(fetch_module, "CONNECTIONS", CONNECTIONS)
    monkeypatch.setattr(fetch_module, "PAUSES", (0.0, 0.0, 0.0))


class Source:
    """Gives at most 300 bytes at a time. `before(start, at)` may hold that up or break it off. `asked` has where
    answers began, `whole` the ends of those that were read to the end, `told` what was reported."""

    url = "https://models.example/m"

    def __init__(self, before: Callable[[int, int], None] = lambda start, at: None) -> None:
        self.before = before
        self.content = CONTENT
        self.asked: list[int] = []
        self.whole: list[int] = []
        self.told: list[int] = []
        self.changed = threading.Condition()
        self.aborted = False

    def connect(self):
        return contextlib.nullcontext(self)

    def abort(self) -> None:
        with self.changed:
            self.aborted = True
            self.changed.notify_all()

    def report(self, done: int, total: int, stage: str) -> None:
        assert (total, stage) == (len(CONTENT), "fetch")
        with self.changed:
            self.told.append(done)
            self.changed.notify_all()

    def wait_for(self, what: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.aborted or what(), 30)
        if self.aborted:
            raise ConnectionError("aborted")

    @contextlib.contextmanager
    def open(self, entry: Entry, start: int, end: int) -> Iterator[Answer]:
        with self.changed:
            self.asked.append(start)
            self.changed.notify_all()
        at = start

        def read(memory: memoryview) -> int:
            nonlocal at
            self.before(start, at)
            data = self.content[at : min(at + 300, end, at + len(memory))]
            memory[: len(data)] = data
            at += len(data)
            if data and at == end:
                with self.changed:
                    self.whole.append(end)
                    self.changed.notify_all()
            return len(data)

        yield Answer(start, end, read)


def brought(source: Source, folder: Path) -> bytes:
    sums = fetch(source, (ENTRY,), folder, source.report)
    content = (folder / ENTRY.name).read_bytes()
    assert sums == {ENTRY.name: blake3.blake3(content).hexdigest()}
    return content


def left(folder: Path) -> int:
    """Bytes on disk, which are the first of the content."""
    content = (folder / ENTRY.name).read_bytes()
    assert CONTENT.startswith(content)
    return len(content)


def test_pieces_are_written_in_order_in_whatever_order_they_come(tmp_path):
    ahead = [start + PIECE for start in STARTS[1 : CONNECTIONS + 1]]

    def hold(start: int, at: int) -> None:
        if not start:
            source.wait_for(lambda: set(ahead) <= set(source.whole))
            assert left(tmp_path) == 0

    source = Source(hold)
    assert brought(source, tmp_path) == CONTENT
    assert source.whole.index(PIECE) == CONNECTIONS, "the first came behind those that there was memory for"
    assert sorted(source.whole) == [min(start + PIECE, len(CONTENT)) for start in STARTS]
    assert sorted(source.asked) == list(STARTS)
    assert source.told == sorted(source.told)
    assert source.told[-1] == len(CONTENT)


def test_no_more_pieces_are_in_memory_than_connections_and_one(tmp_path):
    most = []

    def look(start: int, at: int) -> None:
        if at == start:
            most.append(start + PIECE - (tmp_path / ENTRY.name).stat().st_size // PIECE * PIECE)

    assert brought(Source(look), tmp_path) == CONTENT
    assert max(most) <= (CONNECTIONS + 1) * PIECE


def test_a_piece_that_breaks_off_goes_on_and_the_others_do_not_notice(tmp_path):
    def break_off(start: int, at: int) -> None:
        if (start, at) == (2000, 2600):
            raise ConnectionError("reset")

    source = Source(break_off)
    assert brought(source, tmp_path) == CONTENT
    assert sorted(source.asked) == sorted([*STARTS, 2600])


def test_a_piece_that_never_comes_is_an_error_and_what_is_before_it_stays(tmp_path):
    came: list[int] = []

    def break_off(start: int, at: int) -> None:
        if at >= 2600:
            with source.changed:  # other pieces may get here before this one has come so far
                came.extend([at] if start == 2 * PIECE else [])
                source.changed.notify_all()
            source.wait_for(lambda: bool(came) and source.told[-1:] >= [2 * PIECE])
            raise ConnectionError("reset")

    source = Source(break_off)
    with pytest.raises(CheckpointIncomplete, match="broke off after 2600 of 12345 bytes: reset") as caught:
        brought(source, tmp_path)
    assert "Pull again" in caught.value.hint
    assert left(tmp_path) == 2600
    source = Source()
    assert brought(source, tmp_path) == CONTENT
    assert source.asked[0] == 2600
    assert min(source.asked) == 2600


def test_an_error_of_one_connection_ends_the_others(tmp_path):
    def fail(start: int, at: int) -> None:
        if start == 2000:
            source.wait_for(lambda: source.told[-1:] == [PIECE] and set(STARTS[:CONNECTIONS]) <= set(source.asked))
            raise CheckpointUnavailable("it has changed.")
        if start:
            source.wait_for(lambda: False)

    source, before = Source(fail), threading.active_count()
    with pytest.raises(CheckpointUnavailable, match="changed"):
        brought(source, tmp_path)
    assert source.aborted
    assert left(tmp_path) == PIECE
    assert threading.active_count() == before


def test_a_fetch_that_is_stopped_leaves_a_prefix_and_the_next_goes_on_from_there(tmp_path):
    class Stopped(Exception):
        pass

    def stop(done: int, total: int, stage: str) -> None:
        if done >= 5 * PIECE:
            raise Stopped

    source = Source()
    source.report = stop
    with pytest.raises(Stopped):
        brought(source, tmp_path)
    size = left(tmp_path)
    assert 5 * PIECE <= size < len(CONTENT)
    source = Source()
    assert brought(source, tmp_path) == CONTENT
    assert sorted(source.asked) == list(range(size, len(CONTENT), PIECE))


def test_a_file_that_is_whole_is_not_asked_for_and_one_that_is_too_long_is_begun_anew(tmp_path):
    source = Source()
    (tmp_path / ENTRY.name).write_bytes(CONTENT)
    assert brought(source, tmp_path) == CONTENT
    assert source.asked == []
    (tmp_path / ENTRY.name).write_bytes(CONTENT + b"!")
    assert brought(source, tmp_path) == CONTENT
    assert sorted(source.asked) == list(STARTS)


def test_a_file_of_no_bytes_is_not_asked_for(tmp_path):
    source, empty = Source(), Entry("added_tokens.json", 0, '"tag"')
    assert fetch(source, (empty,), tmp_path, lambda *_: None) == {empty.name: blake3.blake3().hexdigest()}
    assert (tmp_path / empty.name).read_bytes() == b""
    assert source.asked == []


def test_what_has_more_than_its_bytes_is_never_taken_for_whole(tmp_path):
    source, untagged = Source(), Entry(ENTRY.name, len(CONTENT) - 5, "")
    source.open = lambda entry, start, end: Source.open(source, entry, 0, len(CONTENT))
    with pytest.raises(CheckpointIncomplete, match="gave more than its 12340 bytes"):
        fetch(source, (untagged,), tmp_path, lambda *_: None)
    assert left(tmp_path) < untagged.bytes
