"""The workers of a node's GPUs as processes, and the look at memory when one that became an instance has ended.

    take(checkpoint) ──► a device and the worker that waits on it, or one that is made now
    give_back(device)  ◄── the instance's whole process tree is dead: wait until its memory is free, but for what it
                           left for others; else the waiting workers of the device are ended too, then what is kept
                           there is let go of, and if that does not help nobody gets it any more

Which device, how many workers, and what counts as back is `gpus`'s; what is kept is `gpu_memory`'s. Invariant: between
`take` and the end of `give_back` nobody else gets the device.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sllm_faas import logging
from sllm_invoker.containers.base import Made
from sllm_invoker.containers.gpu_memory import GpuMemory
from sllm_invoker.containers.gpus import GpuPool, Probe
from sllm_invoker.containers.zygote_link import ZygoteLink

PATIENCE = 5.0
"""Seconds for a device's memory to be free after its last process is dead."""
LOOK = 0.05

Make = Callable[[str], Awaitable[ZygoteLink]]
"""Start a worker that sees the one device and wait until it is up. Raises what it reports, ZygoteDied."""


@dataclass(frozen=True, slots=True)
class Taken:
    uuid: str
    worker: ZygoteLink
    made: tuple[Made, ...]
    kept: int = -1
    """The instance's end of a channel to what is kept there of its checkpoint: a descriptor, the taker's to close."""


class GpuWorkers:
    """`end` is called with a worker that was let go of."""

    def __init__(
        self, probe: Probe, make: Make, end: Callable[[ZygoteLink], None], pool: GpuPool | None = None
    ) -> None:
        self._probe = probe
        self._make = make
        self._end = end
        self.pool = pool or GpuPool()
        self.memory = GpuMemory(probe.free)
        for gpu in probe.gpus():
            empty = probe.free(gpu.uuid)
            self.pool.add(gpu, empty)
            self.memory.add(gpu.uuid, empty)
        self._loop = asyncio.get_running_loop()
        self._log = logging.get("invoker")
        self._waiting: dict[str, list[asyncio.Task[ZygoteLink]]] = {}
        self._closed = False

    def __len__(self) -> int:
        """How many GPUs instances can have."""
        return len(self.pool)

    @property
    def ready(self) -> bool:
        """A start would find a worker that is up."""
        free = [uuid for uuid, state in self.pool.states().items() if state == "free"]
        return any(_is_up(task) for uuid in free for task in self._waiting.get(uuid, ()))

    @property
    def resident(self) -> tuple[str, ...]:
        """Checkpoints that are whole on a free GPU."""
        return self.memory.resident([uuid for uuid, state in self.pool.states().items() if state == "free"])

    async def take(self, checkpoint: str = "") -> Taken:
        """For an instance of `checkpoint`, whose groups stay where they are; for one of "" everything that was left on
        the device goes. Raises NoCapacity, and what kept a worker from coming up."""
        devices = self.pool.states()
        held = {uuid: self.memory.held(uuid, checkpoint) for uuid in devices}
        uuid = self.pool.take(held, {uuid: self.memory.used(uuid) for uuid in devices})
        waiting = self._waiting.setdefault(uuid, [])
        ours = not waiting
        task = waiting[0] if waiting else self._begin(uuid)
        began, up = self._loop.time(), _is_up(task)
        try:
            worker = await asyncio.shield(task)
        except BaseException:
            self.pool.end(uuid)
            if not self._settles(uuid):
                self.pool.late(uuid)  # `tidy` looks again
            raise
        waiting.remove(task)
        self.pool.became(uuid)
        made = () if up else (Made("libs", self._loop.time() - began, ours),)
        if not checkpoint:
            self.memory.clear(uuid)
            return Taken(uuid, worker, made)
        return Taken(uuid, worker, made, self.memory.lease(uuid, checkpoint))

    async def give_back(self, uuid: str) -> bool:
        """Nothing of what took the device is alive. Whether its memory came back."""
        self.pool.end(uuid)
        self.memory.end(uuid)
        if await self._settled(uuid):
            return True
        self._log.warning("gpu_memory_held", gpu=uuid, free=self._probe.free(uuid), kept=self.memory.used(uuid))
        for task in self._waiting.pop(uuid, []):
            self._let_go(uuid, task)
        if await self._settled(uuid):
            return True
        if self.memory.used(uuid):
            self.memory.clear(uuid)
            if await self._settled(uuid):
                return True
        self.pool.late(uuid)
        self._log.error("gpu_lost", gpu=uuid, free=self._probe.free(uuid))
        return False

    def tidy(self) -> None:
        """Make the workers that are missing, and look again at devices whose memory had not come back."""
        for uuid in self.pool.lost():
            if self._settles(uuid):
                self._log.info("gpu_back", gpu=uuid)
        for uuid in self.pool.missing(self._loop.time()):
            self._begin(uuid)

    def close(self) -> None:
        self._closed = True
        for uuid, tasks in self._waiting.items():
            for task in tasks:
                self._let_go(uuid, task)
        self._waiting.clear()
        self.memory.close()

    # -- workers ---------------------------------------------------------------------------------------------

    def _begin(self, uuid: str) -> asyncio.Task[ZygoteLink]:
        self.pool.grown(uuid)
        task = self._loop.create_task(self._come_up(uuid))
        self._waiting.setdefault(uuid, []).append(task)
        task.add_done_callback(lambda done: self._over(uuid, done))
        return task

    async def _come_up(self, uuid: str) -> ZygoteLink:
        before = self._probe.free(uuid)
        worker = await self._make(uuid)
        self.pool.ready(uuid, before, self._probe.free(uuid))
        worker.ended.add_done_callback(lambda _: self._died(uuid, worker))
        return worker

    def _over(self, uuid: str, task: asyncio.Task[ZygoteLink]) -> None:
        """It is up, or did not come up."""
        if task.cancelled() or task.exception() is None:
            return
        waiting = self._waiting.get(uuid, [])
        if task in waiting:
            waiting.remove(task)
            wait = self.pool.died(uuid, self._loop.time())
            self._log.warning("gpu_worker_failed", gpu=uuid, error=str(task.exception()), retry_after=wait)

    def _died(self, uuid: str, worker: ZygoteLink) -> None:
        """Its socket ended: it became an instance, was let go of, or died waiting."""
        for task in self._waiting.get(uuid, []):
            if _is_up(task) and task.result() is worker:
                self._waiting[uuid].remove(task)
                wait = self.pool.died(uuid, self._loop.time())
                self._log.warning("gpu_worker_died", gpu=uuid, pid=worker.pid, retry_after=wait)
                self._end(worker)
                return

    def _let_go(self, uuid: str, task: asyncio.Task[ZygoteLink]) -> None:
        self.pool.shrunk(uuid)
        if _is_up(task):
            worker = task.result()
            worker.close()
            self._end(worker)
        else:
            task.cancel()

    def _settles(self, uuid: str) -> bool:
        return self.pool.settle(uuid, self._probe.free(uuid), self.memory.used(uuid))

    async def _settled(self, uuid: str) -> bool:
        """Whether its memory is back within PATIENCE."""
        until = self._loop.time() + PATIENCE
        while not self._settles(uuid):
            if self._closed or self._loop.time() >= until:
                return False
            await asyncio.sleep(LOOK)
        return True


def _is_up(task: asyncio.Task[ZygoteLink]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
