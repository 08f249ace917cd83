"""The invoker's end of a zygote's control socket: requests out, forked processes and exit statuses in.

What is said is in `zygote`. It decides nothing: which zygotes there are is `process`'s. Invariants: nothing here blocks
(what the socket does not take waits in a queue), and every request ends — forked, refused, or failed with the zygote.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from sllm_faas.layers import Layer
from sllm_invoker.containers import tree, zygote
from sllm_invoker.containers.base import ForkFailed


class ZygoteDied(ForkFailed):
    """The zygote ended before it answered; worth another try."""

    code = "zygote_died"


class ZygoteLink:
    """The invoker's end of one zygote. `ready` resolves to its first message, `ended` when it is gone.
    `on_standby(link, pid)`: a process that it has forked ahead of need waits; once it is agreed to (`agree`), it is the
    next instance that is asked for."""

    def __init__(
        self,
        layer: Layer,
        control: socket.socket,
        on_exit: Callable[[int, int], None],
        on_standby: Callable[[ZygoteLink, int], None],
    ) -> None:
        self.layer = layer
        self.pid = 0
        self.standby = 0
        """The process that will be the next instance asked for; 0: one that is forked then."""
        self.memory_mb = 0.0
        """What it held for itself alone when it was ready."""
        self._control = control
        self._on_exit = on_exit
        self._on_standby = on_standby
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._requests: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._next = 0
        self._queue: deque[tuple[dict[str, Any], list[int]]] = deque()
        control.setblocking(False)
        self._loop.add_reader(control, self._readable)

    def request(self, message: dict[str, Any], fds: list[int]) -> asyncio.Future[tuple[int, int]]:
        """Resolves to (pid, pidfd). `fds` are duplicated; they stay the caller's."""
        self._next += 1
        future: asyncio.Future[tuple[int, int]] = self._loop.create_future()
        if self.ended.done():
            future.set_exception(ZygoteDied(f"zygote {self.layer.key} has ended"))
            return future
        self._requests[self._next] = future
        self._queue.append(({**message, "request": self._next}, [os.dup(fd) for fd in fds]))
        self._flush()
        return future

    def agree(self, pid: int) -> None:
        """To the process that waits being the next instance."""
        if not self.ended.done():
            self.standby = pid
            self._queue.append(({"op": "standby", "pid": pid}, []))
            self._flush()

    def claim(self) -> int:
        """The process that will be the instance requested next, if one was agreed to; 0: it will be a new one."""
        claimed, self.standby = self.standby, 0
        return claimed

    def _flush(self) -> None:
        try:
            while self._queue:
                message, fds = self._queue[0]
                zygote.send(self._control, message, fds)
                self._queue.popleft()
                for fd in fds:
                    os.close(fd)
            self._loop.remove_writer(self._control)
        except BlockingIOError:
            self._loop.add_writer(self._control, self._flush)
        except OSError:
            self.close()

    def _readable(self) -> None:
        try:
            while (received := zygote.receive(self._control)) is not None:
                self._handle(*received)
            self.close()
        except BlockingIOError:
            return
        except (OSError, ValueError):
            self.close()

    def _handle(self, message: dict[str, Any], fds: list[int]) -> None:
        match message["op"]:
            case "ready" | "error":
                if not self.ready.done():
                    self.ready.set_result(message)
            case "exited":
                self._on_exit(message["pid"], message["status"])
            case "standby":
                self.standby = 0
                if message["pid"]:
                    self._on_standby(self, message["pid"])
            case "forked":
                future = self._requests.pop(message["request"], None)
                if future is None or future.done():
                    tree.kill(message["pid"])
                    os.close(fds[0])
                else:
                    future.set_result((message["pid"], fds[0]))
            case "failed":
                future = self._requests.pop(message["request"], None)
                if future is not None and not future.done():
                    future.set_exception(ForkFailed(f"no new process could be made: {message['error']}"))

    def close(self) -> None:
        """End it; what it forked lives on. Idempotent."""
        if self.ended.done():
            return
        self.ended.set_result(None)
        self._loop.remove_reader(self._control)
        self._loop.remove_writer(self._control)
        self._control.close()
        for _, fds in self._queue:
            for fd in fds:
                os.close(fd)
        self._queue.clear()
        died = ZygoteDied(f"zygote {self.layer.key} died")
        if not self.ready.done():
            self.ready.set_result({"op": "died"})
        for future in self._requests.values():
            if not future.done():
                future.set_exception(died)
        self._requests.clear()
