"""`sllm describe`: one thing in full, with the timed phases of what happened to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from sllm_faas.cli import output
from sllm_faas.cli.api import Api, path
from sllm_faas.cli.apps import get_app
from sllm_faas.cli.common import Session, client_command, suggest
from sllm_faas.errors import NotFound, SllmError

KINDS = ("app", "function", "invocation", "node")
_BAR = 32
_REASONS = 3


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="[KIND] NAME")
@client_command(reads=True)
def describe(session: Session, what: tuple[str, ...]) -> None:
    """Show NAME in full: inv-… is an invocation, app/function a function, else an app or a node.

    KIND (app, function, invocation, node) settles it.
    """
    if len(what) > 2 or (len(what) == 2 and what[0] not in KINDS):
        raise click.UsageError(f"{' '.join(what)!r} is not [KIND] NAME; kinds: {', '.join(KINDS)}")
    name = what[-1]
    with session.api() as api:
        kind = what[0] if len(what) == 2 else _kind(api, name)
        found = _GET[kind](api, name)
    if session.json:
        output.emit_json(found)
    else:
        _SHOW[kind](found)


def _kind(api: Api, name: str) -> str:
    if name.startswith("inv-"):
        return "invocation"
    if "/" in name:
        return "function"
    nodes = {item["name"] for item in api.get(path("nodes"))["nodes"]}
    return "node" if name in nodes else "app"


# -- getting -------------------------------------------------------------------------------------------------


def _function(api: Api, name: str) -> Any:
    app, slash, function = name.partition("/")
    function = function if slash else app
    try:
        return api.get(path("functions", app, function))
    except NotFound as error:
        known = [item["name"] for item in get_app(api, app)["functions"]]
        raise suggest(error, function, lambda: known) from None


def _node(api: Api, name: str) -> Any:
    try:
        return api.get(path("nodes", name))
    except NotFound as error:
        raise suggest(error, name, lambda: [item["name"] for item in api.get(path("nodes"))["nodes"]]) from None


def _invocation(api: Api, name: str) -> Any:
    """The gateway's record, and what the controller knows of its moves and of the choice of its node."""
    record = api.get(path("invocations", name))
    try:
        function = api.get(path("functions", record["app"], record["function"]))
    except SllmError:
        function = {"moves": [], "starts": []}  # deleted since, or another app's
    moves = [item for item in function["moves"] if item["invocation"] == record["invocation"]]
    starts = [item for item in function["starts"] if item["instance"] == record["instance"]]
    return {**record, "moves": moves, "starts": starts}


_GET: dict[str, Callable[[Api, str], Any]] = {
    "app": get_app,
    "function": _function,
    "invocation": _invocation,
    "node": _node,
}


# -- showing -------------------------------------------------------------------------------------------------


def _show_app(app: dict[str, Any]) -> None:
    output.pairs(
        [
            ("app", app["app"]),
            ("version", app["version"]),
            ("weight", app["weight"]),
            ("at once", app["max_concurrency"] or "no cap"),
        ]
    )
    click.echo()
    output.table(
        ["function", "kind", "methods", "slots", "instances", "waiting", "running", "checkpoint"],
        [
            (
                item["name"],
                item["kind"],
                [method["name"] for method in item["methods"]],
                item["concurrency"],
                sum(item["instances"].values()),
                item["waiting"],
                item["running"],
                (item["checkpoint"] or {}).get("source"),
            )
            for item in app["functions"]
        ],
        "No version serves.",
    )


def _show_function(function: dict[str, Any]) -> None:
    scaling, timeouts = function["scaling"], function["timeouts"]
    checkpoint = function["checkpoint"] or {}
    output.pairs(
        [
            ("function", f"{function['app']}/{function['name']}"),
            ("kind", function["kind"]),
            ("version", function["version"]),
            ("methods", [f"{item['name']}{' (stream)' if item['stream'] else ''}" for item in function["methods"]]),
            ("parameters", [f"{item['name']}: {item['type']}" for item in function["parameters"]]),
            ("slots", f"{function['concurrency']} per instance, queue of {function['max_queue']}"),
            (
                "instances",
                f"{scaling['min_containers']} to {scaling['max_containers']}, {scaling['buffer_containers']} spare, "
                f"idle for {scaling['scaledown_window']:g} s; wanted now: {function['desired']}",
            ),
            ("tokens", _tokens(scaling["target_tokens"], function["targets"])),
            ("timeouts", {name: "none" if limit is None else f"{limit:g} s" for name, limit in timeouts.items()}),
            ("memory", output.size(function["memory_mb"] << 20)),
            ("secrets", function["secrets"]),
            ("checkpoint", f"{checkpoint['source']} ({checkpoint['digest'][:12]})" if checkpoint else None),
            ("copies", _copies(function["copies"])),
            ("service time", _service_time(function["service_time"])),
            ("now", f"{function['running']} running, {function['waiting']} waiting"),
        ]
    )
    for target in function["targets"]:
        if target["error"]:
            retry = f", tried again in {output.duration(target['retry_in'])}" if target["retry_in"] else ""
            click.echo(output.style(f"\nCannot start ({target['failures']} times{retry}): ", fg="red"), nl=False)
            click.echo(target["error"]["message"])
        if target["panics_for"]:
            more = output.duration(target["panics_for"])
            click.echo(f"\nPanics: twice what is ready was asked for; nothing is scaled down for {more}.")
        if target["blocked"]:
            click.echo(f"\nWaits: {target['blocked']}")
        for item in target["instances"]:
            click.echo(f"\n{item['instance']} on {item['node']}: {item['state']} — {item['why']}")
            _timeline(item["timeline"]["spans"])
        if target["placement"]:
            click.echo(f"\nLast choice of a node: {target['placement']}")
    _moves(function)
    _starts(function["starts"])


def _tokens(limit: int, targets: list[dict[str, Any]]) -> str | None:
    """Only where they are counted."""
    now = sum(target["tokens"] for target in targets)
    return f"{limit} to an instance; running and waiting now: about {now}" if limit else None


def _copies(copies: list[dict[str, Any]]) -> list[str]:
    """Where its checkpoints are on disk, where one is being brought, or why not."""
    lines = []
    for copy in copies:
        text = f"{copy['digest'][:12]} on {' and '.join(copy['nodes']) or 'no node'}"
        if copy["coming"]:
            text += f", coming to {copy['coming']}"
        elif copy["error"]:
            again, until = copy["next"], "left alone until a deployment or another node"
            later = f"tried again in {output.duration(again)}" if again else until
            text += f", {later}: {copy['error']}"
        lines.append(text)
    return lines


def _service_time(took: dict[str, Any] | None) -> str | None:
    """What an invocation keeps its slot for."""
    if took is None:
        return None
    sure = f" ± {output.duration(took['deviation'])}" if took["deviation"] is not None else ""
    return f"{output.duration(took['seconds'])}{sure} in a slot (mean of {took['seen']})"


def _show_node(node: dict[str, Any]) -> None:
    output.pairs(
        [
            ("node", node["name"]),
            ("state", node["state"]),
            ("cordoned", node["cordoned"]),
            (
                "memory",
                f"{output.size(node['memory_used_mb'] << 20)} of {output.size(node['memory_mb'] << 20)} promised",
            ),
            ("disk free", output.size(node["disk_free_mb"] << 20)),
            ("cores, gpus", f"{node['cores']:g}, {node['gpus']}"),
            ("labels", node["labels"]),
            ("bandwidth", {tier: f"{output.size(value)}/s" for tier, value in node["bandwidth"].items()}),
            ("checkpoints", [digest[:12] for digest in node["checkpoints"]]),
            ("estimates", node["estimates"]),
        ]
    )
    click.echo()
    output.table(
        ["instance", "function", "state", "running", "age"],
        [
            (item["instance"], item["target"], item["state"], item["running"], output.duration(item["age"]))
            for item in node["instances_list"]
        ],
        "No instance runs there.",
    )
    _moves(node)
    _starts(node["starts"])


def _show_invocation(record: dict[str, Any]) -> None:
    error = record["error"]
    output.pairs(
        [
            ("invocation", record["invocation"]),
            ("target", record["target"] + (f" {record['method']}" if record["method"] else "")),
            ("state", record["state"]),
            ("began", output.when(record["began"])),
            ("took", None if record["seconds"] is None else output.duration(record["seconds"])),
            ("instance", f"{record['instance']} on {record['node']}" if record["instance"] else None),
            ("placed", record["why"]),
            ("start", "cold" if record["cold"] else "warm"),
            ("attempts", record["attempts"]),
            ("outputs", record["outputs"]),
            ("usage", record["usage"]),
            ("gateway", record["gateway"]),
        ]
    )
    if error:
        click.echo(f"\n{output.style('Failed:', fg='red')} {error['message']} {error['hint']}".rstrip())
    click.echo()
    _timeline(record["timeline"])
    _moves({"moving": [], **record})
    _starts(record["starts"])


def _moves(found: dict[str, Any]) -> None:
    """Those that go on, then those that were made."""
    for item in found["moving"]:
        to = f"{item['instance']} on {item['to']}" if item["instance"] else item["to"] or "nowhere yet"
        click.echo(
            f"\nMoving {item['source']} on {item['from']} to {to}: {item['state']} for {output.duration(item['age'])}, "
            f"estimated at {output.duration(item['predicted'])} — {item['reason']}"
        )
    if not found["moves"]:
        return
    click.echo()
    output.table(
        ["move of", "from", "to", "outcome", "predicted", "took", "paused", "rounds", "tokens", "ended", "why"],
        [
            (
                item["invocation"],
                item["from"],
                item["to"],
                item["outcome"],
                output.duration(item["predicted"]),
                output.duration(item["seconds"]),
                output.duration(item["paused"]),
                item["rounds"],
                item["tokens"],
                f"{output.duration(item['ended'])} ago",
                item["why"] or item["reason"],
            )
            for item in found["moves"]
        ],
        "",
    )


def _starts(starts: list[dict[str, Any]]) -> None:
    if not starts:
        return
    click.echo()
    output.table(
        ["start of", "node", "from", "tier", "predicted", "actual", "ended", "error"],
        [
            (
                item["instance"],
                item["node"],
                item["warmth"],
                item["tier"],
                output.duration(item["predicted"]) if item["predicted"] else None,
                output.duration(item["actual"]) if item["actual"] is not None else None,
                f"{output.duration(item['ended'])} ago",
                (item["error"] or {}).get("message"),
            )
            for item in starts
        ],
        "",
    )
    _reasons(starts)


def _reasons(starts: list[dict[str, Any]]) -> None:
    """Why the newest of them were where they were."""
    for item in starts[:_REASONS]:
        if item["why"]:
            click.echo(f"\n{item['instance']} — {item['why']}")


def _timeline(spans: list[dict[str, Any]]) -> None:
    """Phases as bars over the whole, one per line."""
    whole = max((span["start"] + span["seconds"] for span in spans), default=0.0)
    if whole <= 0:
        return
    width = max(len(span["name"]) for span in spans)
    for span in spans:
        before = min(_BAR - 1, int(_BAR * max(0.0, span["start"]) / whole))
        filled = max(1, min(_BAR - before, round(_BAR * span["seconds"] / whole)))
        bar = ("·" * before + "█" * filled).ljust(_BAR, "·")
        click.echo(f"  {span['name'].ljust(width)} {bar} {output.duration(span['seconds']):>8}  {span['detail']}")


_SHOW: dict[str, Callable[[Any], None]] = {
    "app": _show_app,
    "function": _show_function,
    "invocation": _show_invocation,
    "node": _show_node,
}
