"""The log of a node: attributed lines, bounded, filtered, followed."""

from __future__ import annotations

import json
from pathlib import Path

from sllm_invoker.logs import MAX_LINE, Filter, LogBook, Record

from sllm_faas.spec import Target
from sllm_faas.wire.messages import LogRecord

TARGET = Target("app", "f", 3)


def texts(records: list[Record]) -> list[str]:
    return [record["text"] for record in records]


def test_a_line_says_whose_it_is(tmp_path: Path) -> None:
    book = LogBook(tmp_path, "node-0")
    book.source("ins-1", TARGET).records((LogRecord(5.0, "stdout", "hello", "ab" * 16),))
    assert json.loads((tmp_path / "node-0.jsonl").read_text()) == {
        "time": 5.0, "level": "info", "stream": "stdout", "app": "app", "function": "f", "version": 3,
        "instance": "ins-1", "invocation": "ab" * 16, "node": "node-0", "text": "hello",
    }  # fmt: skip


def test_bytes_become_whole_lines_however_they_arrive(tmp_path: Path) -> None:
    book = LogBook(tmp_path, "node-0")
    source = book.source("ins-1", TARGET)
    for chunk in (b"one\ntw", b"o\n\nth", b"\xff\xfe"):
        source.feed("stderr", chunk)
    source.close()
    assert texts(book.read(Filter())) == ["one", "two", "th\ufffd\ufffd"]


def test_a_line_without_end_is_cut_into_pieces(tmp_path: Path) -> None:
    book = LogBook(tmp_path, "node-0")
    source = book.source("ins-1", TARGET)
    source.feed("stdout", b"x" * (3 * MAX_LINE))
    source.close()
    assert [len(text) for text in texts(book.read(Filter()))] == [MAX_LINE] * 3


def test_filters_and_the_last_lines(tmp_path: Path) -> None:
    book = LogBook(tmp_path, "node-0")
    for number in range(5):
        book.source(f"ins-{number % 2}", TARGET).records((LogRecord(float(number), "stdout", str(number)),))
    assert texts(book.read(Filter(instance="ins-1"))) == ["1", "3"]
    assert texts(book.read(Filter(since=3.0))) == ["3", "4"]
    assert texts(book.read(Filter(lines=2))) == ["3", "4"]
    assert book.read(Filter(app="other")) == []


def test_it_cannot_fill_a_disk_and_is_read_across_its_files(tmp_path: Path) -> None:
    book = LogBook(tmp_path, "node-0", max_bytes=2000, keep=2)
    source = book.source("ins-1", TARGET)
    for number in range(100):
        source.feed("stdout", b"%d\n" % number)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * 2000
    found = texts(book.read(Filter()))
    assert found[-1] == "99" and found == [str(number) for number in range(100 - len(found), 100)]


def test_a_follower_hears_what_matches_until_it_fails(tmp_path: Path) -> None:
    book = LogBook(tmp_path, "node-0")
    heard: list[str] = []

    def follower(records: list[Record]) -> None:
        heard.extend(texts(records))
        if "end" in heard:
            raise RuntimeError("gone")

    book.follow(Filter(function="f"), follower)
    source = book.source("ins-1", TARGET)
    book.source("ins-2", Target("app", "g", 1)).feed("stdout", b"other\n")
    source.feed("stdout", b"a\nb\n")
    source.feed("stdout", b"end\n")
    assert heard == ["a", "b", "end"] and book.followers == 0


def test_a_line_cut_by_a_crash_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "node-0.jsonl").write_bytes(b'{"text": "whole"}\n{"text": "cu')
    assert texts(LogBook(tmp_path, "node-0").read(Filter())) == ["whole"]


def test_a_flood_is_cut_and_counted(tmp_path: Path) -> None:
    book = LogBook(tmp_path, "node-0")
    book.source("ins-1", TARGET).feed("stdout", b"x\n" * 30_000)
    found = texts(book.read(Filter(lines=10_000)))
    assert len(found) < 10_000 and found[-1].startswith("dropped ")
