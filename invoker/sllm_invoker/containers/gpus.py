"""The GPUs of a node: which one an instance holds, and whether its memory came back. Pure.

    free ── take ──► held ── end ──► returning ── back ──► free
                                         └── late ──► lost ── back ──► free

A device is held by one instance at a time. On each, `spares` workers wait: processes with a CUDA context and their
libraries imported, one of which becomes the instance, since a process with a context cannot be forked. Another waits
while an instance runs, so that the next start on that device does not wait for a context either.

Memory is back when as much is free as there was before anything of ours was on the device, less what the waiting
workers hold and what was left there on purpose (`gpu_memory`); what a worker holds is learned from those that came up
alone. Invariant: a device whose memory did not come
back is given to nobody until it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol

from sllm_faas.errors import IllegalTransition, NoCapacity

SLACK = 256 * 1024 * 1024
"""Bytes by which a device that is empty again may differ: the driver keeps some."""

_NOTHING: Mapping[str, int] = MappingProxyType({})

State = Literal["free", "held", "returning", "lost"]
Event = Literal["take", "end", "back", "late"]

TABLE: dict[tuple[State, Event], State] = {
    ("free", "take"): "held",
    ("held", "end"): "returning",
    ("returning", "back"): "free",
    ("returning", "late"): "lost",
    ("lost", "back"): "free",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """`uuid` is its name for CUDA_VISIBLE_DEVICES; `total` is bytes."""

    uuid: str
    name: str
    total: int


class Probe(Protocol):
    """What is known of the GPUs without using one."""

    def gpus(self) -> tuple[Gpu, ...]:
        """Those this node may use."""

    def free(self, uuid: str) -> int:
        """Bytes."""


@dataclass(slots=True)
class _Device:
    gpu: Gpu
    empty: int
    """Bytes free before anything of ours was on it."""
    state: State = "free"
    workers: int = 0
    """Those that wait or come up."""
    occupied: bool = False
    """An instance has begun to use it."""
    deaths: int = 0
    retry: float = 0.0


@dataclass(slots=True)
class GpuPool:
    """`take/end` a device, `back/late` its memory, `grown/shrunk` its workers; `missing(now)` names the devices that
    want one."""

    spares: int = 1
    first_backoff: float = 1.0
    max_backoff: float = 60.0
    context: int = 0
    """The most bytes that a waiting worker was seen to hold."""
    _devices: dict[str, _Device] = field(default_factory=dict)

    def add(self, gpu: Gpu, free: int) -> None:
        self._devices[gpu.uuid] = _Device(gpu, free)

    def __len__(self) -> int:
        return len(self._devices)

    def state(self, uuid: str) -> State:
        return self._devices[uuid].state

    def states(self) -> dict[str, State]:
        return {uuid: device.state for uuid, device in self._devices.items()}

    def _move(self, uuid: str, event: Event) -> None:
        device = self._devices[uuid]
        state = TABLE.get((device.state, event))
        if state is None:
            raise IllegalTransition(f"GPU {uuid} is {device.state}: {event} is not possible.")
        device.state = state

    def take(self, held: Mapping[str, int] = _NOTHING, kept: Mapping[str, int] = _NOTHING) -> str:
        """A free device. By device, `held` are the bytes that are there already of what the instance needs, and `kept`
        all that were left there: first comes the one with the most of the former, then one with a worker, then the one
        with the least of the latter. Raises NoCapacity."""
        free = [uuid for uuid, device in self._devices.items() if device.state == "free"]
        if not free:
            states = ", ".join(f"{uuid} is {state}" for uuid, state in self.states().items()) or "there is none"
            raise NoCapacity(f"no GPU is free here: {states}.", hint="`sllm node list` shows the GPUs of every node.")
        uuid = max(free, key=lambda each: (held.get(each, 0), self._devices[each].workers, -kept.get(each, 0)))
        self._move(uuid, "take")
        return uuid

    def end(self, uuid: str) -> None:
        """Nothing of what held it is alive."""
        self._move(uuid, "end")
        self._devices[uuid].occupied = False

    def settle(self, uuid: str, free: int, kept: int = 0) -> bool:
        """Whether the memory of a device that was held is back, with `free` bytes free now and `kept` left there on
        purpose; then it is free."""
        device = self._devices[uuid]
        if free < device.empty - device.workers * self.context - kept - SLACK:
            return False
        self._move(uuid, "back")
        return True

    def late(self, uuid: str) -> None:
        """Its memory should have been back by now."""
        self._move(uuid, "late")

    def lost(self) -> tuple[str, ...]:
        return tuple(uuid for uuid, device in self._devices.items() if device.state == "lost")

    # -- workers ---------------------------------------------------------------------------------------------

    def grown(self, uuid: str) -> None:
        """A worker is made for it."""
        self._devices[uuid].workers += 1

    def ready(self, uuid: str, before: int, after: int) -> None:
        """A worker has come up; `before` and `after` that so many bytes were free."""
        device = self._devices[uuid]
        device.deaths = 0
        if device.workers == 1 and not device.occupied:  # else others moved memory meanwhile
            self.context = max(self.context, before - after)

    def became(self, uuid: str) -> None:
        """A worker is to be the instance that holds the device."""
        self.shrunk(uuid)
        self._devices[uuid].occupied = True

    def shrunk(self, uuid: str) -> None:
        """A worker was ended."""
        self._devices[uuid].workers -= 1

    def died(self, uuid: str, now: float) -> float:
        """A worker died, or did not come up; seconds until another is made."""
        device = self._devices[uuid]
        wait = min(self.max_backoff, self.first_backoff * 2.0**device.deaths)
        device.workers, device.deaths, device.retry = device.workers - 1, device.deaths + 1, now + wait
        return wait

    def missing(self, now: float) -> list[str]:
        """Devices that want another worker, once for each."""
        return [
            uuid
            for uuid, device in self._devices.items()
            if device.state != "lost" and now >= device.retry
            for _ in range(self.spares - device.workers)
        ]
