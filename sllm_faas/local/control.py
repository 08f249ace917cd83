"""The controller of a local platform: the same machine, its commands carried out at once, and no store.

An event's consequences may be events again; they are taken in order, one after the other. Time comes to the machine
by one timer for its next deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from sllm_faas.config import machine_memory_mb
from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.routes import RouteTable
from sllm_faas.controller.state import Machine
from sllm_faas.errors import NotFound, SllmError, from_info, to_info
from sllm_faas.spec import AppSpec, CheckpointSpec
from sllm_faas.wire import codec
from sllm_faas.wire.bus import Parts, PeerGone
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.memory import MemoryBus
from sllm_faas.wire.messages import Check, Checked, InstanceReport, NodeInfo, Reply, RoutesDelta, Start, Stop

ENDPOINT = "memory://controller"
LIFE = "local"


class Control:
    """`start` and `stop` command the node; `ingest` gives the object directory of a checkpoint under a
    name, and blocks."""

    def __init__(
        self,
        bus: MemoryBus,
        gateway: bytes,
        node: str,
        start: Callable[[Start], None],
        stop: Callable[[Stop], None],
        ingest: Callable[[str, CheckpointSpec, str], Path],
    ) -> None:
        self.machine = Machine(LIFE)
        self.objects: dict[str, Path] = {}
        """Digest -> object directory."""
        self._gateway = gateway
        self._node = node
        self._start = start
        self._stop = stop
        self._ingest = ingest
        self._loop = asyncio.get_running_loop()
        self._router = bus.router(ENDPOINT, self._from_gateway)
        self._routes = RouteTable(self._publish)
        self._events: deque[ev.Event] = deque()
        self._feeding = False
        self._timer: asyncio.TimerHandle | None = None
        self._versions: dict[str, int] = {}
        self._deploys: dict[tuple[str, int], asyncio.Future[int]] = {}
        self._checks: set[asyncio.Task[None]] = set()
        self._tell(codec.encode(Header(Type.ROUTES), self._routes.whole()))
        self.feed(ev.GatewayUp(gateway.decode(), LIFE))
        self.feed(ev.NodeUp(NodeInfo(node, "memory://node", memory_mb=machine_memory_mb()), LIFE))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for check in self._checks:
            check.cancel()
        self._router.close()

    async def deploy(self, spec: AppSpec) -> int:
        """The version that serves then. Raises what the deployment failed with."""
        number = self._versions[spec.name] = self._versions.get(spec.name, 0) + 1
        ended: asyncio.Future[int] = self._loop.create_future()
        self._deploys[spec.name, number] = ended
        self.feed(ev.VersionAdded(spec.name, number, spec, time.time()))
        return await ended

    def delete(self, app: str) -> None:
        self.feed(ev.AppDeleted(app))

    def report(self, report: InstanceReport) -> None:
        self.feed(ev.InstanceSeen(self._node, report))

    def feed(self, event: ev.Event) -> None:
        self._events.append(event)
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._events:
                for command in self.machine.handle(self._events.popleft(), self._loop.time()):
                    self._carry_out(command)
        finally:
            self._feeding = False
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self.machine.next_deadline()
        self._timer = self._loop.call_at(due, self.feed, ev.Tick()) if due is not None else None

    def _carry_out(self, command: cmd.Command) -> None:
        match command:
            case cmd.SendStart(body=start):
                self._start(start)
            case cmd.SendStop(body=stop):
                self._stop(stop)
            case cmd.SendCheck(body=check):
                task = self._loop.create_task(self._check(check))
                self._checks.add(task)
                task.add_done_callback(self._checks.discard)
            case cmd.PublishFunctions():
                self._routes.set_functions(command.app, command.functions, command.gone)
            case cmd.PublishNode():
                self._routes.set_node(command.info)
            case cmd.WithdrawNode():
                self._routes.drop_node(command.name)
            case cmd.FailTarget():
                self._tell(codec.encode(Header(Type.TARGET_FAILED), command.body))
            case cmd.StoreActivation():
                self.feed(ev.VersionActivated(command.app, command.number))
            case cmd.DeployEnded():
                ended = self._deploys.pop((command.app, command.number), None)
                if ended is not None and not ended.done():
                    if command.error is not None:
                        ended.set_exception(from_info(command.error))
                    else:
                        ended.set_result(command.serving)
            case cmd.Advance() | cmd.StoreFailure() | cmd.ForgetVersions() | cmd.StartEnded():
                pass  # history, for people and stores; there are none here

    async def _check(self, check: Check) -> None:
        """The code is imported already; checkpoints have to be here."""
        digests: dict[str, str] = {}
        error: SllmError | None = None
        for function in check.app.functions:
            if function.checkpoint is not None and error is None:
                try:
                    for key, checkpoint in function.checkpoints().items():
                        name, base = f"{check.app.name}-{key.replace(':', '-')}", digests.get(function.name, "")
                        directory = await asyncio.to_thread(self._ingest, name, checkpoint, base)
                        digests[key], self.objects[directory.name] = directory.name, directory
                except SllmError as failed:
                    error = failed
        info = to_info(error) if error is not None else None
        self.feed(ev.VersionChecked(self._node, Checked(check.app.name, check.version, info, digests)))

    # -- gateway ---------------------------------------------------------------------------------------------

    def _from_gateway(self, _peer: bytes, parts: Parts) -> None:
        frame = codec.decode(parts)
        if frame.header.type is Type.DEMAND:
            self.feed(ev.DemandSeen(self._gateway.decode(), frame.body.items))
        elif frame.header.type is Type.REQUEST:
            refusal = NotFound("a platform in one process has no administration", hint="Start one with `sllm up`.")
            self._tell(codec.encode(Header(Type.REPLY, frame.header.id), Reply(error=to_info(refusal))))

    def _publish(self, delta: RoutesDelta) -> None:
        self._tell(codec.encode(Header(Type.ROUTES_DELTA), delta))

    def _tell(self, parts: Parts) -> None:
        try:
            self._router.send(self._gateway, parts)
        except PeerGone:
            pass  # the platform is closing
