"""The instances of a node, each from START to its end.

    starting ── READY ──► ready ── STOP ──► draining ──► stopped
        └── START_FAILED, death, too slow ──► failed ◄── death ──┘

A start does everything at once that can be done at once: the bundle is fetched, the checkpoint verified and read
ahead, and the zygotes' layers made, side by side. Invariants: every change is reported (`report`); an instance is
reported stopped or failed only after nothing of its process tree is alive, and its slots are gone by then.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sllm_faas import logging
from sllm_faas.errors import ErrorInfo, SllmError, StartFailed, Unavailable, WorkerLost, to_info
from sllm_faas.spec import Span, Timeline
from sllm_faas.wire.codec import encode
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import InstanceReport, InstanceState, Shutdown, Start, Stop
from sllm_invoker import secrets
from sllm_invoker.checkpoints.channel import Loaded
from sllm_invoker.checkpoints.priority import Priority
from sllm_invoker.checkpoints.store import Lease
from sllm_invoker.container import Container, NotReady, Place
from sllm_invoker.containers.base import ContainerSpec
from sllm_invoker.memory_tier import Opening
from sllm_invoker.relay import Relay
from sllm_invoker.relay_core import Instance
from sllm_invoker.runner.config import InstanceConfig, dumps

STARTUP = 600.0
"""Seconds to become ready, where the function does not say."""
EXIT_GRACE = 1.0
"""Seconds between the last output of a container that was told to leave and SIGKILL."""
NEWS_TOKENS, NEWS_SHARE = 64, 0.1
"""More than so many tokens, and more than that share of what was told, are worth a report of their own."""
EXIT_HOOKS = 30.0
"""Seconds for exit hooks, once nothing runs any more."""
LOOK = 0.5
LIMIT_FACTOR = 4
LIMIT_FLOOR_MB = 2048


@dataclass(slots=True, eq=False)
class Entry:
    """One instance. `work` runs its start, then its stop."""

    start: Start
    number: int
    container: Container
    began: float
    state: InstanceState = "starting"
    spans: list[Span] = field(default_factory=list)
    error: ErrorInfo | None = None
    digest: str = ""
    """Of the checkpoint object it uses, once that is known."""
    ahead: bool = False
    """Nobody waits for its start."""
    opening: Opening | None = None
    """Its wish for the checkpoint, once that is said."""
    leases: list[Lease] = field(default_factory=list)
    """On its checkpoints, for as long as there is anything of it."""
    loaded: Loaded | None = None
    """How that came into memory, once it has."""
    told: int = 0
    """How many invocations ran in it by the last report."""
    served: bool = False
    """It has answered something, by the last report."""
    told_tokens: int = 0
    """How many tokens were in their contexts."""
    work: asyncio.Task[None] | None = None
    stopping: asyncio.Task[None] | None = None

    @property
    def peer(self) -> bytes:
        return self.start.instance.encode()


class Instances:
    def __init__(self, place: Place, relay: Relay, report: Callable[[InstanceReport], None]) -> None:
        self._place = place
        self._relay = relay
        self._report = report
        self._log = logging.get("invoker").bind(node=place.node)
        self._loop = asyncio.get_running_loop()
        self._entries: dict[str, Entry] = {}
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def starting(self) -> bool:
        """Whether one of them is."""
        return any(entry.state == "starting" for entry in self._entries.values())

    def _share_memory(self) -> None:
        """What instances were promised is theirs: slabs have what is left of the node's memory."""
        promised = sum(entry.start.spec.memory_mb for entry in self._entries.values())
        self._place.tier.grant(self._place.memory_mb - promised)

    def reports(self) -> tuple[InstanceReport, ...]:
        return tuple(self._describe(entry) for entry in self._entries.values())

    def refresh(self) -> None:
        """Report those in which another number of invocations runs than was told, or contexts have become quite other.
        To be called now and then."""
        for entry in self._entries.values():
            if entry.state in ("ready", "draining") and (
                self._relay.core.running(entry.number) != entry.told
                or abs(entry.container.tokens - entry.told_tokens) > max(NEWS_TOKENS, NEWS_SHARE * entry.told_tokens)
            ):
                self._report(self._describe(entry))

    def bundles(self) -> set[str]:
        return {entry.start.bundle for entry in self._entries.values()}

    def users(self, digest: str) -> list[int]:
        """The processes that may have the checkpoint mapped."""
        handles = [entry.container.handle for entry in self._entries.values() if entry.digest == digest]
        return [handle.pid for handle in handles if handle is not None]

    def container(self, peer: bytes) -> Container | None:
        entry = self._entries.get(peer.decode(errors="replace"))
        return entry.container if entry else None

    # -- start -----------------------------------------------------------------------------------------------

    def start(self, start: Start) -> None:
        """START again for one that exists is answered by its report."""
        known = self._entries.get(start.instance)
        if known is not None:
            self._report(self._describe(known))
            return
        self._numbers += 1
        container = Container(self._place, start.instance, start.target)
        entry = Entry(start, self._numbers, container, time.time(), ahead=start.ahead)
        self._entries[start.instance] = entry
        self._share_memory()
        spec = start.spec
        self._relay.add(
            Instance(
                entry.number, start.instance, entry.peer, start.target, spec.concurrency, spec.timeouts.execution,
                spec.cancel_grace, why=start.why,
            )
        )  # fmt: skip
        self._report(self._describe(entry))
        entry.work = self._loop.create_task(self._run(entry))

    def hasten(self, instance: str) -> None:
        """Somebody waits by now for a start that was ahead of need."""
        entry = self._entries.get(instance)
        if entry is not None and entry.ahead:
            entry.ahead = False
            if entry.opening is not None:
                self._place.tier.hasten(entry.opening, Priority.WAITED)

    async def _run(self, entry: Entry) -> None:
        limit = entry.start.spec.timeouts.startup or STARTUP
        error: ErrorInfo | None = None
        try:
            async with asyncio.timeout(limit):
                await self._become_ready(entry)
        except NotReady as failed:
            error = failed.error
            entry.spans += self._shifted(entry, failed.timeline)
        except TimeoutError:
            error = to_info(
                StartFailed(
                    f"{entry.start.target} was not ready within {limit:g} s.",
                    hint="Its log shows how far it came; timeouts.startup allows more.",
                )
            )
        except SllmError as failure:
            error = to_info(failure)
        except asyncio.CancelledError:
            if entry.stopping is None:
                raise
        except Exception as failure:
            self._log.exception("start_failed", instance=entry.start.instance)
            error = to_info(failure)
        if error is not None or entry.container.handle is None:
            await self._end(entry, "stopped" if error is None else "failed", error)
            return
        ended = await entry.container.ended
        if entry.state == "draining":
            await self._end(entry, "stopped", None)
        else:
            await self._end(
                entry, "failed", to_info(WorkerLost(f"the container of {entry.start.target} ended {ended}."))
            )

    async def _become_ready(self, entry: Entry) -> None:
        start, place = entry.start, self._place
        env = secrets.resolve(start.spec.secrets, place.secrets_dir, os.environ)
        bringing = asyncio.create_task(self._checkpoint(entry))
        try:
            source_dir, object_dir = await asyncio.gather(self._source(entry), bringing)
        finally:
            bringing.cancel()  # without its code nobody waits for its weights
        opening = self._open(entry, object_dir)
        reading = asyncio.create_task(self._loaded(entry, opening))
        try:
            config = InstanceConfig(
                start.instance,
                start.target,
                (start.spec,),
                number=entry.number,
                source_dir=source_dir,
                object_dir=object_dir,
                env=env,
                node=place.node,
                scratch=str(entry.container.scratch),
            )
            limit = min(place.memory_mb, max(LIMIT_FLOOR_MB, LIMIT_FACTOR * start.spec.memory_mb))
            at = self._since(entry)
            with self._relay.link(entry.peer) as link:
                handle = await entry.container.start(
                    ContainerSpec(
                        start.instance, dumps(config), start.spec, object_dir, limit, link.fileno(),
                        opening.channel if opening else -1,
                    )
                )  # fmt: skip
            for made in handle.made:
                entry.spans.append(Span(made.warmth, at, made.seconds, "made" if made.ours else "awaited"))
                at += made.seconds
            self._span(entry, "fork", at, f"from {handle.warmth}{self._company(entry)}")
            self._report(self._describe(entry))
            if opening is not None:
                opening.close()  # the container has it
            timeline = await asyncio.shield(entry.container.ready)
            if any(span.name == "attach" and span.detail.startswith("tier=gpu") for span in timeline.spans):
                entry.loaded = Loaded(0, "gpu", 0, 0.0)
            entry.spans += self._shifted(entry, timeline)
            entry.spans.sort(key=lambda span: span.start)
            if entry.state == "starting":
                self._relay.ready(entry.number, self._serving(entry, opening, reading))
            # It serves already and computes as the bytes arrive; its start is over when all of them have.
            over: list[asyncio.Future[Any]] = [reading, entry.container.ended]
            await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return
            if (failure := reading.result()) is not None and not isinstance(failure, Unavailable):
                raise failure
        finally:
            reading.cancel()
            if opening is not None:
                opening.close()
        if entry.state == "starting":
            entry.state = "ready"
            report = self._describe(entry)
            self._report(report)
            self._log.info(
                "instance_ready", app=start.target.app, function=start.target.function, version=start.target.version,
                instance=start.instance, warmth=report.warmth, predicted=start.predicted,
                actual=round(self._since(entry), 4),
            )  # fmt: skip

    async def _source(self, entry: Entry) -> str:
        if not entry.start.bundle or entry.start.spec.kind == "llm":
            return ""
        at = self._since(entry)
        path = await self._place.bundles.get(entry.start.bundle, self.bundles())
        self._span(entry, "bundle", at)
        return str(path)

    async def _checkpoint(self, entry: Entry) -> str:
        spec = entry.start.spec
        if spec.checkpoint is None:
            return ""
        at = self._since(entry)
        # From now on none of them leaves the disk; one that has is brought again.
        entry.leases += [self._place.ingests.store.use(each.digest) for each in spec.checkpoints().values()]
        digest = spec.checkpoint.digest
        here = bool(digest) and self._place.ingests.store.path(digest).is_dir()
        directory = await self._place.ingests.ready(spec.checkpoint, lambda *_: None)
        for adapter in spec.adapters:
            await self._place.ingests.ready(adapter.checkpoint, lambda *_: None, base=directory.name)
        self._span(entry, "verify" if here else "pull", at, "" if here else "tier=remote")
        return str(directory)

    def _open(self, entry: Entry, object_dir: str) -> Opening | None:
        """Begin to read the checkpoint, beside the container's start. One that is on a GPU is not read; should it be
        gone when the container comes there, that has the object's file."""
        if not object_dir or (entry.start.spec.gpus and Path(object_dir).name in self._place.runtime.on_gpu()):
            return None
        entry.digest = Path(object_dir).name
        priority = Priority.AHEAD if entry.ahead else Priority.WAITED
        entry.opening = self._place.tier.open(entry.digest, Path(object_dir), priority=priority)
        return entry.opening

    async def _loaded(self, entry: Entry, opening: Opening | None) -> SllmError | None:
        """The span of the read. Returns what went wrong: a container can do without a store (Unavailable)."""
        if opening is None:
            return None
        at = self._since(entry)
        try:
            found = await opening.loaded
        except SllmError as error:
            self._span(entry, "checkpoint", at, error.code)
            return error
        entry.loaded = found
        speed = f" {found.bytes / found.seconds / 1e9:.2f} GB/s" if found.seconds > 0 else ""
        self._span(entry, "checkpoint", at, f"tier={found.tier}{speed}")
        entry.spans.sort(key=lambda span: span.start)
        return None

    def _serving(self, entry: Entry, opening: Opening | None, reading: asyncio.Task[SllmError | None]) -> Timeline:
        """The start up to now, for those it serves from now on: a read that goes on is in it as far as it has come."""
        if opening is None or reading.done():
            return self._timeline(entry)
        began = next(span.start for span in entry.spans if span.name == "fork")
        detail = f"tier={opening.tier or 'disk'} and goes on"
        so_far = Span("checkpoint", began, self._since(entry) - began, detail)
        return Timeline(entry.began, tuple(sorted([*entry.spans, so_far], key=lambda span: span.start)))

    def _company(self, entry: Entry) -> str:
        """In words, how many other instances start here now."""
        others = sum(other.state == "starting" for other in self._entries.values() if other is not entry)
        return f", beside {others} other start{'s' * (others > 1)}" if others else ""

    # -- stop ------------------------------------------------------------------------------------------------

    def stop(self, stop: Stop) -> bool:
        """STOP; False for an instance that is not here (any more)."""
        entry = self._entries.get(stop.instance)
        if entry is None:
            return False
        if entry.stopping is None or stop.drain is not None:  # a later STOP may be less patient
            if entry.stopping is not None:
                entry.stopping.cancel()
            entry.stopping = self._loop.create_task(self._stop(entry, stop.drain))
        return True

    def kill(self, number: int, reason: str) -> None:
        """The relay asks for it: code in there does not end by itself."""
        entry = self._of(number)
        if entry is not None:
            entry.container.log.platform(f"killed: {reason}", "warning")
            self._log.warning("instance_killed", instance=entry.start.instance, reason=reason)
            self._drain(entry)
            self._hold(entry, self._loop.create_task(entry.container.stop()))

    def drain(self, number: int, reason: str) -> None:
        """The relay gives it no more work; it will be killed when what runs has ended."""
        entry = self._of(number)
        if entry is not None:
            entry.container.log.platform(f"takes nothing new: {reason}", "warning")
            self._drain(entry)

    def _hold(self, entry: Entry, task: asyncio.Task[None]) -> None:
        if entry.stopping is None:
            entry.stopping = task

    def _drain(self, entry: Entry) -> None:
        if entry.state in ("starting", "ready"):
            entry.state = "draining"
            self._relay.drain(entry.number)
            self._report(self._describe(entry))

    async def _stop(self, entry: Entry, drain: float | None) -> None:
        container = entry.container
        waiting = entry.state == "starting"
        self._drain(entry)
        if container.handle is None:
            assert entry.work is not None
            entry.work.cancel()
            return
        if waiting and not container.ready.done():
            await container.stop()
            return
        self._relay.send_container(entry.peer, encode(Header(Type.SHUTDOWN), Shutdown(drain)))
        if not await self._drained(entry, drain):
            self._relay.cancel_all(entry.number)
            await self._ends(entry, entry.start.spec.cancel_grace + EXIT_GRACE)
        await container.stop()

    async def _drained(self, entry: Entry, drain: float | None) -> bool:
        """Whether the container ended by itself: within `drain` seconds, its exit hooks within EXIT_HOOKS."""
        until = None if drain is None else self._loop.time() + drain
        idle = 0.0
        while until is None or self._loop.time() < until:
            if await self._ends(entry, LOOK if until is None else min(LOOK, until - self._loop.time())):
                return True
            idle = 0.0 if self._relay.core.running(entry.number) else idle + LOOK
            if idle >= EXIT_HOOKS:
                return False
        return False

    async def _ends(self, entry: Entry, seconds: float) -> bool:
        """Whether the container ends by itself within `seconds`."""
        await asyncio.wait([entry.container.ended], timeout=seconds)
        return entry.container.ended.done()

    async def _end(self, entry: Entry, state: InstanceState, error: ErrorInfo | None) -> None:
        await entry.container.stop()
        if entry.container.handle is not None:
            await entry.container.ended
        entry.state, entry.error = state, error
        detail = f" {entry.container.ended.result()}" if entry.container.ended.done() else ""
        entry.served = self._relay.core.served(entry.number)
        self._relay.gone(entry.number, state, detail)
        del self._entries[entry.start.instance]
        for lease in entry.leases:
            lease.close()
        self._share_memory()
        self._report(self._describe(entry))
        say = self._log.info if error is None else self._log.warning
        target = entry.start.target
        say(
            "instance_ended", app=target.app, function=target.function, version=target.version,
            instance=entry.start.instance, state=state, detail=detail.strip(), error=error.message if error else "",
        )  # fmt: skip

    async def close(self, drain: float) -> None:
        """Stop all of them, `drain` seconds for what runs."""
        for name in list(self._entries):
            self.stop(Stop(name, drain, "the node is stopping"))
        await asyncio.gather(*(entry.work for entry in self._entries.values() if entry.work), return_exceptions=True)

    # -- describe --------------------------------------------------------------------------------------------

    def _of(self, number: int) -> Entry | None:
        return next((entry for entry in self._entries.values() if entry.number == number), None)

    def _since(self, entry: Entry) -> float:
        return time.time() - entry.began

    def _span(self, entry: Entry, name: str, start: float, detail: str = "") -> None:
        entry.spans.append(Span(name, start, self._since(entry) - start, detail))

    def _shifted(self, entry: Entry, timeline: Timeline) -> list[Span]:
        offset = timeline.began - entry.began
        return [Span(span.name, span.start + offset, span.seconds, span.detail) for span in timeline.spans]

    def _timeline(self, entry: Entry) -> Timeline:
        return Timeline(entry.began, tuple(entry.spans))

    def _describe(self, entry: Entry) -> InstanceReport:
        handle = entry.container.handle
        entry.served = entry.served or self._relay.core.served(entry.number)
        entry.told, entry.told_tokens = self._relay.core.running(entry.number), entry.container.tokens
        return InstanceReport(
            entry.start.instance,
            entry.number,
            entry.start.target,
            entry.state,
            entry.start.spec.concurrency,
            handle.warmth if handle else "cold",
            handle.pid if handle else 0,
            entry.told,
            self._timeline(entry),
            entry.error,
            tokens=entry.told_tokens,
            tier=entry.loaded.tier if entry.loaded else None,
            read_bytes=entry.loaded.bytes if entry.loaded else 0,
            read_seconds=entry.loaded.seconds if entry.loaded else 0.0,
            served=entry.served,
        )
