"""`sllm ps`, `history`, `rollback`, `delete`: what is deployed and what runs of it."""

from __future__ import annotations

from typing import Any

import click

from sllm_faas.cli import output
from sllm_faas.cli.api import Api, path
from sllm_faas.cli.common import Session, client_command, suggest
from sllm_faas.errors import NotFound


def app_names(api: Api) -> list[str]:
    return [app["name"] for app in api.get(path("apps"))["apps"]]


def get_app(api: Api, name: str) -> dict[str, Any]:
    """Raises NotFound with the nearest name there is."""
    try:
        found: dict[str, Any] = api.get(path("apps", name))
    except NotFound as error:
        raise suggest(error, name, lambda: app_names(api)) from None
    return found


@click.command()
@click.argument("app", required=False, default="")
@client_command(reads=True)
def ps(session: Session, app: str) -> None:
    """List running instances, of APP or of all."""
    with session.api() as api:
        if app:
            get_app(api, app)
        instances = api.get(path("instances"), app=app)["instances"]
    if session.json:
        output.emit_json(instances)
        return
    output.table(
        ["instance", "function", "version", "state", "running", "node", "started from", "age", "pid", "memory"],
        [
            (
                item["instance"],
                f"{item['app']}/{item['function']}",
                item["version"],
                item["state"],
                f"{item['running']}/{item['concurrency']}",
                item["node"],
                item["warmth"],
                output.duration(item["age"]),
                item["pid"] or None,
                output.size(item["memory_mb"] << 20),
            )
            for item in instances
        ],
        "No instance runs; the next call starts one.",
    )


@click.command()
@click.argument("app")
@client_command(reads=True)
def history(session: Session, app: str) -> None:
    """List the versions of APP, newest first."""
    with session.api() as api:
        versions = get_app(api, app)["versions"]
    if session.json:
        output.emit_json(versions)
        return
    output.table(
        ["version", "state", "serves", "created", "functions", "error"],
        [
            (
                item["version"],
                item["state"],
                "yes" if item["active"] else "",
                f"{output.ago(item['created'])} ago",
                item["functions"],
                (item["error"] or {}).get("message", ""),
            )
            for item in versions
        ],
        f"{app} has no versions.",
    )


@click.command()
@click.argument("app")
@click.option("--version", type=click.IntRange(min=1), help="Version to serve. Default: the one before.")
@client_command()
def rollback(session: Session, app: str, version: int | None) -> None:
    """Serve an earlier version of APP."""
    with session.api() as api:
        get_app(api, app)
        done = api.post(path("apps", app, "rollback"), {"version": version})
    before = f" (was {done['from']})" if done["from"] is not None else ""
    click.echo(f"{app} serves version {done['version']}{before}.")


@click.command()
@click.argument("app")
@click.option("--yes", is_flag=True, help="Do not ask.")
@client_command()
def delete(session: Session, app: str, yes: bool) -> None:
    """Delete APP: its functions are gone at once, what runs is stopped."""
    with session.api() as api:
        found = get_app(api, app)
        if not yes:
            functions = ", ".join(function["name"] for function in found["functions"])
            click.confirm(f"Delete {app} with its functions ({functions})?", abort=True)
        done = api.delete(path("apps", app))
    click.echo(f"Deleted {app}; {done['instances']} instances stop.")
