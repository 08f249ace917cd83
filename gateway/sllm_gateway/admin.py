"""Administration over HTTP: each request is one operation of the controller, or one asked of every invoker.

What the operations mean, take and answer is in `sllm_faas.controller.rpc`; here are only their paths, who may use
them, and how progress is shown. Nothing is remembered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from sllm_faas.errors import BadRequest, NotFound, SllmError, Unavailable
from sllm_gateway.auth import Gate, Principal, Scope
from sllm_gateway.dispatcher import Dispatcher
from sllm_gateway.errors import info_of, shape
from sllm_gateway.exchange import Exchange
from sllm_gateway.rpc import TIMEOUT
from sllm_gateway.sse import EVENT_STREAM, PING, QUIET, json_event

NDJSON = b"application/x-ndjson"
MAX_LINES = 100_000
Endpoint = Callable[[Exchange], Awaitable[None]]
Body = Callable[[Exchange], Awaitable[dict[str, Any]]]
_encode = msgspec.json.Encoder().encode
_object = msgspec.json.Decoder(dict[str, Any])


class Admin:
    def __init__(self, dispatcher: Dispatcher, gate: Gate) -> None:
        self._dispatcher = dispatcher
        self._gate = gate

    # -- one question to the controller ----------------------------------------------------------------------

    def ask(
        self,
        op: str,
        scope: Scope,
        body: Body,
        *,
        listed: str = "",
        status: int = 200,
        patience: float | None = TIMEOUT,
    ) -> Endpoint:
        """An endpoint for `op`. `listed` names the answer's list that a token limited to apps sees only part of;
        without it, and without an app in the path, such a token may not ask. `patience`: seconds for the answer."""

        async def endpoint(exchange: Exchange) -> None:
            principal = self._admit(exchange, scope, listed)
            answer = await self._dispatcher.controller.call(op, await body(exchange), patience=patience)
            if listed and principal.apps:
                answer[listed] = [one for one in answer[listed] if principal.sees(one.get("app") or one.get("name"))]
            await exchange.respond(_encode(answer), status)

        return endpoint

    def ask_progress(self, op: str, scope: Scope, body: Body) -> Endpoint:
        """An endpoint for a long `op`: its progress as events, or the final answer alone."""

        async def endpoint(exchange: Exchange) -> None:
            self._admit(exchange, scope, "")
            replies = self._dispatcher.controller.stream(op, await body(exchange), patience=None)
            if exchange.accepts("text/event-stream"):
                await _progress(exchange, replies)
                return
            answer = None
            async for _, each in replies:
                answer = each
            await exchange.respond(_encode(answer))

        return endpoint

    def _admit(self, exchange: Exchange, scope: Scope, listed: str) -> Principal:
        app = exchange.params.get("app", "")
        principal = self._gate.admit(exchange, scope, app)
        exchange.app = app
        if not app and not listed:
            self._gate.check_all_apps(principal)
        return principal

    # -- bundles ---------------------------------------------------------------------------------------------

    async def bundle_head(self, exchange: Exchange) -> None:
        self._gate.admit(exchange, "deploy")
        answer = await self._dispatcher.controller.call("bundle.has", {"digest": exchange.params["digest"]})
        await exchange.respond(b"", 200 if answer["present"] else 404)

    async def bundle_put(self, exchange: Exchange) -> None:
        self._gate.admit(exchange, "deploy")
        data = await exchange.body()
        if not data:
            raise BadRequest("The body is empty; a bundle was expected.")
        digest = exchange.params["digest"]
        answer = await self._dispatcher.controller.call("bundle.put", {"digest": digest}, data)
        await exchange.respond(_encode(answer), 201)

    # -- questions to every invoker --------------------------------------------------------------------------

    async def checkpoints(self, exchange: Exchange) -> None:
        self._gate.check_all_apps(self._gate.admit(exchange, "read"))
        answers = await self._ask_nodes("checkpoint.list", {})
        found = [{**item, "node": node} for node, answer in answers.items() for item in answer["checkpoints"]]
        await exchange.respond(_encode({"checkpoints": found}))

    def checkpoint(self, op: str) -> Endpoint:
        """An endpoint that does `op` on every node that has the checkpoint."""

        async def endpoint(exchange: Exchange) -> None:
            self._gate.check_all_apps(self._gate.admit(exchange, "deploy"))
            answers = await self._ask_nodes(op, {"ref": exchange.params["ref"]})
            await exchange.respond(_encode({"ref": exchange.params["ref"], "nodes": answers}))

        return endpoint

    async def _ask_nodes(self, op: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answers by node. Nodes that do not know what is meant are left out, unless none does."""
        nodes = dict(self._dispatcher.nodes)
        if not nodes:
            raise Unavailable("No invoker is connected.", hint="Is a node up? See `sllm node list`.", retry_after=1.0)
        patience = None if op == "checkpoint.verify" else 30.0
        results = await asyncio.gather(
            *(rpc.call(op, body, patience=patience) for rpc in nodes.values()), return_exceptions=True
        )
        answers, missing = {}, None
        for node, result in zip(nodes, results, strict=True):
            if isinstance(result, NotFound):
                missing = result
            elif isinstance(result, BaseException):
                raise result
            else:
                answers[node] = result
        if not answers and missing is not None:
            raise missing
        return answers

    async def restart_node(self, exchange: Exchange) -> None:
        """Ask the invoker to leave in order; whoever supervises it starts it again."""
        self._gate.check_all_apps(self._gate.admit(exchange, "admin"))
        node = exchange.params["node"]
        rpc = self._dispatcher.nodes.get(node)
        if rpc is None:
            raise NotFound(f"Node {node!r} is not connected.", hint="See `sllm node list`.", param="node")
        connected = rpc.send is not None
        try:
            answer = await rpc.call("node.leave", {})
        except Unavailable:
            if not connected:
                raise
            answer = {"leaving": True}  # and gone, before its answer was here
        await exchange.respond(_encode(answer), 202)

    # -- logs ------------------------------------------------------------------------------------------------

    async def logs(self, exchange: Exchange) -> None:
        """JSON lines, oldest first; with follow=1, events that go on."""
        query = exchange.query()
        principal = self._gate.admit(exchange, "read", query.get("app", ""))
        if not query.get("app"):
            self._gate.check_all_apps(principal)
        body = _log_filter(query)
        if body["follow"]:
            await self._follow(exchange, body)
            return
        answers = await self._ask_nodes_all("logs.read", body)
        records = sorted(answers, key=lambda each: each.get("time", 0.0))
        if body["lines"] is not None:
            records = records[len(records) - min(body["lines"], len(records)) :]
        await exchange.respond(b"".join(_encode(each) + b"\n" for each in records), 200, NDJSON)

    async def _ask_nodes_all(self, op: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        async def one(node: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            rpc = self._dispatcher.nodes.get(node)
            if rpc is not None:
                async for _, answer in rpc.stream(op, body):
                    found += answer["records"] if answer else []
            return found

        batches = await asyncio.gather(*(one(node) for node in list(self._dispatcher.nodes)))
        return [each for batch in batches for each in batch]

    async def _follow(self, exchange: Exchange, body: dict[str, Any]) -> None:
        inbox: asyncio.Queue[dict[str, Any] | SllmError | None] = asyncio.Queue(10_000)

        async def one(node: str) -> None:
            try:
                async for _, answer in self._dispatcher.nodes[node].stream("logs.read", body, patience=None):
                    for each in answer["records"] if answer else ():
                        await inbox.put(each)
            except SllmError as error:
                await inbox.put(error)

        async def gone() -> None:
            while (await exchange.receive())["type"] != "http.disconnect":
                pass
            await inbox.put(None)

        tasks = [asyncio.ensure_future(one(node)) for node in list(self._dispatcher.nodes)]
        tasks.append(asyncio.ensure_future(gone()))
        await exchange.start(200, EVENT_STREAM)
        try:
            while True:
                try:
                    async with asyncio.timeout(QUIET):
                        each = await inbox.get()
                except TimeoutError:
                    await exchange.write(PING)
                    continue
                if each is None:
                    return
                if isinstance(each, SllmError):
                    await exchange.finish(_error_event(each, exchange))
                    return
                await exchange.write(json_event(each, name=b"log"))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _progress(exchange: Exchange, replies: AsyncIterator[tuple[bool, Any]]) -> None:
    """`progress` events, then `result` or `error`; pings between."""
    await exchange.start(200, EVENT_STREAM)
    pending = asyncio.ensure_future(anext(replies))
    try:
        while True:
            await asyncio.wait({pending}, timeout=QUIET)
            if not pending.done():
                await exchange.write(PING)
                continue
            final, answer = pending.result()
            if final:
                await exchange.finish(json_event(answer, name=b"result"))
                return
            await exchange.write(json_event(answer, name=b"progress"))
            pending = asyncio.ensure_future(anext(replies))
    except SllmError as error:
        await exchange.finish(_error_event(error, exchange))
    finally:
        pending.cancel()


def _error_event(error: SllmError, exchange: Exchange) -> bytes:
    info = info_of(error)
    exchange.code = info.code
    return json_event(shape(info, exchange.request_id, owner=exchange.owner), name=b"error")


def _log_filter(query: dict[str, str]) -> dict[str, Any]:
    body: dict[str, Any] = {name: query.get(name) or None for name in ("app", "function", "instance", "invocation")}
    try:
        body["since"] = float(query["since"]) if query.get("since") else None
        body["lines"] = int(query["lines"]) if query.get("lines") else None
    except ValueError:
        raise BadRequest("since is Unix time in seconds, lines a whole number.", param="since") from None
    if body["lines"] is not None and not 0 <= body["lines"] <= MAX_LINES:
        raise BadRequest(f"lines is {body['lines']}; allowed: 0 to {MAX_LINES}.", param="lines")
    if body["invocation"]:
        body["invocation"] = body["invocation"].removeprefix("inv-")
    body["follow"] = query.get("follow", "") in ("1", "true")
    return body


# -- bodies of questions -------------------------------------------------------------------------------------


async def nothing(_exchange: Exchange) -> dict[str, Any]:
    return {}


async def path(exchange: Exchange) -> dict[str, Any]:
    """What the path names."""
    return dict(exchange.params)


async def instance_stop(exchange: Exchange) -> dict[str, Any]:
    drain = exchange.query().get("drain", "")
    try:
        return {**exchange.params, **({"drain": float(drain)} if drain else {})}
    except ValueError:
        raise BadRequest(f"drain is {drain[:40]!r}; allowed: seconds.", param="drain") from None


async def app_query(exchange: Exchange) -> dict[str, Any]:
    return {"app": exchange.query().get("app") or None}


async def path_and_json(exchange: Exchange) -> dict[str, Any]:
    """The body's fields, and what the path names. Raises BadRequest unless the body is a JSON object (or empty)."""
    data = await exchange.body()
    if not data:
        return dict(exchange.params)
    try:
        fields = _object.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadRequest(f"The body is not a JSON object: {error}.") from None
    for name, value in exchange.params.items():
        if fields.get(name, value) != value:
            raise BadRequest(f"{name} is {fields[name]!r} in the body and {value!r} in the path.", param=name)
    return {**fields, **exchange.params}


async def deployment(exchange: Exchange) -> dict[str, Any]:
    """`{"spec": AppSpec}`, of the app in the path."""
    fields = await path_and_json(exchange)
    spec = fields.get("spec")
    if not isinstance(spec, dict):
        raise BadRequest('The body has no "spec" object.', param="spec")
    app = exchange.params["app"]
    if spec.get("name") != app:
        raise BadRequest(f"spec.name is {spec.get('name')!r}; the path names app {app!r}.", param="spec.name")
    return {"spec": spec}
