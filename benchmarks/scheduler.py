"""Decisions of the controller per second, from 10 to 10,000 nodes.

A decision is one call of the machine with one more waiting request, which ends in a start, an eviction or a move; the
whole of it is timed: demand taken in, instances wanted, candidates found and estimated, the choice, the records and
indexes changed, the command made. 90 % of the slots are occupied, a fifth of them by instances that are idle and may
go, the rest by busy ones that may move. Each node has eight accelerators, every second node reads twice as fast, each
function has a checkpoint on three nodes' disks; a quarter of the functions takes two accelerators. Between decisions,
untimed, commands are obeyed and instances ended, so that the occupancy stays. Times are CPU times of the one thread,
so other work on the machine is not in them.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter
from random import Random

from benchmarks.common import Report, arguments, percentile, table
from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.__main__ import spare_the_collector
from sllm_faas.controller.state import Machine
from sllm_faas.spec import AppSpec, CheckpointSpec, FunctionSpec, Scaling, Target, digest
from sllm_faas.wire.messages import InstanceReport, NodeInfo, TargetDemand

SLOTS = 8
OCCUPIED = 0.9
BUSY = 0.8
GB = 10**9
STUCK = 50
"""Requests in a row that changed nothing: all slots are busy, and none would be decided ever again."""


class Cluster:
    def __init__(self, nodes: int, functions: int, seed: int) -> None:
        self.rng = Random(seed)
        self.machine = Machine("bench", migrate=True)
        self.now = 0.0
        self.slots = nodes * SLOTS
        self.demand: dict[Target, int] = {}
        self.asked = self.used = 0
        """Requests there are, and slots they and idle instances hold."""
        self.seen: Counter[str] = Counter()
        specs = [
            FunctionSpec(
                f"f{number}",
                kind="llm",
                checkpoint=CheckpointSpec("bench", digest=digest(b"%d" % number)),
                gpus=1 + (number % 4 == 0),
                scaling=Scaling(max_containers=10_000, scaledown_window=600_000.0),
            )
            for number in range(functions)
        ]
        self.targets = [Target(f"app-{number}", spec.name, 1) for number, spec in enumerate(specs)]
        versions = tuple(
            ev.StoredVersion(t.app, 1, AppSpec(t.app, (spec,)), True, 0.0, active=True)
            for t, spec in zip(self.targets, specs, strict=True)
        )
        digests = [spec.checkpoint.digest for spec in specs if spec.checkpoint]
        sizes = {name: (2 + number % 12) * GB for number, name in enumerate(digests)}
        held: list[list[str]] = [[] for _ in range(nodes)]
        for name in digests:
            for index in self.rng.sample(range(nodes), min(3, nodes)):
                held[index].append(name)
        self.feed(ev.Restored(versions, sizes=sizes))
        self.feed(ev.GatewayUp("g", "1"))
        for index in range(nodes):
            bandwidth = {"disk": (2 + 2 * (index % 2)) * 1e9, "remote": 0.5e9, "dram": 2e10}
            info = NodeInfo(
                f"node-{index:05d}",
                "ipc:///x",
                memory_mb=512_000,
                gpus=SLOTS,
                bandwidth=bandwidth,
                checkpoints=tuple(held[index]),
            )
            self.feed(ev.NodeUp(info, "1"))
        while self.used < OCCUPIED * self.slots:
            self.ask(self.rng.choice(self.targets), 1)
            self.ask(self.rng.choice(self.targets), -1, chance=0.5)

    def feed(self, event: ev.Event) -> list[cmd.Command]:
        """Tell the machine; its commands are obeyed at once."""
        self.now += 0.05
        commands = self.machine.handle(event, self.now)
        self.obey(commands)
        return commands

    def obey(self, commands: list[cmd.Command]) -> None:
        for command in commands:
            if isinstance(command, cmd.SendStart):
                start = command.body
                self.used += start.spec.gpus
                self.report(command.node, start.instance, start.target, "ready")
            elif isinstance(command, cmd.SendStop):
                instance = self.machine.state.instances[command.body.instance]
                self.used -= instance.gpus
                self.report(command.node, instance.id, instance.target, "stopped")

    def report(self, node: str, instance: str, target: Target, state: str) -> None:
        running = InstanceReport(instance, 1, target, state, tokens=1000)  # type: ignore[arg-type]
        self.feed(ev.InstanceSeen(node, running))

    def event(self, target: Target, change: int) -> ev.DemandSeen:
        count = self.demand[target] = self.demand.get(target, 0) + change
        self.asked += change
        return ev.DemandSeen("g", (TargetDemand(target, int(change > 0), max(0, count - (change > 0))),))

    def ask(self, target: Target, change: int, chance: float = 1.0) -> None:
        if self.rng.random() < chance and (change > 0 or self.demand.get(target)):
            self.feed(self.event(target, change))

    def relax(self) -> None:
        """Back to the occupancy there was, and the share of it that is busy."""
        instances = self.machine.state.instances
        while self.asked > BUSY * len(instances):
            self.ask(self.rng.choice(self.targets), -1)
        names = list(instances) if self.used > OCCUPIED * self.slots else []
        while self.used > OCCUPIED * self.slots:
            name = self.rng.choice(names)
            if name in instances and instances[name].state == "ready":
                self.feed(ev.InstanceStopAsked(name))

    def decide(self) -> float | None:
        """Seconds of one decision; None when a ready instance was idle and nothing had to be decided."""
        event = self.event(self.rng.choice(self.targets), 1)
        self.now += 0.05
        began = time.thread_time()
        commands = self.machine.handle(event, self.now)
        spent = time.thread_time() - began
        kinds = {type(command) for command in commands}
        stops = [c for c in commands if isinstance(c, cmd.SendStop)]
        starts = [c for c in commands if isinstance(c, cmd.SendStart)]
        self.obey(commands)
        if not kinds & {cmd.SendStart, cmd.SendStop}:
            return None
        moves = any(c.body.why.startswith("takes over") for c in starts)
        self.seen["moves" if moves else "evictions" if stops else "starts"] += 1
        return spent


def measure(nodes: int, functions: int, decisions: int) -> tuple[Cluster, list[float]]:
    cluster = Cluster(nodes, functions, seed=nodes)
    times: list[float] = []
    gc.collect()
    spare_the_collector()  # as the controller's process does
    idle = 0
    while len(times) < decisions:
        spent = cluster.decide()
        if spent is not None:
            times.append(spent)
        idle = idle + 1 if spent is None else 0
        if len(times) % 10 == 0 or idle >= STUCK:
            cluster.relax()
    gc.unfreeze()
    return cluster, times


def main() -> int:
    parser = arguments(__doc__)
    options = parser.parse_args()
    report = Report("scheduler")
    decisions = 1000 if options.quick else 5000
    rows = []
    for nodes in (10, 100, 1000) if options.quick else (10, 100, 1000, 10_000):  # the last fills for a minute
        functions = nodes
        cluster, times = measure(nodes, functions, decisions)
        rate, p50, p99 = len(times) / sum(times), percentile(times, 50) * 1e3, percentile(times, 99) * 1e3
        mix = ", ".join(f"{kind} {count}" for kind, count in sorted(cluster.seen.items()))
        rows.append((nodes, functions, f"{rate:,.0f}", f"{p50:.3f}", f"{p99:.3f}", f"{max(times) * 1e3:.2f}", mix))
        report.figure(f"decisions_per_s_{nodes}", rate)
        report.figure(f"p50_ms_{nodes}", p50)
        report.figure(f"p99_ms_{nodes}", p99)
        if nodes == 1000:
            report.at_least("decisions/s at 1,000 nodes x 1,000 functions", rate, 5000)
            report.at_most("p99 in ms at 1,000 nodes x 1,000 functions", p99, 1.0)
    table(("nodes", "functions", "decisions/s", "p50 ms", "p99 ms", "max ms", "what was decided"), rows)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
