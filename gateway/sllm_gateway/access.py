"""The access log: one JSON line per request, the fields of `sllm_faas.logging`, gathered into few writes.

Never a prompt, an argument or an output. Invariant: a line is written within `FLUSH` seconds, and on close.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import msgspec

FLUSH = 0.1
_encode = msgspec.json.Encoder().encode


class AccessLog:
    """`fd` is where lines go; None for nowhere."""

    def __init__(self, fd: int | None = 1) -> None:
        self._fd = fd
        self._lines: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self._second = -1
        self._prefix = ""

    def write(self, fields: dict[str, Any]) -> None:
        if self._fd is None:
            return
        now = time.time()
        second = int(now)
        if second != self._second:
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        stamp = f"{self._prefix}.{int((now - second) * 1e6):06d}Z"
        self._lines.append(
            _encode({"time": stamp, "level": "info", "component": "gateway", "event": "request", **fields})
        )
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH, self.flush)

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._lines or self._fd is None:
            return
        data = memoryview(b"\n".join(self._lines) + b"\n")
        self._lines.clear()
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:  # the reader of our stdout is gone; requests are still to be answered
            self._fd = None
