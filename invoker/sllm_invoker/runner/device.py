"""What a runner asks of an accelerator: memory, copies beside the computing, and to know when they are done.

    memory = device.allocate(size)      bytes on the device
    device.copy(memory, host)           on a stream of its own, beside what is computed
    event = device.record()             after all copies so far
    event.hold()                        what this thread launches from here on comes after them
    shared = device.share(size)         bytes on the device, and a descriptor by which another process has them too:
    memory = device.open(fd, size)      there

`cuda` is the one implementation; it is imported only where a function asks for a GPU. Tests have one of plain memory
whose copies end when they say. Not here: what is copied, and in which order (`device_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a device, all processes together."""

    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Shared:
    """Bytes of a device, and the descriptor under which other processes have the same ones; it is the caller's to
    close. They are freed with the last view of them in any process and the last descriptor."""

    memory: torch.Tensor
    descriptor: int


class Event(Protocol):
    """A point in the copies of a device."""

    def wait(self) -> None:
        """Block until all before it is done."""

    def hold(self) -> None:
        """Nothing that the calling thread launches from now on begins before it. Does not block."""


class Device(Protocol):
    @property
    def place(self) -> torch.device: ...

    def memory(self) -> Memory: ...

    def allocate(self, size: int) -> torch.Tensor:
        """`size` bytes, dtype uint8, not initialised; freed with the last view of them, after `trim` for other
        processes too. Raises NoCapacity."""

    def share(self, size: int) -> Shared | None:
        """As `allocate`, for other processes too; None where the driver has no such memory."""

    def open(self, descriptor: int, size: int) -> torch.Tensor:
        """The bytes behind a descriptor of this device, which stays the caller's. What was copied there must have been
        waited for in the process that copied. Raises PlatformError."""

    def trim(self) -> None:
        """Give back to the system what was freed."""

    def register(self, address: int, length: int, *, read_only: bool = False) -> bool:
        """Lock host memory so that copies from it are direct. It must be mapped and stay so until `unregister`. False
        where the driver refuses: copies work, and block. `read_only`: the map cannot be written."""

    def unregister(self, address: int) -> None: ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Bytes of the host (`source`, uint8) to as many on the device, after the copies before it. `source` must
        stay as it is until an event recorded later is done."""

    def record(self) -> Event: ...
