"""What instances leave on a node's GPUs: descriptors of device memory, by layer group, for the next instance.

    lease(device, checkpoint) ──► the end of a channel for the instance (`runner.kept`)
        ◄── Want: room is made, then what there is of the checkpoint
        ◄── Whole + memory: kept
    end(device)     nothing of the instance is alive
    clear(device)   its memory is somebody else's

Which groups, and which go first, is `residency`'s. There is no process that owns the memory and could die: by CUDA's
documents it is freed with the last mapping and the last descriptor. So what the invoker lets go of while an instance
maps it stays that instance's, what an instance maps when it is killed stays the invoker's, and all of it ends with
the node. Invariant: every descriptor here is of a group that the residency keeps.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Sequence

from sllm_faas import logging
from sllm_faas.errors import SllmError, WireError
from sllm_invoker.containers.residency import Group, Residency, grains
from sllm_invoker.runner import kept

SHARE = 0.85
"""Of an empty device's memory that may be kept: workers that come up need the rest for their contexts."""


class GpuMemory:
    """`free` tells how many bytes of a device are free. Everything here is called on the loop."""

    def __init__(self, free: Callable[[str], int]) -> None:
        self._free = free
        self._loop = asyncio.get_running_loop()
        self._log = logging.get("invoker")
        self._devices: dict[str, Residency] = {}
        self._memory: dict[tuple[str, Group], int] = {}
        self._channels: dict[str, tuple[str, socket.socket]] = {}
        """By device: the checkpoint of the instance that holds it, and our end of the channel."""

    def add(self, uuid: str, empty: int) -> None:
        """`empty`: bytes free before anything of ours was on it."""
        self._devices[uuid] = Residency(int(empty * SHARE))

    def used(self, uuid: str) -> int:
        """Bytes kept there."""
        return self._devices[uuid].used

    def held(self, uuid: str, checkpoint: str) -> int:
        """Bytes of it there."""
        return self._devices[uuid].held(checkpoint)

    def resident(self, uuids: Iterable[str]) -> tuple[str, ...]:
        """Checkpoints that are whole on one of those devices."""
        return tuple(sorted({name for uuid in uuids for name in self._devices[uuid].whole_checkpoints()}))

    def lease(self, uuid: str, checkpoint: str) -> int:
        """The channel's end for the instance that holds the device: a descriptor, the caller's to close; -1 where none
        can be made, and the instance does without."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._log.warning("gpu_memory_channel_failed", gpu=uuid, checkpoint=checkpoint, error=str(error))
            return -1
        ours.setblocking(False)
        self._channels[uuid] = checkpoint, ours
        self._loop.add_reader(ours, self._readable, uuid)
        return theirs.detach()

    def end(self, uuid: str) -> None:
        """Nothing of what held the device is alive; what it said before counts."""
        if uuid in self._channels:
            self._readable(uuid)
        self._hang_up(uuid)
        self._devices[uuid].end()

    def clear(self, uuid: str) -> None:
        self._let_go(uuid, self._devices[uuid].clear())

    def close(self) -> None:
        for uuid in self._devices:
            self._hang_up(uuid)
            self.clear(uuid)

    # -- what an instance says -------------------------------------------------------------------------------

    def _readable(self, uuid: str) -> None:
        checkpoint, sock = self._channels[uuid]
        try:
            while received := _next(sock):
                self._hear(uuid, checkpoint, sock, *received)
            if received is None:
                self._hang_up(uuid)
        except (OSError, SllmError) as error:
            self._log.warning("gpu_memory_channel_failed", gpu=uuid, checkpoint=checkpoint, error=str(error))
            self._hang_up(uuid)

    def _hear(self, uuid: str, checkpoint: str, sock: socket.socket, message: kept.AnyMessage, fds: list[int]) -> None:
        device = self._devices[uuid]
        try:
            match message:
                case kept.Want():
                    self._let_go(uuid, device.open(checkpoint, message.ranges))
                    self._answer(uuid, checkpoint, sock, message.room)
                case kept.Whole():
                    group = (message.start, message.end)
                    dropped = device.whole(group)
                    if (uuid, (checkpoint, group)) in self._memory:  # the instance could not use it
                        self._let_go(uuid, [(checkpoint, group)])
                    self._memory[uuid, (checkpoint, group)] = fds.pop()
                    self._let_go(uuid, dropped)
                case _:
                    raise WireError(f"an instance says {type(message).__name__}.")
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, uuid: str, checkpoint: str, sock: socket.socket, room: int) -> None:
        device = self._devices[uuid]
        dropped = device.make_room(room - device.held(checkpoint) - self._free(uuid))
        self._let_go(uuid, dropped)
        freed = sum(grains(group) for _, group in dropped)
        if dropped:
            self._log.info("gpu_memory_freed", gpu=uuid, bytes=freed, groups=len(dropped))
        ranges = device.kept(checkpoint)
        for start in range(0, max(1, len(ranges)), kept.MAX_FDS):
            some = ranges[start : start + kept.MAX_FDS]
            more = start + len(some) < len(ranges)
            fds = [self._memory[uuid, (checkpoint, group)] for group in some]
            kept.send(sock, kept.Have(some, freed if not start else 0, more), fds)

    def _let_go(self, uuid: str, groups: Sequence[Group]) -> None:
        for group in groups:
            os.close(self._memory.pop((uuid, group)))

    def _hang_up(self, uuid: str) -> None:
        found = self._channels.pop(uuid, None)
        if found is not None:
            self._loop.remove_reader(found[1])
            found[1].close()


def _next(sock: socket.socket) -> tuple[kept.AnyMessage, list[int]] | tuple[()] | None:
    """What was said; nothing where nothing has been yet; None at the end. Raises OSError, WireError."""
    try:
        return kept.receive(sock)
    except BlockingIOError:
        return ()
