"""Found through PYTHONPATH by the platform's processes in one experiment: kill a process at one frame.

Not part of the product, which has no hook for it: the functions through which every frame passes are wrapped. With
SLLM_BOUNDARIES naming a folder, each frame of a move that a controller, gateway or invoker is about to send, or has
received and not yet acted upon, is counted and noted in `frames.jsonl` there; at the one that `order.json` names,
the process that it names is killed, once. What was sent before is given time to leave first. OUTPUT' is one under a
raised fence, STATE' one that answers PAUSE.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

MODULES = ("sllm_faas.controller", "sllm_gateway", "sllm_invoker")
CALL = (
    *("HOLD", "HELD", "SNAPSHOT", "STATE", "PAUSE", "CONTINUE", "MOVED", "COMMITTED", "KEPT", "ACTIVATE"),
    *("CANCEL", "CANCELLED", "REFUSED", "OUTPUT"),
)
"""Frames about the invocation that moves."""
OTHER = ["MIGRATE", "MIGRATED", "START", "INSTANCE", "READY", "REQUEST", "REPLY"]
LEAVE = 0.02
"""Seconds for ZeroMQ's thread to write what it has."""


class Boundaries:
    def __init__(self, folder: Path, process: str) -> None:
        from sllm_faas.wire.header import Type

        self._folder = folder
        self._process = process
        self._call = {int(Type[name]): name for name in CALL}
        self._other = {int(Type[name]): name for name in OTHER}
        self._order: dict[str, Any] = {}
        self._mark: tuple[int, int] | None = None
        self._counts: Counter[tuple[str, str]] = Counter()

    def frame(self, direction: str, link: str, part: bytes) -> None:
        if len(part) < 36:
            return
        name = self._call.get(part[1]) or self._other.get(part[1])
        if name is None or not self._current():
            return
        if part[1] in self._call and part[8:24].hex() != self._order["invocation"]:
            return
        if name == "OUTPUT":
            if int.from_bytes(part[24:28]) > 1:
                name = "OUTPUT'"
            elif self._process != self._order["destination"]:
                return
        if name == "STATE" and self._counts["send", "PAUSE"]:
            name = "STATE'"
        self._counts[direction, name] += 1
        at = [self._process, direction, link, name, self._counts[direction, name]]
        with open(self._folder / "frames.jsonl", "a") as file:
            file.write(json.dumps(at) + "\n")
        if at == self._order["at"]:
            self._kill(self._order["victim"])

    def _current(self) -> bool:
        try:
            found = (self._folder / "order.json").stat()
        except FileNotFoundError:
            return False
        mark = (found.st_mtime_ns, found.st_ino)
        if mark != self._mark:
            self._mark = mark
            self._counts.clear()
            self._order = json.loads((self._folder / "order.json").read_bytes())
        return True

    def _kill(self, victim: int) -> None:
        (self._folder / "order.json").rename(self._folder / "done.json")
        time.sleep(LEAVE)
        os.kill(victim, signal.SIGKILL)
        while _lives(victim):
            time.sleep(0.001)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except OSError:
        return False


def install(folder: Path, process: str) -> None:
    import zmq

    from sllm_faas.wire import bus, stream

    seen = Boundaries(folder, process)
    send_parts, send, begin = bus.send_parts, stream.Stream.send, stream.Stream.__init__

    def sending(socket: Any, parts: Any) -> None:
        seen.frame("send", "peer", parts[1 if socket.type == zmq.ROUTER else 0])
        send_parts(socket, parts)

    def to_container(self: Any, parts: Any) -> None:
        seen.frame("send", "container", parts[0])
        send(self, parts)

    def opened(self: Any, sock: Any, on_message: Any, on_end: Any) -> None:
        def received(parts: Any) -> None:
            seen.frame("receive", "container", parts[0])
            on_message(parts)

        begin(self, sock, received, on_end)

    def receiving(deliver: Any, index: int) -> Any:
        def delivered(self: Any, parts: Any) -> None:
            if len(parts) > index:
                seen.frame("receive", "peer", parts[index])
            deliver(self, parts)

        return delivered

    patched: Any = bus
    patched.send_parts = sending
    patched.Dealer._deliver = receiving(bus.Dealer._deliver, 0)
    patched.Router._deliver = receiving(bus.Router._deliver, 1)
    patched = stream.Stream
    patched.send = to_container
    patched.__init__ = opened


def main() -> None:
    words = sys.orig_argv
    if "SLLM_BOUNDARIES" in os.environ and "--name" in words and any(module in words for module in MODULES):
        install(Path(os.environ["SLLM_BOUNDARIES"]), words[words.index("--name") + 1])


main()
