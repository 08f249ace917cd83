"""The operations of `rpc`, and whoever waits for their end: deployments, pulls, questions to gateways.

A change is committed to the store first and told to the machine then, so an error leaves both as they were. Reading
needs the machine alone: it goes on when the store cannot be written.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from sllm_faas.controller import events as ev
from sllm_faas.controller import rpc
from sllm_faas.controller.access import Access, check_name
from sllm_faas.controller.commands import MoveEnded
from sllm_faas.controller.peers import Peer
from sllm_faas.controller.views import Shape, Views
from sllm_faas.errors import (
    BadRequest,
    Conflict,
    ErrorInfo,
    NotFound,
    SllmError,
    Unavailable,
    WireError,
    from_info,
    to_info,
)
from sllm_faas.spec import AppSpec
from sllm_faas.wire import codec
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Ingest, Ingested, Progress, Reply, Request

if TYPE_CHECKING:
    from sllm_faas.controller.service import Controller

ASK = 2.0
"""Seconds that a gateway has to answer a question; one that does not is left out."""

Tell = Callable[[rpc.Stage], None]


@dataclass(slots=True)
class Waiter:
    """Somebody who waits for a deployment or a pull: told every stage, given the end."""

    tell: Tell
    end: asyncio.Future[Any]
    node: str = ""


@dataclass(slots=True)
class Question:
    """A request of ours to a gateway."""

    peer: Peer
    answer: asyncio.Future[Reply]


@dataclass
class Admin:
    controller: Controller
    cordoned: set[str] = field(default_factory=set)
    """Names of cordoned nodes, also of those that are away."""
    _deploys: dict[tuple[str, int], Waiter] = field(default_factory=dict)
    _pulls: dict[str, Waiter] = field(default_factory=dict)
    _questions: dict[bytes, Question] = field(default_factory=dict)
    _moves: dict[str, asyncio.Future[MoveEnded]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.access = Access(self.controller)

    async def load(self) -> None:
        """What the store and the key files know. Raises their errors."""
        nodes = await self.controller.write(self.controller.store.nodes)
        self.cordoned = {node.name for node in nodes if node.cordoned}
        await self.access.load()

    # -- requests and replies --------------------------------------------------------------------------------

    def on_request(self, peer: Peer, identity: bytes, request: Request, buffers: tuple[bytes, ...]) -> None:
        self.controller.spawn(self._serve(peer, identity, request, buffers))

    async def _serve(self, peer: Peer, identity: bytes, request: Request, buffers: tuple[bytes, ...]) -> None:
        def send(reply: Reply) -> None:
            peer.send(codec.encode(Header(Type.REPLY, identity), reply))

        def tell(stage: rpc.Stage) -> None:
            send(Reply(codec.pack(asdict(stage)), more=True))

        try:
            call = rpc.parse(request.op, request.body, buffers)
            answer = await self._run(call, tell)
        except SllmError as error:
            send(Reply(error=to_info(error)))
        except Exception as error:
            self.controller.log.exception("operation failed", op=request.op)
            send(Reply(error=to_info(error)))
        else:
            send(Reply(codec.pack(answer)))

    async def _run(self, call: rpc.Call, tell: Tell) -> Shape:
        name = "_op_" + call.op.replace(".", "_")
        verb = getattr(self, name, None) or getattr(self.access, name)
        result: Shape | Awaitable[Shape]
        if call.op in ("app.deploy", "checkpoint.pull"):
            result = verb(call.body, tell)
        elif call.op == "bundle.put":
            result = verb(call.body, call.buffers)
        else:
            result = verb(call.body)
        return await result if isinstance(result, Awaitable) else result

    @property
    def views(self) -> Views:
        return Views(self.controller.machine.ledger)

    # -- bundles ---------------------------------------------------------------------------------------------

    def _op_bundle_has(self, body: rpc.OfBundle) -> Shape:
        size = self.controller.bundles.size(body.digest)
        return {"digest": body.digest, "present": size is not None, "size": size or 0}

    async def _op_bundle_put(self, body: rpc.OfBundle, buffers: tuple[bytes, ...]) -> Shape:
        if len(buffers) != 1:
            raise BadRequest(f"bundle.put came with {len(buffers)} buffers; it takes one, the archive")
        size = await asyncio.to_thread(self.controller.bundles.put, body.digest, buffers[0])
        return {"digest": body.digest, "size": size}

    # -- apps ------------------------------------------------------------------------------------------------

    async def _op_app_deploy(self, body: rpc.Deploy, tell: Tell) -> Shape:
        spec, began = body.spec, self.controller.now()
        if spec.bundle and self.controller.bundles.size(spec.bundle) is None:
            raise NotFound(
                f"bundle {spec.bundle[:16]}… was not uploaded", hint="Upload it, then deploy.", param="bundle"
            )
        serving = self._unchanged(spec)
        if serving is None:
            tell(rpc.Stage("register", text=f"registering {spec.name}"))
            number = await self.controller.write(lambda: self.controller.store.add_version(spec, time.time()))
            waiter = Waiter(tell, asyncio.get_running_loop().create_future())
            self._deploys[spec.name, number] = waiter
            try:
                if not self.controller.feed(ev.VersionAdded(spec.name, number, spec, time.time())):
                    raise Conflict(f"version {number} of {spec.name} exists already", hint="Deploy again.")
                serving = await waiter.end
            finally:
                del self._deploys[spec.name, number]
            unchanged = serving != number
        else:
            unchanged = True
        seconds = round(self.controller.now() - began, 3)
        return {"app": spec.name, "version": serving, "unchanged": unchanged, "seconds": seconds}

    def _unchanged(self, spec: AppSpec) -> int | None:
        """The active version when it is the same. One with checkpoints is checked again: their source may hold other
        weights by now; the machine compares what the check finds."""
        app = self.controller.machine.state.apps.get(spec.name)
        active = app.versions.get(app.active) if app else None
        if active is None or active.spec != spec or any(function.checkpoint for function in spec.functions):
            return None
        return active.number

    def advance(self, app: str, number: int, stage: str, text: str) -> None:
        waiter = self._deploys.get((app, number))
        if waiter is not None:
            waiter.tell(rpc.Stage(stage, text=text))

    def deploy_ended(self, app: str, number: int, serving: int, error: ErrorInfo | None) -> None:
        waiter = self._deploys.get((app, number))
        if waiter is not None and not waiter.end.done():
            if error is not None:
                waiter.end.set_exception(from_info(error))
            else:
                waiter.end.set_result(serving)

    def _op_app_list(self, _body: rpc.Nothing) -> Shape:
        return {"apps": self.views.app_lines()}

    def _op_app_get(self, body: rpc.OfApp) -> Shape:
        return self.views.app_whole(body.app)

    async def _op_app_delete(self, body: rpc.OfApp) -> Shape:
        self.views.app(body.app)
        await self.controller.write(lambda: self.controller.store.delete_app(body.app))
        running = [i for i in self.controller.machine.state.instances.values() if i.target.app == body.app]
        self.controller.feed(ev.AppDeleted(body.app))
        return {"app": body.app, "deleted": True, "instances": len(running)}

    async def _op_app_rollback(self, body: rpc.Rollback) -> Shape:
        app = self.views.app(body.app)
        before = app.active
        number = body.version
        ready = [version.number for version in app.versions.values() if version.state == "ready"]
        if number is None:
            line = await self.controller.write(lambda: self.controller.store.activations(body.app))
            # The one that served before this one did, by history; version numbers may have gone back and forth.
            number = next((one for one in line if one != before and one in ready), None)
            if number is None:
                raise Conflict(f"app {body.app!r} has no earlier version to go back to", param="version")
        if number not in ready:
            listed = ", ".join(map(str, sorted(ready))) or "none"
            raise NotFound(f"app {body.app!r} has no ready version {number}; ready: {listed}", param="version")
        if number != before:
            chosen = number
            await self.controller.write(lambda: self.controller.store.activate(body.app, chosen, time.time()))
            self.controller.feed(ev.VersionActivated(body.app, number))
        return {"app": body.app, "version": number, "from": before or None}

    # -- instances and nodes ---------------------------------------------------------------------------------

    def _op_instance_list(self, body: rpc.MaybeApp) -> Shape:
        if body.app is not None:
            check_name(body.app)
        return {"instances": self.views.instances(body.app, self.controller.now())}

    def _op_instance_stop(self, body: rpc.StopInstance) -> Shape:
        if body.instance not in self.controller.machine.state.instances:
            raise NotFound(f"instance {body.instance!r} does not exist", hint="See `sllm ps`.", param="instance")
        if body.drain is not None and not 0 <= body.drain <= 86400:
            raise BadRequest(f"drain is {body.drain!r} seconds; allowed: 0 to 86400", param="drain")
        self.controller.feed(ev.InstanceStopAsked(body.instance, body.drain))
        return {"instance": body.instance, "stopping": True}

    def _op_node_list(self, _body: rpc.Nothing) -> Shape:
        return {"nodes": self.views.nodes()}

    async def _op_node_cordon(self, body: rpc.OfNode) -> Shape:
        return await self._cordon(body.node, True)

    async def _op_node_uncordon(self, body: rpc.OfNode) -> Shape:
        return await self._cordon(body.node, False)

    async def _op_node_drain(self, body: rpc.OfNode) -> Shape:
        await self._cordon(body.node, True)
        self.controller.feed(ev.NodeDrained(body.node))
        return self.views.node(self.views.find_node(body.node))

    async def _cordon(self, name: str, cordoned: bool) -> Shape:
        info = self.views.find_node(name).info
        store = self.controller.store
        await self.controller.write(lambda: store.save_node(name, cordoned=cordoned, info=info))
        (self.cordoned.add if cordoned else self.cordoned.discard)(name)
        self.controller.feed(ev.NodeCordoned(name, cordoned))
        return self.views.node(self.views.find_node(name))

    # -- reading ---------------------------------------------------------------------------------------------

    def _op_status(self, _body: rpc.Nothing) -> Shape:
        controller = self.controller
        return {
            "controller": {
                "life": controller.life,
                "uptime": round(time.time() - controller.started, 3),
                "pid": os.getpid(),
                "version": metadata.version("sllm-faas"),
            },
            **self.views.status(),
            "dropped": dict(controller.dropped),
            "storage": {"ok": not controller.storage_error, "error": controller.storage_error},
        }

    def _op_describe_function(self, body: rpc.OfFunction) -> Shape:
        return self.views.describe_function(body.app, body.function, self.controller.now())

    def _op_describe_node(self, body: rpc.OfNode) -> Shape:
        return self.views.describe_node(body.node, self.controller.now())

    # -- checkpoints -----------------------------------------------------------------------------------------

    async def _op_checkpoint_pull(self, body: rpc.Pull, tell: Tell) -> Shape:
        checkpoint = body.checkpoint()
        names = [node.name for node in self.controller.machine.ledger.open_nodes()]
        if body.node is not None:
            names = [self.views.find_node(body.node).name]
        peers = [peer for name in sorted(names) if (peer := self.controller.peers.get("invoker", name)) is not None]
        if not peers:
            raise Unavailable("no node is up to pull the checkpoint", hint="See `sllm node list`.", retry_after=1.0)
        peer, request = peers[0], f"pull-{secrets.token_hex(8)}"
        waiter = Waiter(tell, asyncio.get_running_loop().create_future(), peer.name)
        self._pulls[request] = waiter
        try:
            tell(rpc.Stage("pull", text=f"pulling {checkpoint.source} on {peer.name}"))
            peer.send(codec.encode(Header(Type.INGEST), Ingest(request, checkpoint, body.name, body.base)))
            done = await waiter.end
        finally:
            del self._pulls[request]
        return {"name": body.name, "digest": done.digest, "bytes": done.bytes, "node": peer.name}

    def on_ingested(self, peer: Peer, body: Ingested) -> None:
        waiter = self._pulls.get(body.request)
        if waiter is None or waiter.node != peer.name or waiter.end.done():
            return
        if body.error is not None:
            waiter.end.set_exception(from_info(body.error))
        else:
            waiter.end.set_result(body)

    def on_progress(self, body: Progress) -> None:
        """Of a check (`app@version`) or a pull."""
        app, _, number = body.request.rpartition("@")
        waiter = self._pulls.get(body.request)
        if waiter is None and number.isdecimal():
            waiter = self._deploys.get((app, int(number)))
        if waiter is not None:
            waiter.tell(rpc.Stage(body.stage, body.done, body.total))

    # -- invocations: the gateways know ----------------------------------------------------------------------

    async def _op_invocation_get(self, body: rpc.OfInvocation) -> Shape:
        return await self._ask_owner("invocation.get", body.id)

    async def _op_invocation_cancel(self, body: rpc.OfInvocation) -> Shape:
        return await self._ask_owner("invocation.cancel", body.id)

    async def _op_invocation_migrate(self, body: rpc.MigrateInvocation) -> Shape:
        node = self.views.find_node(body.node).name
        record = (await self._ask_owner("invocation.get", body.id))["invocation"]
        if record is None:
            raise NotFound(f"there is no invocation {body.id}", hint="Gateways keep the last ones only.", param="id")
        instance, state = str(record.get("instance") or ""), record.get("state")
        if not record.get("node") or state not in ("dispatched", "streaming"):
            raise Conflict(f"{body.id} does not run now: it is {state}", param="id")
        machine = self.controller.machine
        if refusal := machine.scaler.migrations.refusal(instance, node):
            raise Conflict(f"{body.id} cannot move to {node}: {refusal}", param="node")
        request = f"move-{secrets.token_hex(8)}"
        end = self._moves[request] = asyncio.get_running_loop().create_future()
        try:
            if not self.controller.feed(ev.MigrationAsked(instance, node, (body.id.removeprefix("inv-"),), request)):
                raise Conflict(f"{body.id} cannot move to {node} now", hint="Try again.")
            move = await end
        finally:
            del self._moves[request]
        result = move.result
        if result is None or result.outcome == "kept":
            raise Conflict(f"{body.id} stays where it is: {move.why or 'no reason was given'}", hint="Try again later.")
        return {
            "invocation": body.id,
            "outcome": result.outcome,
            "from": record["node"],
            "to": move.node,
            "instance": move.to,
            "predicted": move.predicted,
            "seconds": result.total,
            "paused": result.paused,
            "rounds": result.rounds,
            "tokens": result.tokens,
        }

    def move_ended(self, move: MoveEnded) -> None:
        waiter = self._moves.get(move.request)
        if waiter is not None and not waiter.done():
            waiter.set_result(move)

    async def _ask_owner(self, op: str, invocation: str) -> Shape:
        """The answer of the gateway that knows the invocation."""
        for answer in await self._ask_all(op, {"id": invocation}):
            if answer.get("invocation") is not None:
                return answer
        return {"invocation": None}

    async def _op_invocation_list(self, body: rpc.ListInvocations) -> Shape:
        if not 1 <= body.limit <= 10_000:
            raise BadRequest(f"limit is {body.limit}; allowed: 1 to 10000", param="limit")
        answers = await self._ask_all("invocation.list", {"app": body.app, "limit": body.limit})
        found = [record for answer in answers for record in answer.get("invocations", ()) if isinstance(record, dict)]
        found.sort(key=_began, reverse=True)
        return {"invocations": found[: body.limit]}

    async def _ask_all(self, op: str, body: Shape) -> list[Shape]:
        """The answers of those gateways that give one in time."""
        asked = [self._ask(peer, op, body) for peer in self.controller.peers.of_role("gateway")]
        answers = await asyncio.gather(*asked)
        return [answer for answer in answers if answer is not None]

    async def _ask(self, peer: Peer, op: str, body: Shape) -> Shape | None:
        identity = secrets.token_bytes(16)
        question = Question(peer, asyncio.get_running_loop().create_future())
        self._questions[identity] = question
        try:
            if not peer.send(codec.encode(Header(Type.REQUEST, identity), Request(op, codec.pack(body)))):
                return None
            async with asyncio.timeout(ASK):
                reply = await question.answer
            return None if reply.error is not None else codec.unpack_as(dict[str, Any], reply.body)
        except (TimeoutError, WireError, Unavailable):
            return None
        finally:
            del self._questions[identity]

    def on_reply(self, peer: Peer, identity: bytes, reply: Reply) -> None:
        question = self._questions.get(identity)
        if question is not None and question.peer is peer and not reply.more and not question.answer.done():
            question.answer.set_result(reply)

    def peer_gone(self, peer: Peer) -> None:
        """Whoever waits for it waits no more."""
        gone = Unavailable(f"{peer.name} went away", retry_after=1.0)
        for question in self._questions.values():
            if question.peer is peer and not question.answer.done():
                question.answer.set_exception(gone)
        for waiter in self._pulls.values():
            if peer.role == "invoker" and waiter.node == peer.name and not waiter.end.done():
                waiter.end.set_exception(gone)


def _began(record: Shape) -> float:
    began = record.get("began", 0.0)
    return float(began) if isinstance(began, int | float) else 0.0
