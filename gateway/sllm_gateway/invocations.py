"""What was invoked lately, and streams whose gateway died: GET, DELETE /v1/invocations…

A gateway keeps its own recent invocations in a bounded ring, without arguments and outputs; the controller asks all
gateways for each other's. Re-attaching takes an invocation over (`adoption`) and renders it as it was begun.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

from sllm_faas.errors import BadRequest, NotFound, Unavailable
from sllm_gateway import note
from sllm_gateway.adoption import Adoptions
from sllm_gateway.auth import Gate
from sllm_gateway.dispatcher import Dispatcher
from sllm_gateway.exchange import Exchange, invocation_id, invocation_text
from sllm_gateway.handle import Handle
from sllm_gateway.openai_render import writer_of
from sllm_gateway.sse import EventWriter, RecordWriter
from sllm_gateway.stream import Streams
from sllm_gateway.timeline import record

KEPT = 2_000
MAX_LIST = 1_000
_encode = msgspec.json.Encoder().encode


class Recent:
    """The ring. Handles hold no payload once they have ended."""

    def __init__(self, gateway: str, kept: int = KEPT) -> None:
        self._gateway = gateway
        self._kept = kept
        self._ring: OrderedDict[bytes, Handle] = OrderedDict()

    def add(self, handle: Handle) -> None:
        self._ring[handle.inv.id] = handle
        if len(self._ring) > self._kept:
            self._ring.popitem(last=False)

    def get(self, identity: bytes) -> Handle | None:
        return self._ring.get(identity)

    def newest(self, app: str, limit: int, running: list[Handle]) -> list[dict[str, Any]]:
        found: dict[bytes, Handle] = {}
        for handle in (*sorted(running, key=lambda each: -each.began), *reversed(self._ring.values())):
            if len(found) >= limit:
                break
            if not app or handle.inv.target.app == app:
                found.setdefault(handle.inv.id, handle)
        return [record(handle, self._gateway) for handle in found.values()]

    def record(self, handle: Handle) -> dict[str, Any]:
        return record(handle, self._gateway)


class Invocations:
    def __init__(
        self, dispatcher: Dispatcher, gate: Gate, streams: Streams, recent: Recent, adoptions: Adoptions
    ) -> None:
        self._dispatcher = dispatcher
        self._gate = gate
        self._streams = streams
        self._recent = recent
        self._adoptions = adoptions
        dispatcher.answers.operations["invocation.get"] = self._asked_get
        dispatcher.answers.operations["invocation.list"] = self._asked_list
        dispatcher.answers.operations["invocation.cancel"] = self._asked_cancel

    # -- HTTP ------------------------------------------------------------------------------------------------

    async def list(self, exchange: Exchange) -> None:
        principal = self._gate.admit(exchange, "read")
        query = exchange.query()
        app, limit = query.get("app", ""), _limit(query.get("limit", "100"))
        if app:
            self._gate.check_app(principal, app)
        try:
            answer = await self._dispatcher.controller.call("invocation.list", {"app": app or None, "limit": limit})
            found = answer["invocations"]
        except Unavailable:  # this gateway's own are better than none
            found = self._recent.newest(app, limit, self._dispatcher.handles())
        found = [each for each in found if principal.sees(each["app"])]
        await exchange.respond(_encode({"invocations": found}))

    async def get(self, exchange: Exchange) -> None:
        principal = self._gate.admit(exchange, "read")
        identity = invocation_id(exchange.params["id"])
        handle = self._find(identity)
        if handle is not None:
            found = self._recent.record(handle)
        else:
            answer = await self._dispatcher.controller.call("invocation.get", {"id": invocation_text(identity)})
            found = answer["invocation"]
        if found is None or not principal.sees(found["app"]):
            raise _unknown(identity)
        await exchange.respond(_encode(found))

    async def events(self, exchange: Exchange) -> None:
        """Go on with a stream whose gateway died, after Last-Event-ID."""
        principal = self._gate.admit(exchange, "invoke")
        identity = invocation_id(exchange.params["id"])
        first = _first(exchange.header(b"last-event-id"))
        handle = await self._adoptions.adopt(identity, first)
        target = handle.inv.target
        exchange.app, exchange.function = target.app, target.function
        try:
            self._gate.check_app(principal, target.app)
        except Exception:
            handle.cancel()
            raise
        begun = note.unpack(handle.adopted)
        if begun.kind != "function":
            await self._streams.stream(exchange, handle, writer_of(begun, resumed=first > 0))
        elif handle.inv.encoding == "msgpack":
            await self._streams.stream(exchange, handle, RecordWriter())
        else:
            await self._streams.stream(exchange, handle, EventWriter())

    async def delete(self, exchange: Exchange) -> None:
        principal = self._gate.admit(exchange, "invoke")
        identity = invocation_id(exchange.params["id"])
        handle = self._find(identity)
        if handle is None:
            answer = await self._dispatcher.controller.call("invocation.cancel", {"id": invocation_text(identity)})
            found = answer["invocation"]
        elif principal.sees(handle.inv.target.app):
            handle.cancel()
            found = self._recent.record(handle)
        else:
            found = None
        if found is None:
            raise _unknown(identity)
        await exchange.respond(_encode(found), 202)

    # -- the controller asks ---------------------------------------------------------------------------------

    def _asked_get(self, body: dict[str, Any]) -> dict[str, Any]:
        handle = self._find(invocation_id(str(body.get("id", ""))))
        return {"invocation": self._recent.record(handle) if handle is not None else None}

    def _asked_list(self, body: dict[str, Any]) -> dict[str, Any]:
        limit = _limit(str(body.get("limit", 100)))
        return {"invocations": self._recent.newest(body.get("app") or "", limit, self._dispatcher.handles())}

    def _asked_cancel(self, body: dict[str, Any]) -> dict[str, Any]:
        handle = self._find(invocation_id(str(body.get("id", ""))))
        if handle is None:
            return {"invocation": None}
        handle.cancel()
        return {"invocation": self._recent.record(handle)}

    def _find(self, identity: bytes) -> Handle | None:
        return self._dispatcher.handle(identity) or self._recent.get(identity)


def _unknown(identity: bytes) -> NotFound:
    return NotFound(f"There is no invocation {invocation_text(identity)}.", hint=f"Each gateway keeps its last {KEPT}.")


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_LIST:
        raise BadRequest(f"limit is {text[:40]!r}; allowed: 1 to {MAX_LIST}.", param="limit")
    return int(text)


def _first(last_event_id: str) -> int:
    """The ordinal after the last one seen."""
    if not last_event_id:
        return 0
    if not last_event_id.isascii() or not last_event_id.isdigit() or int(last_event_id) >= 2**32 - 1:
        raise BadRequest(f"Last-Event-ID is {last_event_id[:40]!r}; allowed: the integer id of an event.")
    return int(last_event_id) + 1
