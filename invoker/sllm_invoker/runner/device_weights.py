"""An instance's weights on a device, copied there in the order of execution while they still arrive.

    slabs or file ──wait for the bytes──► locked buffers ──side stream──► groups of layers, one allocation each
      (Weights)        (own thread)          (Stage)                          tensors are views of them
                                                 what an instance before left there (`kept`) ──► is used as it is

A group is whole when the event recorded after its last copy is done. `wait` makes the calling thread's launches come
after that event and does not wait for it itself, so the first layer computes while the last is being read.

Why through buffers and not from the registered map: a map of slabs is private and copy-on-write, and locking it would
copy every page of it; locking a shared one costs about a second for a few GiB, in every process anew; and what lies
under a locked page does not change when a store dies and the file is mapped in its place. Copying into buffers that
were locked beforehand is done by all cores. `benchmarks/gpu.py` measures both.

Invariants: nothing is copied before it was checked (`Weights.wait`). What failed to arrive is raised by every `wait`. A
group is offered to be kept when all of them are whole, the host has waited for the last copy and the source has said
that the rest of the file is good.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any

import torch

from sllm_faas.errors import NoCapacity, PlatformError, SllmError
from sllm_invoker.checkpoints.object import ByteRange, Part
from sllm_invoker.runner.device import Device, Event
from sllm_invoker.runner.kept import Kept
from sllm_invoker.runner.weights import Weights

PIECE_BYTES = 32 * 1024 * 1024
PIECES = 4
GROUP_BYTES = 64 * 1024 * 1024
"""A group has at least so many bytes: small layers share an allocation and an event."""
PATIENCE, LOOK = 1.0, 0.005
"""Seconds for memory to be free after others let go of it, and between looks."""


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
    """Bytes `start` to `end` of the part file, on the device. `whole`: they are in place already; else `descriptor` is
    of memory that may be kept, or -1."""

    start: int
    end: int
    memory: torch.Tensor
    whole: bool = False
    descriptor: int = -1


class _Done:
    """The event of what was there before."""

    def wait(self) -> None:
        pass

    def hold(self) -> None:
        pass


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
    """`source`'s weights, on the device behind `stage`. Copying begins at once, of what an instance before has not left
    there (`kept`, which this takes over). Raises NoCapacity."""

    def __init__(self, source: Weights, stage: Stage, kept: Kept | None = None) -> None:
        super().__init__(source.buffer, source.part, ready=0)
        self._source = source
        self._stage = stage
        self._kept = kept
        ranges = grouped(source.part, stage.group)
        there = self._opened(ranges)
        needed = sum(end - start for start, end in ranges if (start, end) not in there)
        memory = stage.device.memory()
        if needed > memory.free:
            raise NoCapacity(
                f"the weights take {needed} bytes of GPU memory; {memory.free} of {memory.total} are free.",
                hint="Use a smaller or a quantised model, or a GPU with more memory.",
            )
        self.groups = [there.get(each) or self._allocated(*each) for each in ranges]
        if all(group.whole for group in self.groups):
            self.tier = "gpu"
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
                event: Event = _Done()
                if not group.whole:
                    self._send(group)
                    event = self._stage.device.record()
                with self._changed:
                    self._events.append(event)
                    self._changed.notify_all()
            if self.tier != "gpu":
                for event in self._events:
                    event.wait()
                self._source.wait()  # what lies behind the last tensor, so that its tier is known
                self.tier = self._source.tier
            self._offer()
            self.ready = self.part.bytes
        except BaseException as error:
            with self._changed:
                self._failed = error if isinstance(error, SllmError) else _failure(error)
                self._changed.notify_all()
        finally:
            self._end()

    def _opened(self, ranges: list[tuple[int, int]]) -> dict[tuple[int, int], Group]:
        """What is there already."""
        found: dict[tuple[int, int], Group] = {}
        if self._kept is None:
            return found
        device = self._stage.device
        before = device.memory().free
        descriptors, freed = self._kept.want(ranges)
        for (start, end), descriptor in descriptors.items():
            try:
                found[start, end] = Group(start, end, device.open(descriptor, end - start), whole=True)
            except PlatformError:  # it is copied again
                pass
            finally:
                os.close(descriptor)
        until = time.monotonic() + PATIENCE
        while device.memory().free < before + freed and time.monotonic() < until:
            time.sleep(LOOK)
        return found

    def _allocated(self, start: int, end: int) -> Group:
        device = self._stage.device
        shared = device.share(end - start) if self._kept is not None else None
        if shared is None:
            return Group(start, end, device.allocate(end - start))
        return Group(start, end, shared.memory, descriptor=shared.descriptor)

    def _offer(self) -> None:
        """What was copied may be kept."""
        for group in self.groups:
            if self._kept is not None and group.descriptor >= 0:
                self._kept.whole((group.start, group.end), group.descriptor)

    def _end(self) -> None:
        """There is no more to be said about what is kept."""
        if self._kept is not None:
            self._kept.close()
        for group in self.groups:
            if group.descriptor >= 0:
                os.close(group.descriptor)

    def _send(self, group: Group) -> None:
        host = self._source.view(torch.uint8, self.part.bytes, 0)
        for start in range(group.start, group.end, self._stage.piece):
            end = min(start + self._stage.piece, group.end)
            self._source.wait(end)
            self._stage.send(group.memory[start - group.start : end - group.start], host[start:end])


def _failure(error: Any) -> SllmError:
    return PlatformError(f"copying the weights to the GPU failed: {type(error).__name__}: {error}")
