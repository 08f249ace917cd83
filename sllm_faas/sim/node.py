"""A modelled node: obeys START and STOP as an invoker does, in virtual time.

A start reads, when those that are shorter on the same tier have (`reads`), and starts its process; a read from below
DRAM leaves the checkpoint on disk and in the DRAM cache (least recently used goes first). A stop waits for what runs,
unless the drain is over at once. The node knows nothing of other nodes and decides nothing.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from sllm_faas.controller import events as ev
from sllm_faas.sim.clock import Clock
from sllm_faas.sim.reads import Reads
from sllm_faas.sim.results import Samples
from sllm_faas.sim.scenario import GB, NodeModel
from sllm_faas.spec import Span, Target, Tier, Timeline
from sllm_faas.wire.messages import InstanceReport, InstanceState, NodeInfo, NodeStats, Start, Stop


@dataclass(slots=True, eq=False)
class Running:
    """An instance on a node."""

    id: str
    number: int
    start: Start
    began: float
    state: InstanceState = "starting"
    in_flight: int = 0
    tokens: int = 0
    ready: float = 0.0
    timeline: Timeline = field(default_factory=Timeline)
    tier: Tier | None = None
    read: tuple[int, float] = (0, 0.0)
    """Bytes and seconds."""

    @property
    def target(self) -> Target:
        return self.start.target


class Host:
    """Starts processes, at most so many at once (0: any number), in the order in which they are asked for. `name`: the
    host that its nodes tell, empty for one that is a machine by itself."""

    def __init__(self, at_once: int, name: str = "") -> None:
        self.name = name
        self._free_at = [0.0] * at_once

    def seconds(self, now: float, process: float) -> float:
        """Until one is there that takes `process` seconds itself."""
        if not self._free_at:
            return process
        ends = max(now, self._free_at[0]) + process
        heapq.heapreplace(self._free_at, ends)
        return ends - now


class SimNode:
    def __init__(
        self,
        name: str,
        model: NodeModel,
        checkpoints: tuple[str, ...],
        sizes: dict[str, int],
        clock: Clock,
        rng: Random,
        samples: Samples,
        tell: Callable[[ev.Event], None],
        changed: Callable[[SimNode, Running], None],
        host: Host,
    ) -> None:
        """`tell` reaches the controller after the messages' delay; `changed` the gateway."""
        self.name, self.model, self._host = name, model, host
        self._disk = dict.fromkeys(checkpoints)
        self._dram: OrderedDict[str, int] = OrderedDict()
        self._sizes, self._clock, self._rng, self._samples = sizes, clock, rng, samples
        self._tell, self._changed = tell, changed
        self._reads: dict[Tier, Reads] = {}
        self.instances: dict[str, Running] = {}
        self._numbers = 0

    def hello(self) -> ev.NodeUp:
        model = self.model
        bandwidth = {"remote": model.remote * GB, "disk": model.disk * GB, "dram": model.dram * GB}
        info = NodeInfo(
            self.name,
            f"sim:{self.name}",
            memory_mb=int(model.memory_gb * GB / 2**20),
            gpus=model.gpus,
            bandwidth=bandwidth,
            checkpoints=tuple(self._disk),
            host=self._host.name,
        )
        return ev.NodeUp(info, "1")

    # -- commands --------------------------------------------------------------------------------------------

    def start(self, start: Start) -> None:
        if start.instance in self.instances:
            return
        self._numbers += 1
        instance = Running(start.instance, self._numbers, start, self._clock.now)
        self.instances[start.instance] = instance
        digest = start.spec.checkpoint.digest if start.spec.checkpoint else ""
        size = self._sizes.get(digest, 0)
        tier: Tier = self._tier(digest)
        if not size:
            self._was_read(instance, tier, digest, 0)
            return
        bandwidth = {"remote": self.model.remote, "disk": self.model.disk, "dram": self.model.dram}[tier] * GB
        load = self._noisy(size / bandwidth)
        self._samples.counts[f"bytes {tier}"] += size
        instance.tier, instance.read = tier, (size, load)
        reads = self._reads.setdefault(tier, Reads(self._clock))
        reads.add(size, load, lambda: self._was_read(instance, tier, digest, size))

    def stop(self, stop: Stop) -> None:
        instance = self.instances.get(stop.instance)
        if instance is None:
            return
        if instance.state == "starting":
            self._end(instance)
            return
        instance.state = "draining"
        if stop.drain == 0.0:
            self._end(instance)
            return
        self._changed(self, instance)
        self.finish_drain(instance)

    # -- what happens ----------------------------------------------------------------------------------------

    def finish_drain(self, instance: Running) -> None:
        """It drains and its last invocation has ended: it is gone."""
        if instance.state == "draining" and not instance.in_flight:
            self._end(instance)

    def report(self, instance: Running) -> None:
        self._tell(
            ev.InstanceSeen(
                self.name,
                InstanceReport(
                    instance.id,
                    instance.number,
                    instance.target,
                    instance.state,
                    concurrency=instance.start.spec.concurrency,
                    running=instance.in_flight,
                    timeline=instance.timeline if instance.state == "ready" else Timeline(),
                    tokens=instance.tokens,
                    tier=instance.tier,
                    read_bytes=instance.read[0],
                    read_seconds=instance.read[1],
                ),
            )
        )

    def _was_read(self, instance: Running, tier: Tier, digest: str, size: int) -> None:
        took = self._clock.now - instance.began
        container = self._host.seconds(self._clock.now, self._process())
        read = Span("checkpoint", 0.0, took, tier)
        instance.timeline = Timeline(0.0, (read, Span("attach", 0.0, took + container)))
        self._clock.after(container, lambda: self._is_ready(instance, digest, size))

    def _is_ready(self, instance: Running, digest: str, size: int) -> None:
        if self.instances.get(instance.id) is not instance:
            return  # cancelled
        instance.state = "ready"
        instance.ready = self._clock.now
        actual = self._clock.now - instance.began
        self._samples.counts["starts"] += 1
        self._samples.starts.append(actual)
        self._samples.error.append(abs(instance.start.predicted - actual))
        if size:
            self._keep(digest, size)
        self._changed(self, instance)
        self.report(instance)

    def _end(self, instance: Running) -> None:
        del self.instances[instance.id]
        seconds = self._clock.now - instance.began
        self._samples.instance_seconds += seconds
        self._samples.gpu_seconds += seconds * instance.start.spec.gpus
        instance.state = "stopped"
        self._changed(self, instance)
        self.report(instance)

    # -- tiers -----------------------------------------------------------------------------------------------

    def _tier(self, digest: str) -> Tier:
        if digest in self._dram:
            self._dram.move_to_end(digest)
            return "dram"
        if any(i.state != "starting" and self._digest(i) == digest for i in self.instances.values()):
            return "dram"
        return "disk" if digest in self._disk else "remote"

    def _digest(self, instance: Running) -> str:
        checkpoint = instance.start.spec.checkpoint
        return checkpoint.digest if checkpoint else ""

    def _keep(self, digest: str, size: int) -> None:
        """On disk, and in DRAM as far as there is room."""
        if digest not in self._disk:
            self._disk[digest] = None
        room = self.model.dram_gb * GB
        if size > room or digest in self._dram:
            return
        self._dram[digest] = size
        total = sum(self._dram.values())
        while total > room:
            total -= self._dram.popitem(last=False)[1]
        self._tell(ev.NodeStatsSeen(self.name, NodeStats(0, 0, len(self.instances), tuple(sorted(self._dram)))))

    def _process(self) -> float:
        measured = self.model.containers
        return self._rng.choice(measured) if measured else self._noisy(self.model.container)

    def _noisy(self, seconds: float) -> float:
        if not self.model.jitter:
            return seconds
        return seconds * self._rng.lognormvariate(0.0, self.model.jitter)

    def settle(self) -> None:
        """Count what still runs when the simulation ends."""
        for instance in self.instances.values():
            seconds = self._clock.now - instance.began
            self._samples.instance_seconds += seconds
            self._samples.gpu_seconds += seconds * instance.start.spec.gpus
