"""The controller's async shell: sockets, clock and store around the pure machine.

    frames ─► decode ─► event ─► Machine.handle ─► commands ─► frames, store, watchers

Decides nothing about instances or versions. One event loop, one writer thread for SQL; a fact about the store becomes
an event only after its commit, so no command can be ahead of the store. No polling: a timer for the machine's next
deadline, one per second for heartbeats, and one for the event log while there is something to write.
Bad frames are counted by type and dropped. Who has no valid role for a frame is treated alike.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sllm_faas import logging
from sllm_faas.config import Config
from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.admin import Admin
from sllm_faas.controller.bundles import Bundles
from sllm_faas.controller.metrics import Metrics
from sllm_faas.controller.peers import Peer, Peers
from sllm_faas.controller.routes import RouteTable
from sllm_faas.controller.state import Machine
from sllm_faas.controller.store import Store
from sllm_faas.errors import IllegalTransition, PlatformError, SllmError, WireError, to_info
from sllm_faas.wire import codec
from sllm_faas.wire.bus import Parts, Router
from sllm_faas.wire.curve import DOMAIN, Admission, load_or_create
from sllm_faas.wire.header import NO_INVOCATION, Header, Type, unpack
from sllm_faas.wire.liveness import INTERVAL
from sllm_faas.wire.messages import (
    BundleGet,
    BundlePart,
    Hello,
    Ingested,
    Progress,
    RoutesDelta,
    Welcome,
    ingest_id,
)

T = TypeVar("T")

FLUSH = 1.0
"""Seconds for which events are gathered before they are written to the log."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEARTBEAT = [Header(Type.HEARTBEAT).pack()]
_BYE = [Header(Type.BYE).pack()]
_FROM = {
    "gateway": {Type.DEMAND, Type.REQUEST, Type.REPLY},
    "invoker": {
        Type.INSTANCE,
        Type.CHECKED,
        Type.INGESTED,
        Type.NODE,
        Type.PROGRESS,
        Type.MIGRATED,
        Type.LEAVING,
        Type.BUNDLE_GET,
        Type.REPLY,
    },
    "admin": {Type.REQUEST},
}


class Controller:
    """`await start()`, then it serves until `await stop()`."""

    def __init__(self, config: Config, name: str = "controller") -> None:
        """Opens the store. Raises its errors."""
        self.config = config
        self.name = name
        self.life = secrets.token_hex(4)
        self.log = logging.get("controller")
        self.dropped: Counter[str] = Counter()
        self.metrics = Metrics()
        self.storage_error = ""
        self.store = Store(config.db_path)
        self.bundles = Bundles(config.bundles_dir)
        self.machine = Machine(self.life, migrate=True, copies=config.copies)
        self.peers = Peers()
        self.routes = RouteTable(self._publish)
        self.admin = Admin(self)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sllm-store")
        self._routers: list[Router] = []
        self._admission: Admission | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._beat_timer: asyncio.TimerHandle | None = None
        self._flush_timer: asyncio.TimerHandle | None = None
        self._log_rows: list[tuple[float, str, bytes]] = []
        self._learned = False
        self._stopping = False
        self._told: dict[tuple[Router, bytes], float] = {}
        """Strangers and when they were last told to say HELLO."""

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Restore from the store, then listen. Raises BadSpec when an endpoint cannot be bound, the store's errors."""
        self._loop = asyncio.get_running_loop()
        self.started = time.time()
        await self.admin.load()
        restored = await self.write(
            lambda: ev.Restored(self.store.versions(), self.store.nodes(), self.store.sizes(), self.store.calibration())
        )
        self.feed(restored)
        for app in self.machine.state.apps.values():
            self.routes.set_functions(app.name, self.machine.routes(app), ())
        for node in self.machine.state.nodes.values():
            self.routes.set_node(node.info)
        self._listen(self.config.controller_endpoint, tcp=False)
        if self.config.listen:
            self._admission = Admission({DOMAIN: self.admin.access.admits})
            self._admission.start()
            self._listen(self.config.listen, tcp=True)
        self._beat()
        self.log.info("started", life=self.life, apps=len(self.machine.state.apps), endpoints=self.endpoints)

    @property
    def endpoints(self) -> list[str]:
        return [router.endpoint for router in self._routers]

    def _listen(self, endpoint: str, *, tcp: bool) -> None:
        keys = load_or_create(self.config.keys_dir, "controller") if tcp else None
        router: Router
        router = Router(endpoint, lambda identity, parts: self._on_message(router, identity, parts), keys=keys)
        self._routers.append(router)

    async def stop(self) -> None:
        """Tell the peers, write what is left of the log, close."""
        self._stopping = True
        for peer in self.peers:
            peer.send(_BYE)
        for timer in (self._timer, self._beat_timer, self._flush_timer):
            if timer is not None:
                timer.cancel()
        self._flush_timer = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._flush_log()
        await asyncio.sleep(0.02)  # what was just sent is still with the sockets' thread, and close() would drop it
        for router in self._routers:
            router.close()
        if self._admission is not None:
            self._admission.stop()
        self._writer.shutdown(wait=True)
        self.store.close()

    async def write(self, work: Callable[[], T]) -> T:
        """Run it in the writer thread, after everything that was handed to it before. Raises what it raises."""
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._writer, work)
        except PlatformError as error:
            self.storage_error = str(error)
            raise
        self.storage_error = ""
        return result

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it beside everything else; a failure of it is logged."""
        task = asyncio.get_running_loop().create_task(self._watched(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watched(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            self.log.exception("task failed")

    # -- the machine -----------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._loop.time()

    def feed(self, event: ev.Event) -> bool:
        """Let the machine take a fact in and do what it commands; False when the fact was impossible."""
        now = self.now()
        try:
            commands = self.machine.handle(event, now)
        except IllegalTransition as error:
            self.dropped[type(event).__name__] += 1
            self.log.warning("impossible event", kind=type(event).__name__, error=error.message)
            return False
        self._log_rows.append((now, *ev.encode_event(event)))
        if self._flush_timer is None:
            self._flush_timer = self._loop.call_later(FLUSH, lambda: self.spawn(self._flush_log()))
        for command in commands:
            self._do(command)
        self._arm()
        return True

    def _arm(self) -> None:
        """One timer, for the machine's next deadline."""
        deadline = self.machine.next_deadline()
        if self._timer is not None:
            if deadline is not None and self._timer.when() == deadline:
                return
            self._timer.cancel()
        self._timer = None if deadline is None else self._loop.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.feed(ev.Tick())

    async def _flush_log(self) -> None:
        self._flush_timer = None
        rows, self._log_rows = self._log_rows, []
        book = dict(self.machine.state.book) if self._learned else None
        self._learned = False
        if not rows and book is None:
            return
        try:
            await self.write(lambda: self.store.append_events(self.life, rows, book))
        except PlatformError as error:
            self.log.warning("event log not written", lost=len(rows), error=str(error))

    def _do(self, command: cmd.Command) -> None:
        match command:
            case cmd.SendStart(node, body):
                self._to_node(node, Type.START, body)
                target = body.target
                self.log.info(
                    "start",
                    app=target.app,
                    function=target.function,
                    version=target.version,
                    instance=body.instance,
                    node=node,
                    why=body.why,
                    predicted=body.predicted,
                )
            case cmd.SendHasten(node, body):
                self._to_node(node, Type.HASTEN, body)
            case cmd.SendStop(node, body):
                self._to_node(node, Type.STOP, body)
                self.log.info("stop", instance=body.instance, node=node, why=body.reason)
            case cmd.SendCheck(node, body):
                self._to_node(node, Type.CHECK, body)
                self.log.info("check", app=body.app.name, version=body.version, node=node)
            case cmd.SendUncheck(node, body):
                self._to_node(node, Type.UNCHECK, body)
            case cmd.SendIngest(node, body):
                self._to_node(node, Type.INGEST, body)
                point = body.checkpoint
                self.log.info("copy", request=body.request, node=node, digest=point.digest[:12], source=point.source)
            case cmd.CancelIngest(node, request):
                self._to_node(node, Type.CANCEL, None, ingest_id(request))
                self.log.info("copy called off", request=request, node=node)
            case cmd.PublishFunctions(app, functions, gone):
                self.routes.set_functions(app, functions, gone)
            case cmd.PublishNode(info):
                self.routes.set_node(info)
            case cmd.WithdrawNode(name):
                self.routes.drop_node(name)
            case cmd.FailTarget(gateways, body):
                self.log.warning("target cannot start", **_of(body.target), error=body.error.message)
                for name in gateways:
                    if (peer := self.peers.get("gateway", name)) is not None:
                        peer.send(codec.encode(Header(Type.TARGET_FAILED), body))
            case cmd.StoreActivation():
                self.spawn(self._activate(command))
            case cmd.StoreFailure(app, number, error):
                self.log.warning("deployment failed", app=app, version=number, error=error.message)
                self.spawn(self._best_effort(lambda: self.store.fail_version(app, number, error)))
            case cmd.Advance(app, number, stage, text):
                self.admin.advance(app, number, stage, text)
            case cmd.DeployEnded(app, number, serving, failure):
                self.admin.deploy_ended(app, number, serving, failure)
            case cmd.ForgetVersions(app, numbers):
                self.spawn(self._forget(app, numbers))
            case cmd.StartEnded():
                self._learned = True
                self.metrics.start_ended(command)
                self.log.info(
                    "start ended",
                    instance=command.instance,
                    node=command.node,
                    outcome=command.outcome,
                    predicted=round(command.predicted, 4),
                    actual=round(command.actual, 4),
                )

            case cmd.SendMigrate(node, body):
                self._to_node(node, Type.MIGRATE, body)
                self.log.info(
                    "migrate",
                    migration=body.migration,
                    instance=body.instance,
                    node=node,
                    to=body.to,
                    destination=body.node,
                    invocations=list(body.invocations) or "all",
                )
            case cmd.MoveEnded():
                self._move_ended(command)

    def _move_ended(self, move: cmd.MoveEnded) -> None:
        self.admin.move_ended(move)
        result = move.result
        if result is None:
            self.log.info("move given up", instance=move.source, why=move.why)
            return
        self._learned = self._learned or result.outcome == "moved"
        self.metrics.move_ended(result, move.predicted)
        self.log.info(
            "move ended",
            invocation=result.invocation,
            instance=move.source,
            to=move.to,
            destination=move.node,
            outcome=result.outcome,
            why=result.why,
            predicted=round(move.predicted, 4),
            total=round(result.total, 4),
            paused=round(result.paused, 4),
            rounds=result.rounds,
            tokens=result.tokens,
        )

    def _to_node(self, name: str, kind: Type, body: object, identity: bytes = NO_INVOCATION) -> None:
        peer = self.peers.get("invoker", name)
        if peer is None or not peer.send(codec.encode(Header(kind, identity), body)):
            # Its HELLO will not name the instance, or its silence will be noticed: either way the machine learns.
            self.log.warning("command not sent", node=name, kind=kind.name)

    async def _activate(self, command: cmd.StoreActivation) -> None:
        app, number = command.app, command.number
        try:
            await self.write(lambda: self.store.activate(app, number, time.time(), command.digests, command.sizes))
        except SllmError as error:
            self.feed(ev.VersionRefused(app, number, to_info(error)))
            return
        self.feed(ev.VersionActivated(app, number))
        self.log.info("switched", app=app, version=number)

    async def _forget(self, app: str, numbers: tuple[int, ...]) -> None:
        def work() -> list[str]:
            self.store.forget_versions(app, numbers)
            return self.bundles.collect(self.store.bundles(), time.time())

        await self._best_effort(work)

    async def _best_effort(self, work: Callable[[], object]) -> None:
        """For what may be repeated or done without: a failure is logged, nothing waits for it."""
        try:
            await self.write(work)
        except PlatformError as error:
            self.log.warning("store not written", error=str(error))

    # -- peers -----------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        self._beat_timer = self._loop.call_later(INTERVAL, self._beat)
        for peer in self.peers.expire(self.now()):
            self.log.warning("peer lost", peer=peer.name, role=peer.role)
            self._gone(peer, orderly=False)
        for peer in self.peers:
            peer.send(_HEARTBEAT)
        self.metrics.observe(self.machine.state, self.dropped)

    def _gone(self, peer: Peer, *, orderly: bool) -> None:
        self.peers.remove(peer)
        peer.router.forget(peer.identity)
        self.admin.peer_gone(peer)
        if peer.role == "gateway":
            self.feed(ev.GatewayLost(peer.name, peer.life))
        elif peer.role == "invoker":
            self.feed(ev.NodeLeft(peer.name) if orderly else ev.NodeLost(peer.name))
            if orderly:
                cordoned = peer.name in self.admin.cordoned
                self.spawn(self._best_effort(lambda: self.store.save_node(peer.name, cordoned=cordoned, info=None)))

    def _on_message(self, router: Router, identity: bytes, parts: Parts) -> None:
        """Never raises: an error of ours with one frame must not keep the socket's others from being read."""
        if self._stopping:
            return
        try:
            self._take(router, identity, parts)
        except Exception:
            self.dropped["error"] += 1
            self.log.exception("frame not handled", kind=_kind_of(parts))

    def _take(self, router: Router, identity: bytes, parts: Parts) -> None:
        try:
            frame = codec.decode(parts)
        except WireError as error:
            claimed = _kind_of(parts)
            self.dropped[claimed] += 1
            self.log.warning("bad frame", kind=claimed, error=error.message)
            return
        kind = frame.header.type
        if kind is Type.HELLO:
            self._on_hello(router, identity, frame.body)
            return
        peer = self.peers.heard(router, identity, self.now())
        if peer is None:
            self._turn_away(router, identity)
        elif kind is Type.BYE:
            self.log.info("peer left", peer=peer.name, role=peer.role)
            self._gone(peer, orderly=True)
        elif kind in _FROM[peer.role]:
            self._on_frame(peer, frame)
        elif kind is not Type.HEARTBEAT:
            self.dropped[kind.name] += 1

    def _turn_away(self, router: Router, identity: bytes) -> None:
        """Tell a stranger to say HELLO, at most once per interval."""
        now = self.now()
        if now - self._told.get((router, identity), -INTERVAL) < INTERVAL:
            return
        if len(self._told) > 1000:
            self._told.clear()
        self._told[router, identity] = now
        Peer("", "", "", identity, router).send(_BYE)

    def _on_hello(self, router: Router, identity: bytes, hello: Hello) -> None:
        node = hello.node
        if refusal := self._refusal(router, hello):
            self.dropped["HELLO"] += 1
            self.log.warning("hello refused", peer=hello.name[:64], error=refusal)
            return
        peer = Peer(hello.role, hello.name, hello.life, identity, router)
        before = self.peers.add(peer, self.now())
        if before is not None and before.life != peer.life:
            self.admin.peer_gone(before)
            if before.role == "gateway":
                self.feed(ev.GatewayLost(before.name, before.life))
        peer.send(codec.encode(Header(Type.WELCOME), Welcome(self.name, self.life, INTERVAL)))
        self.log.info("hello", peer=hello.name, role=hello.role, instances=len(hello.instances))
        if hello.role == "gateway":
            self.feed(ev.GatewayUp(hello.name, hello.life))
            peer.send(codec.encode(Header(Type.ROUTES), self.routes.whole()))
        elif node is not None:
            self.tell_keys(peer)
            cordoned = node.name in self.admin.cordoned
            self.feed(ev.NodeUp(node, hello.life, hello.instances, cordoned))
            self.spawn(self._best_effort(lambda: self.store.save_node(node.name, cordoned=cordoned, info=node)))

    def _refusal(self, router: Router, hello: Hello) -> str:
        """Why this HELLO cannot be; empty when it can."""
        node, remote = hello.node, router is not self._routers[0]
        if not _NAME.fullmatch(hello.name) or not hello.life:
            return "it has no name or no life; allowed: 1-64 letters, digits, '.', '_' and '-'"
        if hello.role == "container" or (remote and hello.role != "invoker"):
            return f"role {hello.role} is not for this endpoint"
        if hello.role == "invoker" and (node is None or node.name != hello.name):
            return "an invoker names its node"
        if remote and node is not None:
            for endpoint in (node.endpoint, node.neighbour_endpoint or node.endpoint):
                if not (endpoint.startswith("tcp://") and node.curve_key):
                    return f"a node of another machine is reached by tcp:// and a key, not by {endpoint[:100]!r}"
        known = self.peers.get(hello.role, hello.name)
        if known is not None and known.router is not router:
            return f"{hello.name} is connected by another way"
        if remote and known is not None and known.life != hello.life and self.peers.alive(known, self.now()):
            # Two machines of one name would throw each other out again and again.
            return f"another node named {hello.name} is connected"
        return ""

    def _on_frame(self, peer: Peer, frame: codec.Frame) -> None:
        body = frame.body
        match frame.header.type:
            case Type.DEMAND:
                self.feed(ev.DemandSeen(peer.name, body.items))
            case Type.REQUEST:
                self.admin.on_request(peer, frame.header.id, body, frame.buffers)
            case Type.REPLY:
                self.admin.on_reply(peer, frame.header.id, body)
            case Type.INSTANCE:
                self.feed(ev.InstanceSeen(peer.name, body))
            case Type.CHECKED:
                self.feed(ev.VersionChecked(peer.name, body))
            case Type.NODE:
                self.feed(ev.NodeStatsSeen(peer.name, body))
            case Type.MIGRATED:
                self.feed(ev.MigrationEnded(peer.name, body))
            case Type.LEAVING:
                self.feed(ev.NodeLeaving(peer.name))
            case Type.PROGRESS:
                assert isinstance(body, Progress)
                self.admin.on_progress(body)
            case Type.INGESTED:
                assert isinstance(body, Ingested)
                self.admin.on_ingested(peer, body)
                self.log.info(
                    "ingested",
                    request=body.request,
                    node=peer.name,
                    digest=body.digest[:12],
                    error=body.error.message if body.error else "",
                )
                self.feed(ev.CheckpointPulled(peer.name, body))
            case Type.BUNDLE_GET:
                self.spawn(self._send_bundle(peer, frame.header.id, body))

    async def _send_bundle(self, peer: Peer, identity: bytes, wanted: BundleGet) -> None:
        total, data = await asyncio.to_thread(self.bundles.part, wanted.digest, wanted.offset)
        body = BundlePart(wanted.digest, wanted.offset, total)
        peer.send(codec.encode(Header(Type.BUNDLE_PART, identity), body, data))

    def tell_keys(self, *peers: Peer) -> None:
        """Whom to let in, to these invokers or to all."""
        if self.config.listen:
            parts = codec.encode(Header(Type.KEYS), self.admin.access.keys())
            for peer in peers or self.peers.of_role("invoker"):
                peer.send(parts)

    def _publish(self, delta: RoutesDelta) -> None:
        parts = codec.encode(Header(Type.ROUTES_DELTA), delta)
        for peer in self.peers.of_role("gateway"):
            peer.send(parts)


def _kind_of(parts: Parts) -> str:
    """What a bad frame says it is; `bad` when not even that can be read. Bounded, for counters."""
    try:
        return unpack(parts[0]).type.name if parts else "bad"
    except WireError:
        return "bad"


def _of(target: Any) -> dict[str, Any]:
    return {"app": target.app, "function": target.function, "version": target.version}
