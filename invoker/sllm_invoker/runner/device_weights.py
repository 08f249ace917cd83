"""An instance's weights on a device, copied there in the order of execution while they still arrive.

    slabs or file ──wait for the bytes──► locked buffers ──side stream──► groups of layers, one allocation each
      (Weights)        (own thread)          (Stage)                          tensors are views of them

A group is whole when the event recorded after its last copy is done. `wait` makes the calling thread's launches come
after that event and does not wait for it itself, so the first layer computes while the last is being read.

Why through buffers and not from the registered map: a map of slabs is private and copy-on-write, and locking it would
copy every page of it; locking a shared one costs about a second for a few GiB, in every process anew; and what lies
under a locked page does not change when a store dies and the file is mapped in its place. Copying into buffers that
were locked beforehand is done by all cores. `benchmarks/gpu.py` measures both.

Invariant: nothing is copied before it was checked (`Weights.wait`). What failed to arrive is raised by every `wait`.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any

import torch

from sllm_faas.errors import NoCapacity, PlatformError, SllmError
from sllm_invoker.checkpoints.object import ByteRange, Part
from sllm_invoker.runner.device import Device, Event
from sllm_invoker.runner.weights import Weights

PIECE_BYTES = 32 * 1024 * 1024
PIECES = 4
GROUP_BYTES = 64 * 1024 * 1024
"""A group has at least so many bytes: small layers share an allocation and an event."""


class Stage:
    """Locked host memory in front of a device, through which everything goes there. One thread at a time."""

    def __init__(
        self, device: Device, *, pieces: int = PIECES, piece: int = PIECE_BYTES, group: int = GROUP_BYTES
    ) -> None:
        self.device = device
        self.piece = piece
        self.group = group
        self._buffers = [torch.zeros(piece, dtype=torch.uint8) for _ in range(pieces)]  # written, so that it is there
        self._sent: list[Event | None] = [None] * pieces
        self._next = 0
        self.locked = sum(device.register(buffer.data_ptr(), piece) for buffer in self._buffers)
        """Buffers that the driver has locked; from the others copies block."""

    def send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """At most a piece, to the device; `source` may change when this returns. Waits for a buffer."""
        turn, self._next = self._next, (self._next + 1) % len(self._buffers)
        if (before := self._sent[turn]) is not None:
            before.wait()
        buffer = self._buffers[turn][: len(source)]
        buffer.copy_(source)
        self.device.copy(target, buffer)
        self._sent[turn] = self.device.record()


@dataclass(frozen=True, slots=True)
class Group:
    """Bytes `start` to `end` of the part file, on the device."""

    start: int
    end: int
    memory: torch.Tensor


def grouped(part: Part, least: int) -> list[tuple[int, int]]:
    """Consecutive layers of at least `least` bytes together, as offsets in the file; the last may be smaller."""
    layers = part.layers or (ByteRange("", 0, part.bytes - part.data_start),)
    found: list[tuple[int, int]] = []
    start: int | None = None
    for layer in layers:
        start = layer.start if start is None else start
        if layer.end - start >= least or layer is layers[-1]:
            found.append((part.data_start + start, part.data_start + layer.end))
            start = None
    return found


class DeviceWeights(Weights):
    """`source`'s weights, on the device behind `stage`. Copying begins at once. Raises NoCapacity."""

    def __init__(self, source: Weights, stage: Stage) -> None:
        super().__init__(source.buffer, source.part, ready=0)
        self._source = source
        self._stage = stage
        ranges = grouped(source.part, stage.group)
        needed, memory = sum(end - start for start, end in ranges), stage.device.memory()
        if needed > memory.free:
            raise NoCapacity(
                f"the weights take {needed} bytes of GPU memory; {memory.free} of {memory.total} are free.",
                hint="Use a smaller or a quantised model, or a GPU with more memory.",
            )
        self.groups = [Group(start, end, stage.device.allocate(end - start)) for start, end in ranges]
        self._starts = [group.start for group in self.groups]
        self._ends = [group.end for group in self.groups]
        self._at = {group.memory.data_ptr(): group for group in self.groups}
        self._events: list[Event] = []  # of the groups that are on their way whole, in order
        self._failed: SllmError | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._copy, name="to-device", daemon=True).start()

    def view(self, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
        group = self.groups[bisect_right(self._starts, offset) - 1]
        start = offset - group.start
        return group.memory[start : start + count * dtype.itemsize].view(dtype)

    def end_of(self, pointer: int, _length: int) -> int | None:
        group = self._at.get(pointer)
        return group.end if group is not None else None

    def wait(self, end: int | None = None) -> None:
        index = len(self._ends) - 1 if end is None else min(bisect_left(self._ends, end), len(self._ends) - 1)
        began = time.perf_counter()
        with self._changed:
            while len(self._events) <= index:
                if self._failed is not None:
                    raise self._failed
                self._changed.wait()
            event = self._events[index]
        self.waited += time.perf_counter() - began
        event.hold()

    def _copy(self) -> None:
        try:
            for group in self.groups:
                self._send(group)
                event = self._stage.device.record()
                with self._changed:
                    self._events.append(event)
                    self._changed.notify_all()
            self._events[-1].wait()
            self._source.wait()  # what lies behind the last tensor, so that its tier is known
            self.tier, self.ready = self._source.tier, self.part.bytes
        except BaseException as error:
            with self._changed:
                self._failed = error if isinstance(error, SllmError) else _failure(error)
                self._changed.notify_all()

    def _send(self, group: Group) -> None:
        host = self._source.view(torch.uint8, self.part.bytes, 0)
        for start in range(group.start, group.end, self._stage.piece):
            end = min(start + self._stage.piece, group.end)
            self._source.wait(end)
            self._stage.send(group.memory[start - group.start : end - group.start], host[start:end])


def _failure(error: Any) -> SllmError:
    return PlatformError(f"copying the weights to the GPU failed: {type(error).__name__}: {error}")
