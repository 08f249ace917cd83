"""What gateways may ask the controller: the ops, their bodies, the shapes of their replies. No behaviour here.

`REQUEST{op, body}` carries a msgpack map; `REPLY{body}` a msgpack map too, JSON-able throughout (text, numbers,
booleans, None, lists, maps with text keys), so a gateway may hand it on as JSON. An error is `REPLY{error}`.
A body with an unknown op, a missing field or a value of the wrong type is a `BadRequest` (`BadSpec` for a spec).

    E (an error)     {code, message, hint, param, status, retry_after, type, traceback} | None
    S (scaling)      {min_containers, max_containers, buffer_containers, scaledown_window, target_tokens}
    T (timeline)     {began: unix seconds, spans: [{name, start, seconds, detail}]}
    I (an instance)  {instance, app, function, version, target, parameters, node, number, state, concurrency, warmth,
                      pid, running, memory_mb, age, ready_for: s | None, predicted: s, actual: s | None, why,
                      timeline: T}
                     state: requested | starting | ready | draining
    N (a node)       {name, state: up | lost, endpoint, cordoned, draining, memory_mb, memory_used_mb,
                      memory_free_mb | None, disk_free_mb | None, cores, gpus, labels, bandwidth, checkpoints: [digest],
                      resident: [digest] in DRAM, running, instances: count, life}
    F (a function)   {app, name, kind, version, methods: [{name, stream, is_async, batched}], parameters: [{name, type,
                      required, default}], concurrency, max_queue, timeouts: {queue, startup, first_output, idle,
                      execution}, scaling: S, memory_mb, secrets: [name], checkpoint: {source, revision, dtype, digest,
                      bytes} | None, instances: {requested, starting, ready, draining}, waiting, running}
    V (a version)    {version, state: checking | warming | ready | failed, active, created: unix seconds, error: E,
                      bundle, functions: [name]}

    M (a move made)  {invocation, function, from, source, to, instance, outcome: moved | ended | kept, why, reason,
                      predicted, seconds, paused, rounds, tokens, sent, ended: age s}
    O (one going on) {source, from, to, instance, state: waiting | moving | resting, reason, predicted, age, tries,
                      next: s | None, invocations: [hex id], none for all}

    op                  body                                  reply
    bundle.has          {digest}                              {digest, present, size}
    bundle.put          {digest} + buffer                     {digest, size}
    app.deploy          {spec: AppSpec}                       more=True {stage, done, total, text} …, then
                                                              {app, version, unchanged, seconds}; a failed one is an
                                                              error with the user's traceback
    app.list            {}                                    {apps: [{name, version | None, created, functions: [name],
                                                              instances, deploying: version | None}]}
    app.get             {app}                                 {app, version | None, weight, max_concurrency,
                                                              functions: [F], versions: [V] newest first}
    app.delete          {app}                                 {app, deleted: true, instances: stopping now}
    app.rollback        {app, version: int | None}            {app, version, from: int | None}; None = the ready version
                                                              before the active one
    instance.list       {app: text | None}                    {instances: [I]}
    instance.stop       {instance, drain: s | None}           {instance, stopping: true}
    node.list           {}                                    {nodes: [N]}
    node.cordon         {node}                                N      node.uncordon, node.drain: the same
    invocation.migrate  {id, node}                            {invocation, outcome: moved | ended, from, to, instance,
                                                              predicted, seconds, paused, rounds, tokens}, when it has
                                                              ended; one that was kept is an error
    token.create        {name, scopes, apps, expires_in}      {name, token, scopes, apps, expires: unix | None}
    token.list          {}                                    {tokens: [{name, scopes, apps, created, expires}]}
    token.delete        {name}                                {name, deleted: true}
    join.create         {expires_in}                          {token, endpoint, expires}
    join.list           {}                                    {tokens: [{key, created, expires, used, revoked}]}
    join.revoke         {key}                                 {key, revoked: true}
    status              {}                                    {controller: {life, uptime, pid, version},
                                                              counts: {apps, functions, nodes, nodes_lost, gateways,
                                                              instances: {requested, starting, ready, draining},
                                                              waiting, running}, nodes: [N], gateways: [{name, life,
                                                              waiting, running}], apps: [as app.list],
                                                              queues: [{target, waiting, running, desired, instances:
                                                              {…}, blocked: text}], moving: count,
                                                              estimates: {starts, mean_error}, dropped: {frame type:
                                                              count}, storage: {ok, error}}
    describe.function   {app, function}                       F + {desired, targets: [{target, parameters, version,
                                                              desired, waiting, running, failures, retry_in: s | None,
                                                              error: E, placement: text, blocked: text,
                                                              instances: [I]}], starts: [{instance, node, state, warmth,
                                                              tier, predicted, actual, why, timeline: T, error: E,
                                                              ended: age s}] newest first}
                                                              + {moves: [M], moving: [O], copies: [{checkpoint, digest,
                                                              nodes: [name], coming: name | None, tries, next: s | None,
                                                              error: text}]}
    describe.node       {node}                                N + {instances_list: [I], estimates: {key: value},
                                                              starts, moves, moving: as above}
    checkpoint.pull     {source, revision, dtype,            more=True {stage, done, total, text} …, then
                         tensor_parallel, name, base,         {name, digest, bytes, node}
                         node: text | None}
    invocation.get      {id}                                  {invocation: the gateway's record | None}
    invocation.cancel   {id}                                  the same, after its gateway has cancelled it
    invocation.list     {app: text | None, limit}             {invocations: [gateways' records], newest first by
                                                              their `began`}; asks every gateway with the same op

A gateway that is asked `invocation.get {id}` or `invocation.cancel {id}` answers {invocation: record | None}; for
`invocation.list` it answers {invocations: […]}.

Links (both kinds of peer): HELLO is answered by WELCOME, for a gateway then ROUTES. The controller answers
a frame from a peer that it does not know (it has restarted, or thought the peer lost) with BYE: the peer says HELLO
again, with everything it knows. An invoker's reports come in HELLO; a gateway sends its whole DEMAND after ROUTES.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from sllm_faas.errors import BadRequest, BadSpec
from sllm_faas.spec import AppSpec, CheckpointSpec

SCOPES = ("admin", "deploy", "invoke", "read")


@dataclass(frozen=True, slots=True)
class Nothing:
    pass


@dataclass(frozen=True, slots=True)
class OfBundle:
    digest: str


@dataclass(frozen=True, slots=True)
class Deploy:
    spec: AppSpec


@dataclass(frozen=True, slots=True)
class OfApp:
    app: str


@dataclass(frozen=True, slots=True)
class Rollback:
    app: str
    version: int | None = None


@dataclass(frozen=True, slots=True)
class MaybeApp:
    app: str | None = None


@dataclass(frozen=True, slots=True)
class StopInstance:
    instance: str
    drain: float | None = None


@dataclass(frozen=True, slots=True)
class OfNode:
    node: str


@dataclass(frozen=True, slots=True)
class TokenCreate:
    """`expires_in` in seconds, None for never. `apps` empty: all."""

    name: str
    scopes: tuple[str, ...] = ("invoke",)
    apps: tuple[str, ...] = ()
    expires_in: float | None = None


@dataclass(frozen=True, slots=True)
class OfToken:
    name: str


@dataclass(frozen=True, slots=True)
class JoinCreate:
    expires_in: float = 3600.0


@dataclass(frozen=True, slots=True)
class OfKey:
    key: str


@dataclass(frozen=True, slots=True)
class OfFunction:
    app: str
    function: str


@dataclass(frozen=True, slots=True)
class Pull:
    source: str
    revision: str = ""
    dtype: str = "auto"
    name: str = ""
    base: str = ""
    node: str | None = None
    tensor_parallel: int = 1

    def checkpoint(self) -> CheckpointSpec:
        """Raises BadRequest for a source, dtype or number of ranks that is none."""
        wanted = {"source": self.source, "revision": self.revision, "dtype": self.dtype}
        try:
            return msgspec.convert({**wanted, "tensor_parallel": self.tensor_parallel}, CheckpointSpec)
        except msgspec.ValidationError as error:
            raise BadRequest(f"checkpoint.pull: {error}") from None


@dataclass(frozen=True, slots=True)
class OfInvocation:
    id: str


@dataclass(frozen=True, slots=True)
class MigrateInvocation:
    id: str
    node: str


@dataclass(frozen=True, slots=True)
class ListInvocations:
    app: str | None = None
    limit: int = 100


BODIES: dict[str, type] = {
    "bundle.has": OfBundle,
    "bundle.put": OfBundle,
    "app.deploy": Deploy,
    "app.list": Nothing,
    "app.get": OfApp,
    "app.delete": OfApp,
    "app.rollback": Rollback,
    "instance.list": MaybeApp,
    "instance.stop": StopInstance,
    "node.list": Nothing,
    "node.cordon": OfNode,
    "node.uncordon": OfNode,
    "node.drain": OfNode,
    "token.create": TokenCreate,
    "token.list": Nothing,
    "token.delete": OfToken,
    "join.create": JoinCreate,
    "join.list": Nothing,
    "join.revoke": OfKey,
    "status": Nothing,
    "describe.function": OfFunction,
    "describe.node": OfNode,
    "checkpoint.pull": Pull,
    "invocation.get": OfInvocation,
    "invocation.list": ListInvocations,
    "invocation.migrate": MigrateInvocation,
    "invocation.cancel": OfInvocation,
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One progress reply of a deploy or a pull."""

    stage: str
    done: int = 0
    total: int = 0
    text: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """A decoded request: `body` is of `BODIES[op]`, `buffers` what came out of band."""

    op: str
    body: Any
    buffers: tuple[bytes, ...] = field(default=())


def parse(op: str, body: bytes, buffers: tuple[bytes, ...] = ()) -> Call:
    """Raises BadRequest (BadSpec for `app.deploy`) with what is wrong and where."""
    kind = BODIES.get(op)
    if kind is None:
        raise BadRequest(f"unknown operation {op!r}", hint=f"Allowed: {', '.join(BODIES)}.", param="op")
    try:
        return Call(op, msgspec.msgpack.decode(body or b"\x80", type=kind), buffers)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        refusal = BadSpec if op == "app.deploy" else BadRequest
        raise refusal(f"{op}: {error}") from None
