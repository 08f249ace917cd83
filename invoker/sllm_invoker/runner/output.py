"""What user code prints, as log records that say which invocation printed it.

`capture` puts writers in the place of sys.stdout and sys.stderr. Lines are told apart by the running
invocation, so two that print at once do not mix. Writes below Python (C libraries, child processes) go to the
descriptors as they are; the invoker reads those. Not a logging set-up: user code's handlers are left alone.

Invariants: memory is bounded (a line at `MAX_LINE`, lines per second by `Rate`); a write never fails and never
waits; lines that were dropped are counted in a record of their own.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, Literal

from sllm._context import current_invocation

from sllm_faas.wire.messages import LogRecord

MAX_LINE = 8 * 1024
"""Characters of one line; the rest is cut off."""

LINES_PER_SECOND = 1000.0
BURST = 5000

Emit = Callable[[LogRecord], None]
Stream = Literal["stdout", "stderr"]


class Rate:
    """A token bucket. `admit(now)` takes a token; `dropped` counts refusals since it was last taken."""

    def __init__(self, per_second: float = LINES_PER_SECOND, burst: int = BURST) -> None:
        self._per_second = per_second
        self._burst = burst
        self._tokens = float(burst)
        self._last = 0.0
        self.dropped = 0

    def admit(self, now: float) -> bool:
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._last) * self._per_second)
        self._last = now
        if self._tokens < 1.0:
            self.dropped += 1
            return False
        self._tokens -= 1.0
        return True

    def take_dropped(self) -> int:
        dropped, self.dropped = self.dropped, 0
        return dropped


class LineWriter(io.TextIOBase):
    """A text stream that emits whole lines."""

    def __init__(self, stream: Stream, descriptor: int, emit: Emit, rate: Rate, clock: Callable[[], float]) -> None:
        self._stream: Stream = stream
        self._descriptor = descriptor
        self._emit = emit
        self._rate = rate
        self._clock = clock
        self._unfinished: dict[str, str] = {}
        self._lock = threading.RLock()
        self._bytes = _Bytes(self)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "replace"

    @property
    def buffer(self) -> BinaryIO:
        return self._bytes  # type: ignore[return-value]

    @property
    def name(self) -> str:
        return f"<{self._stream}>"

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        serving = current_invocation()
        invocation = serving.id.removeprefix("inv-") if serving is not None else ""
        with self._lock:
            *lines, rest = (self._unfinished.pop(invocation, "") + text).split("\n")
            for line in lines:
                self._line(line, invocation)
            if rest:
                # One character more than is shown, so that it is known to have been longer.
                self._unfinished[invocation] = rest[: MAX_LINE + 1]
        return len(text)

    def end(self, invocation: str) -> None:
        """An invocation (32 hex digits) is over: what it left without a line end is a line."""
        if not self._unfinished and not self._rate.dropped:
            return  # as nearly always, and this is on the path of every invocation
        with self._lock:
            rest = self._unfinished.pop(invocation, "")
            if rest:
                self._line(rest, invocation)
            self._say_dropped()

    def _line(self, text: str, invocation: str) -> None:
        now = self._clock()
        if not self._rate.admit(now):
            return
        self._say_dropped()
        if len(text) > MAX_LINE:
            text = text[:MAX_LINE] + "…"
        self._emit(LogRecord(now, self._stream, text, invocation))

    def _say_dropped(self) -> None:
        if dropped := self._rate.take_dropped():
            self._emit(LogRecord(self._clock(), "platform", f"dropped {dropped} lines", level="warning"))


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`: bytes taken as UTF-8."""

    def __init__(self, text: LineWriter) -> None:
        self._text = text

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._text.fileno()

    def write(self, data, /) -> int:  # type: ignore[no-untyped-def]
        self._text.write(bytes(data).decode("utf-8", "replace"))
        return len(data)


class Capture:
    """Both streams of this process. `release` puts the old ones back."""

    def __init__(self, emit: Emit) -> None:
        rate = Rate()
        self._before = sys.stdout, sys.stderr
        self._writers = (
            LineWriter("stdout", 1, emit, rate, time.time),
            LineWriter("stderr", 2, emit, rate, time.time),
        )
        sys.stdout, sys.stderr = self._writers

    def end(self, invocation: str) -> None:
        for writer in self._writers:
            writer.end(invocation)

    def release(self) -> None:
        self.end("")
        sys.stdout, sys.stderr = self._before
