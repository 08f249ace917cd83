"""A modelled world around the machine: nodes that run instances, links that lose, double, delay and reorder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.model import key_of
from sllm_faas.controller.state import Machine
from sllm_faas.errors import ErrorInfo, IllegalTransition
from sllm_faas.spec import Target
from sllm_faas.wire.messages import (
    Checked,
    Ingest,
    Ingested,
    InstanceReport,
    Migrate,
    Migrated,
    MoveResult,
    NodeInfo,
    TargetDemand,
)

DIGEST = "d" * 64
FAILED = ErrorInfo("start_failed", "enter raised", status=503)


@dataclass
class ModelNode:
    name: str
    memory_mb: int
    life: int = 1
    alive: bool = True
    connected: bool = False
    reports: dict[str, InstanceReport] = field(default_factory=dict)
    numbers: int = 0
    joined: bool = False
    """It is on another machine."""
    checkpoints: set[str] = field(default_factory=set)

    def info(self) -> NodeInfo:
        here, tcp = f"ipc:///{self.name}", f"tcp://{self.name}"
        return NodeInfo(
            self.name, f"{tcp}:1" if self.joined else here, f"key-{self.name}", self.memory_mb,
            checkpoints=tuple(sorted(self.checkpoints)), neighbour_endpoint=f"{tcp}:2",
        )  # fmt: skip


@dataclass
class World:
    """`to_machine` and `to_nodes` are links: what is in them was sent and has not arrived."""

    machine: Machine = field(default_factory=lambda: Machine("abc", migrate=True))
    now: float = 0.0
    nodes: dict[str, ModelNode] = field(default_factory=dict)
    to_machine: list[ev.Event] = field(default_factory=list)
    to_nodes: list[tuple[str, int, cmd.Command]] = field(default_factory=list)
    log: list[tuple[ev.Event, float]] = field(default_factory=list)
    commands: list[cmd.Command] = field(default_factory=list)

    # -- the machine -----------------------------------------------------------------------------------------

    def feed(self, event: ev.Event) -> list[cmd.Command]:
        """Validate after each; an illegal event must change nothing."""
        before = self.machine.snapshot()
        try:
            commands = self.machine.handle(event, self.now)
        except IllegalTransition:
            assert self.machine.snapshot() == before, "an illegal event changed something"
            return []
        self.log.append((event, self.now))
        self.machine.validate()
        self.commands += commands
        for command in commands:
            if isinstance(
                command,
                cmd.SendStart | cmd.SendStop | cmd.SendCheck | cmd.SendMigrate | cmd.SendIngest | cmd.CancelIngest,
            ):
                node = self.nodes[command.node]
                self.to_nodes.append((node.name, node.life, command))
            elif isinstance(command, cmd.StoreActivation):
                self.to_machine.append(ev.VersionActivated(command.app, command.number))
        return commands

    def tick(self, until: float) -> None:
        """Let time pass, waking the machine at each of its deadlines."""
        while (deadline := self.machine.next_deadline()) is not None and deadline <= until:
            assert deadline > self.now or self.now == deadline, "a deadline in the past"
            self.now = max(self.now, deadline)
            self.feed(ev.Tick())
            assert self.machine.next_deadline() != deadline, "a tick at its deadline left it standing"
        self.now = until

    # -- nodes -----------------------------------------------------------------------------------------------

    def hello(self, name: str) -> None:
        node = self.nodes[name]
        node.connected = node.alive = True
        self.feed(ev.NodeUp(node.info(), f"life-{node.life}", tuple(node.reports.values())))

    def die(self, name: str) -> None:
        node = self.nodes[name]
        node.alive = node.connected = False
        node.reports.clear()
        node.life += 1
        self.feed(ev.NodeLost(name))

    def cut(self, name: str) -> None:
        """The link breaks; what is in it is lost, what runs there runs on."""
        self.nodes[name].connected = False
        self.to_nodes = [item for item in self.to_nodes if item[0] != name]
        self.feed(ev.NodeLost(name))

    def obey(self, index: int = 0, outcome: str = "moved") -> None:
        """A command arrives. `outcome`: of each invocation that is to be moved."""
        name, life, command = self.to_nodes.pop(index)
        node = self.nodes[name]
        if not node.alive or node.life != life:
            return
        if isinstance(command, cmd.SendStart):
            start = command.body
            if start.instance not in node.reports:
                node.numbers += 1
                node.reports[start.instance] = InstanceReport(start.instance, node.numbers, start.target, "starting")
                self._say(node, start.instance)
        elif isinstance(command, cmd.SendStop):
            report = node.reports.get(command.body.instance)
            if report is not None:
                node.reports[report.instance] = replace(report, state="draining")
                self._say(node, report.instance)
        elif isinstance(command, cmd.SendMigrate):
            self.migrate(node, command.body, outcome)
        elif isinstance(command, cmd.SendIngest):
            self.ingest(node, command.body, outcome)
        elif isinstance(command, cmd.SendCheck):
            check = command.body
            node.checkpoints.update(DIGEST for f in check.app.functions if f.checkpoint)
            digests = {f.name: DIGEST for f in check.app.functions if f.checkpoint}
            result = Checked(
                check.app.name, check.version, checkpoints=digests, sizes=dict.fromkeys(digests.values(), 2**28)
            )
            self.to_machine.append(ev.VersionChecked(name, result))

    def ingest(self, node: ModelNode, body: Ingest, outcome: str) -> None:
        """Brought at once, or refused when `outcome` is "kept"."""
        if outcome == "kept":
            answer = Ingested(body.request, error=ErrorInfo("checkpoint_unavailable", "not there", status=503))
        else:
            node.checkpoints.add(body.checkpoint.digest)
            answer = Ingested(body.request, body.checkpoint.digest, 2**28)
        if node.connected:
            self.to_machine.append(ev.CheckpointPulled(node.name, answer))

    def migrate(self, node: ModelNode, body: Migrate, outcome: str) -> None:
        """What runs there goes on at the destination, or not."""
        report, there = node.reports.get(body.instance), self.nodes[body.node].reports.get(body.to)
        results = []
        for number in range(report.running if report else 0):
            name = body.invocations[0] if body.invocations else f"{number:032x}"
            moved = there is not None and there.state == "ready" and outcome == "moved"
            results.append(
                MoveResult(name, "moved" if moved else "kept", "" if moved else "no_slot", total=0.2, tokens=100)
            )
            if moved:
                assert report is not None
                assert there is not None
                report = node.reports[report.instance] = replace(report, running=report.running - 1)
                there = self.nodes[body.node].reports[there.instance] = replace(there, running=there.running + 1)
            if body.invocations:
                break
        if node.connected:
            answer = Migrated(body.migration, body.instance, tuple(results))
            self.to_machine.append(ev.MigrationEnded(node.name, answer))

    def progress(self, name: str, instance: str, state: str, *, served: bool = False) -> None:
        """An instance changes by itself. `served`: it had answered something by then."""
        node = self.nodes[name]
        error = FAILED if state == "failed" else None
        node.reports[instance] = replace(
            node.reports[instance],
            state=state,  # type: ignore[arg-type]
            error=error,
            served=served,
        )
        self._say(node, instance)
        if state in ("stopped", "failed"):
            del node.reports[instance]

    def _say(self, node: ModelNode, instance: str) -> None:
        if node.connected:
            self.to_machine.append(ev.InstanceSeen(node.name, node.reports[instance]))

    def demand(self, gateway: str, target: Target, waiting: int, running: int = 0) -> None:
        self.feed(ev.DemandSeen(gateway, (TargetDemand(target, waiting, running),)))

    # -- coming to rest --------------------------------------------------------------------------------------

    def rest(self, seconds: float = 400.0) -> None:
        """Everything connects, every start succeeds, every drain ends, all messages arrive, time passes."""
        self.to_machine = [event for event in self.to_machine if isinstance(event, ev.VersionActivated)]
        self.to_nodes.clear()
        for name in self.nodes:
            self.hello(name)
        end = self.now + seconds
        for _ in range(4000):
            if self.to_nodes:
                self.obey()
            elif self.to_machine:
                self.feed(self.to_machine.pop(0))
            elif not self._move_one():
                deadline = self.machine.next_deadline()
                if deadline is None or deadline > end:
                    return
                self.tick(deadline)
        raise AssertionError("the world does not come to rest")

    def _move_one(self) -> bool:
        for node in self.nodes.values():
            for report in list(node.reports.values()):
                if report.state == "starting":
                    self.progress(node.name, report.instance, "ready")
                    return True
                if report.state == "draining":
                    self.progress(node.name, report.instance, "stopped")
                    return True
        return False

    def live(self, target: Target) -> int:
        return len(self.machine.ledger.live(key_of(target)))

    def sent(self, kind: type) -> list[cmd.Command]:
        """Commands of that kind so far."""
        return [command for command in self.commands if isinstance(command, kind)]

    def restored(self) -> Machine:
        """Another machine from what this one keeps; it keeps the same."""
        kept = self.machine.snapshot()
        other = Machine.restore(kept, migrate=True, copies=self.machine.copies.goal)
        assert other.snapshot() == kept
        return other

    def replayed(self) -> Machine:
        """Another machine that was told the same."""
        other = Machine("abc", migrate=True, copies=self.machine.copies.goal)
        for event, at in self.log:
            kind, data = ev.encode_event(event)
            other.handle(ev.decode_event(kind, data), at)
        return other
