"""A device of plain memory whose copies happen when somebody waits for them, and not before. What it shares is a memfd,
which other processes map for real."""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from typing import Any

import torch
from sllm_invoker.runner.device import Memory, Shared

from sllm_faas.errors import NoCapacity, PlatformError


class FakeEvent:
    def __init__(self, device: FakeDevice, after: int) -> None:
        self._device = device
        self._after = after

    def wait(self) -> None:
        self._device.finish(self._after)

    def hold(self) -> None:
        self._device.held.append(self._after)
        self._device.finish(self._after)


class FakeDevice:
    """`calls` are in order; `copied` counts the copies that have happened. What was not copied reads as ones.
    `shares`: whether there is memory for several processes."""

    place = torch.device("cpu")

    def __init__(self, total: int = 1 << 30, *, refuses: bool = False, shares: bool = True) -> None:
        self.total = self.free = total
        self.shares = shares
        self.refuses = refuses
        self.calls: list[tuple[Any, ...]] = []
        self.registered: dict[int, int] = {}
        self.held: list[int] = []
        self.copied = 0
        self._asked = 0
        self._queue: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        self._lock = threading.Lock()

    def memory(self) -> Memory:
        return Memory(self.free, self.total)

    def allocate(self, size: int) -> torch.Tensor:
        if size > self.free:
            raise NoCapacity(f"{size} bytes are needed")
        self.free -= size
        self.calls.append(("allocate", size))
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def share(self, size: int) -> Shared | None:
        if not self.shares:
            return None
        if size > self.free:
            raise NoCapacity(f"{size} bytes are needed")
        self.free -= size
        self.calls.append(("share", size))
        descriptor = os.memfd_create("device", os.MFD_CLOEXEC)
        os.truncate(descriptor, size)
        memory = _mapped(descriptor, size)
        return Shared(memory.fill_(0xFF), descriptor)

    def open(self, descriptor: int, size: int) -> torch.Tensor:
        self.calls.append(("open", size))
        try:
            return _mapped(descriptor, size)
        except (OSError, ValueError) as error:
            raise PlatformError(f"no memory of this device: {error}") from error

    def trim(self) -> None:
        self.calls.append(("trim",))

    def register(self, address: int, length: int, *, read_only: bool = False) -> bool:
        if not self.refuses:
            self.registered[address] = length
        return not self.refuses

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.dtype == source.dtype == torch.uint8 and target.shape == source.shape
        with self._lock:
            self._queue.append((target, source))
            self._asked += 1
            self.calls.append(("copy", len(source)))

    def record(self) -> FakeEvent:
        with self._lock:
            return FakeEvent(self, self._asked)

    def finish(self, count: int) -> None:
        with self._lock:
            while self.copied < count:
                target, source = self._queue.popleft()
                target.copy_(source)
                self.copied += 1


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
