"""The machine's state as people and gateways read it: the shapes that `rpc` promises. Pure, reads only."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import msgspec

from sllm_faas.controller.ledger import Ledger, resolve
from sllm_faas.controller.model import App, Instance, Move, MoveRecord, Node, StartRecord, TargetState, Version, key_of
from sllm_faas.controller.service_times import service_time
from sllm_faas.errors import ErrorInfo, NotFound
from sllm_faas.spec import FunctionSpec, Timeline

STATES = ("requested", "starting", "ready", "draining")

QUEUES = 100
"""Lines of targets that the platform's status has at most."""

Shape = dict[str, Any]


class Views:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.state = ledger.state

    # -- apps ------------------------------------------------------------------------------------------------

    def app(self, name: str) -> App:
        """Raises NotFound."""
        found = self.state.apps.get(name)
        if found is None:
            raise NotFound(f"app {name!r} does not exist", hint=_similar(name, self.state.apps), param="app")
        return found

    def app_line(self, app: App) -> Shape:
        version = app.versions.get(app.active)
        return {
            "name": app.name,
            "version": app.active or None,
            "created": version.created if version else None,
            "functions": [spec.name for spec in version.spec.functions] if version else [],
            "instances": sum(instance.target.app == app.name for instance in self.state.instances.values()),
            "deploying": app.pending or None,
        }

    def app_lines(self) -> list[Shape]:
        return [self.app_line(self.state.apps[name]) for name in sorted(self.state.apps)]

    def app_whole(self, name: str) -> Shape:
        app = self.app(name)
        version = app.versions.get(app.active)
        return {
            "app": app.name,
            "version": app.active or None,
            "weight": version.spec.weight if version else 1.0,
            "max_concurrency": version.spec.max_concurrency if version else 0,
            "functions": [self.function(version, spec.name) for spec in version.spec.functions] if version else [],
            "versions": [self.version(app, app.versions[number]) for number in sorted(app.versions, reverse=True)],
        }

    def version(self, app: App, version: Version) -> Shape:
        return {
            "version": version.number,
            "state": version.state,
            "active": version.number == app.active,
            "created": version.created,
            "error": error(version.error),
            "bundle": version.spec.bundle,
            "functions": [spec.name for spec in version.spec.functions],
        }

    def function(self, version: Version, name: str) -> Shape:
        spec = resolve(version, name)
        assert spec is not None
        targets = self._targets(version.app, name)
        serving = [record for record in targets if record.target.version == version.number]
        loads = [self.ledger.load(key_of(record.target)) for record in serving]
        instances = [i for record in serving for i in self.ledger.instances_of(key_of(record.target))]
        return {
            **_spec(spec, self.state.sizes),
            "app": version.app,
            "version": version.number,
            "instances": _count(instances),
            "waiting": sum(waiting for waiting, _ in loads),
            "running": sum(running for _, running in loads),
        }

    def describe_function(self, app_name: str, name: str, now: float) -> Shape:
        """Raises NotFound."""
        app = self.app(app_name)
        version = app.versions.get(app.active)
        if version is None or version.spec.function(name) is None:
            names = [spec.name for spec in version.spec.functions] if version else []
            raise NotFound(f"app {app_name!r} has no function {name!r}", hint=_similar(name, names), param="function")
        targets = [self.target(record, now) for record in self._targets(app_name, name)]
        took = service_time(self.state.book, f"{app_name}/{name}")
        return {
            **self.function(version, name),
            "desired": sum(target["desired"] for target in targets),
            "service_time": msgspec.structs.asdict(took) if took else None,
            "copies": self._copies(version, name, now),
            "targets": targets,
            "starts": [start(record, now) for record in self.state.history.get(f"{app_name}/{name}", [])],
            "moves": [made(record, now) for record in self.state.moved if record.function == f"{app_name}/{name}"],
            "moving": [
                self.move(move, now)
                for move in self.state.moves.values()
                if (i := self.state.instances[move.source]).target.app == app_name and i.target.function == name
            ],
        }

    def _copies(self, version: Version, name: str, now: float) -> list[Shape]:
        """Where its checkpoints are, and where they are being brought."""
        spec, lines = resolve(version, name), []
        for key, point in spec.checkpoints().items() if spec is not None else ():
            copy = self.state.copies.get(point.digest)
            lines.append(
                {
                    "checkpoint": key,
                    "digest": point.digest,
                    "nodes": sorted(self.ledger.where.holders(point.digest)),
                    "coming": copy.node or None if copy else None,
                    "tries": copy.tries if copy else 0,
                    "next": round(copy.due - now, 3) if copy and copy.state == "resting" and copy.due else None,
                    "error": copy.error.message if copy and copy.error else "",
                }
            )
        return lines

    def move(self, move: Move, now: float) -> Shape:
        """One that goes on."""
        to = self.state.instances.get(move.to or self.ledger.replacement(move.source))
        return {
            "source": move.source,
            "from": self.state.instances[move.source].node,
            "to": to.node if to else move.node or None,
            "instance": to.id if to else None,
            "state": move.state,
            "reason": move.why,
            "predicted": move.predicted,
            "age": round(now - move.asked, 3),
            "tries": move.tries,
            "next": round(move.due - now, 3) if move.due is not None else None,
            "invocations": list(move.invocations),
        }

    def _targets(self, app: str, function: str) -> list[TargetState]:
        found = [r for r in self.state.targets.values() if (r.target.app, r.target.function) == (app, function)]
        return sorted(found, key=lambda record: record.target)

    def target(self, record: TargetState, now: float) -> Shape:
        key = key_of(record.target)
        waiting, running = self.ledger.load(key)
        return {
            "target": str(record.target),
            "parameters": record.target.parameters,
            "version": record.target.version,
            "desired": record.desired,
            "waiting": waiting,
            "running": running,
            "tokens": self.ledger.tokens(key),
            "load": round(record.pressure.mean, 3),
            "panics_for": round(record.pressure.until - now, 3) if record.pressure.until > now else None,
            "failures": record.failures,
            "retry_in": round(record.retry_at - now, 3) if record.retry_at > now else None,
            "error": error(record.error),
            "placement": record.placement,
            "blocked": record.blocked,
            "instances": [self.instance(instance, now) for instance in self.ledger.instances_of(key)],
        }

    # -- instances and nodes ---------------------------------------------------------------------------------

    def instances(self, app: str | None, now: float) -> list[Shape]:
        found = sorted(self.state.instances.values(), key=lambda instance: instance.seq)
        return [self.instance(instance, now) for instance in found if app in (None, instance.target.app)]

    def instance(self, instance: Instance, now: float) -> Shape:
        target = instance.target
        return {
            "instance": instance.id,
            "app": target.app,
            "function": target.function,
            "version": target.version,
            "target": str(target),
            "parameters": target.parameters,
            "node": instance.node,
            "number": instance.number,
            "state": instance.state,
            "concurrency": instance.concurrency,
            "warmth": instance.warmth,
            "pid": instance.pid,
            "running": instance.running,
            "tokens": instance.tokens,
            "memory_mb": instance.memory_mb,
            "age": round(now - instance.asked, 3),
            "ready_for": round(now - instance.ready, 3) if instance.ready is not None else None,
            "predicted": instance.predicted,
            "margin": instance.margin,
            "actual": instance.actual,
            "why": instance.why,
            "timeline": timeline(instance.timeline),
        }

    def find_node(self, name: str) -> Node:
        """Raises NotFound."""
        node = self.state.nodes.get(name)
        if node is None:
            raise NotFound(f"node {name!r} does not exist", hint=_similar(name, self.state.nodes), param="node")
        return node

    def nodes(self) -> list[Shape]:
        return [self.node(self.state.nodes[name]) for name in sorted(self.state.nodes)]

    def node(self, node: Node) -> Shape:
        info, used = node.info, self.ledger.used_mb(node.name)
        return {
            "name": node.name,
            "state": node.state,
            "endpoint": info.endpoint,
            "cordoned": node.cordoned,
            "draining": node.draining,
            "memory_mb": info.memory_mb,
            "memory_used_mb": used,
            "memory_free_mb": max(0, info.memory_mb - used) if info.memory_mb else None,
            "disk_free_mb": node.stats.disk_free_mb if node.stats else None,
            "cores": info.cores,
            "gpus": info.gpus,
            "labels": dict(info.labels),
            "bandwidth": dict(info.bandwidth),
            "checkpoints": list(node.checkpoints),
            "resident": list(node.stats.resident) if node.stats else [],
            "running": sum(instance.running for instance in self.ledger.on_node(node.name)),
            "instances": len(self.ledger.on_node(node.name)),
            "life": node.life,
        }

    def describe_node(self, name: str, now: float) -> Shape:
        node = self.find_node(name)
        starts = [record for records in self.state.history.values() for record in records if record.node == name]
        return {
            **self.node(node),
            "instances_list": [self.instance(instance, now) for instance in self.ledger.on_node(name)],
            "estimates": {key: value for key, value in self.state.book.items() if key.split("|")[1:2] == [name]},
            "starts": [start(record, now) for record in sorted(starts, key=lambda record: -record.at)[:50]],
            "moves": [made(one, now) for one in self.state.moved if name in (one.source_node, one.to_node)],
            "moving": [
                shown
                for move in self.state.moves.values()
                if name in ((shown := self.move(move, now))["from"], shown["to"])
            ],
        }

    # -- the whole -------------------------------------------------------------------------------------------

    def status(self) -> Shape:
        loads = [self.ledger.load(key) for key in self.state.targets]
        active = [version for app in self.state.apps.values() if (version := app.versions.get(app.active))]
        return {
            "counts": {
                "apps": len(self.state.apps),
                "functions": sum(len(version.spec.functions) for version in active),
                "nodes": sum(node.state == "up" for node in self.state.nodes.values()),
                "nodes_lost": sum(node.state == "lost" for node in self.state.nodes.values()),
                "gateways": len(self.state.gateways),
                "instances": _count(self.state.instances.values()),
                "waiting": sum(waiting for waiting, _ in loads),
                "running": sum(running for _, running in loads),
            },
            "nodes": self.nodes(),
            "gateways": [
                {
                    "name": gateway.name,
                    "life": gateway.life,
                    "waiting": sum(item.waiting for item in gateway.demand.values()),
                    "running": sum(item.running for item in gateway.demand.values()),
                }
                for gateway in sorted(self.state.gateways.values(), key=lambda gateway: gateway.name)
            ],
            "apps": self.app_lines(),
            "queues": self._queues(),
            "moving": len(self.state.moves),
            "estimates": {
                "starts": int(self.state.book.get("starts", 0)),
                "mean_error": self.state.book.get("error"),
            },
        }

    def _queues(self) -> list[Shape]:
        """Targets that are asked for or have instances, those where most wait first."""
        lines: list[Shape] = []
        for key, record in self.state.targets.items():
            waiting, running = self.ledger.load(key)
            instances = self.ledger.instances_of(key)
            if waiting or running or instances:
                lines.append(
                    {
                        "target": str(record.target),
                        "waiting": waiting,
                        "running": running,
                        "desired": record.desired,
                        "instances": _count(instances),
                        "blocked": record.blocked or (record.error.message if record.error else ""),
                    }
                )
        return sorted(lines, key=lambda line: (-line["waiting"], -line["running"], line["target"]))[:QUEUES]


def error(info: ErrorInfo | None) -> Shape | None:
    """Without `args`: those are bytes for the SDK, not for people."""
    if info is None:
        return None
    return {f.name: getattr(info, f.name) for f in dataclasses.fields(info) if f.name != "args"}


def timeline(value: Timeline) -> Shape:
    spans = [{"name": s.name, "start": s.start, "seconds": s.seconds, "detail": s.detail} for s in value.spans]
    return {"began": value.began, "spans": spans}


def start(record: StartRecord, now: float) -> Shape:
    return {
        "instance": record.instance,
        "node": record.node,
        "version": record.version,
        "state": record.outcome,
        "warmth": record.warmth,
        "tier": record.tier,
        "predicted": record.predicted,
        "margin": record.margin,
        "actual": record.actual,
        "why": record.why,
        "timeline": timeline(record.timeline),
        "error": error(record.error),
        "ended": round(now - record.at, 3),
    }


def made(record: MoveRecord, now: float) -> Shape:
    """A move that has ended."""
    result = record.result
    return {
        "invocation": f"inv-{result.invocation}",
        "function": record.function,
        "from": record.source_node,
        "source": record.source,
        "to": record.to_node,
        "instance": record.to,
        "outcome": result.outcome,
        "why": result.why,
        "reason": record.why,
        "predicted": record.predicted,
        "seconds": result.total,
        "paused": result.paused,
        "rounds": result.rounds,
        "tokens": result.tokens,
        "sent": result.sent,
        "ended": round(now - record.at, 3),
    }


def _spec(spec: FunctionSpec, sizes: dict[str, int]) -> Shape:
    point = spec.checkpoint
    return {
        "name": spec.name,
        "kind": spec.kind,
        "methods": [
            {"name": m.name, "stream": m.stream, "is_async": m.is_async, "batched": m.batching is not None}
            for m in spec.methods
        ],
        "parameters": [
            {"name": p.name, "type": p.type, "required": p.required, "default": p.default} for p in spec.parameters
        ],
        "concurrency": spec.concurrency,
        "max_queue": spec.max_queue,
        "timeouts": dataclasses.asdict(spec.timeouts),
        "scaling": dataclasses.asdict(spec.scaling),
        "memory_mb": spec.memory_mb,
        "secrets": list(spec.secrets),
        "checkpoint": {**dataclasses.asdict(point), "bytes": sizes.get(point.digest, 0)} if point else None,
    }


def _count(instances: Any) -> dict[str, int]:
    counts = dict.fromkeys(STATES, 0)
    for instance in instances:
        counts[instance.state] += 1
    return counts


def _similar(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else ""
