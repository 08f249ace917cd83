"""The invoker of one node: it puts the parts together, obeys the controller and reports facts.

    controller ══ Uplink ══► agent ─┬─ Instances, Checks ── containers ── zygotes
    gateways ═════ Relay ═══════════┤
                                    └─ Ingests, Bundles, LogBook, Requests

Decides nothing about placement or scaling. Invariants: this process imports no torch; whatever it started is dead when
`stop` has returned, and whatever an earlier life left is dead before `start` begins.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import Counter
from collections.abc import Callable

from sllm_faas import logging
from sllm_faas.config import Config
from sllm_faas.errors import SllmError, to_info
from sllm_faas.wire.bus import CurveKeys, Parts
from sllm_faas.wire.codec import Frame
from sllm_faas.wire.curve import Admission, JoinToken, load_or_create
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import (
    BundleGet,
    Checked,
    Hello,
    Ingest,
    Ingested,
    InstanceReport,
    Keys,
    Migrated,
    NodeInfo,
    NodeStats,
    Progress,
    Request,
    ingest_id,
)
from sllm_invoker import node
from sllm_invoker.bundles import Bundles
from sllm_invoker.calibration import Calibration
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.checks import Checks
from sllm_invoker.container import Place
from sllm_invoker.containers import nvml, tree
from sllm_invoker.containers.pool import Pool
from sllm_invoker.containers.process import ProcessRuntime
from sllm_invoker.containers.zygote import ENTRY, become_subreaper
from sllm_invoker.entrances import GATEWAYS, INVOKERS
from sllm_invoker.ingests import Ingests
from sllm_invoker.instances import Instances
from sllm_invoker.logs import LogBook
from sllm_invoker.memory_tier import MemoryTier
from sllm_invoker.relay import Answer, Relay, RelayEvents, life
from sllm_invoker.relay_core import RelayCore
from sllm_invoker.requests import Requests
from sllm_invoker.uplink import Uplink

TICK = 1.0
LOOK = 0.05
IDLE = 5.0
"""Seconds for which a node that was given notice keeps idle instances: others start elsewhere first."""
QUIESCE = 1.0
"""Seconds for the gateways to know that nothing is here any more."""
LEAVE = 0.1
"""Seconds for the last frames to get out."""
_WORK = frozenset({Type.START, Type.CHECK, Type.INGEST})


class Agent:
    """`start` and `stop` are a pair, both on the event loop; `leave` comes between them. `entry` is what a forked
    instance runs, `asked_to_leave` is called when somebody asks for an orderly stop over the wire."""

    def __init__(
        self, config: Config, name: str, *, entry: str = ENTRY, asked_to_leave: Callable[[], None] = lambda: None
    ) -> None:
        self._asked_to_leave = asked_to_leave
        self._leaving = False
        self.config = config
        self.name = name
        self.life = life()
        self.directory = config.node_dir(name)
        self._entry = entry
        self._log = logging.get("invoker").bind(node=name)
        self._token = JoinToken.decode(config.join) if config.join else None
        self._public_key = ""
        self._known = Keys()
        self._admission: Admission | None = None
        self._stats: NodeStats | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ingesting: dict[bytes, asyncio.Task[None]] = {}
        """By `ingest_id` of their requests."""

    async def start(self) -> None:
        """Returns when the node serves; the controller may be there or come later."""
        config, name = self.config, self.name
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        killed = await asyncio.to_thread(tree.reap, self.directory)
        if killed:
            self._log.warning("leftovers_killed", count=killed)
        shutil.rmtree(self.directory / "scratch", ignore_errors=True)
        become_subreaper()
        self._loop = asyncio.get_running_loop()
        self._tree = tree.Tree(self.directory)
        layers = Pool(budget_mb=config.node_layers_mb, budgets=config.node_layer_budgets)
        probe = await asyncio.to_thread(nvml.probe)
        self.runtime = ProcessRuntime(name, self._tree, entry=self._entry, policy=layers, probe=probe)
        self.book = LogBook(config.logs_dir, name)
        self.ingests = Ingests(
            CheckpointStore(config.checkpoints_dir),
            self.runtime,
            feed=lambda: self.tier.feed(),
            limit=config.disk_mb << 20,
            changed=self._look,
        )
        self.tier = MemoryTier(
            config.checkpoints_dir, config.node_dram_mb, self._tree, users=lambda digest: self.instances.users(digest)
        )
        self.calibration = Calibration(self.directory, config.checkpoints_dir, self._idle)
        self.bundles = Bundles(self.directory / "src", self._ask_bundle)
        place = Place(
            name, self.directory, config.secrets_dir, self.runtime, self.bundles, self.ingests, self.tier,
            self.book, config.node_memory_mb,
        )  # fmt: skip
        core = RelayCore(name, stream_window=config.stream_window, orphan_grace=config.orphan_grace)
        events = RelayEvents(
            self._from_container, self._on_request, self._on_cancel, self._on_kill, self._on_drain, self._migrated
        )  # fmt: skip
        keys = self._keys()
        if keys is not None:
            self._public_key = keys.public
            self._admit()
        endpoint, neighbours = self._endpoints()
        self.relay = Relay(core, endpoint, events, life=self.life, neighbours=neighbours, keys=keys)
        self.instances = Instances(place, self.relay, self._report)
        self.checks = Checks(place, self.relay, self._checked, self._progress, prefetch=config.prefetch)
        self.requests = Requests(
            self.book, self.ingests.store, self.tier, self._look, self._asked_to_leave, self.runtime.on_gpu
        )
        await asyncio.to_thread(self.ingests.refresh)
        self.tier.start()
        self.tier.expect(await asyncio.to_thread(self.ingests.largest))
        await self.runtime.warm()
        self.uplink = Uplink(
            self._token.endpoint if self._token else config.controller_endpoint,
            name,
            self.life,
            self._hello,
            self._command,
            self._welcomed,
            keys=keys,
            server_key=self._token.server_key if self._token else "",
        )
        self._tick()

    async def leave(self, grace: float) -> float:
        """Give notice, and serve on until the controller has taken everything away, at most `grace` seconds; what is
        left of them. Without a controller until nothing runs."""
        until = self._loop.time() + grace
        self._leaving, idle = True, 0.0
        self._give_notice()
        while (left := until - self._loop.time()) > 0 and len(self.instances):
            idle = 0.0 if self.relay.core.flights else idle + LOOK
            if idle >= (IDLE if self.uplink.up else LOOK):
                break
            await asyncio.sleep(LOOK)
        return max(0.0, left)

    def _give_notice(self) -> None:
        if self._leaving:
            self.uplink.send(Header(Type.LEAVING))

    async def stop(self, grace: float) -> None:
        """Refuse new work, give what runs `grace` seconds, then end everything."""
        if self._timer is not None:
            self._timer.cancel()
        await self.calibration.close()
        self.checks.close()
        for task in self._ingesting.values():
            task.cancel()
        self.ingests.close()
        await self.instances.close(grace)
        await self.relay.quiesce(QUIESCE)
        self.requests.close()
        self.relay.part()
        self.uplink.close()
        await asyncio.sleep(LEAVE)
        self.relay.close()
        await self.runtime.close()
        await self.tier.close()
        self.book.close()
        if self._admission is not None:
            self._admission.stop()
        tree.forget(self.directory)

    # -- endpoints -------------------------------------------------------------------------------------------

    def _keys(self) -> CurveKeys | None:
        """A joined node has those of its token; those of the platform's own machine share one pair, if it listens."""
        if self._token is not None:
            return self._token.keys
        return load_or_create(self.config.keys_dir, "invoker") if self.config.listen else None

    def _admit(self) -> None:
        """Let in over TCP whom the controller names, and before it has nobody."""
        allow = {
            GATEWAYS: lambda key: key in self._known.gateways,
            INVOKERS: lambda key: key in self._known.invokers,
        }
        self._admission = Admission(allow, later=True)
        self._admission.start()

    def _endpoints(self) -> tuple[str, str]:
        """Where gateways connect, a socket beside the controller's or this machine's address over TCP, and where
        invokers of other machines do, if there may be any."""
        if self._token is not None:
            here = f"tcp://{node.address_towards(self._token.endpoint)}:*"
            return here, here
        listen = self.config.listen
        return self.config.node_endpoint(self.name), f"{listen.rsplit(':', 1)[0]}:*" if listen else ""

    def _welcomed(self) -> None:
        self._give_notice()
        self._stats = None  # a controller that was restarted has not heard them

    # -- to the controller -----------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        info = NodeInfo(
            self.name,
            self.relay.endpoint,
            self._public_key,
            self.config.node_memory_mb,
            node.cores(),
            len(self.runtime.gpus),
            bandwidth=self.calibration.bandwidth,
            checkpoints=tuple(sorted(self.ingests.here)),
            host=node.host(),
            neighbour_endpoint=self.relay.neighbour_endpoint,
        )
        return Hello("invoker", self.name, self.life, os.getpid(), info, self.instances.reports())

    def _report(self, report: InstanceReport) -> None:
        if report.state != "starting":
            self._tell_stats()  # first: what a start left in memory is known when it is known to be over
        self.uplink.send(Header(Type.INSTANCE), report)
        if report.state == "ready":
            self._stats = None  # its layers count as kept from now on: the next tick says which are

    def _checked(self, checked: Checked) -> None:
        self.uplink.send(Header(Type.CHECKED), checked)

    def _migrated(self, migrated: Migrated) -> None:
        told = Counter(result.outcome for result in migrated.results)
        self._log.info(
            "migrated", instance=migrated.instance, moved=told["moved"], kept=told["kept"], ended=told["ended"]
        )
        self.uplink.send(Header(Type.MIGRATED), migrated)

    def _progress(self, progress: Progress) -> None:
        self.uplink.send(Header(Type.PROGRESS), progress)

    def _ask_bundle(self, wanted: BundleGet) -> bool:
        return self.uplink.send(Header(Type.BUNDLE_GET), wanted)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK, self._tick)
        self.runtime.tidy()
        self.instances.refresh()
        self.calibration.tick()
        self._look()
        self._tell_stats()

    def _look(self) -> None:
        """What left the disk, whoever removed it, has no place in memory either: a start would have to fetch it."""
        for digest in self.ingests.refresh():
            self.tier.forget(digest)

    def _idle(self) -> bool:
        busy = self.relay.core.flights or self.instances.starting or self.checks.bundles() or self._ingesting
        return not busy

    def _tell_stats(self) -> None:
        here = self.ingests.here
        stats = node.stats(
            self.directory,
            self.config.node_memory_mb,
            len(self.instances),
            tuple(digest for digest in self.tier.resident() if digest in here),
            self.tier.pinned(),
            self.runtime.pool.layers(),
            self.tier.granted_mb,
            tuple(digest for digest in self.runtime.on_gpu() if digest in here),
            self.calibration.bandwidth,
            tuple(sorted(here)),
        )
        if stats != self._stats and self.uplink.send(Header(Type.NODE), stats):
            self._stats = stats

    # -- from the controller ---------------------------------------------------------------------------------

    def _command(self, frame: Frame) -> None:
        if frame.header.type in _WORK:
            self.calibration.interrupt()
        match frame.header.type:
            case Type.START:
                self.instances.start(frame.body)
            case Type.STOP:
                if not self.instances.stop(frame.body):
                    self._log.info("stop_of_unknown_instance", instance=frame.body.instance)
            case Type.HASTEN:
                self.instances.hasten(frame.body.instance)
            case Type.KEYS:
                self._known = frame.body
            case Type.MIGRATE:
                self.relay.migrate(frame.body)
            case Type.CHECK:
                self.checks.check(frame.body)
            case Type.UNCHECK:
                self.checks.end(frame.body)
            case Type.INGEST:
                self._begin_ingest(frame.body)
            case Type.CANCEL:
                if (task := self._ingesting.get(frame.header.id)) is not None:
                    task.cancel()
            case Type.BUNDLE_PART if frame.buffers or not frame.body.total:
                self.bundles.part(frame.body, frame.buffers[0] if frame.buffers else b"")
            case _:
                self.uplink.dropped += 1

    def _begin_ingest(self, ingest: Ingest) -> None:
        """Asked again for one that runs: there will be one answer."""
        identity = ingest_id(ingest.request)
        if identity not in self._ingesting:
            task = self._ingesting[identity] = self._loop.create_task(self._ingest(ingest))
            task.add_done_callback(lambda _: self._ingesting.pop(identity))

    async def _ingest(self, ingest: Ingest) -> None:
        try:
            while ingest.ahead and self.instances.starting:  # noqa: ASYNC110 - a look each second is soon enough
                await asyncio.sleep(TICK)
            digest, size = await self.ingests.bring(
                ingest.checkpoint,
                ingest.name,
                lambda *step: self._progress(Progress(ingest.request, *step)),
                base=ingest.base,
                forward=self.config.prefetch,
                ahead=ingest.ahead,
            )
            answer = Ingested(ingest.request, digest, size)
            self.tier.expect(size)
        except (SllmError, OSError) as error:
            answer = Ingested(ingest.request, error=to_info(error))
        self.uplink.send(Header(Type.INGESTED), answer)

    # -- from gateways and containers ------------------------------------------------------------------------

    def _from_container(self, peer: bytes, header: Header, parts: Parts) -> None:
        container = self.instances.container(peer) or self.checks.container(peer)
        if container is None:
            self.relay.core.dropped["unknown_container"] += 1
        else:
            container.on_frame(header, parts)

    def _on_request(self, identity: bytes, request: Request, answer: Answer) -> None:
        self.requests.on_request(identity, request, answer)

    def _on_cancel(self, identity: bytes) -> bool:
        return self.requests.cancel(identity)

    def _on_kill(self, number: int, reason: str) -> None:
        self.instances.kill(number, reason)

    def _on_drain(self, number: int, reason: str) -> None:
        self.instances.drain(number, reason)
