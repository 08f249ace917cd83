"""Checkpoints on this node: present or brought here by an ingest process of its own.

Ingest needs torch, which the invoker must not import: it is forked from the warmest process that there is, with torch
imported or without, and reports JSON lines (`checkpoints/ingest.py`). What it writes it forwards to the DRAM tier,
through a channel that it is given (`feed`). Where the disk is too full others leave for it (`room`), in that process:
what is here is looked at, not remembered (`refresh`).
Invariants: one ingest per source at a time, however many ask, and none that nobody waits for: what it had fetched by
then is where the next one goes on (`fetch.fetch`). An ingest ends with its invoker, as whatever is forked does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from sllm_faas import logging
from sllm_faas.errors import BadSpec, CheckpointError, CheckpointUnavailable, ErrorInfo, from_info
from sllm_faas.spec import CheckpointSpec, FunctionSpec
from sllm_invoker.checkpoints import usage
from sllm_invoker.checkpoints.object import CheckpointObject, read_manifest
from sllm_invoker.checkpoints.room import stays
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.checkpoints.usage import Asked
from sllm_invoker.containers.base import ContainerSpec, Event, Exited, Runtime

ENTRY = "sllm_invoker.checkpoints.ingest:run"
MODELS = FunctionSpec("ingest", kind="llm", checkpoint=CheckpointSpec("any"))
"""What starts with the libraries that an ingest needs."""
Report = Callable[[str, int, int], None]
"""(stage, done, total)."""


@dataclass(slots=True, eq=False)
class _Flight:
    """An ingest under way; `reports` has one of everybody who waits for it. `ahead`: none of them needs it yet."""

    ahead: bool
    task: asyncio.Task[str] = field(init=False)
    reports: list[Report] = field(default_factory=list)

    async def arrival(self) -> str:
        """The digest, once it is here. Another ingest may take over meanwhile."""
        while True:
            task = self.task
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                if self.task is task:
                    raise


class _Heard:
    """What an ingest says, as events of its process. `answer` is its last line, or `{"ended": Exited}`."""

    def __init__(self, said: Callable[[dict[str, Any]], None]) -> None:
        self.answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._said = said
        self._rest = b""

    def __call__(self, event: Event) -> None:
        if self.answer.done():
            return
        if isinstance(event, Exited):
            self.answer.set_result({"ended": event})
        elif event.stream == "stdout":
            *lines, self._rest = (self._rest + event.data).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    self._line(json.loads(line))

    def _line(self, line: dict[str, Any]) -> None:
        if "stage" in line or "evicted" in line:
            self._said(line)
        elif not self.answer.done():
            self.answer.set_result(line)


class Ingests:
    def __init__(
        self,
        store: CheckpointStore,
        runtime: Runtime,
        *,
        feed: Callable[[], socket.socket | None] = lambda: None,
        limit: int = 0,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`limit`: bytes that all checkpoints of the store may take, 0: what the disk has. `changed` is called when one
        came or left by what is done here."""
        self.store = store
        self._runtime = runtime
        self._feed = feed
        self._limit = limit
        self._changed = changed
        self._log = logging.get("invoker")
        self._listed: set[str] = set()
        self.here: set[str] = set()
        """Digests of what is on this node, by the last `refresh`; those that cannot be read are left out."""
        self._running: dict[Asked, _Flight] = {}
        self._count = 0
        self._verified: dict[str, CheckpointObject] = {}
        """Objects that were found verified, by digest."""

    def largest(self) -> int:
        """Bytes of the largest checkpoint on this node."""
        return max((entry.manifest.total_bytes for entry in self.store.list()), default=0)

    def refresh(self) -> set[str]:
        """See what there is: what has left since. Whoever else uses the store may have changed it. What an earlier life
        of this node found verified, and has not changed, is ready at once."""
        listed = set(self.store.digests())
        gone = self.here - listed
        for digest in listed - self._listed:
            with contextlib.suppress(CheckpointError, BadSpec):
                found = CheckpointObject(self.store.path(digest), read_manifest(self.store.path(digest)))
                self.here.add(digest)
                if self.store.is_verified(found):
                    self._verified[digest] = found
        self.here -= gone
        self._listed = listed
        for digest in gone:
            self._verified.pop(digest, None)
        return gone

    async def bring(
        self,
        checkpoint: CheckpointSpec,
        name: str,
        report: Report,
        *,
        base: str = "",
        forward: bool = True,
        ahead: bool = False,
    ) -> tuple[str, int]:
        """(digest, bytes) of the object of `checkpoint`, ingested unless it is here, and named `name`; `base` is what
        an adapter adapts. `forward`: into free memory too, when it is brought here. `ahead`: of need, as long as
        nobody else asks for it: after whatever wants the processor, and nothing leaves the disk for it. It ends when
        the last who waits for it is cancelled.

        Raises what ingest found: BadSpec, CheckpointError, StorageFull."""
        asked = _asked(checkpoint, base)
        flight = self._running.get(asked)
        if flight is None:
            flight = self._running[asked] = _Flight(ahead)
            self._begin(asked, flight, name, forward=forward)
        elif flight.ahead and not ahead:  # it goes on as what is needed, from what was fetched by now
            flight.ahead = False
            flight.task.cancel()
            self._begin(asked, flight, name, forward=forward)
        flight.reports.append(report)
        try:
            digest = await flight.arrival()
        finally:
            flight.reports.remove(report)
            if not flight.reports:
                self._over(asked, flight)
                flight.task.cancel()
        if name:
            await asyncio.to_thread(self.store.set_ref, name, digest)
        found = await asyncio.to_thread(self.store.get, digest)
        self.here.add(digest)
        self._listed.add(digest)
        self._changed()
        return digest, found.manifest.total_bytes

    async def ready(self, checkpoint: CheckpointSpec, report: Report, *, base: str = "") -> Path:
        """The verified object's directory; its source is ingested when this node has not got it yet.

        One that was ready before and has not changed is so at once, in the order of asking: what starts later takes
        nothing out of memory that an earlier start was to find there.

        Raises CheckpointUnavailable, CheckpointCorrupt …"""
        digest = checkpoint.digest
        known = self._verified.get(digest)
        if known is not None and self.store.is_verified(known):
            self._used(known, _asked(checkpoint, base))
            return known.directory
        if not digest:
            digest, _ = await self.bring(checkpoint, "", report, base=base)
        elif not self.store.path(digest).is_dir():
            found, _ = await self.bring(checkpoint, "", report, base=base)
            if found != digest:
                raise CheckpointUnavailable(
                    f"{checkpoint.source!r} is {found[:12]} on this node, and the version needs {digest[:12]}.",
                    hint="The source has changed; deploy again, or give a revision.",
                )
        found_here = await asyncio.to_thread(self.store.ensure_verified, digest)
        self._verified[found_here.digest] = found_here
        self._used(found_here, _asked(checkpoint, base))
        return found_here.directory

    def _used(self, found: CheckpointObject, asked: Asked) -> None:
        """Noted beside what comes next."""
        size = found.manifest.total_bytes
        asyncio.get_running_loop().run_in_executor(None, usage.used, self.store, found.digest, size, asked)

    def _begin(self, asked: Asked, flight: _Flight, name: str, *, forward: bool) -> None:
        ingest = self._ingest(asked, name or _name(asked.source), flight.reports, forward=forward, ahead=flight.ahead)
        task = flight.task = asyncio.get_running_loop().create_task(ingest)
        task.add_done_callback(lambda _: self._over(asked, flight) if flight.task is task else None)

    def _over(self, asked: Asked, flight: _Flight) -> None:
        """Whoever asks from now on gets another: one that has been cancelled may take a moment to end."""
        if self._running.get(asked) is flight:
            del self._running[asked]

    async def _ingest(self, asked: Asked, name: str, reports: list[Report], *, forward: bool, ahead: bool) -> str:
        """It may go on when this returns: removing what it had fetched."""
        arguments = ["--root", str(self.store.root), "--source", asked.source, "--name", name]
        arguments += ["--revision", asked.revision, "--dtype", asked.dtype, "--base", asked.base]
        arguments += ["--tensor-parallel", str(asked.tensor_parallel), "--limit", str(self._limit)]
        arguments += ["--ahead"] if ahead else []
        heard = _Heard(lambda line: self._said(line, reports))
        self._count += 1
        with contextlib.ExitStack() as stack:
            end = self._feed() if forward else None
            channel = stack.enter_context(end).fileno() if end is not None else -1
            spec = ContainerSpec(
                f"ingest-{self._count}", json.dumps(arguments).encode(), MODELS, weights=channel, entry=ENTRY
            )
            process = await self._runtime.run(spec, heard)
        try:
            answer = await heard.answer
        except asyncio.CancelledError:
            await process.stop(0)
            raise
        if "result" in answer:
            return str(answer["result"]["digest"])
        if "error" in answer:
            raise from_info(msgspec.convert(answer["error"], ErrorInfo))
        raise CheckpointError(
            f"the ingest of {asked.source!r} ended {answer['ended']} and with no answer.",
            hint="Was there enough memory? The kernel's log shows processes killed for it.",
        )

    def _said(self, line: dict[str, Any], reports: list[Report]) -> None:
        if "evicted" in line:
            self._log.info("checkpoint_evicted", **line["evicted"])
            self._changed()
        else:
            for report in reports:
                report(line["stage"], line["done"], line["total"])

    def close(self) -> None:
        for flight in self._running.values():
            flight.task.cancel()


def _asked(checkpoint: CheckpointSpec, base: str) -> Asked:
    return Asked(checkpoint.source, checkpoint.revision, checkpoint.dtype, base, checkpoint.tensor_parallel)


def _name(source: str) -> str:
    """A ref name from a source: its last two parts for a repo id, the directory's name otherwise."""
    parts = [re.sub(r"[^A-Za-z0-9._-]", "-", part).strip("-._") for part in source.split("/")]
    parts = [part[:96] for part in parts if part]
    if not parts:
        return "checkpoint"
    return parts[-1] if source.startswith(("/", ".", "~")) else "/".join(parts[-2:])


def listing(store: CheckpointStore) -> list[dict[str, Any]]:
    """What `checkpoint.list` answers."""
    stay = stays(store)
    return [
        {
            "digest": entry.digest,
            "names": list(entry.refs),
            "bytes": entry.manifest.total_bytes,
            "pinned": entry.pinned,
            "source": entry.manifest.source.name,
            "stays": stay.get(entry.digest, ""),
        }
        for entry in store.list()
    ]
