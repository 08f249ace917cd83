"""What the node's containers write: one structured file, bounded in size, with readers that may follow.

    container ── LOG frames (attributed by the runner) ──┐
              └─ descriptors 1, 2 (C code, children)  ───┴─► Source ─► LogBook ─► file, followers

Records: time (Unix), level, stream, app, function, version, instance, invocation, node, text. The file rotates, so logs
cannot fill a disk; a disk that is full loses lines and says so once. Not the invoker's own log: that goes to stdout.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from sllm_faas import logging
from sllm_faas.logging import RotatingFile
from sllm_faas.spec import Target
from sllm_faas.wire.messages import LogRecord
from sllm_invoker.runner.output import Rate

MAX_BYTES = 64 * 1024 * 1024
KEEP = 3
"""Older files beside the current one."""
MAX_LINE = 16 * 1024
MAX_LINES = 10_000
BATCH = 500

Record = dict[str, Any]
Follower = Callable[[list[Record]], None]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


@dataclass(frozen=True, slots=True)
class Filter:
    """Body of `logs.read`. `lines`: the last so many (None: all there are, up to MAX_LINES)."""

    app: str | None = None
    function: str | None = None
    instance: str | None = None
    invocation: str | None = None
    since: float | None = None
    lines: int | None = None
    follow: bool = False

    def matches(self, record: Record) -> bool:
        if self.since is not None and record.get("time", 0.0) < self.since:
            return False
        return all(
            wanted is None or record.get(name) == wanted
            for name, wanted in (
                ("app", self.app),
                ("function", self.function),
                ("instance", self.instance),
                ("invocation", self.invocation),
            )
        )


class LogBook:
    """The log of one node. `follow/unfollow` are a pair."""

    def __init__(self, directory: Path, node: str, max_bytes: int = MAX_BYTES, keep: int = KEEP) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = RotatingFile(directory / f"{node}.jsonl", max_bytes, keep)
        self._followers: dict[int, tuple[Filter, Follower]] = {}
        self._next = 0
        self._full = False
        self.node = node

    def source(self, instance: str, target: Target) -> Source:
        return Source(self, instance, target)

    def add(self, records: list[Record]) -> None:
        try:
            for record in records:
                self._file.write(_encode(record) + b"\n")
            self._full = False
        except OSError as error:
            if not self._full:
                self._full = True
                logging.get("invoker").error("container_logs_lost", node=self.node, error=error.strerror)
        for key, (wanted, follower) in list(self._followers.items()):
            matching = [record for record in records if wanted.matches(record)]
            if matching:
                try:
                    follower(matching)
                except Exception:
                    self.unfollow(key)

    def follow(self, wanted: Filter, follower: Follower) -> int:
        """Call `follower` with every new batch that matches, until it raises or `unfollow(key)`."""
        self._next += 1
        self._followers[self._next] = (wanted, follower)
        return self._next

    def unfollow(self, key: int) -> None:
        self._followers.pop(key, None)

    @property
    def followers(self) -> int:
        return len(self._followers)

    def read(self, wanted: Filter) -> list[Record]:
        """The last records that match, oldest first. Blocks: call it in a thread."""
        limit = MAX_LINES if wanted.lines is None else min(wanted.lines, MAX_LINES)
        found: deque[Record] = deque(maxlen=limit)
        for record in self._records():
            if wanted.matches(record):
                found.append(record)
        return list(found)

    def _records(self) -> Iterator[Record]:
        path = self._file.path
        files = [path.with_name(f"{path.name}.{number}") for number in range(self._file.keep, 0, -1)]
        for each in (*files, path):
            with contextlib.suppress(FileNotFoundError), each.open("rb") as file:
                for line in file:
                    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):  # cut by a crash
                        yield _decode(line)

    def close(self) -> None:
        self._followers.clear()
        self._file.close()


class Source:
    """One instance's lines on their way into the book. Partial lines wait until they are whole, or too long; a flood of
    them is cut to a rate and counted, so that it costs the node no more than that."""

    def __init__(self, book: LogBook, instance: str, target: Target) -> None:
        self._book = book
        self._fields = {
            "app": target.app,
            "function": target.function,
            "version": target.version,
            "instance": instance,
        }
        self._partial: dict[str, bytes] = {}
        self._rate = Rate()

    def records(self, records: tuple[LogRecord, ...]) -> None:
        self._book.add([self._record(r.time, r.level, r.stream, r.text, r.invocation) for r in records])

    def feed(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        """Bytes from a descriptor."""
        *lines, rest = (self._partial.pop(stream, b"") + data).split(b"\n")
        while len(rest) > MAX_LINE:
            lines.append(rest[:MAX_LINE])
            rest = rest[MAX_LINE:]
        if rest:
            self._partial[stream] = rest
        now, clock = time.time(), time.monotonic()
        records = [
            self._record(now, "info", stream, line[:MAX_LINE].decode(errors="replace"))
            for line in lines
            if line and self._rate.admit(clock)
        ]
        if dropped := self._rate.take_dropped():
            records.append(self._record(now, "warning", "platform", f"dropped {dropped} lines"))
        if records:
            self._book.add(records)

    def platform(self, text: str, level: str = "info") -> None:
        """A line of ours about the instance."""
        self._book.add([self._record(time.time(), level, "platform", text)])

    def close(self) -> None:
        for stream in list(self._partial):
            self._book.add(
                [self._record(time.time(), "info", stream, self._partial.pop(stream).decode(errors="replace"))]
            )

    def _record(self, when: float, level: str, stream: str, text: str, invocation: str = "") -> Record:
        record: Record = {"time": when, "level": level, "stream": stream, **self._fields}
        if invocation:
            record["invocation"] = invocation
        record["node"] = self._book.node
        record["text"] = text
        return record
