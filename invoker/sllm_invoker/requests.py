"""What gateways may ask of a node: its logs and its checkpoints.

    logs.read{app?, function?, instance?, invocation?, since?, lines?, follow}   {records} …, more=True but the last
    node.leave{}                               {leaving: true}: an orderly stop, as by SIGTERM
    checkpoint.list{}                          {checkpoints: [{digest, names, bytes, pinned, source, tier: disk | dram,
                                                 leases, loaded: bytes in memory,
                                                 stays: why it does not leave a full disk}]}
    checkpoint.verify|rm|pin|unpin{ref}        {digest}

A follower ends when its gateway leaves or sends CANCEL with the request's id. Every request is answered, in a thread
where it reads files.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import msgspec

from sllm_faas import logging
from sllm_faas.errors import BadRequest, Conflict, NotFound, SllmError, Unavailable, to_info
from sllm_faas.spec import Tier
from sllm_faas.wire.codec import pack
from sllm_faas.wire.messages import Reply, Request
from sllm_invoker.checkpoints.channel import Resident
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.ingests import listing
from sllm_invoker.logs import BATCH, Filter, LogBook, Record
from sllm_invoker.memory_tier import MemoryTier
from sllm_invoker.relay import Answer

MAX_FOLLOWERS = 256


@dataclass(frozen=True, slots=True)
class OfCheckpoint:
    ref: str


class Requests:
    def __init__(
        self,
        book: LogBook,
        store: CheckpointStore,
        tier: MemoryTier,
        changed: Callable[[], None],
        leave: Callable[[], None],
        on_gpu: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """`changed` is called when a checkpoint has been removed; `on_gpu`: digests of what is whole on a GPU that no
        instance holds."""
        self._leave = leave
        self._book = book
        self._store = store
        self._tier = tier
        self._changed = changed
        self._on_gpu = on_gpu
        self._followers: dict[bytes, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def on_request(self, identity: bytes, request: Request, answer: Answer) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(identity, request, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self, identity: bytes) -> bool:
        """The asker has gone. False when there is no such request."""
        key = self._followers.pop(identity, None)
        if key is None:
            return False
        self._book.unfollow(key)
        return True

    async def _serve(self, identity: bytes, request: Request, answer: Answer) -> None:
        try:
            if request.op == "logs.read":
                await self._logs(identity, _body(Filter, request), answer)
            elif request.op == "node.leave":
                answer(Reply(pack({"leaving": True})))
                self._leave()
            elif request.op == "checkpoint.list":
                answer(Reply(pack({"checkpoints": await self._listing()})))
            else:
                done = await asyncio.to_thread(self._checkpoint, request)
                if request.op == "checkpoint.rm":
                    self._changed()
                answer(Reply(pack(done)))
        except SllmError as error:
            self._refuse(answer, error)
        except Exception as error:
            logging.get("invoker").exception("request_failed", op=request.op)
            self._refuse(answer, error)

    def _refuse(self, answer: Answer, error: Exception) -> None:
        try:
            answer(Reply(error=to_info(error)))
        except SllmError:
            pass  # whoever asked is gone

    async def _listing(self) -> list[dict[str, Any]]:
        """What is on disk, how much of it in memory, and the fastest tier where it is whole. Without the store's
        process nothing is known of memory."""
        found = await asyncio.to_thread(listing, self._store)
        residents: dict[str, Resident] = {}
        with contextlib.suppress(Unavailable):
            residents = {each.digest: each for each in (await self._tier.look()).residents if each.state != "retiring"}
        on_gpu = self._on_gpu()
        for item in found:
            resident = residents.get(item["digest"])
            in_memory: Tier = "dram" if resident is not None and resident.state == "full" else "disk"
            item["tier"] = "gpu" if item["digest"] in on_gpu else in_memory
            item["leases"] = resident.leases if resident is not None else 0
            item["loaded"] = resident.watermark if resident is not None else 0
        return found

    def _checkpoint(self, request: Request) -> dict[str, Any]:
        verbs: dict[str, Callable[[str], object]] = {
            "checkpoint.verify": self._store.verify,
            "checkpoint.rm": self._store.remove,
            "checkpoint.pin": self._store.pin,
            "checkpoint.unpin": self._store.unpin,
        }
        verb = verbs.get(request.op)
        if verb is None:
            raise NotFound(
                f"a node has no operation {request.op[:64]!r}; it has logs.read, node.leave, {', '.join(verbs)}."
            )
        digest = self._store.resolve(_body(OfCheckpoint, request).ref)
        verb(digest)
        return {"digest": digest}

    async def _logs(self, identity: bytes, wanted: Filter, answer: Answer) -> None:
        held: list[Record] | None = []
        if wanted.follow:
            if self._book.followers >= MAX_FOLLOWERS:
                raise Conflict(f"{MAX_FOLLOWERS} readers follow this node's log already.")

            def new(records: list[Record]) -> None:
                if held is not None:
                    held.extend(records)
                else:
                    _send(answer, records, more=True)

            # Followed from before the file is read, so that no line falls between the two.
            self._followers[identity] = self._book.follow(wanted, new)
        records = await asyncio.to_thread(self._book.read, wanted)
        try:
            if wanted.follow:
                assert held is not None
                seen = {id_of(record) for record in records[-len(held) - BATCH :]} if held else set()
                records += [record for record in held if id_of(record) not in seen]
                held = None
            _send(answer, records, more=wanted.follow)
        except SllmError:
            self.cancel(identity)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


def id_of(record: Record) -> tuple[Any, ...]:
    return (record.get("time"), record.get("instance"), record.get("stream"), record.get("text"))


def _send(answer: Answer, records: list[Record], *, more: bool) -> None:
    for start in range(0, len(records), BATCH):
        last = start + BATCH >= len(records)
        answer(Reply(pack({"records": records[start : start + BATCH]}), more=more or not last))
    if not records:
        answer(Reply(pack({"records": []}), more=more))


def _body(kind: type[Any], request: Request) -> Any:
    try:
        return msgspec.msgpack.decode(request.body or b"\x80", type=kind)
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadRequest(f"{request.op}: {error}") from None
