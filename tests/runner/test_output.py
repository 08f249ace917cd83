"""Prints as records: whole lines, told apart by invocation, bounded in length and rate."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sllm._runtime import Invocation, serving
from sllm_invoker.runner.output import BURST, MAX_LINE, Capture, LineWriter, Rate

from sllm_faas.wire.messages import LogRecord


class Writer:
    """A writer on a clock that stands still until it is set."""

    def __init__(self, rate: Rate | None = None) -> None:
        self.records: list[LogRecord] = []
        self.now = 100.0
        self.stream = LineWriter("stdout", 1, self.records.append, rate or Rate(), lambda: self.now)

    @property
    def texts(self) -> list[str]:
        return [record.text for record in self.records]


@given(st.lists(st.text(alphabet="ab\n", max_size=6), max_size=8))
def test_lines_come_out_whole_however_they_were_written(pieces: list[str]) -> None:
    writer = Writer()
    for piece in pieces:
        assert writer.stream.write(piece) == len(piece)
    writer.stream.end("")
    lines = "".join(pieces).split("\n")
    assert writer.texts == (lines if lines[-1] else lines[:-1])


def test_two_invocations_that_write_at_once_do_not_mix() -> None:
    writer = Writer()
    one, two = Invocation("inv-" + "1" * 32), Invocation("inv-" + "2" * 32)
    for invocation, text in ((one, "a"), (two, "x"), (one, "b\n"), (two, "y\n")):
        with serving(invocation):
            writer.stream.write(text)
    assert [(record.text, record.invocation) for record in writer.records] == [("ab", "1" * 32), ("xy", "2" * 32)]


@pytest.mark.parametrize("pieces", [["x" * 20_000 + "\n"], ["x" * 5_000] * 4 + ["\n"]])
def test_a_long_line_is_cut_and_the_next_is_whole(pieces: list[str]) -> None:
    writer = Writer()
    for piece in [*pieces, "next\n"]:
        writer.stream.write(piece)
    assert writer.texts == ["x" * MAX_LINE + "…", "next"]


def test_a_line_of_exactly_the_limit_is_not_marked_as_cut() -> None:
    writer = Writer()
    writer.stream.write("x" * MAX_LINE + "\n")
    assert writer.texts == ["x" * MAX_LINE]


def test_a_flood_is_dropped_and_counted() -> None:
    writer = Writer(Rate(per_second=10, burst=3))
    writer.stream.write("line\n" * 8)
    writer.now += 0.25
    writer.stream.write("after\n")
    assert writer.texts == ["line"] * 3 + ["dropped 5 lines", "after"]
    assert writer.records[3].stream == "platform"


def test_what_was_dropped_is_said_at_the_end_too() -> None:
    writer = Writer(Rate(per_second=1, burst=1))
    writer.stream.write("line\n" * 3)
    writer.stream.end("")
    assert writer.texts == ["line", "dropped 2 lines"]


def test_bytes_go_the_same_way() -> None:
    writer = Writer()
    writer.stream.buffer.write("grün\n".encode())
    writer.stream.buffer.write(b"\xff\n")
    assert writer.texts == ["grün", "\ufffd"]


def test_it_looks_like_a_stream_to_libraries() -> None:
    stream = Writer().stream
    assert (stream.fileno(), stream.isatty(), stream.encoding, stream.writable()) == (1, False, "utf-8", True)
    with pytest.raises(TypeError):
        stream.write(b"bytes")  # type: ignore[arg-type]


def test_capture_takes_the_streams_and_gives_them_back() -> None:
    before = sys.stdout, sys.stderr
    records: list[LogRecord] = []
    capture = Capture(records.append)
    try:
        print("out")
        print("err", file=sys.stderr, end="")
    finally:
        capture.release()
    assert (sys.stdout, sys.stderr) == before
    assert [(record.stream, record.text) for record in records] == [("stdout", "out"), ("stderr", "err")]


def test_the_default_rate_admits_a_burst() -> None:
    rate = Rate()
    assert sum(rate.admit(5.0) for _ in range(BURST + 10)) == BURST
    assert rate.take_dropped() == 10
    assert rate.take_dropped() == 0
